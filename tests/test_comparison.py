"""Notebook 10: the statistics against scipy and against closed forms, and what happens to runs that are missing, mixed or diverged."""
import math
import warnings
from dataclasses import asdict, replace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from statsmodels.stats.power import TTestPower

from wib_nbdev import comparison as c
from wib_nbdev.sweep import ARMS, PAPER_ARMS, Results, arm_grid, full_plan, with_arms

matplotlib.use('agg')
PAPER = ('wib_relu', *c.RIVALS)


def results_of(configs, curve, status='finished') -> Results:
    "Results whose losses are `curve(config, epoch, split)`, accuracy exp(-loss): exact numbers, so that every statistic is known."
    configs = list(configs)
    runs = pd.DataFrame([{'key': config.key, **asdict(config), 'status': status, 'seconds': 1.0} for config in configs])
    rows = [dict(key=config.key, epoch=epoch, split=split, loss=curve(config, epoch, split), seconds=1.0)
            for config in configs for epoch in range(1, config.epochs + 1) for split in ('train', 'valid')]
    epochs = pd.DataFrame(rows)
    return Results(runs, epochs.assign(accuracy=np.exp(-epochs['loss'])), pd.DataFrame())


def noisy(config, epoch, split) -> float:
    "A falling loss, with noise that an arm and a seed fix."
    noise = np.random.default_rng([config.seed, *config.activation.encode(), epoch, split == 'train']).normal(0, 0.02)
    return 0.3 + 1 / epoch + 0.02 * len(config.activation) / 9 + noise


@pytest.fixture(scope='module')
def results() -> Results:
    return with_arms(results_of(arm_grid(PAPER), noisy))


numbers = st.floats(-10, 10, allow_subnormal=False).map(lambda x: round(x, 6))
samples = arrays(float, st.integers(3, 12), elements=numbers)


# Intervals and tests of one sample of differences

def test_t_interval_is_scipys_paired_one():
    a, b = np.random.default_rng(0).normal(0, 1, (2, 10))
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    interval = c.mean_interval(a - b)
    np.testing.assert_allclose([interval.low, interval.high], expected)
    assert interval.mean == pytest.approx((a - b).mean())


def test_bca_from_twenty_values_on():
    x = np.random.default_rng(0).exponential(1, 20)
    expected = stats.bootstrap((x,), np.mean, method='BCa', rng=np.random.default_rng(0)).confidence_interval
    assert c.mean_interval(x)[1:] == (expected.low, expected.high)
    assert c.mean_interval(x[:19])[1:] == pytest.approx(stats.ttest_1samp(x[:19], 0).confidence_interval(0.95))


def test_t_interval_covers():
    "2000 samples of ten normal values: 95 % within five standard errors of the simulation."
    draws = np.random.default_rng(0).normal(0.5, 2, (2000, 10))
    covered = np.mean([interval.low <= 0.5 <= interval.high for interval in map(c.mean_interval, draws)])
    assert abs(covered - 0.95) < 5 * math.sqrt(0.95 * 0.05 / 2000)


@pytest.mark.parametrize('values, expected', [([], (math.nan,) * 3), ([2.0], (2.0, math.nan, math.nan)), ([0.1] * 5, (0.1, 0.1, 0.1))])
def test_interval_of_few_or_equal_values(values, expected):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        np.testing.assert_allclose(c.mean_interval(values), expected)


@given(samples, numbers)
def test_interval_moves_with_its_values(x, shift):
    moved, still = c.mean_interval(x + shift), c.mean_interval(x)
    np.testing.assert_allclose(moved, np.array(still) + shift, atol=1e-6)


@given(samples)
def test_interval_turns_over_with_its_values(x):
    mean, low, high = c.mean_interval(x)
    np.testing.assert_allclose(c.mean_interval(-x), (-mean, -high, -low), atol=1e-9)


@pytest.mark.parametrize('n', [1, 2, 5, 8, 10])
def test_sign_flip_p_of_a_clean_sweep(n):
    "All differences on one side: only that pattern and its mirror image are as extreme."
    assert c.sign_flip_p(np.arange(1.0, n + 1)) == pytest.approx(2 / 2**n)


def test_sign_flip_p_by_hand():
    "|mean| of (±1 ±2 ±4)/3 is at least 5/3 for ±(1+4), that is for +++, -++ ... counted one by one."
    x = np.array([-1.0, 2.0, 4.0])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 3)).reshape(3, -1)
    assert c.sign_flip_p(x) == pytest.approx(np.mean(np.abs(x @ signs) >= abs(x.sum())))


@settings(max_examples=30)
@given(samples)
def test_sign_flip_p_knows_no_side(x):
    p = c.sign_flip_p(x)
    assert p == pytest.approx(c.sign_flip_p(-x))
    assert 2 / 2**len(x) - 1e-12 <= p <= 1


def test_sign_flip_p_is_uniform_under_no_difference():
    "The share of p at most 0.1 is at most 0.1, within five standard errors."
    draws = np.random.default_rng(1).normal(0, 1, (400, 8))
    assert np.mean([c.sign_flip_p(x) <= 0.1 for x in draws]) <= 0.1 + 5 * math.sqrt(0.09 / 400)


def test_p_next_seed_is_the_share_of_fresh_seeds():
    "Over many repetitions, the stated probability of a positive fresh difference is right on average."
    draws = np.random.default_rng(2).normal(0.4, 1, (4000, 11))
    stated = np.array([c.p_next_seed(x[:10]) for x in draws])
    assert stated.mean() == pytest.approx((draws[:, 10] > 0).mean(), abs=5 * 0.5 / math.sqrt(4000) + 0.01)


@given(samples)
def test_p_next_seed_turns_over(x): assert c.p_next_seed(x) + c.p_next_seed(-x) == pytest.approx(1)


@pytest.mark.parametrize('x, expected', [([0.0, 0.0], 0.5), ([1.0, 1.0], 1.0), ([-1.0, -1.0], 0.0)])
def test_p_next_seed_without_spread(x, expected): assert c.p_next_seed(x) == expected


@pytest.mark.parametrize('effect, n', [(0.5, 34), (1.0, 10)])
def test_seeds_needed_is_what_tables_say(effect, n):
    "Paired t test, two-sided 5 %, power 80 %: 34 pairs for d = 0.5 and 10 for d = 1 (G*Power)."
    x = np.array([-1.0, 1.0, 0.0])
    assert c.seeds_needed(x / x.std(ddof=1) + effect) == n


def test_seeds_needed_at_the_ends():
    assert c.seeds_needed([1.0, -1.0]) == math.inf
    assert c.seeds_needed([5.0, 5.0]) == 2
    assert c.seeds_needed([100.0, 100.1]) == 2
    assert math.isnan(c.seeds_needed([1.0]))


@given(st.floats(1e-3, 1e4))
def test_seeds_needed_are_just_enough(effect):
    x = np.array([-1.0, 1.0, 0.0]) + effect
    n = c.seeds_needed(x)
    assert c.paired_power(min(effect, 1e3), n) >= 0.8 and (n == 2 or c.paired_power(effect, n - 1) < 0.8)


@pytest.mark.parametrize('effect', [0.1, 0.5, 1, 2])
def test_power_is_statsmodels(effect):
    assert c.paired_power(effect, 12) == pytest.approx(TTestPower().power(effect, 12, 0.05), abs=1e-6)


def test_holm_by_hand():
    p = pd.Series([0.01, 0.04, 0.03, np.nan])
    np.testing.assert_allclose(c.holm(p), [0.03, 0.06, 0.06, np.nan])


# Verdicts

@pytest.mark.parametrize('low, high, metric, expected', [
    (0.006, 0.02, 'valid accuracy', 'better'), (-0.02, -0.006, 'valid accuracy', 'worse'), (-0.004, 0.004, 'valid accuracy', 'equivalent'),
    (0.004, 0.02, 'valid accuracy', 'undecided'), (-0.02, 0.02, 'train accuracy', 'undecided'), (-0.3, -0.1, 'valid loss', 'better'),
    (0.03, 0.1, 'train loss', 'worse'), (-0.01, 0.019, 'train loss', 'equivalent'), (math.nan, math.nan, 'valid loss', 'undecided')])
def test_verdict(low, high, metric, expected): assert c.verdict(low, high, metric) == expected


def test_the_rope_is_a_tenth_of_the_claim():
    for kind, claimed in c.CLAIMED.items(): assert c.ROPE[kind] == pytest.approx(abs(claimed) / 10)


# Differences of runs

def test_differences_are_scipys(results):
    row = c.paired_differences(results).query("dataset == 'cifar10' and metric == 'valid loss' and rival == 'elu'").iloc[0]
    losses = c.run_values(c.select(results, dataset='cifar10')).query("metric == 'valid loss'")
    values = losses.pivot(index='seed', columns='arm', values='value')
    logs = np.log(values['wib_relu']) - np.log(values['elu'])
    test = stats.ttest_rel(values['wib_relu'], values['elu'])
    assert row['difference'] == pytest.approx((values['wib_relu'] - values['elu']).mean())
    np.testing.assert_allclose([row['low'], row['high']], test.confidence_interval())
    np.testing.assert_allclose(np.log([row['ratio'], row['ratio_low'], row['ratio_high']]), c.mean_interval(logs))
    assert row['effect'] == row['ratio'] - 1 and row['n'] == 10 and row['lost'] == 0


def test_differences_turn_over_when_the_arms_change_places(results):
    one = c.paired_differences(results, 'wib_relu', ['relu'])  # a family of one: no correction
    other = c.paired_differences(results, 'relu', ['wib_relu'])
    for name, turned in (('difference', -other['difference']), ('low', -other['high']), ('ratio', 1 / other['ratio']), ('p', other['p']),
                         ('wins', 1 - other['wins']), ('p_next', 1 - other['p_next']), ('seeds_needed', other['seeds_needed'])):
        np.testing.assert_allclose(one[name], turned, err_msg=name)


def test_a_family_is_the_rivals_of_one_metric(results):
    frame = c.paired_differences(results)
    assert len(frame) == 2 * 4 * 4
    for _, family in frame.groupby(['dataset', 'metric']): np.testing.assert_allclose(family['p_holm'], c.holm(family['p']))
    assert list(frame['dataset'].unique()) == ['fashion_mnist', 'cifar10']
    assert list(frame['metric'][:16].unique()) == list(c.METRICS) and list(frame['rival'][:4]) == list(c.RIVALS)


def test_the_order_of_the_runs_does_not_matter(results):
    shuffled = Results(results.runs.sample(frac=1, random_state=0), results.epochs.sample(frac=1, random_state=1), results.layers)
    one, other = (c.paired_differences(each, metrics=['valid loss']) for each in (shuffled, results))
    pd.testing.assert_frame_equal(one, other)


def test_a_known_effect_is_found():
    "A fifth less loss at every seed: ratio 0.8 exactly, better, and the p of a clean sweep."
    configs = arm_grid(('wib_relu', 'relu'), dataset='cifar10')
    known = results_of(configs, lambda config, epoch, split: (1 + 0.1 * config.seed) * (0.8 if config.activation == 'wib_relu' else 1))
    row = c.paired_differences(known, rivals=['relu'], metrics=['valid loss']).iloc[0]
    assert row['effect'] == pytest.approx(-0.2) and row['verdict'] == 'better' and row['wins'] == 1
    assert row['p'] == row['p_holm'] == pytest.approx(2 / 2**10)


def test_seeds_without_a_pair_are_left_out_and_named(results):
    gone = results.runs.query("arm == 'elu' and dataset == 'cifar10' and seed < 2")['key']
    fewer = results._replace(runs=results.runs[~results.runs['key'].isin(gone)])
    with pytest.warns(UserWarning, match='cifar10, valid loss, wib_relu against elu: 2 seeds have no pair'):
        frame = c.paired_differences(fewer, metrics=['valid loss'])
    assert frame.query("dataset == 'cifar10' and rival == 'elu'")[['n', 'lost']].iloc[0].tolist() == [8, 2]
    assert (frame.query("rival != 'elu'")['n'] == 10).all()


def test_diverged_runs_are_no_pairs(results):
    runs = results.runs.copy()
    runs.loc[(runs['arm'] == 'relu') & (runs['seed'] == 3), 'status'] = 'diverged'
    with pytest.warns(UserWarning, match='1 seeds have no pair'):
        frame = c.paired_differences(results._replace(runs=runs), metrics=['valid loss'])
    assert set(frame.query("rival == 'relu'")['n']) == {9}


def test_mixed_set_ups_are_refused(results):
    other = with_arms(results_of(arm_grid(PAPER, lr=0.01), noisy))
    mixed = Results(*(pd.concat(frames) for frames in zip(results, other, strict=True)))
    with pytest.raises(ValueError, match=r'wib_relu on .* more than one run at seed .*: select one set-up'): c.paired_differences(mixed)
    one, other = (c.paired_differences(each, metrics=['valid loss']) for each in (c.select(mixed, **c.MAIN), results))
    pd.testing.assert_frame_equal(one, other)


@pytest.mark.parametrize('call', [c.paired_differences, c.final_table, c.learning_curves, c.speed_differences])
def test_runs_that_differ_in_one_field_do_not_count_as_more_seeds(results, call):
    again = with_arms(results_of(arm_grid(PAPER, device='cpu'), noisy))
    twice = Results(*(pd.concat(frames) for frames in zip(results, again, strict=True)))
    with pytest.raises(ValueError, match=r"differ in device: select one set-up, such as select\(results, device='auto'\)"): call(twice)
    assert len(call(c.select(twice, device='auto'))) == len(call(results))


@pytest.mark.parametrize('call, message', [
    (lambda r: c.paired_differences(r, 'gelu'), "arm='gelu': has no runs"),
    (lambda r: c.select(r, learning_rate=1), "field='learning_rate'"),
    (lambda r: c.run_values(r, 'first'), "at='first'"),
    (lambda r: c.kind_of('accuracy'), "metric='accuracy'"),
    (lambda r: c.epochs_to_loss(r, 0), 'target=0'),
    (lambda r: c.figure_13(c.select(r, dataset='fashion_mnist')), 'no finished run'),
    (lambda r: c.plot_forest(c.paired_differences(r)), 'holds 4 metrics')])
def test_errors_name_the_argument(results, call, message):
    with pytest.raises(ValueError, match=message): call(results)


# Tables

def test_last_and_best_epoch():
    config = replace(arm_grid(('relu',), dataset='cifar10', seed=0)[0], epochs=3)
    losses = {1: 3.0, 2: 1.0, 3: 2.0}
    one = results_of([config], lambda config, epoch, split: losses[epoch])
    for at, expected in (('last', 2.0), ('best', 1.0)):
        values = c.run_values(one, at).set_index('metric')['value']
        assert values['valid loss'] == expected and values['train accuracy'] == pytest.approx(math.exp(-expected))


def test_tables_hold_every_arm(results):
    final, best = c.final_table(results), c.best_table(results)
    assert len(final) == len(best) == 2 * 5 * 4 and set(final['n']) == {10}
    assert (best.query("metric == 'valid loss'")['mean'].to_numpy() <= final.query("metric == 'valid loss'")['mean'].to_numpy()).all()
    assert c.readable(final).shape == (10, 4) and c.readable(final).notna().all(axis=None)


# Convergence

def test_epochs_to_loss_are_interpolated():
    "The loss of epoch e is 4 - e and stands at e - 1/2: 2.25 is reached at 1.25."
    config = replace(arm_grid(('relu',), dataset='cifar10', seed=0)[0], epochs=3)
    one = results_of([config], lambda config, epoch, split: 4.0 - epoch)
    reached = lambda target: c.epochs_to_loss(one, target)['epochs'].iloc[0]
    assert reached(2.25) == pytest.approx(1.25) and reached(3.0) == 0.5 and math.isnan(reached(0.9))


def test_twice_as_fast_is_a_ratio_of_a_half():
    "Loss 1/(epoch - 1/2) against 1/(2 epoch - 1): the same loss in half the epochs."
    configs = arm_grid(('wib_relu', 'relu'), dataset='cifar10', seed=range(4))
    curve = lambda config, epoch, split: 1 / ((2 if config.activation == 'wib_relu' else 1) * (epoch - 0.5))
    row = c.speed_differences(results_of(configs, curve), rivals=['relu']).iloc[0]
    assert row['target'] == pytest.approx(1 / 19.5) and row['n'] == 4
    assert row['ratio'] == pytest.approx(0.5, rel=0.01)


# Learning rates

def rates_results(best_of) -> Results:
    "Holdout runs of four rates of which `best_of[arm]` is best, and test runs at every rate."
    curve = lambda config, epoch, split: 0.3 + abs(math.log(config.lr / best_of[config.activation])) + 0.01 * config.seed
    return with_arms(results_of(arm_grid(tuple(best_of), lr=[0.001, 0.002, 0.004, 0.01], valid=['holdout', 'test'], seed=range(3)), curve))


def test_each_arm_is_tested_at_its_own_best_rate():
    best_of = {'relu': 0.002, 'wib_relu': 0.01}
    results = rates_results(best_of)
    chosen = c.best_rates(results)
    assert {(row.arm, row.lr) for row in chosen.itertuples()} == set(best_of.items()) and len(chosen) == 4
    assert (chosen['edge'] == (chosen['lr'] == 0.01)).all(), 'the greatest rate tried is an edge'
    tested = c.at_best_rates(results).runs
    assert set(tested['valid']) == {'test'} and len(tested) == 2 * 2 * 3
    assert all(row.lr == best_of[row.arm] for row in tested.itertuples())


def test_the_test_images_choose_nothing():
    "Test runs that would choose another rate change nothing; without holdout runs nothing is chosen."
    results = rates_results({'relu': 0.002})
    keys = results.runs.query("valid == 'test' and lr == 0.01")['key']
    epochs = results.epochs.copy()
    epochs.loc[epochs['key'].isin(keys), 'accuracy'] = 1.0
    assert set(c.best_rates(results._replace(epochs=epochs))['lr']) == {0.002}
    assert c.at_best_rates(c.select(results, valid='test')).runs.empty


@pytest.mark.parametrize('early', [False, True])
def test_a_rate_at_which_a_run_diverged_is_not_chosen(early):
    results = rates_results({'relu': 0.002})
    runs = results.runs.copy()
    runs.loc[(runs['lr'] == 0.002) & (runs['seed'] == 1), 'status'] = 'diverged'
    gone = results.epochs['key'].isin(runs.loc[runs['status'] == 'diverged', 'key'])
    never_validated = results.epochs[~gone | ((results.epochs['epoch'] == 1) & (results.epochs['split'] == 'train'))]  # at its first step
    changed = results._replace(runs=runs, epochs=never_validated if early else results.epochs)
    assert set(c.rate_table(c.select(changed, valid='holdout')).query('lr == 0.002')['diverged']) == {1}
    assert len(c.best_rates(changed)) == 2 and 0.002 not in set(c.best_rates(changed)['lr'])


def test_unequal_budgets_choose_nothing():
    "A rate that only one arm has been tried at: that data set waits, the other does not."
    results = rates_results({'relu': 0.002, 'wib_relu': 0.01})
    extra = results.runs.query("arm == 'relu' and dataset == 'cifar10' and valid == 'holdout' and lr == 0.01")['key']
    lacking = results._replace(runs=results.runs[~results.runs['key'].isin(extra)])
    assert set(c.best_rates(lacking)['dataset']) == {'fashion_mnist'}


def test_the_last_runs_are_planned_when_the_grid_of_rates_is_whole():
    curve = lambda config, epoch, split: 0.3 + 0.01 * config.seed + (0 if config.optimizer == 'sgd' and config.lr == 0.04 else 0.1)
    held_out = [config for config in full_plan() if config.valid == 'holdout']
    plan = c.best_rate_plan(results_of(held_out, curve))
    assert len(plan) == len({config.key for config in plan}) == 2 * len(PAPER_ARMS) * 10
    assert {(config.optimizer, config.lr, config.valid) for config in plan} == {('sgd', 0.04, 'test')}
    assert c.best_rate_plan(results_of(held_out[1:], curve)) == []


# Pictures

@given(arrays(float, st.integers(1, 12), elements=st.floats(0, 1)), st.floats(0.01, 0.2))
def test_labels_stand_apart(wanted, gap):
    placed = c.spread(wanted, gap)
    assert (np.diff(np.sort(placed)) >= gap - 1e-9).all()
    assert placed.mean() == pytest.approx(wanted.mean())
    order = np.argsort(placed)
    assert (np.diff(wanted[order]) >= 0).all()


def test_labels_far_apart_stay(): np.testing.assert_allclose(c.spread([0.9, 0.1, 0.5], 0.1), [0.9, 0.1, 0.5])


@pytest.mark.parametrize('arms', [PAPER, tuple(ARMS)])
def test_no_label_over_another(arms):
    results = with_arms(results_of(arm_grid(arms, seed=range(2)), noisy))
    figure = c.figure_12(results, arms)
    figure.canvas.draw()
    for ax in figure.axes:
        boxes = [text.get_window_extent().padded(-0.5) for text in ax.texts]
        assert len(boxes) == len(arms)
        assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_forest_shows_the_claim_and_the_rope(results):
    ax = c.plot_forest(c.paired_differences(results, metrics=['valid loss']))
    assert ax.patches[0].get_x() == pytest.approx(-2) and ax.patches[0].get_width() == pytest.approx(4)
    assert any(line.get_linestyle() == '--' and line.get_xdata()[0] == pytest.approx(-20) for line in ax.lines)
    assert [tick.get_text() for tick in ax.get_yticklabels()][:2] == ['Fashion-MNIST: ReLU', 'Fashion-MNIST: Leaky ReLU']
