"""Statistics against scipy, statsmodels and closed forms; runs that are missing, mixed or diverged."""
import itertools
import math
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from statsmodels.stats.multitest import multipletests

from wib_nbdev import statistics as s
from wib_nbdev.plan import PAPER_ARMS, RIVALS, arm_grid
from wib_nbdev.sweep import Results


def results_of(configs, curve, status='finished', **extra) -> Results:
    "Results whose losses are `curve(config, epoch, split)`, accuracy exp(-loss): every statistic is known."
    configs = list(configs)
    runs = pd.DataFrame([{'key': config.key, **asdict(config), 'status': status} for config in configs])
    rows = [dict(key=config.key, epoch=epoch, split=split, loss=curve(config, epoch, split), seconds=1.0)
            for config in configs for epoch in range(1, config.epochs + 1) for split in ('train', 'valid')]
    epochs = pd.DataFrame(rows)
    frames = dict(layers=pd.DataFrame(), correct=pd.DataFrame(), steps=pd.DataFrame()) | extra
    return Results(runs, epochs.assign(accuracy=np.exp(-epochs['loss'])), **frames)


def noisy(config, epoch, split) -> float:
    "A falling loss, with noise that an arm and a seed fix."
    rng = np.random.default_rng([config.seed, *config.activation.encode(), epoch, split == 'train'])
    return 0.3 + 1 / epoch + 0.02 * len(config.activation) / 9 + rng.normal(0, 0.02)


@pytest.fixture(scope='module')
def results() -> Results: return results_of(arm_grid(PAPER_ARMS), noisy)


def changed(results, which, **fields) -> Results:
    "The results with some fields of the runs that a query finds set."
    runs = s.select(results).runs.copy()
    runs.loc[runs.query(which).index, list(fields)] = list(fields.values())
    return results._replace(runs=runs)


numbers = st.floats(-10, 10, allow_subnormal=False).map(lambda x: round(x, 6))
samples = arrays(float, st.integers(3, 12), elements=numbers)


# One sample

def test_the_interval_of_differences_is_scipys():
    a, b = np.random.default_rng(0).exponential(1, (2, 10))
    expected = stats.ttest_rel(a, b).confidence_interval()
    np.testing.assert_allclose(s.t_interval(a - b), [(a - b).mean(), expected.low, expected.high])


def test_t_interval_covers():
    draws = np.random.default_rng(0).normal(0.5, 2, (2000, 10))
    covered = np.mean([interval.low <= 0.5 <= interval.high for interval in map(s.t_interval, draws)])
    assert abs(covered - 0.95) < 5 * math.sqrt(0.95 * 0.05 / 2000)


@pytest.mark.parametrize('values, expected', [
    ([], (math.nan,) * 3), ([2.0], (2.0, math.nan, math.nan)), ([0.1] * 5, (0.1, 0.1, 0.1))])
def test_interval_of_few_or_equal_values(values, expected):
    np.testing.assert_allclose(s.t_interval(values), expected)


@given(samples)
def test_interval_turns_over_with_its_values(x):
    mean, low, high = s.t_interval(x)
    np.testing.assert_allclose(s.t_interval(-x), (-mean, -high, -low), atol=1e-9)


@settings(max_examples=30)
@given(samples)
def test_sign_flip_p_counts_the_patterns(x):
    signs = np.array(np.meshgrid(*[[-1, 1]] * len(x))).reshape(len(x), -1)
    means = np.abs(x @ signs)
    assert s.sign_flip_p(x) == pytest.approx(np.mean(means >= abs(x.sum()) - 1e-9 * means.max()))
    assert s.sign_flip_p(x) == pytest.approx(s.sign_flip_p(-x))


def test_sign_flip_p_counts_ties_of_accuracies():
    "Differences in steps of one image tie often, and floats must not part them."
    for steps in np.random.default_rng(0).integers(-50, 50, (50, 9)):
        sums = np.array([signs @ steps for signs in itertools.product([1, -1], repeat=9)])
        right = 0.6 + np.arange(9) / 1e4, 0.6 + (np.arange(9) + steps) / 1e4
        assert s.sign_flip_p(right[1] - right[0]) == np.mean(abs(sums) >= abs(steps.sum()))


@settings(max_examples=12)  # statsmodels' own is slow: it calls the garbage collector
@given(st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), min_size=1, max_size=8))
@example([0.01, 0.3, 0.011])  # the second smallest is lifted to the smallest's
def test_holm_is_that_of_statsmodels(p):
    p = pd.Series(p)
    expected = p.copy()
    if p.notna().any(): expected[p.notna()] = multipletests(p.dropna(), method='holm')[1]
    np.testing.assert_allclose(s.holm(p), expected)


# One pair of arms

@pytest.mark.parametrize('low, high, metric, expected', [
    (0.006, 0.02, 'valid accuracy', 'better'), (-0.02, -0.006, 'valid accuracy', 'worse'),
    (-0.004, 0.004, 'valid accuracy', 'equivalent'), (-0.3, -0.1, 'valid loss', 'better'),
    (0.03, 0.1, 'train loss', 'worse'), (-0.01, 0.021, 'train loss', 'undecided'),
    (math.nan, math.nan, 'valid loss', 'undecided')])
def test_verdict(low, high, metric, expected): assert s.verdict(low, high, metric) == expected


@pytest.mark.parametrize('metric', ['valid loss', 'valid accuracy'])
def test_a_comparison_turns_over_when_the_arms_change_places(metric):
    a, b = np.random.default_rng(0).uniform(0.5, 0.9, (2, 10))
    one, other = s.compare_pairs(a, b, metric), s.compare_pairs(b, a, metric)
    same = dict(difference=-other['difference'], low=-other['high'], ratio=1 / other['ratio'], p=other['p'],
                n=other['n'], ratio_low=1 / other['ratio_high'], wins=1 - other['wins'],
                wins_low=1 - other['wins_high'], p_fresh=1 - other['p_fresh'])
    for name, turned in same.items(): assert one[name] == pytest.approx(turned), name



def test_posterior_is_students_on_the_scale_of_logarithms():
    "Draws of the mean difference: the shares of better, equivalent, worse and as claimed."
    logs = np.random.default_rng(0).normal(-0.1, 0.2, 10)
    found = s.compare_pairs(np.exp(logs), np.ones(10), 'valid loss')
    draws = stats.t.rvs(9, logs.mean(), stats.sem(logs), size=100_000, random_state=1)
    effects = np.exp(draws) - 1
    shares = dict(p_better=effects < -0.02, p_worse=effects > 0.02, p_equivalent=abs(effects) < 0.02,
                  p_claimed=effects < -0.2)
    for name, share in shares.items(): assert found[name] == pytest.approx(share.mean(), abs=0.01), name


def test_shares_of_wins():
    a, b = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.05, 0.3, 0.3, 0.1])
    found = s.compare_pairs(a, b, 'train accuracy')
    assert found['wins'] == 0.5, 'a tie is no win'
    assert (found['wins_low'], found['wins_high']) == pytest.approx(stats.binomtest(2, 4).proportion_ci())
    assert found['p_fresh'] == pytest.approx(stats.mannwhitneyu(a, b).statistic / 16)


@pytest.mark.parametrize('metric, bad', [('train loss', math.inf), ('train accuracy', -math.inf)])
def test_a_diverged_run_loses_and_is_in_no_mean(metric, bad):
    good, other = (0.2, 0.3) if metric == 'train loss' else (0.3, 0.2)
    whole = s.compare_pairs([good] * 8, [other] * 8, metric)
    found = s.compare_pairs([good] * 8 + [bad, bad], [other] * 9 + [bad], metric)
    assert (found['n'], found['diverged'], found['wins']) == (8, 2, 0.8)
    for name in ('effect', 'low', 'p', 'verdict', 'p_better'): assert found[name] == whole[name]
    assert found['p_fresh'] < whole['p_fresh'] == 1 and whole['verdict'] == 'better'
    assert s.compare_pairs([good] * 7 + [bad], [other] * 8, metric)['verdict'] == 'undecided'


# Results

def test_differences_are_scipys(results):
    part = s.select(results, dataset='cifar10')
    row = s.paired_differences(part, rivals=['elu'], metrics=['valid loss']).iloc[0]
    values = s.pivot(part).loc['cifar10'].xs('valid loss', axis=1, level='metric')
    test = stats.ttest_rel(values['wib_relu'], values['elu'])
    np.testing.assert_allclose([row['low'], row['high']], test.confidence_interval())
    logs = np.log(values['wib_relu']) - np.log(values['elu'])
    ratios = row[['ratio', 'ratio_low', 'ratio_high']].astype(float)
    np.testing.assert_allclose(np.log(ratios), s.t_interval(logs))
    assert row['effect'] == row['ratio'] - 1 and row['n'] == 10 and row['lost'] == row['diverged'] == 0


def test_the_order_of_rows_and_runs(results):
    shuffled = results._replace(runs=results.runs.sample(frac=1, random_state=0),
                                epochs=results.epochs.sample(frac=1, random_state=1))
    frame = s.paired_differences(results)
    pd.testing.assert_frame_equal(s.paired_differences(shuffled), frame)
    names = frame.set_index(['dataset', 'metric', 'rival']).index
    assert list(names) == list(pd.MultiIndex.from_product([['fashion_mnist', 'cifar10'], s.METRICS, RIVALS]))
    for _, family in frame.groupby(['dataset', 'metric']):
        np.testing.assert_allclose(family['p_holm'], s.holm(family['p']))


def test_lost_and_diverged_runs_are_counted(results):
    missing = results.runs.query("activation == 'elu' and dataset == 'cifar10' and seed < 2")['key']
    fewer = results._replace(runs=results.runs[~results.runs['key'].isin(missing)])
    fewer = changed(fewer, "arm == 'relu' and seed == 3", status='diverged')
    table = lambda each: s.paired_differences(each, metrics=['valid loss']).set_index(['dataset', 'rival'])
    others = table(s.select(results, seed=list(range(2, 10))))  # what is left is paired by its seeds
    assert table(fewer).loc[('cifar10', 'elu'), 'p'] == others.loc[('cifar10', 'elu'), 'p']
    frame = table(fewer)[['n', 'lost', 'diverged']]
    assert frame.loc[('cifar10', 'elu')].tolist() == [8, 2, 0]
    assert frame.loc[('fashion_mnist', 'elu')].tolist() == [10, 0, 0]
    assert frame.loc[('cifar10', 'relu')].tolist() == [9, 0, 1]


def test_a_run_that_was_never_validated_counts_as_diverged(results):
    early = changed(results, "arm == 'relu' and seed == 3", status='diverged')
    gone = early.runs.query("status == 'diverged'")['key']
    first = (early.epochs['epoch'] == 1) & (early.epochs['split'] == 'train')
    early = early._replace(epochs=early.epochs[~early.epochs['key'].isin(gone) | first])
    assert set(s.paired_differences(early).query("rival == 'relu'")['diverged']) == {1}


def test_last_and_best_epoch():
    config = replace(arm_grid(('relu',), dataset='cifar10', seed=0)[0], epochs=3)
    one = results_of([config], lambda config, epoch, split: {1: 3.0, 2: 1.0, 3: 2.0}[epoch])
    for at, expected in (('last', 2.0), ('best', 1.0)):
        values = s.run_values(one, at).set_index('metric')['value']
        assert values['valid loss'] == expected
        assert values['train accuracy'] == pytest.approx(math.exp(-expected))


@pytest.mark.parametrize('call', [s.paired_differences, s.final_table, s.speed_differences, s.at_equal_loss])
def test_two_set_ups_are_not_more_seeds(results, call):
    again = results_of(arm_grid(PAPER_ARMS, device='cpu'), noisy)
    twice = Results(*(pd.concat(frames) for frames in zip(results, again, strict=True)))
    with pytest.raises(ValueError, match=r"differ in device: .*select\(results, device='auto'\)"): call(twice)
    assert len(call(s.select(twice, device='auto'))) == len(call(results))


@pytest.mark.parametrize('call, message', [
    (lambda r: s.paired_differences(r, 'gelu'), "arm='gelu': has no runs"),
    (lambda r: s.select(r, learning_rate=1), "field='learning_rate'"),
    (lambda r: s.run_values(r, 'first'), "at='first'"),
    (lambda r: s.kind_of('accuracy'), "metric='accuracy'"),
    (lambda r: s.epochs_to_loss(r, {'cifar10': 0}), 'targets=0'),
    (lambda r: s.speed_differences(r, targets={'cifar': 1.0}), "targets='cifar'.* did you mean 'cifar10'")])
def test_errors_name_the_argument(results, call, message):
    with pytest.raises(ValueError, match=message): call(results)


def test_one_rival_and_a_range_of_seeds_are_meant_as_written(results):
    few = s.select(results, seed=range(2))
    assert set(few.runs['seed']) == {0, 1} == set(s.select(results, seed=np.arange(2)).runs['seed'])
    for call in (s.paired_differences, s.speed_differences, s.at_equal_loss):
        assert call(results, rivals='elu').equals(call(results, rivals=['elu'])), call


def test_momentum_is_part_of_a_setting():
    sgd = dict(optimizer='sgd', lr=0.1, seed=range(2), valid='holdout')
    configs = arm_grid(('relu',), momentum=[0.0, 0.9], **sgd)
    results = results_of(configs, lambda config, epoch, split: 0.3 + config.momentum)
    chosen = results.runs.query('momentum == 0').assign(arm='relu')
    assert set(s.at_settings(results, chosen).runs['momentum']) == {0.0}


# Speed

def test_epochs_to_loss_are_interpolated():
    "The loss of epoch e is 4 - e and stands at e - 1/2: 2.25 is reached at 1.25."
    config = replace(arm_grid(('relu',), dataset='cifar10', seed=0)[0], epochs=3)
    one = results_of([config], lambda config, epoch, split: 4.0 - epoch)
    reached = lambda target, results=one: s.epochs_to_loss(results, {'cifar10': target})['epochs'].iloc[0]
    assert reached(2.25) == pytest.approx(1.25) and reached(3.0) == 0.5 and math.isnan(reached(0.9))
    assert math.isnan(reached(2.25, changed(one, "arm == 'relu'", status='diverged')))
    assert s.epochs_to_loss(s.select(one, seed=99), {'cifar10': 0.5}).empty, 'without runs there is no row'
    pair = s.speed_differences(one, 'relu', ['elu'], targets={'cifar10': 0.5, 'fashion_mnist': 0.5})
    assert pair['n'].tolist() == [0, 0]


def hyperbola(config, epoch, split) -> float:
    "Loss 1/(epoch - 1/2), WIB-ReLU at twice the pace; the best rate is 0.004. Validation: training plus 1."
    pace = (2 if config.activation == 'wib_relu' else 1) * (1 if config.lr == 0.004 else 0.5)
    return 1 / (pace * (epoch - 0.5)) if split == 'train' else 1 + 1 / (pace * epoch)


def test_twice_as_fast_is_a_ratio_of_a_half():
    results = results_of(arm_grid(('wib_relu', 'relu'), seed=range(4)), hyperbola)
    rows = itertools.product(('cifar10', 'fashion_mnist'), PAPER_ARMS, range(4))
    pace = pd.DataFrame(rows, columns=['dataset', 'arm', 'turn'])
    pace['seconds'] = np.where(pace['arm'] == 'relu', 3.0, 3.3)
    row = s.speed_differences(results, rivals=['relu'], pace=pace).iloc[0]
    assert row['target'] == pytest.approx(1 / 19.5) and (row['n'], row['missed']) == (4, 0)
    assert row['ratio'] == pytest.approx(0.5, rel=0.01)
    assert row['seconds_ratio'] == pytest.approx(1.1 * row['ratio'])
    assert row['seconds_high'] == pytest.approx(1.1 * row['high'])  # turns without scatter add nothing
    pace['seconds'] *= np.exp(0.1 * pace['turn'] * (pace['arm'] == 'relu'))
    noisy = s.speed_differences(results, rivals=['relu'], pace=pace).iloc[0]
    assert noisy['seconds_high'] / noisy['seconds_low'] > 1.2 * row['seconds_high'] / row['seconds_low']
    late = changed(results, "arm == 'relu' and seed == 0", status='diverged')
    assert s.speed_differences(late, rivals=['relu'])[['n', 'missed']].to_numpy().tolist() == [[3, 1]] * 2


def test_at_equal_training_loss_the_pace_cancels():
    "Validation loss is a function of training loss alone here: no difference at equal training loss."
    results = results_of(arm_grid(('wib_relu', 'relu'), seed=range(8)), hyperbola)
    last = s.paired_differences(results, rivals=['relu'], metrics=['valid loss'])
    equal = s.at_equal_loss(results, rivals=['relu']).query("metric == 'valid loss'")
    assert (last['effect'] < -0.02).all() and (equal['effect'].abs() < 0.002).all()


def test_each_arm_at_its_own_fastest_setting():
    results = results_of(arm_grid(('wib_relu', 'relu'), seed=range(2), lr=[0.002, 0.004]), hyperbola)
    targets = s.common_loss(results)
    assert targets['cifar10'] == pytest.approx(1 / 19.5), 'what the slower arm reaches at its faster setting'
    assert set(s.fastest_settings(results, targets)['lr']) == {0.004}
    broken = changed(results, "arm == 'relu' and lr == 0.004 and seed == 1", status='diverged')
    rates = s.fastest_settings(broken, {'cifar10': 0.2}).set_index('arm')['lr']
    assert rates.to_dict() == {'relu': 0.002, 'wib_relu': 0.004}, 'a setting at which a run diverged is out'
    slower = s.common_loss(s.without_diverged(broken))['cifar10']
    assert slower == pytest.approx(2 / 19.5), 'what ReLU reaches where all its runs finished'


# Test images

def test_images_that_differ_widen_the_interval_and_images_alike_do_not():
    rng = np.random.default_rng(0)
    gaps = rng.normal(0, 0.02, (10, 1)) + rng.normal(0, 0.4, (10, 400))
    alike, apart = s.gap_interval(gaps), s.gap_interval(gaps + rng.normal(0, 0.3, (1, 400)))
    width = lambda interval: interval.high - interval.low
    over_seeds = width(s.t_interval(gaps.mean(axis=1)))
    assert over_seeds <= width(alike) * (1 + 1e-12) < 1.2 * over_seeds and width(apart) > 1.5 * over_seeds


@pytest.mark.parametrize('of_seeds, of_images', [(0, 0), (0.02, 0.3), (0, 0.5), (0.05, 0.05)])
def test_the_interval_over_seeds_and_images_covers(of_seeds, of_images):
    "300 worlds with a gap of 0."
    rng = np.random.default_rng(1)
    draw = lambda std, *size: rng.normal(0, std, size)
    worlds = [draw(of_seeds, 10, 1) + draw(of_images, 1, 300) + draw(0.4, 10, 300) for _ in range(300)]
    covered = np.mean([low <= 0 <= high for _, low, high in map(s.gap_interval, worlds)])
    assert 0.95 - 3 * math.sqrt(0.95 * 0.05 / 300) < covered < 0.99


def test_a_bootstrap_of_seeds_and_images_counts_the_noise_three_times():
    "Why `gap_interval` is none: 300 worlds of noise alone, with a gap of 0."
    rng, variances, covered = np.random.default_rng(2), [], []
    for _ in range(300):
        gaps = rng.normal(0, 0.4, (10, 300))
        seeds, images = (rng.multinomial(n, np.full(n, 1 / n), 200) / n for n in gaps.shape)  # weights
        means = (seeds @ gaps * images).sum(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        variances.append(means.var())
        covered.append(low <= 0 <= high)
    assert 2.6 < np.mean(variances) / (0.4**2 / 3000) < 3  # 3 for many seeds
    assert np.mean(covered) > 0.99


def test_differences_over_seeds_and_images():
    "500 test images, no whole number of bytes; the arm gets 10 more of them right at each seed."
    configs = arm_grid(('wib_relu', 'relu'), dataset='cifar10', seed=range(3), epochs=2)
    right = {config.key: np.arange(500) < 400 + config.seed + 10 * (config.activation == 'wib_relu')
             for config in configs}
    correct = pd.DataFrame({'key': list(right), 'bits': [np.packbits(x).tobytes() for x in right.values()]})
    curve = lambda config, epoch, split: -math.log(right[config.key].mean())
    row = s.seeds_and_images(results_of(configs, curve, correct=correct), rivals=['relu', 'elu']).squeeze()
    assert (row['n'], row['n_images'], row['rival']) == (3, 500, 'relu')
    assert [row['difference'], row['low'], row['high']] == pytest.approx(3 * [0.02]), 'the same at each seed'
    assert row['images_low'] < 0.02 < row['images_high']
    assert s.seeds_and_images(results_of(configs, curve)).empty


# Words

def test_no_probability_below_a_thousandth_is_printed():
    row = dict(dataset='cifar10', metric='valid loss', rival='relu', n=9, diverged=1, effect=-0.05,
               effect_low=-0.07, effect_high=-0.03, verdict='better', wins=0.9, p_equivalent=0.002,
               p_claimed=1e-7)
    words = s.in_words(pd.Series(row))
    start = 'CIFAR-10, valid loss against ReLU: -5.0 % (-7.0 to -3.0) over 9 pairs, 1 more diverged; '
    assert words.startswith(f'{start}better')
    assert 'within 2 %: 0.2 %' in words and words.endswith('of a gain of 20 % or more: below 0.1 %.')
