"""What chapter 02 cannot show: every scheme on every kind of layer, against PyTorch's own."""
import copy
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

from wib_nbdev.initializers import SCHEMES, fans, init_weights, scheme_std

LAYERS = {
    'linear': lambda: nn.Linear(60, 40),
    'conv1d': lambda: nn.Conv1d(8, 12, 5),
    'conv2d': lambda: nn.Conv2d(8, 80, 3),  # fan_in between units and fan_out, 72 < 80 < 720
    'conv3d': lambda: nn.Conv3d(4, 6, 3),
    'grouped': lambda: nn.Conv2d(8, 12, 3, groups=4),
    'transposed': lambda: nn.ConvTranspose2d(8, 12, 4, stride=2),
}
PYTORCHS = {
    'xavier_normal': nn.init.xavier_normal_,
    'xavier_uniform': nn.init.xavier_uniform_,
    'orthogonal': nn.init.orthogonal_,
    'kaiming_normal': partial(nn.init.kaiming_normal_, nonlinearity='relu'),
    'kaiming_uniform': partial(nn.init.kaiming_uniform_, nonlinearity='relu'),
    'lecun_normal': partial(nn.init.kaiming_normal_, nonlinearity='linear'),
    'pytorch_default': partial(nn.init.kaiming_uniform_, a=math.sqrt(5)),
    'pytorch_sqrt3': partial(nn.init.kaiming_uniform_, a=math.sqrt(3)),
}


def seeded(seed: int = 0) -> torch.Generator: return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize('name', LAYERS)
def test_fans_are_pytorchs(name):
    weight = LAYERS[name]().weight
    assert fans(weight) == nn.init._calculate_fan_in_and_fan_out(weight)


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('scheme', SCHEMES)
def test_spread_of_weights_and_biases(name, scheme):
    layer = init_weights(LAYERS[name](), scheme, generator=seeded())
    weight = layer.weight.detach()
    scale = weight.square().mean().sqrt().item()
    # an orthogonal matrix has an exact second moment
    tolerance = 1e-4 if scheme == 'orthogonal' else 5 / math.sqrt(2 * weight.numel())
    assert scale == pytest.approx(scheme_std(scheme, *fans(weight), units=len(weight)), rel=tolerance)
    assert (layer.bias == 0).all() != scheme.startswith('pytorch')


@pytest.mark.parametrize('scheme', PYTORCHS)
def test_same_numbers_as_torch_nn_init(scheme):
    for build in LAYERS.values():
        ours, theirs = init_weights(build(), scheme, generator=seeded(3)), build()
        PYTORCHS[scheme](theirs.weight, generator=seeded(3))
        assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize('name', LAYERS)
def test_pytorch_default_is_what_a_new_layer_has(name):
    "Weight and bias, from the same state of the global generator."
    torch.manual_seed(7)
    layer = LAYERS[name]()
    fresh = copy.deepcopy(layer)
    torch.manual_seed(7)
    init_weights(layer, 'pytorch_default')
    assert torch.equal(fresh.weight, layer.weight) and torch.equal(fresh.bias, layer.bias)


@given(st.floats(0.1, 10), st.sampled_from(sorted(SCHEMES)))
@settings(max_examples=20)
def test_weights_are_proportional_to_the_gain(gain, scheme):
    one, other = (init_weights(nn.Linear(9, 5), scheme, gain=g, generator=seeded()) for g in (1.0, gain))
    torch.testing.assert_close(other.weight, one.weight * gain)


@pytest.mark.parametrize('scheme', SCHEMES)
def test_a_gain_of_zero_is_not_the_schemes_own(scheme):
    assert (init_weights(nn.Linear(9, 5), scheme, gain=0.0).weight == 0).all()


def test_everything_else_is_left_alone():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.PReLU(), nn.Linear(4, 2, bias=False))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert init_weights(model, 'orthogonal', generator=seeded()) is model
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {'0.weight', '0.bias', '3.weight'}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.get_rng_state().equal(state)


UNDRAWABLE = {
    "weight of layer '1' has no shape yet": lambda: nn.LazyConv2d(3, 3),
    "weight of layer '1' is computed": lambda: parametrizations.weight_norm(nn.Linear(3, 2)),
    "bias of layer '1' is computed": lambda: prune.l1_unstructured(nn.Linear(3, 2), 'bias', 1),
    "weight of layer '1.0' is computed": lambda: nn.Sequential(prune.identity(nn.Conv1d(3, 2, 1), 'weight')),
}


@pytest.mark.parametrize('message', UNDRAWABLE)
@pytest.mark.parametrize('scheme', ['kaiming_normal', 'orthogonal'])
def test_all_layers_are_checked_before_any_is_drawn(message, scheme):
    model = nn.Sequential(nn.Linear(4, 3), UNDRAWABLE[message]())
    before = copy.deepcopy(model[0].state_dict())
    with pytest.raises(ValueError, match=message): init_weights(model, scheme)
    assert all(torch.equal(value, before[key]) for key, value in model[0].state_dict().items())


def test_a_lazy_layer_is_drawn_once_it_has_a_shape():
    model = nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(2))
    model(torch.zeros(1, 4))
    assert (init_weights(model, 'kaiming_normal')[1].bias == 0).all()


@pytest.mark.parametrize('call, message', [
    (lambda: init_weights(nn.Linear(2, 2), 'kaimingnormal'), "did you mean 'kaiming_normal'"),
    (lambda: scheme_std(None, 3, 3), 'scheme=None'),
    (lambda: init_weights(nn.Sequential(), 'orthogonal'), 'has no linear or convolutional layer'),
])
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message): call()
