"""Notebook 11: every judge in a world as the paper describes it, in a world where nothing it says is so, and without runs."""
import math
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pandas as pd
import pytest

from wib_nbdev import claims as c
from wib_nbdev.comparison import MAIN, PUBLISHED, RIVALS
from wib_nbdev.sweep import Results, arm_grid, with_arms

ARMS = ('wib_relu', *RIVALS, 'relu_pytorch', 'relu_sqrt3', 'relu_gain_sqrt3')
LAYERS = (*c.CONVOLUTIONS, 'pool', 'flatten', 'dense')
ITERATIONS = [*range(0, 21), *range(25, 500, 25)]
ONE_LAYER = {'fig3a': 'holds', 'fig3b': 'holds', 'eq5': 'holds in part', 'eq6': 'holds in part', 'fig4_std': 'holds in part',
             'fig4_mean': 'holds', 'fig5': 'holds', 'zero_one': 'holds in part', 'sqrt3': 'holds in part', 'sqrt5': 'holds in part'}
FROM_RUNS = [claim.id for claim in c.CLAIMS if claim.needs in ('runs', 'layers')]


def some(names): return [claim for claim in c.CLAIMS if claim.id in names]


def grids():
    "The main grid, the grid of learning rates on held-out images, and Adam at 0.4."
    main = arm_grid(ARMS)
    rates = arm_grid(('wib_relu', *RIVALS), lr=[0.001, 0.004], valid='holdout', seed=range(2))
    return [*main, *rates, *arm_grid(('wib_relu',), lr=0.4, dataset='fashion_mnist', seed=range(2))]


@cache
def draws(seed: int, cifar: bool) -> np.ndarray: return np.random.default_rng([seed, cifar]).normal(0, 1, 997)


def noise(config, place: int = 0) -> float: return draws(config.seed, config.dataset == 'cifar10')[place % 997]


def paper_epochs(config, arm, metric, epoch) -> float:
    "Fig. 12 and 13 as the paper tells them: WIB-ReLU a quarter less loss, six points more, faster, smoother; ELU just ahead in training."
    split, kind = metric.split()
    wib, ahead = arm == 'wib_relu', arm == 'elu' and config.dataset == 'cifar10' and split == 'train'
    value = PUBLISHED[metric] if config.lr == 0.004 or config.lr == 0.4 else 0.9 * PUBLISHED[metric]
    if kind == 'accuracy': return value - (0 if wib else -0.002 if ahead else 0.06 if arm != 'relu_pytorch' else 0.1) + 1e-4 * noise(config)
    zigzag = 0.01 * (-1) ** epoch * (not wib) * (split == 'valid')
    falling = (2 if wib else 3) * math.exp(-epoch / 2)
    return (value * (1 if wib else 0.98 if ahead else 1.35) + zigzag + falling) * (1 + 1e-3 * noise(config))


def null_epochs(config, arm, metric, epoch) -> float:
    "No arm differs from another but by noise; none comes near the published numbers."
    value = 0.6 if metric.endswith('accuracy') else 0.9 + 1 / epoch
    return value - 0.1 * (config.lr == 0.001) + 0.002 * noise(config, 31 * sum(map(ord, arm)) + 7 * epoch + sum(map(ord, metric)))


def paper_layers(config, arm, layer, iteration) -> dict:
    "Fig. 7 to 11 as the paper tells them."
    small = 0.5 if config.dataset == 'cifar10' and arm == 'relu_pytorch' else 1
    if arm == 'wib_relu': return dict(mean=0.02, std=0.9, inactive=0.25, near=0.25)
    shares = dict(inactive=0.8, near=0.6 if layer == 'conv1' else 0.8)
    if iteration == 0: return dict(mean=0.5, std=0.02 if arm == 'relu_pytorch' else 1.0, **shares)
    height = 0.2 if iteration == 15 else 1.0
    return dict(mean=height * small, std=3 * height * small, **shares)


def null_layers(config, arm, layer, iteration) -> dict:
    "Nothing as the paper tells it: no default network near the numbers, no collapse but in WIB-ReLU's, which is not centred either."
    swing = 3 * (iteration == 5) if arm == 'wib_relu' else 0.1 * (iteration == 5)
    wib = arm == 'wib_relu'
    return dict(mean=(2 if wib else 5) + swing, std=(1 if wib else 6) + swing, inactive=0.5, near=0.6 if wib else 0.3)


def world(epoch_value, layer_value) -> Results:
    results = with_arms(Results(pd.DataFrame([{'key': config.key, **asdict(config), 'status': 'finished'} for config in grids()]),
                                pd.DataFrame(), pd.DataFrame()))
    arm_of = results.runs.set_index('key')['arm']
    epochs, layers = [], []
    for config in grids():
        arm, main = arm_of[config.key], config.valid == 'test' and config.lr == 0.004
        for epoch in range(1, config.epochs + 1):
            epochs += [dict(key=config.key, epoch=epoch, split=split, seconds=1.0,
                            **{kind: epoch_value(config, arm, f'{split} {kind}', epoch) for kind in ('loss', 'accuracy')})
                       for split in ('train', 'valid')]
        if main and config.seed < 2 and arm in ('wib_relu', 'relu_pytorch', 'relu_sqrt3', 'relu_gain_sqrt3'):
            layers += [dict(key=config.key, iteration=iteration, layer=layer, **layer_value(config, arm, layer, iteration))
                       for iteration in ITERATIONS for layer in LAYERS]
    frame = pd.DataFrame(layers)
    frame['near_zero_bins_0.5'] = frame['near_zero_bins_-0.35_0.7'] = frame.pop('near')
    return results._replace(epochs=pd.DataFrame(epochs), layers=frame)


@pytest.fixture(scope='module')
def paper_world(): return world(paper_epochs, paper_layers)


@pytest.fixture(scope='module')
def null_world(): return world(null_epochs, null_layers)


@pytest.fixture(scope='module')
def in_paper_world(paper_world): return c.judge(paper_world).set_index('id')


@pytest.fixture(scope='module')
def in_null_world(null_world): return c.judge(null_world, claims=some(FROM_RUNS)).set_index('id')


@pytest.fixture(scope='module')
def without_runs(): return c.judge().set_index('id')


# The claims themselves

def test_a_claim_is_whole():
    assert len({claim.id for claim in c.CLAIMS}) == len(c.CLAIMS) >= 30
    for claim in c.CLAIMS:
        assert all(getattr(claim, name) for name in ('id', 'place', 'quote', 'reading', 'criterion', 'quantity')), claim.id
        assert claim.needs in ('theory', 'simulation', 'runs', 'layers', 'none') and claim.judge.__doc__


def test_a_claim_cannot_be_changed():
    with pytest.raises(AttributeError): c.CLAIMS[0].criterion = 'something easier'


# The worlds

@pytest.mark.parametrize('name', FROM_RUNS)
def test_holds_in_the_papers_world(in_paper_world, name):
    assert in_paper_world.loc[name, 'verdict'] == 'holds', in_paper_world.loc[name, 'why']
    assert in_paper_world.loc[name, 'n_runs'] > 0


@pytest.mark.parametrize('name', FROM_RUNS)
def test_does_not_hold_in_a_world_without_it(in_null_world, name):
    assert in_null_world.loc[name, 'verdict'] == 'does not hold', in_null_world.loc[name, 'why']


@pytest.mark.parametrize('name', FROM_RUNS)
def test_cannot_be_tested_without_runs(without_runs, name):
    assert without_runs.loc[name, 'verdict'] == 'cannot be tested'
    assert without_runs.loc[name, 'why'].startswith('not run yet: ') and without_runs.loc[name, 'n_runs'] == 0


@pytest.mark.parametrize('name, verdict', ONE_LAYER.items())
def test_what_needs_no_runs(without_runs, in_paper_world, name, verdict):
    assert without_runs.loc[name, 'verdict'] == verdict, without_runs.loc[name, 'why']
    pd.testing.assert_series_equal(without_runs.loc[name], in_paper_world.loc[name])


def test_every_claim_is_in_one_of_these_groups(): assert {*FROM_RUNS, *ONE_LAYER, 'inference'} == {claim.id for claim in c.CLAIMS}


def test_intervals_hold_their_value(in_paper_world, in_null_world):
    for frame in (in_paper_world, in_null_world):
        known = frame.dropna(subset=['low', 'high'])
        assert ((known['low'] <= known['value'] + 1e-12) & (known['value'] <= known['high'] + 1e-12)).all()


# Which runs count

def only(results, keep) -> Results:
    keys = results.runs.loc[keep(results.runs), 'key']
    return Results(*(frame[frame['key'].isin(keys)] for frame in results))


def test_other_set_ups_do_not_count(paper_world, null_world, in_paper_world):
    "Runs of another learning rate, in which nothing holds, change no verdict."
    names = ['fig7', 'fig10', 'fig11_swings', 'default', 'fig12_values', 'fig13_elu', 'loss']
    other = [replace(config, lr=0.002) for config in arm_grid(ARMS)]
    keys = {config.key: changed.key for config, changed in zip(arm_grid(ARMS), other, strict=True)}
    moved = only(null_world, lambda runs: runs['key'].isin(keys))
    moved = Results(*(frame.assign(key=frame['key'].map(keys)) for frame in moved))
    mixed = Results(*(pd.concat(pair) for pair in zip(paper_world, moved._replace(runs=moved.runs.assign(lr=0.002)), strict=True)))
    pd.testing.assert_frame_equal(c.judge(mixed, claims=some(names)).set_index('id'), in_paper_world.loc[names])


def test_too_few_seeds_decide_nothing(paper_world):
    few = only(paper_world, lambda runs: runs['seed'] < 3)
    verdicts = c.judge(few, claims=some(['fig12', 'loss', 'default', 'smooth', 'outperforms'])).set_index('id')
    assert set(verdicts['verdict']) == {'cannot be tested'}
    assert '3 pairs of seeds, 8 needed' in verdicts.loc['fig12', 'why']
    assert c.judge(few, min_pairs=3, claims=some(['loss']))['verdict'].tolist() == ['holds']


def test_one_data_set_is_half_the_claim(paper_world, null_world):
    "The paper's world on Fashion-MNIST, the other on CIFAR-10."
    halves = [only(paper_world, lambda runs: runs['dataset'] == 'fashion_mnist'),
              only(null_world, lambda runs: runs['dataset'] == 'cifar10')]
    mixed = Results(*(pd.concat(pair) for pair in zip(*halves, strict=True)))
    names = ['default', 'convergence', 'smooth', 'loss', 'accuracy', 'outperforms', 'fig11_swings']
    assert set(c.judge(mixed, claims=some(names))['verdict']) == {'holds in part'}


def test_the_abstract_is_judged_at_each_arms_own_best_rate(paper_world, in_paper_world):
    "Held-out images send WIB-ReLU to another rate than the main one, where it is worse than all rivals."
    at_best = {config.key: replace(config, lr=0.001).key for config in arm_grid(('wib_relu',))}
    moved = only(paper_world, lambda runs: runs['key'].isin(at_best))
    runs = pd.concat([paper_world.runs, moved.runs.assign(key=moved.runs['key'].map(at_best), lr=0.001)])
    worse = moved.epochs.assign(key=moved.epochs['key'].map(at_best), accuracy=moved.epochs['accuracy'] - 0.3)
    held_out = runs.query("arm == 'wib_relu' and valid == 'holdout' and lr == 0.001")['key']
    epochs = paper_world.epochs.copy()
    epochs.loc[epochs['key'].isin(held_out), 'accuracy'] = 0.99
    results = Results(runs, pd.concat([epochs, worse]), paper_world.layers)
    found = c.judge(results, claims=some(['outperforms', 'accuracy'])).set_index('id')
    assert found.loc['outperforms', 'verdict'] == 'does not hold' and found.loc['outperforms', 'value'] == 0
    assert 'Fashion-MNIST, WIB-ReLU with adam 0.001: better than no rival' in found.loc['outperforms', 'why']
    assert in_paper_world.loc['outperforms', 'verdict'] == found.loc['accuracy', 'verdict'] == 'holds'


def test_a_missing_rival_is_named(paper_world):
    without = only(paper_world, lambda runs: runs['arm'] != 'prelu')
    verdicts = c.judge(without, claims=some(['fig12', 'fig13_elu'])).set_index('id')
    assert 'prelu on fashion_mnist: 0 pairs of seeds' in verdicts.loc['fig12', 'why'] and verdicts.loc['fig13_elu', 'verdict'] == 'holds'


def test_lost_seeds_are_warned_of_where_enough_are_left(paper_world):
    without = only(paper_world, lambda runs: ~((runs['arm'] == 'prelu') & (runs['seed'] == 0)))
    with pytest.warns(UserWarning, match='1 seeds have no pair'):
        assert c.judge(without, claims=some(['fig12'])).loc[0, 'verdict'] != 'cannot be tested'


def test_records_too_thin_for_a_window(paper_world):
    thin = paper_world._replace(layers=paper_world.layers[paper_world.layers['iteration'] % 25 == 0])
    verdicts = c.judge(thin, claims=some(['fig9_swings', 'fig8'])).set_index('id')
    assert '10 or more recorded iterations from 0 to 20' in verdicts.loc['fig9_swings', 'why']
    assert verdicts.loc['fig8', 'verdict'] == 'holds'


def test_another_reading_is_judged_by_its_own_runs(paper_world):
    "ELU taken for WIB-ReLU: in the paper's world it reaches nothing."
    assert c.judge(paper_world, wib='elu', claims=some(['fig12_values']))['verdict'].tolist() == ['does not hold']
    assert c.judge(paper_world, wib='silu', claims=some(['fig12_values']))['why'].str.contains('silu on fashion_mnist').all()


def test_a_wide_interval_is_no_proof(null_world):
    "So much noise that the interval reaches 20 %: it must not hold for that."
    rng = np.random.default_rng(0)
    epochs = null_world.epochs.assign(loss=null_world.epochs['loss'] * np.exp(rng.normal(0, 0.5, len(null_world.epochs))))
    verdict = c.judge(null_world._replace(epochs=epochs), claims=some(['loss']))
    assert verdict['low'].iloc[0] < -0.2 and verdict['verdict'].iloc[0] == 'does not hold'


@pytest.mark.parametrize('early', [False, True])
def test_diverged_runs_at_a_rate_count_as_chance(paper_world, early):
    runs, epochs = paper_world.runs.copy(), paper_world.epochs
    runs.loc[runs['lr'] == 0.4, 'status'] = 'diverged'
    gone = epochs['key'].isin(runs.loc[runs['lr'] == 0.4, 'key'])
    if early: epochs = epochs[~gone | (epochs['epoch'] == 1) & (epochs['split'] == 'train')]
    row = c.judge(paper_world._replace(runs=runs, epochs=epochs), claims=some(['rate'])).iloc[0]
    assert row['value'] == pytest.approx(0.1) and row['verdict'] == 'does not hold' and row['n_runs'] == 2


def test_one_reading_must_meet_the_whole_criterion(paper_world):
    "Fig. 9: standard deviations of one in one reading of the gain and means of a half in the other are not both in either."
    layers = paper_world.layers.merge(paper_world.runs[['key', 'arm']], on='key')
    start = layers['iteration'] == 0
    layers.loc[start & (layers['arm'] == 'relu_sqrt3'), 'mean'] = 3.0
    layers.loc[start & (layers['arm'] == 'relu_gain_sqrt3'), 'std'] = 9.0
    row = c.judge(paper_world._replace(layers=layers.drop(columns='arm')), claims=some(['fig9_start'])).iloc[0]
    assert row['verdict'] == 'holds in part', row['why']


def test_the_default_is_judged_at_the_epoch_asked_for(paper_world):
    "Kaiming's runs spoilt in their last epoch: then the default is better there, and worse at the best."
    spoilt = paper_world.runs.query("arm == 'relu'")['key']
    epochs = paper_world.epochs.copy()
    epochs.loc[epochs['key'].isin(spoilt) & (epochs['epoch'] == 20), 'accuracy'] = 0.1
    last, best = (c.judge(paper_world._replace(epochs=epochs), claims=some(['default']), at=at).iloc[0] for at in ('last', 'best'))
    assert (last['verdict'], best['verdict']) == ('does not hold', 'holds') and last['value'] < 0 < best['value']


def test_a_single_run_of_a_rival_does_not_stand_in_the_way(paper_world):
    runs = paper_world.runs
    gone = (runs['arm'] == 'elu') & (runs['dataset'] == 'fashion_mnist') & (runs['seed'] > 0)
    row = c.judge(paper_world._replace(runs=runs[~gone]), claims=some(['fig12_values'])).iloc[0]
    assert row['verdict'] == 'holds'


def test_the_same_runs_twice_are_not_more_evidence(paper_world):
    again = paper_world.runs.assign(device='cpu', key='again-' + paper_world.runs['key'])
    twice = paper_world._replace(runs=pd.concat([paper_world.runs, again]))
    with pytest.raises(ValueError, match='differ in device'): c.judge(twice, claims=some(['smooth']))


# Small things

@pytest.mark.parametrize('tests, verdict', [((True,), 'holds'), ((True, False), 'holds in part'), ((False, False), 'does not hold')])
def test_grade(tests, verdict): assert c.grade(*tests) == verdict


@pytest.mark.parametrize('values, fall', [([1, 2, 3], 0), ([2, 1, 4], 0.5), ([1, 10, 5, 1, 10], 0.9), ([0, 0], 0)])
def test_largest_fall(values, fall): assert c.largest_fall(values) == pytest.approx(fall)


def test_roughness_of_lines_and_zigzags():
    epochs = lambda loss: pd.DataFrame(dict(key='a', epoch=range(len(loss)), split='valid', loss=loss))
    rough = lambda loss: c.roughness(Results(pd.DataFrame(), epochs(loss), pd.DataFrame())).iloc[0]
    assert rough([5.0, 4, 3, 2]) == pytest.approx(0)
    assert rough([1.0, 2, 1, 2]) == pytest.approx(1)


def test_summary_and_table_say_every_verdict(in_paper_world):
    verdicts = in_paper_world.reset_index()
    summary, table = c.summary(verdicts), c.as_markdown(verdicts)
    for name, verdict in zip(verdicts['id'], verdicts['verdict'], strict=True):
        assert name in summary and any(f'`{name}`' in line and verdict in line for line in table.splitlines())
    assert 'runs that these results do not hold' not in summary and table.count('\n') == len(verdicts) + 1
    assert f'Of {len(verdicts)} claims: ' in summary


def test_every_claim_stands_in_the_picture(in_paper_world):
    ax = c.plot_verdicts(in_paper_world.reset_index())
    assert sorted(text.get_text() for text in ax.texts) == sorted(in_paper_world.index)
    assert [bar.get_height() for bar in ax.patches] == [(in_paper_world['verdict'] == verdict).sum() for verdict in c.VERDICTS]


def test_main_is_the_papers_set_up():
    config = arm_grid(('wib_relu',), seed=0, dataset='cifar10')[0]
    assert {name: getattr(config, name) for name in MAIN} == MAIN


def test_the_epoch_can_be_the_best(paper_world):
    "Losses that rise in the last epoch, for WIB-ReLU alone: it loses there, and not at the best epochs."
    wib = set(paper_world.runs.loc[paper_world.runs['arm'] == 'wib_relu', 'key'])
    last = (paper_world.epochs['epoch'] == paper_world.epochs['epoch'].max()) & paper_world.epochs['key'].isin(wib)
    spoilt = paper_world._replace(epochs=paper_world.epochs.assign(loss=paper_world.epochs['loss'].where(~last, 9.0)))
    verdict = {at: c.judge(spoilt, at=at, claims=some(['loss'])).loc[0, 'verdict'] for at in ('last', 'best')}
    assert verdict == {'last': 'does not hold', 'best': 'holds'}
    with pytest.raises(ValueError, match="at='first'"): c.judge(spoilt, at='first')


def test_what_is_told_for_comparison_only_is_not_needed(paper_world):
    without = only(paper_world, lambda runs: runs['arm'] != 'relu_pytorch')
    row = c.judge(without, claims=some(['fig11_swings'])).iloc[0]
    assert row['verdict'] == 'holds' and 'default' not in row['why']
    assert 'default' in c.judge(paper_world, claims=some(['fig11_swings'])).loc[0, 'why']


def test_the_mark():
    found = lambda *verdicts: c.mark(pd.DataFrame({'id': c.PROMISES, 'verdict': verdicts}))
    assert found('holds', 'holds') == '[Re]' and found('holds', 'holds in part') == '[Re, in part]'
    assert found('holds in part', 'does not hold') == '[¬Re]' and found('holds', 'cannot be tested') == '[Re, unfinished]'
