"""What chapter 03 cannot show: properties of the moments, functions hard to integrate, two peers."""
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

few = settings(max_examples=8)  # a call sums four million cells
places = st.floats(-6, 6)


@given(st.floats(0.05, 20), st.sampled_from([1, -1]))
@few
def test_relu_by_quadrature_is_the_closed_form(preact_std, sign):
    preact_std *= sign  # only its square counts
    assert gaussian_moments(F.relu, preact_std) == pytest.approx(relu_moments(preact_std), rel=1e-10)


@given(st.sampled_from([F.gelu, torch.tanh, F.leaky_relu]), st.floats(-1e4, 1e4), st.floats(1e-6, 1e6))
@few
def test_a_constant_and_a_factor(fn, constant, factor):
    "Mean and variance follow, and no digits are lost to size."
    plain, moved = gaussian_moments(fn), gaussian_moments(lambda z: factor * (fn(z) + constant))
    assert moved.mean / factor == pytest.approx(plain.mean + constant, rel=1e-9, abs=1e-9)
    assert moved.var / factor**2 == pytest.approx(plain.var, rel=1e-9)


@given(places)
@few
def test_a_jump_wherever_it_is(place):
    assert gaussian_moments(lambda z: z > place).mean == pytest.approx(stats.norm.sf(place), abs=1e-6)


@given(places)
@few
def test_a_kink_wherever_it_is(place):
    "E max(0, z - p) = pdf(p) - p sf(p)."
    truth = stats.norm.pdf(place) - place * stats.norm.sf(place)
    assert gaussian_moments(lambda z: F.relu(z - place)).mean == pytest.approx(truth, abs=1e-10)


@pytest.mark.parametrize('degree', range(1, 7))
def test_polynomials(degree):
    "E z^d is the double factorial (d - 1)!! for even d, else 0."
    def moment(d: int) -> int: return math.prod(range(d - 1, 0, -2)) if d % 2 == 0 else 0
    moments = gaussian_moments(lambda z: z**degree)
    assert moments.mean == pytest.approx(moment(degree), abs=1e-8)
    assert moments.second_moment == pytest.approx(moment(2 * degree), rel=1e-8)


@pytest.mark.parametrize('fn, same', [
    (nn.SiLU(inplace=True), F.silu), (torch.relu_, torch.relu),
    (nn.PReLU(init=0.25), lambda z: F.leaky_relu(z, 0.25)),
])
def test_modules_and_functions_that_work_in_place(fn, same):
    assert gaussian_moments(fn) == gaussian_moments(same)
    if isinstance(fn, nn.PReLU): assert fn.weight.dtype == torch.float32 and fn.weight.item() == 0.25


@pytest.mark.parametrize('fn', [lambda z: torch.exp(z**2 / 3), torch.log, lambda z: z * math.inf])
def test_no_second_moment_no_number(fn):
    with pytest.raises(ValueError, match='no finite second moment'): gaussian_moments(fn)


@pytest.mark.parametrize('fn', [
    lambda z: z.softmax(-1), lambda z: z - z.mean(), lambda z: z / z.std(), lambda z: z.cumsum(0),
    lambda z: z.sum(), lambda z: F.dropout(z, 0.01),
])
def test_not_elementwise(fn):
    with pytest.raises(ValueError, match='must be elementwise'): gaussian_moments(fn)


@pytest.mark.bench('timm')
def test_timm_agrees():
    "timm's table of NFNet gains is a Monte Carlo: three digits. Its log_softmax is not elementwise."
    from timm.models.nfnet import _nonlin_gamma
    functions = {name: getattr(F, name.replace('log_s', 'logs'), None) for name in _nonlin_gamma}
    ours = {name: centred_gain(fn) for name, fn in functions.items() if fn and name != 'log_softmax'}
    assert len(ours) >= 12
    assert ours == pytest.approx({name: _nonlin_gamma[name] for name in ours}, rel=1e-3)


@pytest.mark.bench('dks')
@pytest.mark.parametrize('ours, theirs', [
    (torch.relu, lambda z: np.maximum(z, 0)), (torch.tanh, np.tanh), (F.silu, lambda z: z / (1 + np.exp(-z))),
])
def test_dks_agrees(ours, theirs):
    "Deep Kernel Shaping integrates by a Gauss-Hermite rule of its own, with 100,000 nodes."
    from dks.base import activation_transform
    integrate = activation_transform._estimate_gaussian_mean
    mean, second_moment = integrate(theirs), integrate(lambda z: theirs(z)**2)
    moments = gaussian_moments(ours)
    assert (moments.mean, moments.second_moment) == pytest.approx((mean, second_moment), abs=1e-8)
    assert centred_gain(ours) == pytest.approx(1 / math.sqrt(second_moment - mean**2), abs=1e-8)
