"""The plan: its size, its pairs, what it records, and how best rates are chosen and the grid extended."""
from dataclasses import replace
from itertools import groupby

import pandas as pd
import pytest

from wib_nbdev.plan import (
    ARMS,
    EDGES,
    FEW_SEEDS,
    PAPER_ARMS,
    RATES,
    SEEDS,
    arm_grid,
    best_rate_plan,
    best_rates,
    edge_plan,
    full_plan,
    quick_plan,
    rate_grid,
    record_of,
    recorded_plan,
    thinned,
    with_arms,
)
from wib_nbdev.sweep import Results


def made_up(configs, accuracy) -> Results:
    "Invented results, with a last accuracy that is a function of the configuration."
    runs = pd.DataFrame([{'key': config.key, **config.__dict__, 'status': 'finished'} for config in configs])
    epochs = [dict(key=config.key, epoch=1, split='valid', accuracy=accuracy(config), loss=1.0)
              for config in configs]
    return Results(runs, pd.DataFrame(epochs), *3 * [pd.DataFrame()])


def test_the_full_plan_is_what_was_announced():
    plan = full_plan()
    assert len({config.key for config in plan}) == len(plan) and set(recorded_plan()) <= set(plan)
    tested = [config for config in plan
              if config.valid == 'test' and (config.lr != 0.4 or config.momentum == 0)]
    pairs = with_arms(made_up(tested, lambda _: 0.5)).runs
    seeds = pairs.groupby(['arm', 'dataset', 'optimizer', 'momentum', 'lr'])['seed'].agg(set)
    for arm in PAPER_ARMS: assert [len(each) for each in seeds[arm]] == 6 * [len(SEEDS)]
    assert not {config.seed for config in plan} & set(range(10)), 'no seed of the first round'
    held_out = [config for config in plan if config.valid == 'holdout']
    assert len(held_out) == 6 * 2 * len(FEW_SEEDS) * sum(map(len, RATES.values()))


def test_a_plan_that_is_stopped_has_whole_pairs():
    "The runs of one seed in all three settings come before those of the next."
    seeds = [config.seed for config in full_plan()[:3 * 2 * len(PAPER_ARMS) * len(SEEDS)]]
    assert [seed for seed, _ in groupby(seeds)] == list(SEEDS)


def test_recorded_runs_keep_every_second_iteration_then_every_tenth():
    kept = [iteration for iteration in range(1000) if thinned(iteration)]
    assert kept == [*range(0, 400, 2), *range(400, 1000, 10)]
    record = record_of(recorded_plan()[0])
    assert record['every'] is thinned and record['gradients']
    assert 'near_zero_bins_-0.35_0.7' in record['near_zero']
    assert record_of(full_plan()[1]) is False and any(record_of(config) for config in quick_plan())


@pytest.mark.parametrize('arm', ARMS)
def test_a_run_knows_its_arm(arm):
    configs = arm_grid([arm], seed=3)
    assert set(with_arms(made_up(configs, lambda _: 0.5)).runs['arm']) == {arm}
    strange = [replace(config, network='mlp', depth=3) for config in configs]
    assert with_arms(made_up(strange, lambda _: 0.5)).runs.empty


def test_with_arms_twice_is_once():
    once = with_arms(made_up(arm_grid(['relu']), lambda _: 0.5))
    pd.testing.assert_frame_equal(once.runs, with_arms(once).runs, check_like=True)


def test_the_best_setting_is_chosen_and_an_edge_extends_the_grid_once():
    peak = {'elu': 0.002, 'relu': 0.01}  # inside and on the edge
    def score(config):
        return 1 - abs(config.lr - peak.get(config.activation, 0.004)) + 0.5 * (config.optimizer == 'adam')
    grid = rate_grid(dataset='cifar10')
    results = made_up(grid, score)
    best = best_rates(results).set_index('arm')
    assert best.loc['elu', 'lr'] == 0.002 and not best.loc['elu', 'edge']
    assert best.loc['relu', 'lr'] == 0.01 and best.loc['relu', 'edge'] and set(best['optimizer']) == {'adam'}
    beyond = edge_plan(results)
    assert {config.lr for config in beyond} == {EDGES['adam', 0.9][1]} and len(beyond) == 6 * len(FEW_SEEDS)
    extended = made_up([*grid, *beyond], score)
    assert best_rates(extended).set_index('arm').loc['relu', 'lr'] == 0.01
    assert not best_rates(extended)['edge'].any()
    last = best_rate_plan(extended)
    assert len(last) == 6 * len(SEEDS) and {config.valid for config in last} == {'test'}


def test_arms_that_were_not_tried_alike_choose_nothing():
    grid = rate_grid(dataset='cifar10')
    assert best_rates(made_up(grid[1:], lambda _: 0.5)).empty
    diverged = made_up(grid, lambda config: config.lr)
    diverged.runs.loc[diverged.runs['lr'] == 0.4, 'status'] = 'diverged'
    assert (best_rates(diverged)['lr'] == 0.2).all()


def test_plain_sgd_is_not_sgd_with_momentum():
    score = lambda config: 1.0 if (config.optimizer, config.momentum, config.lr) == ('sgd', 0.0, 0.1) else 0.5
    best = best_rates(made_up(rate_grid(), score))
    assert set(best['momentum']) == {0.0} and best['edge'].all()
