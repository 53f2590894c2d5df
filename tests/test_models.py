"""The networks: what the paper describes, the control's identity, and what depth's networks share."""
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from wib_nbdev.activations import ACTIVATIONS, EQ7_SHIFT
from wib_nbdev.initializers import SCHEMES
from wib_nbdev.models import LAYERS, compensate_next_bias, deep_cnn, mlp, plain_cnn, rnn, summary

IMAGE = (1, 28, 28)
DEEP = [mlp, deep_cnn, rnn]


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_it_is_the_network_that_the_paper_describes():
    convolutions = [layer.conv for layer in plain_cnn(3)[:4]]
    assert [conv.out_channels for conv in convolutions] == [8, 16, 32, 64]
    assert [conv.kernel_size for conv in convolutions] == [(5, 5)] + 3 * [(3, 3)]
    assert [conv.padding for conv in convolutions] == [(2, 2)] + 3 * [(1, 1)]
    assert {conv.stride for conv in convolutions} == {(2, 2)}
    table = summary(plain_cnn(1), IMAGE).set_index('layer')
    assert list(table.index) == ['input', *LAYERS] and table.loc['dense', 'parameters'] == 64 * 10 + 10
    assert table.loc['conv1', 'multiply_adds'] == 14 * 14 * 8 * 25


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_each_layer_has_an_activation_of_its_own_and_survives_copying(name):
    model, x = plain_cnn(1, activation=name, generator=seeded()), torch.randn(4, *IMAGE, generator=seeded())
    units = [layer.act for layer in model[:4]]
    assert len({id(unit) for unit in units}) == 4
    copy = deepcopy(model)
    fresh = plain_cnn(1, activation=name, generator=seeded(1))
    fresh.load_state_dict(model.state_dict())
    for other in (copy, fresh): torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize('scheme', SCHEMES)
def test_a_seed_fixes_every_weight_whatever_the_activation_and_the_global_generator(scheme):
    before = torch.get_rng_state()
    first, again = (weights(plain_cnn(1, init=scheme, activation=name, generator=seeded(3)))
                    for name in ('relu', 'wib_relu'))
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, weights(plain_cnn(1, init=scheme, generator=seeded(4))))


@pytest.mark.parametrize(('arguments', 'error', 'message'), [
    (dict(activation='rely'), ValueError, "did you mean 'relu'"),
    (dict(activation=nn.ReLU()), TypeError, 'such as nn.ReLU'),
    (dict(init='kaiming'), ValueError, 'did you mean'),
    (dict(activation='elu', shift=0.4), ValueError, 'must come with wib_relu'),
    (dict(activation='elu', compensate_bias=True), ValueError, "must come with 'relu'"),
])
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message): plain_cnn(1, **arguments)


@settings(max_examples=20)
@given(shift=st.floats(-1, 1), seed=st.integers(0, 100), side=st.integers(16, 32))
def test_the_control_is_wib_relu_where_no_padding_reaches(shift, seed, side):
    wib = plain_cnn(1, activation='wib_relu', shift=shift, generator=seeded(seed))
    control = plain_cnn(1, compensate_bias=True, shift=shift, generator=seeded(seed))
    x = torch.randn(2, 1, side, side, generator=seeded(seed))
    with torch.no_grad(): z_wib, z_control = (model.conv2.conv(model.conv1(x)) for model in (wib, control))
    torch.testing.assert_close(z_wib[..., 1:-1, 1:-1], z_control[..., 1:-1, 1:-1], atol=1e-4, rtol=1e-4)
    if abs(shift) > 0.1: assert not torch.allclose(z_wib[..., 0, :], z_control[..., 0, :], atol=1e-4)


def test_the_control_differs_in_its_later_biases_only():
    plain, control = (plain_cnn(1, compensate_bias=c, generator=seeded()) for c in (False, True))
    both = zip(plain.named_parameters(), control.parameters(), strict=True)
    changed = [name for (name, a), b in both if not torch.equal(a, b)]
    assert changed == ['conv2.conv.bias', 'conv3.conv.bias', 'conv4.conv.bias', 'dense.bias']
    torch.testing.assert_close(weights(compensate_next_bias(plain, EQ7_SHIFT)), weights(control))


@pytest.mark.parametrize('network', DEEP)
@pytest.mark.parametrize('arm', [
    dict(activation='wib_relu'), dict(activation='elu', gain=1.2), dict(init='lecun_normal'),
])
def test_deep_networks_score_every_image_size_and_depth(network, arm):
    for shape, depth in ((IMAGE, 7), ((3, 32, 32), 4)):
        model = network(shape, depth=depth, width=8, generator=seeded(), **arm)
        scores = model(torch.randn(5, *shape, generator=seeded()))
        assert scores.shape == (5, 10) and scores.isfinite().all()
        scores.sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_the_control_of_a_deep_network_without_padding_is_exact():
    x = torch.randn(6, *IMAGE, generator=seeded())
    wib, control = (mlp(IMAGE, depth=5, generator=seeded(), **arm)
                    for arm in (dict(activation='wib_relu'), dict(compensate_bias=True)))
    torch.testing.assert_close(wib(x), control(x), atol=1e-4, rtol=1e-4)


def test_the_control_of_a_recurrent_network_is_exact_once_there_is_a_hidden_state():
    x, hidden = torch.randn(6, 28, generator=seeded()), torch.randn(6, 128, generator=seeded(1))
    wib, control = (rnn(IMAGE, generator=seeded(), **arm)
                    for arm in (dict(activation='wib_relu'), dict(compensate_bias=True)))
    step = lambda model, hidden: model.cell(torch.cat([x, hidden], 1))
    torch.testing.assert_close(step(wib, hidden.relu() - EQ7_SHIFT), step(control, hidden.relu()),
                               atol=1e-5, rtol=1e-5)


def test_a_recurrent_network_reads_row_by_row_and_refuses_what_does_not_divide():
    model, x = rnn(IMAGE, generator=seeded()), torch.randn(2, *IMAGE, generator=seeded())
    hidden = torch.zeros(2, 128)
    for row in range(28): hidden = model.cell(torch.cat([x[:, 0, row], hidden], 1)).relu()
    torch.testing.assert_close(model.dense(hidden), model(x))
    with pytest.raises(ValueError, match='depth=5: must divide the 784'): rnn(IMAGE, depth=5)
    with pytest.raises(ValueError, match='batch_norm=True'): rnn(IMAGE, batch_norm=True)


@pytest.mark.parametrize('network', [mlp, deep_cnn])
def test_batch_norm_stands_before_each_activation(network):
    model = network(IMAGE, depth=3, batch_norm=True)
    blocks = [block for name, block in model.named_children() if name[-1].isdigit()]
    assert len(blocks) == 3
    for block in blocks: assert [name for name, _ in block.named_children()] == ['layer', 'norm', 'act']
