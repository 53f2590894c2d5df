"""What chapter 01 cannot show: Eq. 3 and 4 for all inputs, and the contract of the simulation."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wib_nbdev.variance import linear_output_variance, simulate_layer, stacked_output_variance


@given(st.integers(1, 100), st.floats(0.01, 10), st.integers(0, 20), st.integers(0, 20))
def test_stacks_compose(fan_in, weight_var, first, second):
    "Eq. 4 for two stacks on top of each other, and Eq. 3 as a stack of one layer."
    below = stacked_output_variance(fan_in, weight_var, first)
    whole = stacked_output_variance(fan_in, weight_var, first + second)
    assert stacked_output_variance(fan_in, weight_var, second, below) == pytest.approx(whole)
    one = stacked_output_variance(fan_in, weight_var, 1, 3.0)
    assert one == pytest.approx(linear_output_variance(fan_in, weight_var, 3.0))


def test_simulation_depends_on_its_generator_alone():
    def run() -> object: return simulate_layer(50, 40, 0.1, 3, torch.relu, torch.Generator().manual_seed(5))
    torch.manual_seed(1)
    first, state = run(), torch.get_rng_state()
    assert run().equals(first) and torch.get_rng_state().equal(state)
    assert list(first) == ['trial', 'mean', 'std'] and len(first) == 3


def test_simulation_takes_the_statistics_after_the_activation():
    frame = simulate_layer(784, 784, 1 / 28, 5, torch.relu, torch.Generator().manual_seed(0))
    assert frame['mean'].between(0.3, 0.5).all()
    one_output = simulate_layer(5, 1, 1.0, 4, generator=torch.Generator().manual_seed(0))
    assert (one_output['std'] == 0).all()  # the population's; a sample's would be NaN
