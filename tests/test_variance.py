"""What notebook 01 cannot show: the formulas for all inputs, and the simulation's contract."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wib_nbdev.variance import float32_layer, linear_output_variance, simulate_layer, simulate_stack, stacked_output_variance

fans = st.integers(1, 10_000)
variances = st.floats(0, 1e3)


@given(fans, variances, variances)
def test_eq_3_is_eq_4_of_one_layer(fan_in, weight_var, input_var):
    assert stacked_output_variance(fan_in, weight_var, 1, input_var) == pytest.approx(linear_output_variance(fan_in, weight_var, input_var))


@given(st.integers(1, 100), st.floats(0.01, 10), st.integers(0, 20), st.integers(0, 20))
def test_stacks_compose(fan_in, weight_var, first, second):
    below = stacked_output_variance(fan_in, weight_var, first)
    whole = stacked_output_variance(fan_in, weight_var, first + second)
    assert stacked_output_variance(fan_in, weight_var, second, below) == pytest.approx(whole)


@given(st.integers(1, 5000), st.floats(1e-4, 1e4))
def test_float32_layer_is_where_eq_4_leaves_float32(fan_in, weight_std):
    layer = float32_layer(fan_in, weight_std)
    scale = weight_std * math.sqrt(fan_in)
    if math.isinf(layer): assert scale == pytest.approx(1)
    else:
        assert layer > 0
        end = torch.finfo(torch.float32).max if scale > 1 else 2.0**-149
        assert layer * math.log(scale) == pytest.approx(math.log(end))


@pytest.mark.parametrize('arguments, name', [
    ((0, 1.0), 'fan_in=0'), ((-3, 1.0), 'fan_in=-3'), ((3, -1.0), 'weight_var=-1.0'), ((3, math.nan), 'weight_var=nan'),
    ((3, math.inf), 'weight_var=inf'), ((3, 1.0, -2), 'input_var=-2'),
])
def test_wrong_numbers_are_named(arguments, name):
    with pytest.raises(ValueError, match=name): linear_output_variance(*arguments)


def test_an_input_of_no_variance_has_none_behind_any_stack():
    assert stacked_output_variance(784, 1.0, 500, 0.0) == 0
    assert stacked_output_variance(784, 1.0, 500) == math.inf
    with pytest.raises(ValueError, match=r'input_var=-1\.0'): stacked_output_variance(784, 1.0, 500, -1.0)


@pytest.mark.parametrize('arguments', [('3', 1.0), (3.0, 1.0), (True, 1.0), (3, '1'), (3, None)])
def test_wrong_types_are_type_errors(arguments):
    with pytest.raises(TypeError, match='must be'): linear_output_variance(*arguments)


def test_simulation_depends_on_its_generator_alone():
    def run() -> object: return simulate_layer(50, 40, 0.1, 3, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(1)
    first = run()
    state = torch.get_rng_state()
    assert run().equals(first) and torch.get_rng_state().equal(state)
    assert list(first.columns) == ['trial', 'mean', 'std'] and len(first) == 3


def test_simulation_std_is_the_populations():
    frame = simulate_layer(5, 1, 1.0, 4, generator=torch.Generator().manual_seed(0))
    assert (frame['std'] == 0).all()  # of one output; a sample's would be NaN


def test_simulation_applies_the_activation():
    frame = simulate_layer(784, 784, 1 / 28, 5, torch.relu, torch.Generator().manual_seed(0))
    assert frame['mean'].between(0.3, 0.5).all()


def test_simulation_refuses_nothing_to_draw():
    with pytest.raises(ValueError, match='n_trials=0'): simulate_layer(5, 5, 1.0, 0)
    with pytest.raises(ValueError, match='weight_std=-1'): simulate_layer(5, 5, -1.0, 1)
    with pytest.raises(ValueError, match='depth=0'): simulate_stack(5, 1.0, 0)


def test_stack_of_zeros_is_dead_from_the_start():
    frame = simulate_stack(8, 0.0, 2)
    assert (frame['nonzero'] == 0).all() and (frame['finite'] == 1).all()
