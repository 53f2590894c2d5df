"""The depth experiment: its plan, how rates are chosen and runs paired, and every verdict."""
import math
import re
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from torch.nn.functional import relu

from wib_nbdev import depth
from wib_nbdev.activations import predict_depth
from wib_nbdev.claims import MissingRuns
from wib_nbdev.depth import CELLS, DEPTH_ARMS, FACTORIALS, RATES, SEEDS
from wib_nbdev.style import ARM_STYLE
from wib_nbdev.sweep import Results

SPLITS = ('test', 'train', 'holdout')
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'tools'))
N_ARMS = {'mlp': 12, 'deep_cnn': 12, 'rnn': 10}  # recurrent: tanh, no batch norm, no rescaled layers


def stored(configs, accuracy, status=lambda config: 'finished'):
    "Results as a sweep stores them, with the accuracy that a function gives each run."
    made = dict(commit='d22e768', made_at='2026-11-26 12:00:00', seconds=1.0, torch='2', processor='a')
    runs = pd.DataFrame([{**asdict(each), 'key': each.key, 'status': status(each), **made}
                         for each in configs])
    epochs = [dict(key=config.key, epoch=epoch, split=split, loss=1.0, accuracy=accuracy(config) * epoch / 2)
              for config in configs for epoch in (1, 2) for split in ('train', 'valid')
              if split == 'train' or status(config) == 'finished']
    return Results(runs, pd.DataFrame(epochs), *[pd.DataFrame()] * 3)


def synthetic(accuracy, loss=lambda family, n, arm: 1.0, noise=0.002):
    "A frame of `merge_runs`: every final run, an accuracy and a loss for each cell and arm, with noise."
    generator = np.random.default_rng(0)
    rows = [dict(family=family, depth=n, arm=arm, seed=seed, lr=RATES[0], chosen=True, split=split,
                 accuracy=accuracy(family, n, arm) + noise * generator.standard_normal(),
                 loss=loss(family, n, arm) * math.exp(noise * generator.standard_normal()))
            for (family, n), arm, seed, split in product(CELLS, DEPTH_ARMS, SEEDS, SPLITS)
            if arm not in (('relu_batch_norm', 'relu_unit', 'wib_relu_unit') if family == 'rnn' else 'tanh')]
    return pd.DataFrame(rows)


def verdicts(*arguments, **options):
    return depth.judge_depth(synthetic(*arguments, **options)).set_index('id')['verdict']


def test_the_plan_counts_and_its_arms_are_styled():
    plan = depth.depth_plan()
    cells = sum(N_ARMS[family] for family, _ in CELLS)
    assert len(set(plan)) == len({config.key for config in plan}) == cells * len(RATES) * 3
    assert {config.valid for config in plan} == {'holdout'} and not set(DEPTH_ARMS) - set(ARM_STYLE)
    updates = {config.epochs * -(-config.n_train // config.batch_size) for config in plan}
    assert updates == {400}, 'every run makes as many updates'


def test_each_arm_is_compared_at_its_own_best_rate_with_other_seeds():
    plan = depth.depth_plan([('mlp', 2)], ['relu', 'elu'], seeds=[0, 1])
    best = {'relu': 0.0004, 'elu': 0.0016}
    accuracy = lambda config: 0.9 if config.lr in (best[config.activation], 0.0064) else 0.8
    status = lambda config: 'diverged' if (config.lr, config.seed) == (0.0064, 1) else 'finished'
    results = stored(plan, accuracy, status)
    final = depth.depth_best_plan(results)
    rates = {(config.activation, config.lr) for config in final}
    assert rates == set(best.items()), 'a run that diverged is a guess'
    pairs = {arm: [config.seed for config in final if config.activation == arm] for arm in best}
    assert pairs['relu'] == pairs['elu'] == list(SEEDS) and {config.valid for config in final} == {'test'}

    late = lambda config: 'diverged' if config.seed == 12 else status(config)
    runs = depth.merge_runs(stored([*plan, *final], accuracy, late))
    assert runs.groupby('split').size().to_dict() == {'holdout': 16, 'test': 20, 'train': 20}
    assert runs.query("split != 'holdout'")['chosen'].all()
    assert runs.query("split == 'holdout'")['chosen'].sum() == 4
    wide = depth.side_by_side(runs, 'mlp')
    assert wide.loc[10].tolist() == [0.9, 0.9] and wide.loc[12].tolist() == [0.1, 0.1]
    losses = depth.side_by_side(runs, 'mlp', 'train', 'loss')
    assert losses.loc[12].tolist() == pytest.approx([-math.log(math.log(10))] * 2)


def test_the_arms_of_a_factorial_stand_in_their_places():
    "By theory, after four layers: which second moments are kept, and which means."
    for arms in FACTORIALS.values():
        last = [depth.predict_arm(arm, 4).iloc[-1] for arm in arms]
        assert [row['mean']**2 + row['std']**2 > 0.9 for row in last] == [True, False, True, False]
        assert [row['mean'] > 0.1 for row in last] == [True, True, False, False]


def test_effects_are_separated():
    "A mean worth 2 points a doubling, a second moment worth 3, nothing else."
    zero, one = FACTORIALS['calibrated'][2:], FACTORIALS['calibrated'][::2]
    accuracy = lambda family, n, arm: 0.5 + 0.02 * math.log2(n) * (arm in zero) + 0.03 * (arm in one)
    runs = synthetic(accuracy, noise=0)
    table = depth.effects(runs, 'mlp').set_index(['effect', 'over'])['mean']
    assert table['mean', 8] == pytest.approx(0.06)
    assert table['mean', 'change with depth'] == pytest.approx(0.08)
    assert table['second moment', 'all depths'] == pytest.approx(0.03)
    assert table['second moment', 'change with depth'] == pytest.approx(0, abs=1e-12)
    assert table['mean x second moment'].abs().max() < 1e-12
    with pytest.raises(MissingRuns, match='relu_shrunk'):
        depth.effects(runs[runs['arm'] != 'relu_shrunk'], 'mlp')


def test_every_verdict_of_the_question_can_come():
    zero = (*FACTORIALS['calibrated'][2:], 'wib_relu_unit')
    every = ['mean', 'depth', 'equal_mean', 'equal_depth']
    effect = {'mlp': 0.02, 'deep_cnn': -0.02, 'rnn': 0.0}
    found = verdicts(lambda family, n, arm: 0.5 + effect[family] * math.log2(n) * (arm in zero), noise=0.001)
    for family, verdict in (('mlp', 'holds'), ('deep_cnn', 'does not hold'), ('rnn', 'does not hold')):
        assert found[[f'{each}_{family}' for each in every]].eq(verdict).all(), family
    noisy = verdicts(lambda family, n, arm: 0.5 + 0.005 * (arm in zero), noise=0.03)
    assert noisy[['mean_rnn', 'equal_mean_mlp']].eq('undecided').all()


def test_the_ends_stand_beside_a_change_with_depth():
    "A zero mean that harms less and less: its effect grows, and the reason says that it harms."
    runs = synthetic(lambda family, n, arm: 0.5 - 0.2 / n * (arm == 'wib_relu_unit'), noise=0)
    row = depth.judge_depth(runs).set_index('id').loc['equal_depth_mlp']
    assert row['verdict'] == 'holds' and '; -10.0 at 2, -5.0 at 4' in row['why']


def test_unit_moments_are_judged_apart_from_the_factorial():
    runs = synthetic(lambda family, n, arm: 0.5 + 0.1 * (arm == 'wib_relu_unit'), noise=0)
    table = depth.compare_means(runs).set_index(['family', 'depth', 'comparison'])['mean']
    assert table['mlp', 2, 'same second moment'] == pytest.approx(0.1) and len(table) == 3 * len(CELLS)
    assert table['rnn'].abs().max() < 1e-12, 'there the shrunk column has the same second moments'
    assert table.drop(index='same second moment', level='comparison').abs().max() < 1e-12
    assert 'unit' not in ''.join(depth.decision_chart(runs)['best']), 'they serve the comparison alone'


def test_the_effect_of_the_mean_by_depth_is_that_of_the_factorial():
    runs = synthetic(lambda family, n, arm: 0.5 + 0.01 * n * ('wib' in arm))
    ours = depth.compare_means(runs).query("comparison == 'effect of the mean' and family == 'rnn'")
    theirs = depth.effects(runs, 'rnn').query("effect == 'mean'")
    columns = ['mean', 'low', 'high']
    assert ours[columns].to_numpy() == pytest.approx(theirs[columns].to_numpy()[:3])


def test_runs_at_chance_are_counted():
    runs = synthetic(lambda family, n, arm: 0.1 if (arm, n) == ('relu', 32) else 0.5, noise=0)
    diverged = runs.query("family == 'mlp' and arm == 'elu' and depth == 2 and seed == 10")
    runs.loc[diverged.index, 'accuracy'] = math.nan
    counts = depth.count_at_chance(runs)
    assert counts.loc[('mlp', 'relu'), 32] == 10 and counts.loc[('mlp', 'elu'), 2] == 1
    assert counts.sum().sum() == 21


def test_the_legend_names_each_arm_of_any_family_and_accuracies_are_in_percent():
    figure = depth.figure_depth(synthetic(lambda family, n, arm: 0.7), ['relu', 'relu_batch_norm', 'tanh'])
    drawn = {line.get_label() for ax in figure.axes for line in ax.lines}
    assert {text.get_text() for text in figure.legends[0].texts} == drawn and len(drawn) == 3
    assert all(abs(y - 70) < 1 for ax in figure.axes for line in ax.lines for y in line.get_ydata())


def test_second_moments_are_equal_where_the_plan_says_so():
    "Of the factorial design two layers match, thirty-two do not; rescaled layers do, and recurrent networks."
    arms = (*FACTORIALS['calibrated'], *depth.EQUAL['mlp']['same second moment'])
    moments = depth.initial_signals([('mlp', 2), ('mlp', 32)], arms, [10, 11])
    mean = moments.groupby(['depth', 'arm'])['moment'].mean().unstack('arm')
    for kept, zero in zip(FACTORIALS['calibrated'][:2], FACTORIALS['calibrated'][2:], strict=True):
        far = (mean[zero] - mean[kept]).abs() > math.log10(2)
        assert far.to_dict() == {2: False, 32: True}
    assert mean.loc[2, list(depth.EQUAL['mlp']['same second moment'])].abs().max() < 0.1
    arms = depth.EQUAL['rnn']['same second moment']
    recurrent = depth.initial_signals([('rnn', 56)], arms, [10]).set_index('arm')['moment']
    assert recurrent.max() - recurrent.min() < 0.2


def test_signals_measured_in_random_networks():
    "Gain and rescaling change no cosine of a ReLU network; batch norm's gradient grows on its way back."
    arms = ['relu', 'relu_shrunk', 'relu_unit', 'relu_batch_norm', 'selu']
    found = depth.initial_signals([('mlp', 16)], arms, [0]).set_index('arm')
    contrast, gradient = found['contrast'], found['gradient']
    assert contrast[arms[1:3]].to_numpy() == pytest.approx(contrast['relu'], abs=1e-3)
    shrunk = 15 * math.log10(depth.SHRUNK_GAIN / math.sqrt(2))
    assert gradient['relu_shrunk'] - gradient['relu'] == pytest.approx(shrunk, abs=0.1)
    assert gradient['relu_batch_norm'] > 0.5 > gradient['relu'] and contrast['selu'] > -0.3 > contrast['relu']


def test_a_gain_within_half_a_point_refutes_however_sure_it_is():
    good = ('elu', 'wib_relu', 'wib_relu_centred_calibrated')
    found = verdicts(lambda family, n, arm: 0.5 + 0.003 * (arm in good),
                     lambda family, n, arm: 0.99 if arm in good else 1.0, noise=0.0002)
    assert found[['elu', 'bipolar_rnn', 'bipolar_cnn', 'future_rnn']].eq('does not hold').all()


def test_a_seed_that_one_family_lacks_is_left_out_of_a_verdict_on_two():
    good = lambda family, n, arm: 0.5 + 0.05 * (arm == 'elu') * (n > 5)
    runs = synthetic(good).query("family != 'deep_cnn' or seed != 12")
    row = depth.judge_depth(runs).set_index('id').loc['elu']
    assert row['verdict'] == 'holds' and 'nan' not in row['why']


def test_every_verdict_of_the_others_can_come():
    good = ('elu', 'wib_relu', 'wib_relu_centred_calibrated')
    deep = lambda family, n, arm: 0.5 + 0.05 * (arm in good) * (n > 5 or family == 'rnn')
    loss = lambda family, n, arm: 0.8 if arm == 'wib_relu_centred_calibrated' else 1.0
    names = ['elu', 'bipolar_rnn', 'bipolar_cnn', 'normalisation', 'future_rnn']
    assert verdicts(deep, loss)[names].eq('holds').all()
    why = depth.judge_depth(synthetic(deep, loss)).set_index('id')['why']['bipolar_rnn']
    assert re.search(r'training loss, 28 steps: -(19|20)\.\d %', why), why
    same = verdicts(lambda *_: 0.5)[names]
    assert same.pop('normalisation') == 'holds' and same.eq('does not hold').all()
    worse = verdicts(lambda family, n, arm: 0.5 - 0.05 * (arm in good), loss)
    assert worse[['elu', 'normalisation', 'future_rnn']].eq('does not hold').all()
    assert worse['bipolar_cnn'] == 'holds in part'
    assert verdicts(lambda *_: 0.5, noise=0.05)[['elu', 'bipolar_rnn', 'future_rnn']].eq('undecided').all()
    elsewhere = verdicts(lambda family, n, arm: 0.5 + 0.05 * (arm in good) * (n == 56))
    assert elsewhere['future_rnn'] == 'holds in part'


def test_missing_runs_are_named():
    runs = synthetic(lambda *_: 0.5).query("family == 'mlp' and seed < 13")
    table = depth.judge_depth(runs).set_index('id')
    assert table['verdict'].eq('cannot be tested').all()
    assert '8 needed' in table['why']['mean_mlp'] and 'at depth' in table['why']['predictor']
    with pytest.raises(FileNotFoundError, match='run_depth_plan'): depth.load_runs('nowhere/depth.parquet')


@pytest.fixture
def quick_signals(monkeypatch):
    "Signals that cost nothing, in place of the theory's integrals."
    order = {arm: i for i, arm in enumerate(depth.THEORIES)}
    monkeypatch.setattr(depth, 'signals', lambda arm, n: (order[arm] / 10, (order[arm] * 7 % 5) / 10, 0.0))
    return order


def test_the_predictor_travels_or_not(quick_signals):
    follows = lambda family, n, arm: 0.5 + 0.02 * quick_signals.get(arm, 0)
    assert verdicts(follows)['predictor'] == 'holds'
    turned = lambda family, n, arm: 0.5 + 0.02 * quick_signals.get(arm, 0) * (1 if family == 'mlp' else -1)
    assert verdicts(turned)['predictor'] == 'does not hold'
    sign = lambda family, n: 1 if family == 'mlp' or n % 16 else -1
    half = lambda family, n, arm: 0.5 + 0.02 * quick_signals.get(arm, 0) * sign(family, n)
    assert verdicts(half)['predictor'] == 'undecided'
    once = lambda family, n, arm: follows(family, n, arm) if family == 'mlp' or n == 7 else 0.5
    assert verdicts(once, noise=0)['predictor'] == 'undecided', 'one cell is too few'
    why = depth.judge_depth(synthetic(turned)).set_index('id')['why']['predictor']
    assert why.endswith('Without theory, by mean ranks in fully connected networks: 0%.')


def test_a_tie_is_half_a_hit():
    pairs = pd.DataFrame([('rnn', 7, 'a', 'b', 0.0, 0.0, 0.0), ('rnn', 7, 'a', 'c', 1.0, 0.0, 0.0)],
                         columns=['family', 'depth', 'better', 'worse', 'contrast', 'gradient', 'scale'])
    assert depth.hit_rates(pairs, pairs['contrast'])['hits'].tolist() == [0.75]


def test_theory_of_another_gain_follows_from_homogeneity():
    "A shrunk ReLU predicted by scaling is the shrunk ReLU predicted by itself."
    scaled = depth.predict_arm('relu_shrunk', 5, 0.1)
    direct = predict_depth(relu, depth.SHRUNK_GAIN, 5, 0.1)
    pd.testing.assert_frame_equal(scaled, direct, rtol=1e-4)
    calibrated = depth.predict_arm('wib_relu_calibrated', 5)
    assert calibrated['mean'].abs().max() < 1e-4
    assert calibrated['gradient'].to_numpy() == pytest.approx(1, abs=1e-3)
    ratio = (calibrated['std'] / calibrated['std'].shift()).dropna()
    assert ratio.to_numpy() == pytest.approx(math.sqrt(1 - 1 / math.pi), rel=1e-3)
    assert all(math.isfinite(x) for x in depth.signals('relu', 8))


def test_the_criteria_are_those_committed_before_the_runs(history):
    import merge_results
    runs = pd.concat([depth.load_runs(), depth.load_runs(trial=True)])
    assert merge_results.changed_depth_claims() == []
    merge_results.check_provenance(set(runs['commit']), merge_results.DEPTH_CRITERIA)


@pytest.mark.parametrize('trial', [False, True])
def test_the_committed_runs_are_those_of_the_plan(trial):
    runs, plan = depth.load_runs(trial=trial), depth.trial_plan() if trial else depth.depth_plan()
    chose = runs[runs['split'] == 'holdout']
    assert set(chose['key']) == {config.key for config in plan}
    best = depth.best_rates(runs)
    compared = {(*cell, seed) for cell in zip(best.family, best.depth, best.arm, best.lr, strict=True)
                for seed in SEEDS}
    test = runs[runs['split'] == 'test']
    assert set(zip(test.family, test.depth, test.arm, test.lr, test.seed, strict=True)) == compared


def test_the_committed_signals_are_those_of_the_networks():
    cells, arms = [('mlp', 8), ('rnn', 7)], ['relu', 'wib_relu_centred_calibrated']
    said, order = depth.load_signals(), ['family', 'depth', 'arm', 'seed']
    now = depth.initial_signals(cells, arms, SEEDS[:2]).set_index(order).sort_index()
    pd.testing.assert_frame_equal(said.set_index(order).loc[now.index], now, atol=1e-3)
    assert said.groupby(order[:3])['seed'].nunique().eq(len(SEEDS)).all()
    assert set(said['arm']) == {*depth.THEORIES, *depth.EQUAL['mlp']['same second moment']}


def test_the_chart_advises_another_arm_only_beyond_half_a_point():
    better = lambda family, n, arm: 0.5 + 0.05 * (arm == 'elu') * (n > 5 and family != 'rnn')
    chart = depth.decision_chart(synthetic(better)).set_index('network')
    assert chart['use'].tolist() == ['relu', 'elu', 'elu', 'elu', 'relu']
    assert chart['gain'].iloc[1] == pytest.approx(5, abs=0.3) and chart['as_good'].iloc[1] == ''
    assert chart['yardstick'].abs().max() < 0.3 and chart['as_good'].iloc[0].count(';') == 7


def test_no_advice_where_the_best_harms_at_a_depth():
    mixed = lambda family, n, arm: 0.5 + (0.1 if n < 32 else -0.05) * (arm == 'elu')
    chart = depth.decision_chart(synthetic(mixed, noise=0.0002)).set_index('network')
    assert chart['use'].isna().tolist() == [False, True, False, True, True]
    assert chart.loc['fully connected, 8 to 32', 'by_depth'].endswith(', -5.0')


def test_the_chart_is_tried_on_other_networks():
    plan = depth.trial_plan()
    assert len(plan) == 3 * len(depth.THEORIES) * len(RATES) * 3
    final = depth.depth_best_plan(stored(plan, lambda config: 0.5))
    assert {config.dataset for config in final if config.network == 'mlp'} == {'cifar10'}, 'fields are kept'
    good = {'elu': 0.6, 'selu': 0.604}
    name = lambda config: good.get(config.activation, 0.5)
    tried = depth.merge_runs(stored([*plan, *final], name))
    planned = synthetic(lambda family, n, arm: 0.6 if arm == 'elu' else 0.5)
    chart = depth.decision_chart(planned)
    found = depth.judge_chart(chart, tried)
    assert set(found['advised']) == {'elu'} and set(found['best']) == {'selu'}
    assert found['found'].tolist() == ['right'] * 3
    other = depth.judge_chart(chart.assign(use=['relu', None, 'relu', None, 'relu']), tried)
    assert other['found'].tolist() == ['no advice', 'no advice', 'wrong']


def test_the_chart_chooses_on_held_out_images_and_measures_on_the_test_images():
    runs = synthetic(lambda family, n, arm: 0.5 + 0.05 * (arm == 'elu'))
    runs['accuracy'] += 0.2 * ((runs['split'] == 'holdout') & (runs['arm'] == 'selu'))
    runs['accuracy'] += 0.01 * ((runs['split'] == 'test') & (runs['arm'] == 'selu'))
    chart = depth.decision_chart(runs)
    assert set(chart['best']) == set(chart['use']) == {'selu'}
    assert chart['gain'].to_numpy() == pytest.approx(1, abs=0.3)
