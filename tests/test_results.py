"""The committed runs: whole, with their keys, from descendants of the criteria, and judged as they say."""
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from wib_nbdev import sweep
from wib_nbdev.claims import CLAIMS, judge
from wib_nbdev.config import RESULTS_VERSION

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'tools'))
FOLDERS = [folder for folder in (ROOT / 'wib_nbdev' / 'results', ROOT / 'results_next')
           if (folder / 'runs.csv').exists()]


def test_there_are_committed_runs(): assert FOLDERS


@pytest.fixture(scope='module', params=FOLDERS, ids=lambda folder: folder.name)
def folder(request) -> Path: return request.param


@pytest.fixture(scope='module')
def results(folder) -> sweep.Results: return sweep.load_results(folder)


@pytest.fixture(scope='module')
def current(results) -> sweep.Results:
    "The results, if they are of this version."
    if set(results.runs.get('results_version', [1])) == {RESULTS_VERSION}: return results
    pytest.skip('runs of another version')


def test_every_run_is_whole_and_has_its_key(results):
    runs = results.runs.set_index('key')
    assert runs.index.is_unique and not runs['sample'].any()
    assert set(runs['status']) <= {'finished', 'diverged'}
    counts = results.epochs.groupby('key')['epoch'].max().reindex(runs.index)
    finished = runs['status'] == 'finished'
    assert (counts[finished] == runs.loc[finished, 'epochs']).all()
    numbers = results.epochs.loc[results.epochs['key'].isin(runs.index[finished]), ['loss', 'accuracy']]
    assert np.isfinite(numbers).all(axis=None)


def test_every_run_of_this_version_has_its_weights_steps_and_images(current):
    runs = current.runs.set_index('key')
    assert [config.key for config in sweep.configs_of(current.runs)] == list(runs.index)
    assert runs['weights_last'].str.fullmatch('[0-9a-f]{64}').all()
    assert set(current.steps['key']) == set(runs.index)
    right = (runs['valid'] == 'test') & (runs['status'] == 'finished')
    assert set(current.correct['key']) == set(runs.index[right])


def test_what_a_run_got_right_is_its_accuracy(results):
    if results.correct.empty: pytest.skip('the first round kept no images')
    last = results.epochs.query("split == 'valid'").sort_values('epoch').groupby('key')['accuracy'].last()
    share = lambda bits: np.unpackbits(np.frombuffer(bits, np.uint8)).sum() / 10_000
    right = results.correct.set_index('key')['bits'].map(share)
    pd.testing.assert_series_equal(right, last.reindex(right.index), check_names=False)


def test_runs_descend_from_the_criteria(current, history):
    import merge_results
    merge_results.check_provenance(set(current.runs['commit']))


@pytest.mark.parametrize('commit', ['abc1234+', 'abc1234', ''])
def test_other_runs_are_refused(commit, history):
    import merge_results
    with pytest.raises(SystemExit, match='no descendant of the criteria'):
        merge_results.check_provenance({commit})


def test_the_readme_says_what_was_changed_since_the_criteria(current, history):
    import merge_results
    text = merge_results.readme(current, ['fig12'])
    assert 'was changed since: none; claims added since, so after some of the runs:\nnone.' in text
    for judges, what in merge_results.MENDED.items():
        assert f"{', '.join(judges)}: {what}" in text and {*judges} <= {each.id for each in CLAIMS}
    assert 'number of worlds): fig12.' in text
    for commit in set(current.runs['commit']): assert f"| {merge_results.git('rev-parse', commit)} |" in text


def test_what_the_judges_of_the_criteria_say_otherwise_is_named(monkeypatch):
    import merge_results
    now = pd.DataFrame({'id': [*'abcd'], 'verdict': 'holds', 'worlds': ['', 'in 1 of 2', 'in 1 of 2', ''],
                        'value': [0.1, 0.2, 0.3, 0.4], 'low': np.nan, 'high': np.nan})
    then = now.assign(verdict=['holds', 'undecided', 'holds', 'holds'], value=[0.1 + 1e-9, 0.2, 0.3, 0.41])
    monkeypatch.setattr(merge_results, 'print_then', lambda code: then.drop(index=2).to_csv())
    assert merge_results.judged_otherwise(now, ROOT) == ['b', 'c', 'd']


@pytest.mark.slow
def test_the_judges_of_the_criteria_say_the_same(folder, current, history):
    import merge_results
    assert merge_results.judged_otherwise(judge(current), folder) == []


def test_the_verdicts_are_those_of_these_runs(folder, results):
    path = folder / 'verdicts.csv'
    if not path.exists(): pytest.skip('not judged yet')
    said, now = pd.read_csv(path), judge(results)
    pd.testing.assert_frame_equal(said[['id', 'verdict', 'n_runs']], now[['id', 'verdict', 'n_runs']])


def test_sizes(folder):
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sum(sizes.values()) < 25e6
    outside = ('layers.parquet', 'steps.parquet', 'curves.csv', 'depth_epochs.parquet')  # of the wheel
    assert sum(size for name, size in sizes.items() if name not in outside) < 3e6


def test_they_go_back_into_a_store_and_out_again(current, tmp_path):
    "The runs of this version that are merged can be resumed from: nothing is lost on the way."
    few = current.runs['key'].sample(3, random_state=0)
    some = sweep.Results(*(frame[frame['key'].isin(few)] for frame in current))
    sweep.write_results(some, tmp_path / 'some')
    assert sweep.restore_runs(tmp_path / 'some', tmp_path / 'store') == 3
    sweep.write_results(sweep.load_results(tmp_path / 'store'), tmp_path / 'again')
    for path in (tmp_path / 'some').iterdir():
        assert path.read_bytes() == (tmp_path / 'again' / path.name).read_bytes(), path.name
