"""What notebook 02 cannot show: every scheme on every kind of layer, against PyTorch's own."""
import copy
import math
import re

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import skip_init

from wib_nbdev.initializers import SCHEMES, fans, init_weights, scheme_std, signal_and_gradient

LAYERS = {
    'linear': lambda **kw: nn.Linear(60, 40, **kw),
    'conv1d': lambda **kw: nn.Conv1d(8, 12, 5, **kw),
    'conv2d': lambda **kw: nn.Conv2d(8, 12, 3, **kw),
    'conv3d': lambda **kw: nn.Conv3d(4, 6, 3, **kw),
    'grouped': lambda **kw: nn.Conv2d(8, 12, 3, groups=4, **kw),
    'depthwise': lambda **kw: nn.Conv2d(32, 32, 3, groups=32, **kw),
    'transposed1d': lambda **kw: nn.ConvTranspose1d(8, 12, 4, stride=2, **kw),
    'transposed2d': lambda **kw: nn.ConvTranspose2d(8, 12, 3, **kw),
    'transposed3d': lambda **kw: nn.ConvTranspose3d(4, 6, 3, **kw),
    'transposed grouped': lambda **kw: nn.ConvTranspose2d(8, 12, 3, groups=4, **kw),
}


def seeded(seed: int = 0) -> torch.Generator: return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize('name', LAYERS)
def test_fans_are_pytorchs(name):
    weight = LAYERS[name]().weight
    assert fans(weight) == nn.init._calculate_fan_in_and_fan_out(weight)


@pytest.mark.parametrize('scheme', SCHEMES)
@pytest.mark.parametrize('name', LAYERS)
def test_spread_is_what_theory_says(name, scheme):
    layer = init_weights(LAYERS[name](), scheme, generator=seeded())
    weight = layer.weight.detach()
    scale = weight.square().mean().sqrt().item()
    # An orthogonal matrix has an exact second moment, which goes by its rows and columns; a random one scatters: five standard errors.
    if scheme == 'orthogonal': assert scale == pytest.approx(scheme_std(scheme, *weight.flatten(1).shape), rel=1e-4)
    else: assert abs(scale / scheme_std(scheme, *fans(weight)) - 1) < 5 / math.sqrt(2 * weight.numel())
    assert (layer.bias == 0).all() != scheme.startswith('pytorch')


PYTORCHS = {
    'xavier_normal': nn.init.xavier_normal_, 'xavier_uniform': nn.init.xavier_uniform_, 'orthogonal': nn.init.orthogonal_,
    'kaiming_normal': lambda w, generator: nn.init.kaiming_normal_(w, nonlinearity='relu', generator=generator),
    'kaiming_uniform': lambda w, generator: nn.init.kaiming_uniform_(w, nonlinearity='relu', generator=generator),
    'lecun_normal': lambda w, generator: nn.init.kaiming_normal_(w, nonlinearity='linear', generator=generator),
    'pytorch_default': lambda w, generator: nn.init.kaiming_uniform_(w, a=math.sqrt(5), generator=generator),
    'pytorch_sqrt3': lambda w, generator: nn.init.kaiming_uniform_(w, a=math.sqrt(3), generator=generator),
}


@pytest.mark.parametrize('scheme', PYTORCHS)
def test_same_numbers_as_torch_nn_init(scheme):
    ours, theirs = nn.Conv2d(8, 12, 3), nn.Conv2d(8, 12, 3)
    init_weights(ours, scheme, generator=seeded(3))
    PYTORCHS[scheme](theirs.weight, generator=seeded(3))
    assert torch.equal(ours.weight, theirs.weight)


def test_pytorch_default_is_what_a_new_layer_has():
    "The same distribution as reset_parameters, weight and bias: the same numbers from the same state of the global generator."
    for name, build in LAYERS.items():
        torch.manual_seed(7)
        fresh = build()
        torch.manual_seed(7)
        again = init_weights(skip_init(type(fresh), *_arguments(fresh)), 'pytorch_default')
        assert torch.equal(fresh.weight, again.weight) and torch.equal(fresh.bias, again.bias), name


def _arguments(layer: nn.Module) -> tuple:
    if isinstance(layer, nn.Linear): return layer.in_features, layer.out_features
    shape = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return (*shape, layer.output_padding, layer.groups) if transposed else (*shape, layer.dilation, layer.groups)


@given(st.floats(0.1, 10), st.sampled_from(['lecun_normal', 'xavier_uniform', 'kaiming_normal', 'gain_sqrt3', 'orthogonal']))
@settings(max_examples=30)
def test_weights_are_proportional_to_the_gain(gain, scheme):
    one, other = (init_weights(nn.Linear(20, 10), scheme, gain=g, generator=seeded(1)).weight for g in (1.0, gain))
    torch.testing.assert_close(other, one * gain)


@pytest.mark.parametrize('scheme', ['standard', 'alexnet', 'pytorch_default', 'pytorch_sqrt3'])
def test_no_gain_to_replace(scheme):
    with pytest.raises(ValueError, match=re.escape(f'gain=2.0: scheme={scheme!r} has none')):
        init_weights(nn.Linear(2, 2), scheme, gain=2.0)


def test_bias_by_argument():
    assert (init_weights(nn.Linear(9, 50), 'kaiming_normal', bias='pytorch', generator=seeded()).bias.abs() <= 1 / 3).all()
    assert (init_weights(nn.Linear(9, 50), 'pytorch_default', bias='zeros').bias == 0).all()
    with pytest.raises(ValueError, match=r"bias='zero'.*did you mean 'zeros'"): init_weights(nn.Linear(2, 2), 'standard', bias='zero')


def test_everything_else_is_left_alone():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.PReLU(), nn.Flatten(), nn.Linear(4, 2, bias=False), nn.LayerNorm(2))
    before = copy.deepcopy(model.state_dict())
    assert init_weights(model, 'orthogonal') is model
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {'0.weight', '0.bias', '4.weight'}
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize('name', ['weight', 'bias'])
def test_a_parametrised_layer_is_refused_before_anything_is_drawn(name):
    "A draw would go into a tensor that the next access computes anew."
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2), name, dim=None))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"layer '2': its {name} is computed by a parametrisation: initialise before that"):
        init_weights(model, 'kaiming_normal')
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_uninitialised_memory_is_overwritten():
    layer = skip_init(nn.Conv2d, 3, 5, 3)
    with torch.no_grad():
        layer.weight.fill_(math.nan)
        layer.bias.fill_(math.nan)
    init_weights(layer, 'kaiming_normal')
    assert layer.weight.isfinite().all() and layer.bias.isfinite().all()


def test_global_generator_is_not_touched_when_one_is_given():
    layer, state = nn.Linear(4, 3), torch.get_rng_state()
    for scheme in SCHEMES: init_weights(layer, scheme, generator=seeded())
    assert torch.get_rng_state().equal(state)


@pytest.mark.cuda
def test_signal_and_gradient_on_a_gpu():
    model, x = init_weights(nn.Sequential(nn.Linear(9, 5), nn.Tanh()), 'lecun_normal', generator=seeded()), torch.randn(50, 9)
    here, there = signal_and_gradient(model, x, seeded(1)), signal_and_gradient(model.cuda(), x.cuda(), seeded(1))
    pd.testing.assert_frame_equal(there, here, rtol=1e-2)


@pytest.mark.parametrize('call, message', [
    (lambda: init_weights(nn.Linear(2, 2), 'kaimingnormal'), "did you mean 'kaiming_normal'"),
    (lambda: init_weights(nn.Linear(2, 2), None), 'scheme=None'),
    (lambda: init_weights(nn.Linear(2, 2), 'orthogonal', gain=math.nan), 'gain=nan'),
    (lambda: init_weights(nn.Linear(2, 2), 'orthogonal', gain=0), 'gain=0'),
    (lambda: init_weights(nn.Sequential(), 'orthogonal'), 'has no linear or convolutional layer'),
    (lambda: scheme_std('kaiming_normal', -3, 1), 'fan_in=-3'),
])
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message): call()
