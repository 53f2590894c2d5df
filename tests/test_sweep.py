"""The store under fire: real drivers killed, real workers killed, full disks, spoilt files, two drivers, Ctrl-C, and a Dask cluster."""
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from wib_nbdev import sweep
from wib_nbdev.config import TrainConfig

# Small but real: the embedded sample, one epoch.
CONFIGS = sweep.grid(sample=True, epochs=1, batch_size=250, seed=range(3), activation=['relu', 'wib_relu'], dataset='fashion_mnist')
DRIVER = '''
import sys
from wib_nbdev import sweep
if __name__ == '__main__':
    configs = sweep.grid(sample=True, epochs=1, batch_size=250, seed=range(3), activation=['relu', 'wib_relu'], dataset='fashion_mnist')
    sweep.run_sweep(configs, sys.argv[1], n_jobs=int(sys.argv[2]), progress=False)
    print('done')
'''


def numbers(results: sweep.Results) -> pd.DataFrame:
    "What a sweep measured, without what differs from one execution to the next."
    return results.epochs.drop(columns='seconds').sort_values(['key', 'epoch', 'split']).reset_index(drop=True)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory) -> pd.DataFrame:
    return numbers(sweep.run_sweep(CONFIGS, tmp_path_factory.mktemp('undisturbed'), n_jobs=1, progress=False))


@pytest.fixture
def driver(tmp_path) -> Path:
    path = tmp_path / 'driver.py'
    path.write_text(DRIVER)
    return path


def start(driver: Path, store: Path, n_jobs: int = 1, **env: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, driver, store, str(n_jobs)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, env={**os.environ, **env})


def runs_in(store: Path) -> list[Path]: return sorted(store.glob('*.parquet'))


def test_undisturbed(undisturbed):
    assert undisturbed['key'].nunique() == len(CONFIGS) and set(undisturbed['split']) == {'train', 'valid'}


def test_numbers_do_not_depend_on_workers_or_order(undisturbed, tmp_path):
    results = sweep.run_sweep(CONFIGS[::-1], tmp_path, n_jobs=2, progress=False)
    pd.testing.assert_frame_equal(numbers(results), undisturbed, check_exact=True)


def test_a_finished_run_is_not_computed_again(undisturbed, tmp_path):
    sweep.run_sweep(CONFIGS, tmp_path, n_jobs=1, progress=False)
    before = {path: path.stat().st_mtime_ns for path in runs_in(tmp_path)}
    results = sweep.run_sweep(CONFIGS + CONFIGS[:2], tmp_path, n_jobs=1, progress=False)
    assert {path: path.stat().st_mtime_ns for path in runs_in(tmp_path)} == before
    assert len(results.runs) == len(CONFIGS)


def test_driver_killed_at_random_moments(driver, tmp_path, undisturbed):
    "SIGKILL, twenty times or until the sweep is through: what is in the store stays whole, and the end equals an undisturbed sweep."
    store, moment, seen = tmp_path / 'store', random.Random(0), set()
    for _ in range(20):
        process = start(driver, store)
        time.sleep(moment.uniform(0.5, 5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        there = {path.stem for path in runs_in(store)}
        for path in runs_in(store): sweep.read_run(path)
        assert seen <= there
        seen = there
    process = start(driver, store)
    assert process.communicate()[0].strip() == 'done' and process.returncode == 0
    pd.testing.assert_frame_equal(numbers(sweep.load_results(store)), undisturbed, check_exact=True)
    assert not list(store.glob('*.tmp')), 'leftovers of killed drivers are cleared by the next one'


def children(pid: int) -> list[int]:
    "The process's descendants, as Linux lists them."
    found = []
    for task in Path(f'/proc/{pid}/task').glob('*/children'):
        for child in task.read_text().split(): found += [int(child), *children(int(child))]
    return found


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='finds worker processes through /proc')
def test_worker_killed(driver, tmp_path, undisturbed):
    store = tmp_path / 'store'
    process = start(driver, store, n_jobs=2)
    deadline = time.time() + 60
    while not runs_in(store) and time.time() < deadline: time.sleep(0.02)
    commands = {pid: Path(f'/proc/{pid}/cmdline').read_bytes() for pid in children(process.pid)}
    workers = [pid for pid, words in commands.items() if b'loky' in words and b'tracker' not in words]
    os.kill(workers[0], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out.strip() == 'done', err
    pd.testing.assert_frame_equal(numbers(sweep.load_results(store)), undisturbed, check_exact=True)


def test_ctrl_c(driver, tmp_path, undisturbed):
    store = tmp_path / 'store'
    process = start(driver, store, n_jobs=2)
    deadline = time.time() + 60
    while not runs_in(store) and time.time() < deadline: time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.search(r'interrupted: \d of 6 runs are in .*; run the same sweep again to go on', err), err
    for path in runs_in(store): sweep.read_run(path)
    resumed = sweep.run_sweep(CONFIGS, store, n_jobs=1, progress=False)
    pd.testing.assert_frame_equal(numbers(resumed), undisturbed, check_exact=True)


def test_disk_full(driver, tmp_path, undisturbed):
    "A real full disk: a tmpfs of 64 KiB in a mount namespace of its own."
    probe = subprocess.run(['unshare', '-rm', 'true'], capture_output=True)
    if probe.returncode: pytest.skip('this system lets no user make a mount namespace')
    store, kept = tmp_path / 'store', tmp_path / 'kept'
    store.mkdir()
    kept.mkdir()
    script = (f'mount -t tmpfs -o size=64k tmpfs {store} && dd if=/dev/zero of={store}/ballast bs=1k count=52 status=none; '
              f'{sys.executable} {driver} {store} 1; code=$?; cp {store}/*.parquet {kept}; ls {store} >&2; exit $code')
    run = subprocess.run(['unshare', '-rm', 'sh', '-c', script], capture_output=True, text=True)
    assert run.returncode != 0 and 'done' not in run.stdout
    assert 'No space left on device' in run.stderr and 'it goes on where it was' in run.stderr
    assert '.tmp' not in run.stderr.splitlines()[-1]
    for path in runs_in(kept): sweep.read_run(path)
    resumed = sweep.run_sweep(CONFIGS, kept, n_jobs=1, progress=False)
    pd.testing.assert_frame_equal(numbers(resumed), undisturbed, check_exact=True)


@pytest.fixture(scope='module')
def one_run(tmp_path_factory) -> Path:
    store = tmp_path_factory.mktemp('one')
    sweep.run_sweep(CONFIGS[:1], store, n_jobs=1, progress=False)
    return runs_in(store)[0]


def spoil(content: bytes, how: str, chance: random.Random) -> bytes:
    if how == 'empty': return b''
    if how == 'truncated': return content[:chance.randrange(1, len(content))]
    if how == 'text': return b'not a parquet file'
    at = chance.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1:]


@pytest.mark.parametrize('how', ['empty', 'truncated', 'text', 'flipped'])
def test_spoilt_file_is_named_or_harmless(one_run, tmp_path, how):
    "A spoilt file is either refused by name, or its numbers are those that were written: no change gets through."
    content, chance, good = one_run.read_bytes(), random.Random(how), sweep.read_run(one_run)
    refused = 0
    for trial in range(60):
        path = tmp_path / str(trial) / one_run.name
        path.parent.mkdir()
        path.write_bytes(spoil(content, how, chance))
        try: row = sweep.read_run(path)
        except sweep.DamagedRun as error:
            assert str(path) in str(error) and 'delete it and run the sweep again' in str(error)
            refused += 1
        else: assert row == good
    assert refused >= (10 if how == 'flipped' else 60)  # a flipped bit in padding or statistics may change nothing


def test_spoilt_file_is_set_aside_and_run_again(one_run, tmp_path):
    path = tmp_path / one_run.name
    path.write_bytes(one_run.read_bytes()[:-40])
    with pytest.warns(UserWarning, match='was set aside'): results = sweep.run_sweep(CONFIGS[:1], tmp_path, n_jobs=1, progress=False)
    assert len(results.runs) == 1 and path.with_suffix('.damaged').exists()


def test_file_under_another_name_is_refused(one_run, tmp_path):
    path = tmp_path / f'{CONFIGS[1].key}.parquet'
    path.write_bytes(one_run.read_bytes())
    with pytest.raises(sweep.DamagedRun, match='it holds the run'): sweep.read_run(path)


def test_two_drivers_on_one_folder(driver, tmp_path):
    store = tmp_path / 'store'
    with sweep._only_driver(store):
        second = start(driver, store)
        _, err = second.communicate(timeout=60)
    assert second.returncode != 0 and 'another sweep is writing there' in err
    assert not runs_in(store)


def test_runs_of_another_torch_are_refused(one_run, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    table = pq.read_table(one_run)
    environment = json.dumps({**json.loads(table['environment'][0].as_py()), 'torch': '1.4.0'})
    table = table.set_column(table.schema.get_field_index('environment'), 'environment', pa.array([environment]))
    pq.write_table(table, tmp_path / one_run.name)
    with pytest.raises(sweep.SweepError, match=r'1\.4\.0.*use another folder'):
        sweep.run_sweep(CONFIGS[:1], tmp_path, n_jobs=1, progress=False)


def test_a_failing_run_is_listed_and_the_others_finish(tmp_path, capsys):
    bad = TrainConfig(dataset='cifar10', epochs=1)  # full data, which are not in this root
    results = sweep.run_sweep([bad, CONFIGS[0]], tmp_path / 'store', n_jobs=1, progress=False, root=tmp_path / 'nothing-here')
    assert list(results.runs['key']) == [CONFIGS[0].key]
    assert re.search(rf'failed: {bad.key}: .*FileNotFoundError', capsys.readouterr().err)
    assert 'Traceback' in (tmp_path / 'store' / f'{bad.key}.error.txt').read_text()


def test_merged_results_round_trip(tmp_path, undisturbed):
    results = sweep.run_sweep(CONFIGS, tmp_path / 'store', n_jobs=1, progress=False, record={'every': 2})
    sweep.write_results(results, tmp_path / 'merged')
    sweep.write_results(sweep.load_results(tmp_path / 'merged'), tmp_path / 'again')
    for name in ('runs.csv', 'epochs.parquet', 'layers.parquet'):
        assert (tmp_path / 'merged' / name).read_bytes() == (tmp_path / 'again' / name).read_bytes()
    pd.testing.assert_frame_equal(numbers(sweep.load_results(tmp_path / 'merged')), undisturbed, check_exact=True)


def test_merged_results_go_back_into_a_store(tmp_path, undisturbed):
    results = sweep.run_sweep(CONFIGS, tmp_path / 'store', n_jobs=1, progress=False, record={'every': 2})
    sweep.write_results(results, tmp_path / 'merged')
    assert sweep.restore_runs(tmp_path / 'merged', tmp_path / 'other') == len(CONFIGS)
    before = {path: path.stat().st_mtime_ns for path in runs_in(tmp_path / 'other')}
    again = sweep.run_sweep(CONFIGS, tmp_path / 'other', n_jobs=1, progress=False)
    assert {path: path.stat().st_mtime_ns for path in runs_in(tmp_path / 'other')} == before, 'nothing was computed again'
    pd.testing.assert_frame_equal(numbers(again), undisturbed, check_exact=True)
    pd.testing.assert_frame_equal(again.runs.sort_values('key', ignore_index=True), results.runs.sort_values('key', ignore_index=True),
                                  check_exact=True, check_like=True)


def test_merged_results_that_were_edited_are_refused(tmp_path, one_run):
    results = sweep.load_results(one_run.parent)
    sweep.write_results(results._replace(runs=results.runs.assign(lr=0.5)), tmp_path / 'merged')
    with pytest.raises(sweep.DamagedRun, match='has another key'): sweep.restore_runs(tmp_path / 'merged', tmp_path / 'store')
    sweep.write_results(results._replace(runs=results.runs.assign(numbers=0)), tmp_path / 'merged')
    with pytest.raises(sweep.SweepError, match='cannot be mixed'): sweep.restore_runs(tmp_path / 'merged', tmp_path / 'store')
    assert not runs_in(tmp_path / 'store')


def test_a_run_says_which_commit_made_it(one_run):
    assert 'commit' in sweep.read_run(one_run)['environment']


def test_the_plan_watches_what_it_says():
    plan = sweep.full_plan()
    runs = pd.DataFrame([vars(config) for config in plan if sweep.watch(config)])
    watched = sweep.with_arms(sweep.Results(runs, pd.DataFrame(), pd.DataFrame())).runs
    assert set(watched['arm']) == set(sweep.WATCHED) and (watched.groupby(['arm', 'dataset']).size() == 3).all()
    assert len({config.key for config in plan}) == len(plan)


def test_no_results_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no runs: name another folder, or run a sweep'): sweep.load_results(tmp_path)


def test_dask_cluster_and_a_lost_worker(tmp_path, undisturbed):
    "A scheduler and two workers in processes of their own; one worker is killed in mid-sweep."
    pytest.importorskip('distributed', reason='the extra cluster')
    from distributed import Client
    env = {**os.environ, 'DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES': '5'}
    address_file = tmp_path / 'scheduler.json'
    begin = lambda *words: subprocess.Popen([sys.executable, '-m', 'distributed.cli.' + words[0], *words[1:]], cwd=tmp_path, env=env,
                                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    scheduler = begin('dask_scheduler', '--host', '127.0.0.1', '--port', '0', '--no-dashboard', '--scheduler-file', str(address_file))
    deadline = time.time() + 60
    while not address_file.exists() and time.time() < deadline: time.sleep(0.1)
    address = json.loads(address_file.read_text())['address']
    workers = [begin('dask_worker', address, '--nthreads', '1', '--no-nanny', '--no-dashboard') for _ in range(2)]
    try:
        with Client(address) as client: client.wait_for_workers(2, timeout=60)
        driver = tmp_path / 'dask_driver.py'
        driver.write_text(DRIVER.replace('n_jobs=int(sys.argv[2])', 'cluster=sys.argv[2]'))
        process = subprocess.Popen([sys.executable, driver, tmp_path / 'store', address], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True)
        while not runs_in(tmp_path / 'store') and time.time() < deadline: time.sleep(0.02)
        workers[0].kill()
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and out.strip() == 'done', err
    finally:
        for each in (*workers, scheduler): each.kill()
    pd.testing.assert_frame_equal(numbers(sweep.load_results(tmp_path / 'store')), undisturbed, check_exact=True)


def test_no_scheduler_at_that_address(tmp_path):
    pytest.importorskip('distributed', reason='the extra cluster')
    with pytest.raises(sweep.SweepError, match='no Dask scheduler answers'):
        sweep.run_sweep(CONFIGS[:1], tmp_path, cluster='tcp://127.0.0.1:1', progress=False)


def test_grid_refuses_an_unknown_axis():
    with pytest.raises(ValueError, match=r"axis='activaton'.*did you mean 'activation'"): sweep.grid(activaton='relu')
