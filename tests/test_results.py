"""The committed full reproduction: whole, described, shipped, and the same numbers when a run of it is run again."""
import hashlib
import random
import re
import subprocess
from dataclasses import fields, replace
from importlib import metadata, util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from wib_nbdev import sweep
from wib_nbdev.claims import committed_verdicts, judge
from wib_nbdev.comparison import best_rate_plan
from wib_nbdev.config import TrainConfig
from wib_nbdev.data import load
from wib_nbdev.training import train

RESULTS = Path(__file__).parents[1] / 'results'
SHIPPED = Path(sweep.__file__).parent / 'results'
pytestmark = pytest.mark.skipif(not (RESULTS / 'runs.csv').exists(), reason='no results are committed')


@pytest.fixture(scope='module')
def results() -> sweep.Results: return sweep.load_results(RESULTS)


def configs(results: sweep.Results) -> list[TrainConfig]:
    names = [each.name for each in fields(TrainConfig)]
    rows = results.runs[names].astype(object).where(results.runs[names].notna(), None).to_dict('records')
    return [TrainConfig(**row) for row in rows]


def test_the_readme_names_each_file_as_it_is():
    page = (RESULTS / 'README.md').read_text()
    said = dict(re.findall(r'^\| `(\w+\.\w+)` .* `([0-9a-f]{64})` \|$', page, re.M))
    assert set(said) == {'runs.csv', 'epochs.parquet', 'layers.parquet', 'verdicts.csv'}
    for name, digest in said.items(): assert hashlib.sha256((RESULTS / name).read_bytes()).hexdigest() == digest, name


def test_sizes_and_the_copies_in_the_package():
    assert sum(path.stat().st_size for path in RESULTS.iterdir()) < 25e6
    for name in ('runs.csv', 'epochs.parquet', 'verdicts.csv'):
        assert (SHIPPED / name).read_bytes() == (RESULTS / name).read_bytes() and (SHIPPED / name).stat().st_size < 1e6


def test_every_run_is_whole_and_has_its_key(results):
    runs = results.runs.set_index('key')
    assert runs.index.is_unique and not runs['sample'].any()
    assert [config.key for config in configs(results)] == list(runs.index)
    counts = results.epochs.groupby('key')['epoch'].max().reindex(runs.index)
    finished = runs['status'] == 'finished'
    assert (counts[finished] == runs.loc[finished, 'epochs']).all() and set(runs['status']) <= {'finished', 'diverged'}
    assert np.isfinite(results.epochs.loc[results.epochs['key'].isin(runs.index[finished]), ['loss', 'accuracy']]).all(axis=None)


def test_the_verdicts_are_those_of_these_runs(results):
    said, now = committed_verdicts(), judge(results)
    pd.testing.assert_frame_equal(said[['id', 'verdict', 'n_runs']], now[['id', 'verdict', 'n_runs']])
    np.testing.assert_allclose(said[['value', 'low', 'high']], now[['value', 'low', 'high']].astype(float), rtol=1e-3, atol=1e-3)


def test_runs_of_no_commit_are_refused_before_anything_is_written():
    spec = util.spec_from_file_location('make', RESULTS / 'make.py')
    make = util.module_from_spec(spec)
    spec.loader.exec_module(make)
    try: assert make.criteria_commit(set())
    except (OSError, subprocess.CalledProcessError, IndexError): pytest.skip('needs git and the history of the project')
    for commit in ('abc1234+', 'abc1234', ''):
        with pytest.raises(ValueError, match=f"commit='{re.escape(commit)}', no descendant"): make.criteria_commit({commit})


def test_they_are_what_was_planned_no_less_and_no_more(results):
    assert set(results.runs['key']) == {config.key for config in [*sweep.full_plan(), *best_rate_plan(results)]}


def test_they_go_back_into_a_store_and_out_again(results, tmp_path):
    few = results.runs['key'].sample(3, random_state=0)
    some = sweep.Results(*(frame[frame['key'].isin(few)] for frame in results))
    some.runs[['torch', 'numpy']] = metadata.version('torch'), metadata.version('numpy')  # a store takes no others
    sweep.write_results(some, tmp_path / 'some')
    assert sweep.restore_runs(tmp_path / 'some', tmp_path / 'store') == 3
    sweep.write_results(sweep.load_results(tmp_path / 'store'), tmp_path / 'again')
    for name in ('epochs.parquet', 'layers.parquet'):
        if (tmp_path / 'some' / name).exists(): assert (tmp_path / 'some' / name).read_bytes() == (tmp_path / 'again' / name).read_bytes()
    before, after = (pd.read_csv(tmp_path / folder / 'runs.csv') for folder in ('some', 'again'))
    pd.testing.assert_frame_equal(before, after, check_like=True)


def test_a_run_chosen_at_random_gives_its_first_epoch_again(results):
    """One epoch on the full data. On another processor sums round otherwise and training amplifies it: the mean training loss of an epoch
    within 2 %, its accuracy within a point, and the validation's, measured at one moment, within three, its loss within 8 %."""
    finished = [config for config in configs(results) if config.lr < 0.1]
    config = random.SystemRandom().choice(finished)
    try: data = load(config.dataset, download=False)
    except FileNotFoundError: pytest.skip('needs the full data sets (WIB_DATA, else data)')
    again = train(replace(config, epochs=1), data, progress=False).epochs.set_index('split')
    first = results.epochs[(results.epochs['key'] == config.key) & (results.epochs['epoch'] == 1)].set_index('split')
    np.testing.assert_allclose(again.loc['train', 'loss'], first.loc['train', 'loss'], rtol=0.02, err_msg=config.key)
    for split, points in (('train', 0.01), ('valid', 0.03)):
        np.testing.assert_allclose(again.loc[split, 'accuracy'], first.loc[split, 'accuracy'], atol=points, err_msg=config.key)
    np.testing.assert_allclose(again.loc['valid', 'loss'], first.loc['valid', 'loss'], rtol=0.08, err_msg=config.key)
