"""The plain CNN against a network written out by hand, its control against WIB-ReLU, and what must not be shared or left behind."""
import copy
import io
import pickle
from math import pi, sqrt

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from wib_nbdev import models
from wib_nbdev.activations import ACTIVATIONS
from wib_nbdev.initializers import SCHEMES
from wib_nbdev.models import plain_cnn

CONVS = ('conv1', 'conv2', 'conv3', 'conv4')


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def weighted(model):
    return [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


# The network

def test_it_is_the_network_that_the_paper_describes():
    ours = plain_cnn(3, generator=seeded())
    by_hand = nn.Sequential(
        nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    by_hand.load_state_dict(dict(zip(by_hand.state_dict(), ours.state_dict().values(), strict=True)))
    x = images(5, 3, 32, 32)
    torch.testing.assert_close(ours(x), by_hand(x), rtol=0, atol=0)
    assert [name for name, _ in ours.named_children()] == [*CONVS, 'pool', 'flatten', 'dense']
    assert all([name for name, _ in ours.get_submodule(conv).named_children()] == ['conv', 'act'] for conv in CONVS)


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(1, 20), st.integers(1, 70), st.integers(1, 70))
def test_any_image_size_gives_scores_and_the_summary_agrees(channels, n_classes, height, width):
    model = plain_cnn(channels, n_classes, generator=seeded())
    assert model(images(2, channels, height, width)).shape == (2, n_classes)
    frame = models.summary(model, (channels, height, width))
    for row in range(1, 5):
        kernel = 5 if row == 1 else 3
        height, width = ((side + 2 * (kernel // 2) - kernel) // 2 + 1 for side in (height, width))
        assert frame.output_shape[row] == (2 ** (row + 2), height, width)


def test_summary_counts_what_pytorch_counts():
    model = plain_cnn(3)
    frame = models.summary(model, (3, 32, 32))
    with torch.no_grad(), FlopCounterMode(display=False) as counter: model(torch.zeros(1, 3, 32, 32))
    assert 2 * frame.multiply_adds.sum() == counter.get_total_flops() == 2 * 375_424
    assert frame.parameters.sum() == sum(p.numel() for p in model.parameters()) == 25_562
    assert frame.parameters[1:].tolist() == [608, 1168, 4640, 18496, 0, 0, 650]
    assert frame.multiply_adds[1:].tolist() == [153600, 73728, 73728, 73728, 0, 0, 640]


@pytest.mark.parametrize('count', [lambda model: models.summary(model, (1, 28, 28)),
                                   lambda model: models.layer_statistics(model, images(4, 1, 28, 28))])
@pytest.mark.parametrize('training', [True, False])
def test_looking_at_a_network_leaves_it_as_it_was(count, training):
    model = plain_cnn(1, activation='wib_relu_batch', generator=seeded()).train(training)
    before = snapshot(model)
    count(model)
    assert_unchanged(model, before)
    assert all(module.training == training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_layer_statistics_are_those_of_the_outputs():
    model, x = plain_cnn(1, generator=seeded()), images(6, 1, 28, 28)
    frame = models.layer_statistics(model, x)
    out = model.conv2(model.conv1(x))
    assert frame.layer.tolist() == [*CONVS, 'pool', 'flatten', 'dense']
    assert frame['mean'][1] == pytest.approx(out.mean().item()) and frame['std'][1] == pytest.approx(out.std(correction=0).item())


# Activations

@pytest.mark.parametrize('name', [*ACTIVATIONS, nn.PReLU, nn.Softplus])
def test_each_layer_has_an_activation_of_its_own(name):
    model = plain_cnn(1, activation=name, generator=seeded())
    acts = [model.get_submodule(conv).act for conv in CONVS]
    assert len({id(act) for act in acts}) == 4
    own = [p for act in acts for p in act.parameters()]
    assert len({p.data_ptr() for p in own}) == len(own)
    loss = F.cross_entropy(model(images(8, 1, 28, 28)), torch.arange(8))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_four_prelus_learn_four_slopes():
    model = plain_cnn(1, activation='prelu', generator=seeded())
    with torch.no_grad(): model.conv2.act.weight.fill_(0.9)
    assert [model.get_submodule(conv).act.weight.item() for conv in CONVS] == [0.25, pytest.approx(0.9), 0.25, 0.25]


def test_a_shared_module_is_refused_wherever_it_comes_back():
    shared, returned = nn.PReLU(), []
    def factory():
        returned.append(nn.ReLU() if len(returned) % 2 else shared)
        return returned[-1]
    with pytest.raises(ValueError, match='activation returned the same PReLU twice'): plain_cnn(1, activation=factory)
    assert len(returned) == 3


def test_a_shared_module_is_refused_inside_a_new_one():
    shared = nn.PReLU()
    with pytest.raises(ValueError, match='activation returned the same PReLU twice'):
        plain_cnn(1, activation=lambda: nn.Sequential(nn.Identity(), shared))


@pytest.mark.parametrize('activation', [nn.ReLU(), 3, None])
def test_what_is_no_factory_is_refused(activation):
    with pytest.raises(TypeError, match='must be a name or a callable that returns a new module'): plain_cnn(1, activation=activation)


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(activation='relu6'), 'activation'), (dict(init='kaiming'), "init='kaiming'"), (dict(n_classes=0), 'n_classes=0'),
    (dict(shift=float('nan'), activation='wib_relu'), 'shift=nan'), (dict(shift=0.4), "activation='relu'"),
    (dict(shift=0.4, activation='wib_relu_batch'), "activation='wib_relu_batch'"),
    (dict(compensate_bias=True, activation='wib_relu'), 'compensate_bias=True'),
    (dict(compensate_bias=True, activation=nn.ReLU), 'compensate_bias=True'),
    (dict(compensate_bias=True, shift=float('inf')), 'shift=inf'),
])
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message): plain_cnn(1, **arguments)


# Random numbers

@pytest.mark.parametrize('scheme', SCHEMES)
def test_a_seed_fixes_every_weight_under_every_scheme(scheme):
    first = plain_cnn(1, init=scheme, generator=seeded(4))
    litter = [torch.full((2_000,), float('nan')) for _ in range(50)] # memory that layers made next may get
    del litter
    second = plain_cnn(1, init=scheme, generator=seeded(4))
    assert_unchanged(second, snapshot(first))
    assert all(p.isfinite().all() for p in first.parameters())
    assert not torch.equal(first.conv1.conv.weight, plain_cnn(1, init=scheme, generator=seeded(5)).conv1.conv.weight)


def test_the_weights_do_not_depend_on_the_activation():
    reference = [p for layer in weighted(plain_cnn(1, generator=seeded(2))) for p in layer.parameters()]
    for name in ACTIVATIONS:
        ours = [p for layer in weighted(plain_cnn(1, activation=name, generator=seeded(2))) for p in layer.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(reference, ours, strict=True))


def test_the_global_generator_is_left_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for name in ('relu', 'prelu', 'wib_relu_batch'): plain_cnn(3, activation=name, generator=seeded())
    plain_cnn(3, compensate_bias=True, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_gain_scales_the_weights():
    one, three = (plain_cnn(1, gain=gain, generator=seeded()) for gain in (1., 3.))
    torch.testing.assert_close(3 * one.conv3.conv.weight, three.conv3.conv.weight)


# The control

def pair(shift, seed, scheme='kaiming_normal', channels=1):
    "In double precision, the compensation included, so that rounding cannot pass for a difference or hide one."
    wib = plain_cnn(channels, activation='wib_relu', init=scheme, shift=shift, generator=seeded(seed)).double()
    control = plain_cnn(channels, init=scheme, generator=seeded(seed)).double()
    return wib, models.compensate_next_bias(control, shift)


@pytest.mark.parametrize('scheme', ['kaiming_normal', 'pytorch_default'])
def test_the_control_differs_in_its_later_biases_only(scheme):
    control = plain_cnn(1, init=scheme, compensate_bias=True, shift=0.3, generator=seeded(1))
    plain = plain_cnn(1, init=scheme, generator=seeded(1))
    assert torch.equal(control.conv1.conv.bias, plain.conv1.conv.bias)
    for ours, theirs in zip(weighted(control), weighted(plain), strict=True): assert torch.equal(ours.weight, theirs.weight)
    for conv in CONVS[1:]:
        ours, theirs = control.get_submodule(conv).conv, plain.get_submodule(conv).conv
        torch.testing.assert_close(ours.bias, theirs.bias - 0.3 * theirs.weight.sum((1, 2, 3)))
    torch.testing.assert_close(control.dense.bias, plain.dense.bias - 0.3 * plain.dense.weight.sum(1))
    assert all(isinstance(control.get_submodule(conv).act, nn.ReLU) for conv in CONVS)


def test_the_default_shift_is_eq_7s():
    by_default, by_name = (plain_cnn(1, compensate_bias=True, shift=shift, generator=seeded()) for shift in (None, 1 / sqrt(pi)))
    assert_unchanged(by_default, snapshot(by_name))
    assert plain_cnn(1, activation='wib_relu').conv1.act.shift == pytest.approx(models.EQ7_SHIFT)


def reached(mask):
    return F.max_pool2d(F.pad(mask, (1, 1, 1, 1), value=1.), 3, stride=2)


@settings(max_examples=25)
@given(st.floats(-1, 1).filter(lambda shift: abs(shift) > 0.05), st.integers(0, 10**6), st.integers(12, 90), st.integers(12, 90),
       st.sampled_from(['kaiming_normal', 'pytorch_default']))
def test_the_control_is_wib_relu_inside_the_image_and_differs_where_padding_reaches(shift, seed, height, width, scheme):
    wib, control = pair(shift, seed, scheme)
    x = images(3, 1, height, width, seed=seed).double()
    mask = torch.zeros(1, 1, (height + 1) // 2, (width + 1) // 2)
    for name, difference in models.control_differences(wib, control, x).items():
        mask = reached(mask)
        assert difference.shape == mask.shape[2:]
        assert (difference[mask[0, 0] == 0] < 1e-12).all() and (difference[mask[0, 0] == 1] > 1e-9).all(), name


@settings(max_examples=25)
@given(st.floats(-1, 1), st.integers(0, 10**6), st.integers(9, 64))
def test_the_control_is_exact_where_padding_carries_the_shift(shift, seed, side):
    wib, control = pair(shift, seed, channels=3)
    x = images(2, 3, side, side, seed=seed).double()
    out = control.conv1(x)
    for name in CONVS[1:]:
        conv = control.get_submodule(name).conv
        out = F.conv2d(F.pad(out, (1, 1, 1, 1), value=shift), conv.weight, conv.bias, stride=2).relu()
    torch.testing.assert_close(control.dense(out.mean((2, 3))), wib(x), rtol=0, atol=1e-10)


def test_a_layer_without_bias_cannot_be_compensated():
    "And if there is one, the layers before it keep their biases."
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1, bias=False))
    before = snapshot(model)
    with pytest.raises(ValueError, match='must have a bias'): models.compensate_next_bias(model)
    assert_unchanged(model, before)


# Keeping a network

@pytest.mark.parametrize('name', ACTIVATIONS)
def test_a_network_survives_copying_and_saving(name):
    model, x = plain_cnn(1, activation=name, generator=seeded()).eval(), images(2, 1, 28, 28)
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    loaded = plain_cnn(1, activation=name, generator=seeded(9)).eval()
    loaded.load_state_dict(torch.load(stored, weights_only=True))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded): assert torch.equal(other(x), model(x))


# Figures

def texts(figure):
    return ' '.join(text.get_text() for ax in figure.axes for text in ax.texts)


def test_figures_show_the_shapes():
    shown = texts(models.figure_6())
    for label in ('8 × 14 × 14', '64 × 2 × 2', '18,496 parameters', '3 × 32 × 32', '8 × 16 × 16', 'flatten', 'dense'): assert label in shown
    assert 'four times' in texts(models.figure_1())
