"""What notebook 03 cannot show: properties of the moments, hard functions, and two peers."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn import functional as F

from wib_nbdev.mean_shift import centred_gain, gaussian_moments, relu_moments

SMOOTH = {'relu': F.relu, 'leaky_relu': F.leaky_relu, 'elu': F.elu, 'gelu': F.gelu, 'silu': F.silu, 'selu': F.selu, 'tanh': torch.tanh}
spreads = st.floats(0.05, 20)
some = settings(max_examples=12)


@given(spreads)
@some
def test_relu_by_quadrature_is_the_closed_form(preact_std):
    assert gaussian_moments(F.relu, preact_std) == pytest.approx(relu_moments(preact_std), rel=1e-8, abs=1e-8)


@given(spreads, st.floats(0.1, 10))
def test_relu_moments_are_homogeneous(preact_std, factor):
    one, other = relu_moments(preact_std), relu_moments(factor * preact_std)
    assert other == pytest.approx((factor * one.mean, factor**2 * one.var, factor**2 * one.second_moment))


@given(st.sampled_from(list(SMOOTH)), spreads)
@some
def test_variance_is_second_moment_less_squared_mean(name, preact_std):
    moments = gaussian_moments(SMOOTH[name], preact_std)
    assert moments.var == pytest.approx(moments.second_moment - moments.mean**2, abs=1e-12)
    assert moments.var > 0


@given(st.sampled_from([F.relu, F.leaky_relu, F.softplus, torch.abs]), spreads)
@some
def test_jensen(fn, preact_std):
    "A convex function's mean exceeds its value at the mean of its argument, 0."
    assert gaussian_moments(fn, preact_std).mean > fn(torch.zeros(1)).item()


@given(st.sampled_from(list(SMOOTH)), st.floats(-3, 3))
@some
def test_a_constant_moves_the_mean_alone(name, constant):
    fn = SMOOTH[name]
    plain, moved = gaussian_moments(fn), gaussian_moments(lambda z: fn(z) + constant)
    assert moved.mean == pytest.approx(plain.mean + constant, abs=1e-8)
    assert moved.var == pytest.approx(plain.var, abs=2e-8)


@given(st.floats(-6, 6))
@some
def test_a_jump_is_found_wherever_it_is(place):
    moments = gaussian_moments(lambda z: (z > place).double())
    assert moments.mean == pytest.approx(stats.norm.sf(place), abs=1e-8)


@pytest.mark.parametrize('place', [5.9, -5.9, 0.25 + 1e-9, 2**-12 + 1e-10, 1.0000001])
def test_a_jump_where_a_rule_of_fixed_points_would_miss_it(place):
    assert gaussian_moments(lambda z: F.relu(z) + (z > place)).mean == pytest.approx(
        relu_moments().mean + stats.norm.sf(place), abs=1e-9)


@given(st.floats(-3, 3), st.floats(5e-4, 0.1))
@some
def test_a_peak_wider_than_the_grid_is_not_overlooked(place, width):
    "The grid's step, which the docstring names, is 2^-11 = 4.9e-4."
    mass = stats.norm.cdf(place + width) - stats.norm.cdf(place)
    assert gaussian_moments(lambda z: ((z > place) & (z <= place + width)).double()).mean == pytest.approx(mass, abs=1e-9)


@pytest.mark.parametrize('fn', [nn.SiLU(inplace=True), nn.ELU(inplace=True), nn.LeakyReLU(0.2, inplace=True), torch.relu_])
def test_functions_that_work_in_place(fn):
    out_of_place = {'SiLU': F.silu, 'ELU': F.elu, 'LeakyReLU': lambda z: F.leaky_relu(z, 0.2)}.get(type(fn).__name__, F.relu)
    assert gaussian_moments(fn) == gaussian_moments(out_of_place)


@pytest.mark.parametrize('constant, factor', [(1000, 1), (1e6, 1), (0, 1e-7), (0, 1e9)])
def test_no_digits_are_lost_to_size(constant, factor):
    moments = gaussian_moments(lambda z: constant + factor * F.relu(z))
    assert moments.var / factor**2 == pytest.approx(relu_moments().var, abs=1e-8)


@given(st.floats(-6, 6))
@some
def test_a_kink_is_found_wherever_it_is(place):
    "E max(0, z - p) = pdf(p) - p sf(p)."
    truth = stats.norm.pdf(place) - place * stats.norm.sf(place)
    assert gaussian_moments(lambda z: F.relu(z - place)).mean == pytest.approx(truth, abs=1e-8)


@pytest.mark.parametrize('degree', range(1, 7))
def test_polynomials(degree):
    "E z^d is the double factorial (d - 1)!! for even d, else 0."
    moment = lambda d: math.prod(range(d - 1, 0, -2)) if d % 2 == 0 else 0
    moments = gaussian_moments(lambda z: z**degree)
    assert moments.mean == pytest.approx(moment(degree), abs=1e-8)
    assert moments.second_moment == pytest.approx(moment(2 * degree), rel=1e-9)


def test_lognormal():
    moments = gaussian_moments(torch.exp, 1.0)
    assert moments.mean == pytest.approx(math.exp(0.5), abs=1e-8) and moments.second_moment == pytest.approx(math.exp(2), abs=1e-7)


@pytest.mark.parametrize('fn', [
    lambda z: torch.exp(z**2 / 3), lambda z: torch.exp(z**2), torch.log, lambda z: 1 / z, lambda z: z * math.inf,
])
def test_no_moments_no_number(fn):
    with pytest.raises(ValueError, match='do not converge'): gaussian_moments(fn)


@pytest.mark.parametrize('fn', [
    lambda z: z.softmax(-1), lambda z: z - z.mean(), lambda z: z.cumsum(0), lambda z: z.sort().values,
    lambda z: z / z.std(), lambda z: z.sum(), lambda z: z[:1], lambda z: F.dropout(z, 0.01),
                                nn.Softmax(dim=1), nn.ReLU, nn.PReLU(8), math.tanh, lambda z: z.numpy(), lambda z: torch.sqrt(z + 0j),
])
def test_not_elementwise(fn):
    with pytest.raises(ValueError, match='must be elementwise'): gaussian_moments(fn)


def test_a_module_is_left_as_it_was():
    module = nn.PReLU(init=0.3).train()
    first = gaussian_moments(module)
    assert module.weight.dtype == torch.float32 and module.weight.item() == pytest.approx(0.3) and module.training
    assert gaussian_moments(module) == first


def test_global_state_is_left_alone():
    state = torch.get_rng_state()
    gaussian_moments(F.gelu)
    assert torch.get_rng_state().equal(state) and torch.is_grad_enabled()


@pytest.mark.bench('timm')
def test_timm_agrees():
    "timm's table of NFNet gains is a Monte Carlo: three digits. Its log_softmax is not elementwise."
    from timm.models.nfnet import _nonlin_gamma
    ours = dict(celu=F.celu, elu=F.elu, gelu=F.gelu, leaky_relu=F.leaky_relu, log_sigmoid=F.logsigmoid, relu=F.relu, relu6=F.relu6,
                selu=F.selu, sigmoid=torch.sigmoid, silu=F.silu, softplus=F.softplus, softsign=F.softsign, tanh=torch.tanh)
    known = {name for name in _nonlin_gamma if name in ours}
    assert len(known) >= 12
    for name in known: assert centred_gain(ours[name]) == pytest.approx(_nonlin_gamma[name], rel=1e-3), name


@pytest.mark.bench('dks')
@pytest.mark.parametrize('name, theirs', [
    ('relu', lambda z: np.maximum(z, 0)), ('tanh', np.tanh), ('silu', lambda z: z / (1 + np.exp(-z))),
])
def test_dks_agrees(name, theirs):
    "Deep Kernel Shaping integrates by a Gauss-Hermite rule of its own, with 100,000 nodes."
    from dks.base import activation_transform
    mean, second_moment = (activation_transform._estimate_gaussian_mean(fn) for fn in (theirs, lambda z: theirs(z)**2))
    moments = gaussian_moments(SMOOTH[name])
    assert (moments.mean, moments.second_moment) == pytest.approx((mean, second_moment), abs=1e-8)
    assert centred_gain(SMOOTH[name]) == pytest.approx(1 / math.sqrt(second_moment - mean**2), abs=1e-8)
