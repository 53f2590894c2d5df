"""The store under fire: real drivers killed, real workers killed, full disks, spoilt files, two drivers, Ctrl-C, and a Dask cluster."""
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
from waiting import wait_for

from wib_nbdev import sweep
from wib_nbdev.config import TrainConfig
from wib_nbdev.training import train

# Small but real: the embedded sample, a few epochs, so that a signal sent after the first run meets others.
CONFIGS = sweep.grid(sample=True, epochs=4, batch_size=250, seed=range(3), activation=['relu', 'wib_relu'], dataset='fashion_mnist')
DRIVER = '''
import sys
from wib_nbdev import sweep
if __name__ == '__main__':
    configs = sweep.grid(sample=True, epochs=4, batch_size=250, seed=range(3), activation=['relu', 'wib_relu'], dataset='fashion_mnist')
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
    store, chance, seen, met = tmp_path / 'store', random.Random(0), set(), []
    begun, process = time.monotonic(), start(driver, store)
    wait_for(lambda: runs_in(store))  # the first kill meets a sweep in mid-run, and tells how long a driver takes to its first run
    pace = time.monotonic() - begun
    for _ in range(20):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        there = {path.stem for path in runs_in(store)}
        met.append(len(there))
        for path in runs_in(store): sweep.read_run(path)
        assert seen <= there
        seen = there
        process = start(driver, store)
        time.sleep(pace * chance.uniform(0.1, 1.1))
    assert 0 < met[0] < len(CONFIGS), 'no kill met a sweep in mid-run'
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
    wait_for(lambda: runs_in(store))
    commands = {pid: Path(f'/proc/{pid}/cmdline').read_bytes() for pid in children(process.pid)}
    workers = [pid for pid, words in commands.items() if b'loky' in words and b'tracker' not in words]
    os.kill(workers[0], signal.SIGKILL)
    assert len(runs_in(store)) < len(CONFIGS), 'the kill met no sweep in mid-run'
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out.strip() == 'done', err
    pd.testing.assert_frame_equal(numbers(sweep.load_results(store)), undisturbed, check_exact=True)


@pytest.mark.parametrize('n_jobs', [1, 2])
def test_ctrl_c(driver, tmp_path, undisturbed, n_jobs):
    store = tmp_path / 'store'
    process = start(driver, store, n_jobs)
    wait_for(lambda: runs_in(store))
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert (said := re.search(r'interrupted: (\d) of 6 runs are in .*; run the same sweep again to go on', err)), err
    assert len(runs_in(store)) == int(said[1]) < 6
    for path in runs_in(store): sweep.read_run(path)
    resumed = sweep.run_sweep(CONFIGS, store, n_jobs=1, progress=False)
    pd.testing.assert_frame_equal(numbers(resumed), undisturbed, check_exact=True)


def test_disk_full(driver, tmp_path, undisturbed):
    "A real full disk: a tmpfs of 64 KiB in a mount namespace of its own."
    if not shutil.which('unshare') or subprocess.run(['unshare', '-rm', 'true'], capture_output=True).returncode:
        pytest.skip('this system lets no user make a mount namespace')
    store, kept = tmp_path / 'store', tmp_path / 'kept'
    store.mkdir()
    kept.mkdir()
    script = (f'mount -t tmpfs -o size=64k tmpfs {store} && dd if=/dev/zero of={store}/ballast bs=1k count=52 status=none; '
              f'{sys.executable} {driver} {store} 1; code=$?; cp {store}/*.parquet {kept}; ls {store} >&2; exit $code')
    run = subprocess.run(['unshare', '-rm', 'sh', '-c', script], capture_output=True, text=True)
    assert run.returncode != 0 and 'done' not in run.stdout
    assert 'No space left on device' in run.stderr and 'it goes on where it was' in run.stderr
    assert '.tmp' not in run.stderr.splitlines()[-1]
    assert 0 < len(runs_in(kept)) < len(CONFIGS)
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
    if how == 'renamed':  # in the footer, which no checksum covers
        name = chance.choice([b'loss', b'layers', b'accuracy', b'status', b'split'])
        return content.replace(name, name[:-1] + b'_')
    at = chance.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1:]


@pytest.mark.parametrize('how', ['empty', 'truncated', 'text', 'renamed', 'flipped'])
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


def test_a_file_that_the_system_does_not_let_us_read_stays(one_run, tmp_path, monkeypatch):
    "Too many open files, no permission: the run itself may be whole."
    path = tmp_path / one_run.name
    path.write_bytes(one_run.read_bytes())
    taken = []
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowered = max(map(int, os.listdir('/dev/fd'))) + 8
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowered, limit[1]))
        with contextlib.suppress(OSError):
            while True: taken.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(sweep.SweepError, match='could not be read'): sweep.read_run(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        for each in taken: os.close(each)
    assert sweep.read_run(path) == sweep.read_run(one_run)


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


def test_runs_of_other_numbers_are_refused_though_their_keys_are_others(tmp_path, monkeypatch):
    "A change of the numbers changes every key, so none of the store's runs is one of those asked for."
    sweep.run_sweep(CONFIGS[:2], tmp_path, n_jobs=1, progress=False)
    runs_in(tmp_path)[0].write_bytes(b'damaged')  # one that cannot be asked
    monkeypatch.setattr(sweep, 'NUMBERS', 2)
    with pytest.raises(sweep.SweepError, match=r"'numbers': 1.*here are \{'numbers': 2.*use another folder"):
        sweep.run_sweep(CONFIGS[2:3], tmp_path, n_jobs=1, progress=False)


def test_a_worker_with_another_torch_is_refused(tmp_path):
    result = train(CONFIGS[0], progress=False)
    elsewhere = replace(result, environment={**result.environment, 'torch': '1.4.0'})
    with pytest.raises(sweep.SweepError, match=r'the worker that ran .* has .*1\.4\.0.*same versions on every machine'):
        sweep.keep(sweep.Outcome(CONFIGS[0], elsewhere, '', 1.0), tmp_path)
    assert not runs_in(tmp_path)


def test_results_of_several_torches_are_not_mixed(tmp_path, undisturbed):
    results = sweep.run_sweep(CONFIGS, tmp_path / 'store', n_jobs=1, progress=False)
    mixed = results.runs.assign(torch=['1.4.0', *results.runs['torch'][1:]])
    sweep.write_results(results._replace(runs=mixed), tmp_path / 'mixed')
    with pytest.raises(sweep.SweepError, match=r'mixes runs of .*1\.4\.0'): sweep.load_results(tmp_path / 'mixed')
    sweep.write_results(results._replace(runs=results.runs.assign(torch='1.4.0')), tmp_path / 'old')
    with pytest.raises(sweep.SweepError, match=r'1\.4\.0.*cannot be mixed'): sweep.restore_runs(tmp_path / 'old', tmp_path / 'empty')
    assert not runs_in(tmp_path / 'empty')


def test_runs_that_were_not_watched_run_again_to_be(tmp_path):
    sweep.run_sweep(CONFIGS[:2], tmp_path, n_jobs=1, progress=False)
    watch = lambda config: config == CONFIGS[0] and {'every': 2}
    with pytest.warns(UserWarning, match='1 runs in .* without watching'):
        results = sweep.run_sweep(CONFIGS[:2], tmp_path, n_jobs=1, progress=False, record=watch)
    assert set(results.layers['key']) == {CONFIGS[0].key}
    before = {path: path.stat().st_mtime_ns for path in runs_in(tmp_path)}
    sweep.run_sweep(CONFIGS[:2], tmp_path, n_jobs=1, progress=False, record=watch)
    assert {path: path.stat().st_mtime_ns for path in runs_in(tmp_path)} == before


def test_when_no_run_works_the_sweep_says_so(tmp_path, capsys):
    with pytest.raises(sweep.SweepError, match='no run worked'):
        sweep.run_sweep([TrainConfig(epochs=1)], tmp_path / 'store', n_jobs=1, progress=False, root=tmp_path / 'nothing-here')


def test_a_failing_run_is_listed_and_the_others_finish(tmp_path, capsys):
    bad = TrainConfig(dataset='cifar10', epochs=1)  # full data, which are not in this root
    results = sweep.run_sweep([bad, CONFIGS[0]], tmp_path / 'store', n_jobs=1, progress=False, root=tmp_path / 'nothing-here')
    assert list(results.runs['key']) == [CONFIGS[0].key]
    assert re.search(rf'failed: {bad.key}: .*FileNotFoundError', capsys.readouterr().err)
    assert 'Traceback' in (tmp_path / 'store' / f'{bad.key}.error.txt').read_text()


def test_failures_are_listed_although_the_sweep_is_stopped(tmp_path):
    bad = TrainConfig(dataset='cifar10', epochs=1)
    driver, store = tmp_path / 'driver.py', tmp_path / 'store'
    driver.write_text(DRIVER.replace('run_sweep(configs,', f'run_sweep([sweep.{bad!r}, *configs],').replace(
        'progress=False', f'progress=False, root={str(tmp_path)!r}'))
    process = start(driver, store)
    wait_for(lambda: runs_in(store))
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and 'interrupted: ' in err
    assert re.search(rf'^failed: {bad.key}: .*FileNotFoundError', err, re.M)


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


@pytest.mark.parametrize('name', ['runs.csv', 'epochs.parquet'])
def test_merged_results_that_do_not_belong_together_are_refused(tmp_path, undisturbed, name):
    "A file cut short, one of another merge, one that is missing."
    results = sweep.run_sweep(CONFIGS, tmp_path / 'store', n_jobs=1, progress=False)
    fewer = results.runs['key'] != CONFIGS[0].key
    for folder, kept in (('whole', results), ('other', sweep.Results(results.runs[fewer], *results[1:]))):
        sweep.write_results(kept, tmp_path / folder)
    sweep.write_results(results._replace(epochs=results.epochs[results.epochs['key'] != CONFIGS[0].key]), tmp_path / 'fewer epochs')
    path = tmp_path / 'whole' / name
    content = path.read_bytes()
    for spoilt in (content[:len(content) // 2], b''):
        path.write_bytes(spoilt)
        with pytest.raises(sweep.DamagedRun, match='damaged'): sweep.load_results(path.parent)
    for folder in ('other', 'fewer epochs'):
        with pytest.raises(sweep.DamagedRun, match='name different runs'): sweep.load_results(tmp_path / folder)
    (tmp_path / 'other' / 'epochs.parquet').unlink()
    with pytest.raises(sweep.DamagedRun, match='damaged'): sweep.load_results(tmp_path / 'other')
    with pytest.raises(sweep.SweepError, match='merged results'): sweep.run_sweep(CONFIGS[:1], tmp_path / 'other', progress=False)


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


class Cluster(NamedTuple):
    address: str
    scheduler: subprocess.Popen
    workers: list[subprocess.Popen]
    driver: subprocess.Popen # a sweep on it, of which at least one run is in the store
    store: Path


@pytest.fixture
def start_cluster(tmp_path):
    "A scheduler and two workers in processes of their own, one of them with two threads, and a sweep on them that has begun."
    pytest.importorskip('distributed', reason='the extra cluster')
    from distributed import Client
    started = []
    def begin(*words, **env):
        command, silent = [sys.executable, '-m', 'distributed.cli.' + words[0], *words[1:]], subprocess.DEVNULL
        started.append(subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **env}, stdout=silent, stderr=silent))
        return started[-1]
    def start(failures: int) -> Cluster:
        file, store, driver = tmp_path / 'scheduler.json', tmp_path / 'store', tmp_path / 'dask_driver.py'
        scheduler = begin('dask_scheduler', '--host', '127.0.0.1', '--port', '0', '--no-dashboard', '--scheduler-file', str(file),
                          DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=str(failures))
        address = wait_for(lambda: address_in(file))
        workers = [begin('dask_worker', address, '--nthreads', threads, '--no-nanny', '--no-dashboard') for threads in '12']
        with Client(address) as client: client.wait_for_workers(2, timeout=60)
        driver.write_text(DRIVER.replace('n_jobs=int(sys.argv[2])', 'cluster=sys.argv[2]'))
        command, heard = [sys.executable, driver, store, address], subprocess.PIPE
        started.append(subprocess.Popen(command, stdout=heard, stderr=heard, text=True))
        wait_for(lambda: runs_in(store))
        return Cluster(address, scheduler, workers, started[-1], store)
    yield start
    for process in started: process.kill()


def address_in(scheduler_file: Path) -> str | None:
    "The scheduler's address, once it has been written to the end."
    try: return json.loads(scheduler_file.read_text())['address']
    except (FileNotFoundError, ValueError): return None


def test_dask_cluster_and_a_lost_worker(start_cluster, undisturbed):
    "One worker is killed in mid-sweep: another one does its runs."
    cluster = start_cluster(failures=5)
    cluster.workers[0].kill()
    assert len(runs_in(cluster.store)) < len(CONFIGS), 'the kill met no sweep in mid-run'
    out, err = cluster.driver.communicate(timeout=120)
    assert cluster.driver.returncode == 0 and out.strip() == 'done', err
    pd.testing.assert_frame_equal(numbers(sweep.load_results(cluster.store)), undisturbed, check_exact=True)


def test_a_run_that_dask_gives_up_is_an_error_and_the_others_finish(start_cluster, undisturbed):
    cluster = start_cluster(failures=0)  # whatever a killed worker was doing is given up at once
    cluster.workers[1].kill()
    out, err = cluster.driver.communicate(timeout=120)
    assert cluster.driver.returncode == 0 and out.strip() == 'done', err
    failed = re.findall(r'failed: (\S+): .*KilledWorker', err)
    assert failed and len(runs_in(cluster.store)) == len(CONFIGS) - len(failed)
    for key in failed: assert 'KilledWorker' in (cluster.store / f'{key}.error.txt').read_text()
    resumed = sweep.run_sweep(CONFIGS, cluster.store, n_jobs=1, progress=False)
    pd.testing.assert_frame_equal(numbers(resumed), undisturbed, check_exact=True)


def test_a_lost_dask_scheduler_is_a_clear_end(start_cluster):
    cluster = start_cluster(failures=0)
    cluster.scheduler.kill()
    _, err = cluster.driver.communicate(timeout=120)
    assert cluster.driver.returncode != 0 and 'SweepError: the Dask scheduler is gone' in err
    for path in runs_in(cluster.store): sweep.read_run(path)


def test_no_scheduler_at_that_address(tmp_path):
    pytest.importorskip('distributed', reason='the extra cluster')
    with pytest.raises(sweep.SweepError, match='no Dask scheduler answers'):
        sweep.run_sweep(CONFIGS[:1], tmp_path, cluster='tcp://127.0.0.1:1', progress=False)


def test_grid_refuses_an_unknown_axis():
    with pytest.raises(ValueError, match=r"axis='activaton'.*did you mean 'activation'"): sweep.grid(activaton='relu')
