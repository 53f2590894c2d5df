"""Claims: each judge gives each verdict that it can, on results made for it; missing runs are named."""
import math
import re
from dataclasses import asdict, replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
from test_statistics import changed, hyperbola, results_of

from wib_nbdev import claims as c
from wib_nbdev.plan import MAIN, PAPER_ARMS, SETTINGS, arm_grid, with_arms
from wib_nbdev.statistics import PUBLISHED
from wib_nbdev.sweep import Results

FEW = ('wib_relu', 'relu', 'relu_pytorch', *c.REPAIRED)  # recorded
ARMS = (*PAPER_ARMS, 'wib_relu_centred', 'relu_compensated', 'relu_pytorch', *c.REPAIRED)
ITERATIONS = [*range(0, 21), *range(25, 500, 25)]
N = {('fashion_mnist', 'train'): 60_000, ('cifar10', 'train'): 50_000}
FROM_RUNS = [each.id for each in c.CLAIMS if each.needs in ('runs', 'layers')]
FOUR = set(c.VERDICTS[:4])
# What a judge cannot say: some criteria have no parts, and counts are exact.
CANNOT = {'rate': {'holds in part'}, 'table1': {'undecided', 'does not hold'}}
HOLD = ('unit_gradient exploding vanishing eq3 eq4 fig3a fig3a_mean fig3b half_zero fig4a fig4_mean '
        'relu_gradient eq7 fig5 uniform')
WITHOUT_RUNS = {**dict.fromkeys(HOLD.split(), 'holds'), 'inference': 'does not hold',
                **dict.fromkeys('zero_one eq5 eq6 fig4_std sqrt3 sqrt5'.split(), 'holds in part')}


def some(*names): return [each for each in c.CLAIMS if each.id in names]


def grids():
    "The main setting, the grid of learning rates on held-out images, and Adam at 0.4."
    main = arm_grid(ARMS, seed=range(10), **SETTINGS['Adam 0.002'])
    rates = arm_grid(PAPER_ARMS, lr=[0.001, 0.002], valid='holdout', seed=range(3))
    return [*main, *rates, *arm_grid(('wib_relu',), lr=0.4, dataset='fashion_mnist', seed=range(3))]


CONFIGS = grids()
NONE = pd.DataFrame()
RUNS = pd.DataFrame([{'key': each.key, **asdict(each), 'status': 'finished'} for each in CONFIGS])
NAMED = with_arms(Results(RUNS, NONE, NONE, NONE, NONE)).runs.set_index('key')
ARM = NAMED['arm'].reindex(RUNS['key']).tolist()


def noise(*words) -> float:
    seed = [sum(map(ord, str(word))) + 97 * i for i, word in enumerate(words)]
    return np.random.default_rng(seed).normal()


def paper_epochs(config, arm, metric, epoch) -> float:
    "A quarter less loss, six points more, faster, smoother; ELU just ahead in training on CIFAR-10."
    split, kind = metric.split()
    best, poor = arm in ('wib_relu', 'wib_relu_centred'), arm == 'relu_pytorch'
    ahead = arm == 'elu' and config.dataset == 'cifar10' and split == 'train'
    little = 1e-4 * noise(config.seed, config.dataset, arm, metric)
    value = PUBLISHED[metric]
    if kind == 'accuracy':
        behind = 0 if best else -0.012 if ahead else 0.1 if poor else 0.06
        return value + 0.01 * (arm == 'wib_relu_centred') - behind + little
    zigzag = -0.01 * (-1) ** epoch * (0.05 if best else 3 if poor else 1)
    falling = 0 if split == 'valid' and best else (2 if best else 3) * math.exp(-epoch)
    factor = 1 if best else 0.98 if ahead else 1.8 if poor else 1.4
    return (value * factor + zigzag + falling) * (1 + little)


def null_epochs(config, arm, metric, epoch) -> float:
    "No arm differs from another; none comes near the published numbers."
    little = 1e-4 * noise(config.seed, config.dataset, metric)
    if metric.endswith('accuracy'): return 0.6 + little
    return (0.9 + 1 / epoch + 0.03 * (-1) ** epoch) * (1 + little)


def open_epochs(config, arm, metric, epoch) -> float:
    "Nothing is decided: each arm has a wide wave of its own over the ten seeds, with a mean of 0."
    i = ARMS.index(arm)
    wave = math.cos(2 * math.pi * (i // 2 + 1) * config.seed / 10 - math.pi / 2 * (i % 2))
    wide = wave if config.valid == 'test' else noise(config)
    if metric.endswith('accuracy'): return PUBLISHED[metric] - 0.02 * (config.lr == 0.4) + 0.1 * wide
    return PUBLISHED[metric] * math.exp(0.4 * wide) * (1 + 2 / epoch + 0.1 * math.exp(wide) * (-1) ** epoch)


def paper_layers(config, arm, layer, iteration) -> dict:
    "Fig. 7 to 11 as the paper tells them."
    fashion, default = config.dataset == 'fashion_mnist', arm == 'relu_pytorch'
    kept = {'wib_relu': 1.0, 'relu_pytorch': 0.1}.get(arm, 0.5)
    gradient = (0.01 if default and iteration <= 200 else 1.0) * (kept if layer == 'conv1' else 1)
    if arm == 'wib_relu':
        near = (0.4 if fashion else 0.65) if layer == 'conv1' else 0.16
        std = 0.9 + 0.1 * (iteration == 5)
        return dict(mean=0.02, std=std, inactive=0.25, near=near, gradient_rms=gradient)
    rest = dict(inactive=0.8, near=0.6 if layer == 'conv1' else 0.8, gradient_rms=gradient)
    if iteration == 0: return dict(mean=0.5, std=0.02 if default else 0.95, **rest)
    height = (0.2 if iteration == 15 else 1.0) * (0.5 if default and not fashion else 1)
    return dict(mean=height, std=3 * height, **rest)


def null_layers(config, arm, layer, iteration) -> dict:
    "Nothing as the paper tells it: no collapse but in WIB-ReLU, which is not centred either."
    swing, wib = (9.0 if arm == 'wib_relu' else 0.1) * (iteration == 5), arm == 'wib_relu'
    start = iteration == 0 and arm == 'relu_pytorch'
    std, near = 1.05 if start else 6 + swing, 0.9 if wib else 0.3
    return dict(mean=5 + swing, std=std, inactive=0.5, near=near, gradient_rms=1.0)


def disagreeing_layers(config, arm, layer, iteration) -> dict:
    "Two seeds as the paper tells it, one not."
    return (paper_layers if config.seed else null_layers)(config, arm, layer, iteration)


def late_layers(config, arm, layer, iteration) -> dict:
    "As the paper tells it at first; then another collapse, and means that drift."
    value = paper_layers(config, arm, layer, 15 if iteration == 300 else iteration)
    return value | {'mean': 2.0} if arm == 'wib_relu' and iteration > 20 else value


def world(epoch_value, layer_value) -> Results:
    epochs, layers = [], []
    for config, arm in zip(CONFIGS, ARM, strict=True):
        for epoch, split in product(range(1, 9), ('train', 'valid')):
            loss, accuracy = (epoch_value(config, arm, f'{split} {kind}', epoch)
                              for kind in ('loss', 'accuracy'))
            n = N.get((config.dataset, split), 10_000) if epoch_value is paper_epochs else 997
            accuracy = round((accuracy - 0.1 * (config.lr == 0.001)) * n) / n
            epochs.append(dict(key=config.key, epoch=epoch, split=split, loss=loss, accuracy=accuracy))
        if not (arm in FEW and config.seed < 3 and config.valid == 'test' and config.lr == 0.002): continue
        for iteration, layer in product(ITERATIONS, c.LAYERS):
            factor = 1 + 1e-3 * noise(config.seed, layer, arm)
            value = {name: x * factor for name, x in layer_value(config, arm, layer, iteration).items()}
            layers.append(dict(key=config.key, iteration=iteration, layer=layer, **value))
    frame = pd.DataFrame(layers)
    near = frame.pop('near')
    columns = ['near_zero_bins_0.5', 'near_zero_bins_-0.35_0.7', 'near_zero_0.5']
    return Results(RUNS, pd.DataFrame(epochs), frame.assign(**dict.fromkeys(columns, near)), NONE, NONE)


def mixed(test):
    "A world of two: the paper's where the test says so, else the other."
    def epochs(config, arm, metric, epoch):
        return (paper_epochs if test(config, metric) else null_epochs)(config, arm, metric, epoch)

    def layers(config, arm, layer, iteration):
        paper, other = (each(config, arm, layer, iteration) for each in (paper_layers, null_layers))
        return {name: (paper if test(config, layer) and test(config, name) else other)[name]
                for name in paper}

    return world(epochs, layers)


MIXTURES = {
    'by data set': lambda config, name: config.dataset == 'fashion_mnist',
    'by metric': lambda config, name: name not in ('train accuracy', 'valid accuracy', 'std', 'gradient_rms'),
    'by layer': lambda config, name: name not in ('conv4', 'pool', 'flatten'),
}


@pytest.fixture(scope='module')
def paper_world(): return world(paper_epochs, paper_layers)


@pytest.fixture(scope='module')
def null_world(): return world(null_epochs, null_layers)


@pytest.fixture(scope='module')
def judged(paper_world, null_world):
    "The verdicts in each world, a column each."
    worlds = {'paper': paper_world, 'null': null_world, 'open': world(open_epochs, disagreeing_layers),
              'late': world(null_epochs, late_layers)}
    worlds |= {name: mixed(test) for name, test in MIXTURES.items()}
    return pd.DataFrame({name: c.judge(each, claims=some(*FROM_RUNS)).set_index('id')['verdict']
                         for name, each in worlds.items()})


@pytest.fixture(scope='module')
def without_runs(): return c.judge().set_index('id')


# The verdicts

@pytest.mark.parametrize('name', FROM_RUNS)
def test_each_judge_gives_each_verdict_that_it_can(judged, name):
    found = judged.loc[name]
    assert found['paper'] == 'holds', found
    assert found['null'] == ('holds in part' if name == 'table1' else 'does not hold'), found
    assert set(found) == FOUR - CANNOT.get(name, set()), found


@pytest.mark.parametrize('name', FROM_RUNS)
def test_missing_runs_are_named(without_runs, name):
    row = without_runs.loc[name]
    assert row['verdict'] == 'cannot be tested' and row['why'].startswith('not run yet: ')
    assert row['n_runs'] == 0 and row['worlds'] == ''


def test_what_needs_no_runs(without_runs):
    found = without_runs['verdict'].drop(FROM_RUNS)
    assert found.to_dict() == WITHOUT_RUNS


def test_claims_are_whole():
    texts = ('place', 'quote', 'reading', 'criterion', 'threshold_from', 'quantity')
    for each in c.CLAIMS:
        assert all(vars(each)[name] for name in texts) and each.theme in c.THEMES, each.id
        assert set(each.varies) <= {'threshold', 'reading', 'at', 'setting', 'near_zero'}, each.id
    judges = {name.removeprefix('judge_') for name in vars(c) if name.startswith('judge_')}
    assert judges == set(c.TEXTS.sections()), 'a section for each judge, and a judge for each section'


def test_intervals_hold_their_value(paper_world):
    frame = c.judge(paper_world).dropna(subset=['low', 'high'])
    assert len(frame) > 30 and ((frame['low'] <= frame['value']) & (frame['value'] <= frame['high'])).all()


# Which runs count

def only(results, keep) -> Results:
    keys = results.runs.loc[keep(results.runs), 'key']
    return Results(*(frame[frame['key'].isin(keys)] if len(frame) else frame for frame in results))


def at_setting(results, name) -> Results:
    "The runs of the main setting, moved to another one."
    runs = results.runs.copy()
    main = (runs['lr'] == 0.002) & (runs['valid'] == 'test')
    keys = {old: f'{name} {old}' for old in runs.loc[main, 'key']}
    moved = Results(*(frame.assign(key=frame['key'].replace(keys)) if len(frame) else frame
                      for frame in results))
    for column, value in SETTINGS[name].items(): moved.runs.loc[main, column] = value
    return moved


def test_the_best_setting_counts_and_is_named(paper_world, null_world):
    "The paper's world at plain SGD, the other in the main setting, where alone `default` is judged."
    moved = at_setting(paper_world, 'SGD 0.4')
    both = Results(*(pd.concat(pair) for pair in zip(null_world, moved, strict=True)))
    epochs = both.epochs.drop_duplicates(['key', 'epoch', 'split'])
    both = both._replace(runs=both.runs.drop_duplicates('key'), epochs=epochs)
    verdicts = c.judge(both, claims=some('fig12', 'fig7', 'loss', 'default')).set_index('id')
    assert verdicts['verdict'].tolist() == ['holds', 'holds', 'holds', 'does not hold']
    assert verdicts.loc['fig12', 'why'].endswith('[SGD 0.4; Adam 0.002: does not hold]')


def test_one_setting_can_be_asked_for(paper_world, null_world):
    moved = at_setting(paper_world, 'SGD 0.4')
    assert c.judge(moved, {**MAIN, **SETTINGS['SGD 0.4']}, claims=some('fig12'))['verdict'].item() == 'holds'
    assert c.judge(moved, MAIN, claims=some('fig12'))['verdict'].item() == 'cannot be tested'


def test_too_few_pairs_are_not_judged(paper_world):
    few = only(paper_world, lambda runs: runs['seed'] < 3)
    verdicts = c.judge(few, claims=some('fig12', 'loss', 'default', 'smooth', 'several', 'speed'))
    assert set(verdicts['verdict']) == {'cannot be tested'}
    assert verdicts['why'].str.contains('3 pairs of seeds, 8 needed').all()


@pytest.mark.parametrize('names', [['conv1'], ['conv1', 'conv2'], list(c.CONVOLUTIONS)])
def test_records_without_some_layers_are_not_judged(paper_world, names):
    some_layers = paper_world._replace(layers=paper_world.layers[paper_world.layers['layer'].isin(names)])
    found = c.judge(some_layers, claims=some('default_start', 'default_variance', 'fig10'))
    assert set(found['verdict']) == {'cannot be tested'} and found['why'].str.contains('recorded layer').all()


def test_a_missing_rival_is_named(paper_world):
    without = only(paper_world, lambda runs: runs['activation'] != 'prelu')
    verdicts = c.judge(without, claims=some('fig12', 'fig13_elu')).set_index('id')
    assert 'prelu' in verdicts.loc['fig12', 'why'] and verdicts.loc['fig13_elu', 'verdict'] == 'holds'


@pytest.mark.parametrize('lost, verdict', [(2, 'holds'), (3, 'undecided')])
def test_diverged_rivals_leave_it_undecided_never_better(paper_world, lost, verdict):
    runs = paper_world.runs.copy()
    gone = (runs['activation'] == 'elu') & (runs['seed'] < lost) & (runs['dataset'] == 'cifar10')
    runs.loc[gone, 'status'] = 'diverged'
    claims = some('fig13_valid', 'loss', 'fig13_elu')
    found = c.judge(paper_world._replace(runs=runs), claims=claims).set_index('id')
    assert found.loc['fig13_valid', 'verdict'] == found.loc['fig13_elu', 'verdict'] == verdict
    assert f'{lost} pairs lost' in found.loc['fig13_valid', 'why'] and found.loc['loss', 'verdict'] == 'holds'


def test_finished_pairs_are_counted_not_finished_runs(paper_world):
    "Eight finished runs of each arm, but only six seeds at which both finished."
    runs = paper_world.runs.copy()
    main = (runs['lr'] == 0.002) & (runs['valid'] == 'test') & (runs['init'] == 'kaiming_normal')
    for activation, seeds in (('wib_relu', (0, 1)), ('relu', (2, 3))):
        runs.loc[main & (runs['activation'] == activation) & runs['seed'].isin(seeds), 'status'] = 'diverged'
    verdicts = c.judge(paper_world._replace(runs=runs), claims=some('smooth', 'equal_loss'))['verdict']
    assert set(verdicts) == {'undecided'}


@pytest.mark.parametrize('name, early, verdict', [
    *((name, "activation == 'wib_relu'", 'undecided')
      for name in ('mitigates', 'fig10', 'fig10_gradient', 'fig11_range', 'corrects')),
    ('fig11_swings', "activation == 'wib_relu'", 'holds in part'),  # its other condition needs no pairs
    ('fig9_improves', "init != 'pytorch_default'", 'undecided'),
    ('fig7_cifar', "dataset == 'cifar10'", 'undecided')])
def test_one_common_seed_decides_nothing(paper_world, name, early, verdict):
    "Some runs have seeds 0 and 1, the others 1 and 2."
    few = only(paper_world, lambda runs: runs['seed'].isin([0, 1]).where(
        runs.eval(early), runs['seed'].isin([1, 2])))
    assert c.judge(paper_world, claims=some(name))['verdict'].item() == 'holds'
    assert c.judge(few, claims=some(name))['verdict'].item() == verdict


def test_a_rate_at_which_a_run_diverged_sets_no_target():
    "At 0.004 ReLU reaches a loss that it reaches nowhere else, but one of its runs there diverged."
    grid = arm_grid(PAPER_ARMS, seed=range(3), lr=[0.002, 0.004], valid='holdout')
    broken = changed(results_of(grid, hyperbola), "arm == 'relu' and lr == 0.004 and seed == 1",
                     status='diverged')
    rows = c.Evidence(broken, MAIN).own_speed('wib_relu')
    assert [(row.n, row.missed) for row in rows] == 8 * [(3, 0)]


def test_runs_that_all_diverged_decide_nothing(paper_world):
    lost = paper_world._replace(runs=paper_world.runs.assign(status='diverged'))
    verdicts = c.judge(lost).set_index('id')['verdict']
    names = ['outperforms', 'loss', 'accuracy', 'speed', 'equal_loss', 'convergence', 'fig12', 'smooth']
    assert set(verdicts[names]) <= {'undecided', 'cannot be tested'}


def test_a_third_data_set_changes_no_verdict(paper_world):
    runs = paper_world.runs.query("dataset == 'cifar10'")
    third = only(paper_world._replace(runs=runs), lambda runs: runs['seed'] >= 0)
    third = Results(*(frame.assign(key='svhn ' + frame['key']) if len(frame) else frame for frame in third))
    third.runs['dataset'] = 'svhn'
    more = Results(*(pd.concat(pair) for pair in zip(paper_world, third, strict=True)))
    one, other = (c.judge(each, MAIN, claims=some(*FROM_RUNS)).drop(columns='worlds')
                  for each in (paper_world, more))
    pd.testing.assert_frame_equal(one, other)


def test_the_runs_of_speed_are_counted_by_data_set(paper_world):
    "Ten pairs of five arms on the one data set, nine on the other."
    short = only(paper_world, lambda runs: ~(runs['dataset'].eq('cifar10') & runs['seed'].eq(9)))
    assert c.judge(short, claims=some('speed'))['n_runs'].item() == 5 * 10 + 5 * 9


def test_why_says_what_was_judged(paper_world, monkeypatch):
    "Intervals where intervals decide; and a gradient that grows, or falls."
    why = c.judge(paper_world, claims=some('fig12_values'))['why'].item()
    assert len(re.findall(r'(?:loss|accuracy) 0\.\d{3} \(0\.\d{3} to 0\.\d{3}\)', why)) == 4
    assert '(it grows)' in c.judge(claims=some('unit_gradient'))['why'].item()
    monkeypatch.setattr(c, 'CENTRED_GAIN', 1.0)
    assert '(it falls)' in c.judge(claims=some('unit_gradient'))['why'].item()


def test_diverged_runs_at_the_printed_rate_count_as_chance(paper_world):
    runs = paper_world.runs.copy()
    runs.loc[runs['lr'] == 0.4, 'status'] = 'diverged'
    row = c.judge(paper_world._replace(runs=runs), claims=some('rate')).iloc[0]
    assert row['value'] == pytest.approx(0.1) and row['verdict'] == 'does not hold' and row['n_runs'] == 3


def test_two_runs_of_a_seed_are_an_error(paper_world):
    again = paper_world.runs.assign(device='cpu', key='again ' + paper_world.runs['key'])
    twice = paper_world._replace(runs=pd.concat([paper_world.runs, again]))
    with pytest.raises(ValueError, match='differ in'): c.judge(twice, claims=some('fig12'))
    with pytest.raises(ValueError, match="at='first'"): c.judge(paper_world, at='first')


# Worlds

def test_robustness_has_a_row_for_each_world_with_runs(paper_world):
    "Here runs have one setting, two readings, two definitions of near zero."
    frame = c.robustness(paper_world)
    counts = frame.groupby('claim').size()
    found = counts[['fig12', 'fig7', 'fig10', 'inference']].tolist()
    assert found == [3 * 2 * 2, 3, 3 * 2, 1]
    assert set(frame['claim']) == {each.id for each in c.CLAIMS}
    table = c.judge(paper_world).set_index('id')
    for name, found in frame.groupby('claim')['verdict']:
        same = (found == table.loc[name, 'verdict']).sum()
        assert table.loc[name, 'worlds'] == f'in {same} of {len(found)}'


def test_a_threshold_can_flip_a_verdict(paper_world):
    frame = c.robustness(paper_world, claims=some('loss', 'fig12'))
    flips = frame.groupby(['claim', 'threshold'])['verdict'].first()
    assert flips['loss'].to_dict() == {0.5: 'holds', 1.0: 'holds', 2.0: 'holds in part'}
    assert set(flips['fig12']) == {'holds'}


def test_another_reading_is_judged_by_its_own_runs(paper_world):
    elu = only(paper_world, lambda runs: runs['activation'].eq('elu') & runs['valid'].eq('test'))
    code = elu._replace(runs=elu.runs.assign(activation='wib_relu_code'))
    code = Results(*(frame.assign(key='code ' + frame['key']) if len(frame) else frame for frame in code))
    more = Results(*(pd.concat(pair) for pair in zip(paper_world, code, strict=True)))
    frame = c.robustness(more, claims=some('loss')).query('threshold == 1 and at == "last"')
    found = frame.set_index('reading')['verdict'].to_dict()
    assert found == {'wib_relu': 'holds', 'wib_relu_centred': 'holds', 'wib_relu_code': 'does not hold'}


@pytest.mark.parametrize('field, other', [('threshold', 0.3), ('at', 'best'), ('near_zero', '|a| < 0.5')])
def test_a_verdict_depends_on_no_choice_that_is_not_declared(paper_world, field, other):
    "With another value of a choice, a claim that does not vary by it says the same."
    layers = paper_world.layers.assign(**{'near_zero_0.5': 0.01})
    evidence = c.Evidence(paper_world._replace(layers=layers), {**MAIN, **SETTINGS['Adam 0.002']})
    free = [each for each in c.CLAIMS if field not in each.varies and each.needs in ('runs', 'layers')]
    for each in free:
        one, two = each.judge(evidence), each.judge(replace(evidence, **{field: other}))
        assert one[4:] == two[4:] and one[:4] == pytest.approx(two[:4], nan_ok=True), each.id


# Small things

def test_averages_weigh_iterations_not_records():
    "Every iteration to 10, then every tenth: a value of 1 at first, of 0 after."
    config = CONFIGS[0]
    keys = ['a', 'b']
    runs = pd.DataFrame([{**asdict(replace(config, seed=i)), 'key': key, 'arm': 'relu', 'status': 'finished'}
                         for i, key in enumerate(keys)])
    iterations = [*range(11), *range(20, 101, 10)]
    layers = pd.DataFrame([dict(key=key, iteration=i, layer=layer, mean=float(i <= 10))
                           for key, i, layer in product(keys, iterations, c.LAYERS)])
    evidence = c.Evidence(Results(runs, NONE, layers, NONE, NONE), MAIN)
    assert evidence.averages('relu', config.dataset, 'mean')['conv1'].tolist() == pytest.approx([0.15, 0.15])
