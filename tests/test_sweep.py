"""The store and its workers: killed processes, Ctrl-C, spoilt files, refused folders, a Dask cluster."""
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from waiting import wait_for

from wib_nbdev import sweep
from wib_nbdev.plan import quick_plan

# Small but real. After them come runs without an end, where a signal has to meet a sweep in mid-run.
AXES = dict(sample=True, epochs=4, batch_size=250, seed=range(3), activation=['relu', 'wib_relu'])
CONFIGS = sweep.grid(**AXES)
ENDLESS = sweep.grid(sample=True, epochs=1_000_000)
BROKEN = replace(CONFIGS[0], compile=True)  # fails at once if it is to be recorded
DRIVER = f'''
import sys
from wib_nbdev import sweep
from wib_nbdev.plan import quick_plan
if __name__ == '__main__':
    configs, cluster = sweep.grid(**{AXES}), sys.argv[2] if len(sys.argv) > 2 else None
    if len(sys.argv) != 3: configs += sweep.grid(sample=True, epochs=1_000_000)
    sweep.run_sweep(configs, sys.argv[1], n_jobs=1, cluster=cluster)
    print('done')
'''
DEADLINE = 900  # seconds; far above what anything here needs
linux = pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='finds processes through /proc')


def run(configs, store, **options) -> sweep.Results:
    return sweep.run_sweep(configs, store, **{'n_jobs': 1, 'progress': False, **options})


def assert_same(results: sweep.Results, expected: sweep.Results) -> None:
    "Equal, save for the order and for what differs from one execution to the next."
    for name, frame, other in zip(results._fields, results, expected, strict=True):
        by = [column for column in ('key', 'iteration', 'epoch', 'split') if column in frame]
        frames = [each.drop(columns=['seconds', 'made_at'], errors='ignore') for each in (frame, other)]
        frames = [each.sort_values(by, ignore_index=True) for each in frames]
        pd.testing.assert_frame_equal(*frames, check_exact=True, check_dtype=False, obj=name)


def runs_in(store: Path) -> list[Path]:
    return sorted(store.glob('*.parquet'))


def times_of(store: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in runs_in(store)}


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory) -> sweep.Results:
    return run(CONFIGS, tmp_path_factory.mktemp('undisturbed'))


@pytest.fixture(scope='module')
def one_run(tmp_path_factory) -> Path:
    store = tmp_path_factory.mktemp('one')
    run(CONFIGS[:1], store, record=True)
    return runs_in(store)[0]


# ---- what runs give

def test_numbers_do_not_depend_on_workers_or_order(undisturbed, tmp_path):
    assert_same(run(CONFIGS[::-1] + CONFIGS[:2], tmp_path, n_jobs=2), undisturbed)
    before = times_of(tmp_path)
    assert_same(run(CONFIGS, tmp_path), undisturbed)
    assert times_of(tmp_path) == before, 'nothing was computed again'


def test_what_is_kept_of_a_run(undisturbed):
    runs = undisturbed.runs.set_index('key')
    assert list(runs.index) == sorted(config.key for config in CONFIGS)
    assert (runs['threads'] == 1).all() and runs['weights_first'].ne(runs['weights_last']).all()
    if sweep.SETTINGS: assert set(runs['cpu_capability']) <= {'AVX2', 'DEFAULT'}
    assert all(list(each) == [0, 1, 2, 3] for _, each in undisturbed.steps.groupby('key')['iteration'])
    last = undisturbed.epochs.query("split == 'valid' and epoch == 4").set_index('key')['accuracy']
    bits = undisturbed.correct.set_index('key')['bits']
    right = bits.map(lambda each: int.from_bytes(each, 'big').bit_count())
    pd.testing.assert_series_equal(right / 500, last, check_names=False, check_like=True)


def test_a_held_out_run_keeps_no_test_images(tmp_path):
    results = run([replace(CONFIGS[0], valid='holdout', amp=True)], tmp_path)
    assert results.correct.empty and len(results.steps) and sweep.configs_of(results.runs)[0].amp


def test_runs_without_layers_run_again_to_get_them(tmp_path):
    run(CONFIGS[:2], tmp_path)
    record = lambda config: config == CONFIGS[0] and {'every': 2}
    with pytest.warns(UserWarning, match='1 runs in .* kept no layers'):
        results = run(CONFIGS[:2], tmp_path, record=record)
    assert set(results.layers['key']) == {CONFIGS[0].key}
    before = times_of(tmp_path)
    run(CONFIGS[:2], tmp_path, record=record)
    assert times_of(tmp_path) == before


def test_a_failing_run_is_listed_and_the_others_finish(tmp_path, capsys):
    record = lambda config: config == BROKEN
    results = run([BROKEN, CONFIGS[0]], tmp_path, record=record, progress=True)
    assert list(results.runs['key']) == [CONFIGS[0].key]
    said = capsys.readouterr().err
    assert re.search(rf'^failed: {BROKEN.key}: ValueError: record=True with compile=True', said, re.M)
    assert re.search(r'^2 of 2: fashion_mnist relu seed 0: ', said, re.M) and '\r' not in said, 'no bar'
    assert 'Traceback' in (tmp_path / f'{BROKEN.key}.error.txt').read_text()
    with pytest.raises(sweep.SweepError, match='no run worked'): run([BROKEN], tmp_path, record=True)


def test_progress_tells_the_runs_of_a_plan_apart():
    configs = quick_plan()
    with sweep._Progress(configs, 0, show=False) as bar:
        assert len({bar.describe(config) for config in configs}) == len(configs)


def test_grid_refuses_an_unknown_axis():
    with pytest.raises(ValueError, match=r"axis='activaton'.*did you mean 'activation'"):
        sweep.grid(activaton='relu')


# ---- processes that end

@pytest.fixture
def start(tmp_path):
    "A real driver in a process group of its own."
    (tmp_path / 'driver.py').write_text(DRIVER)
    started = []
    def begin(*words) -> subprocess.Popen:
        heard = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        command = [sys.executable, tmp_path / 'driver.py', *words]
        started.append(subprocess.Popen(command, **heard, start_new_session=True))
        return started[-1]
    yield begin
    for process in started: process.kill()


def workers_of(pid: int) -> list[int]:
    "The loky workers of a process."
    lists = [each.read_text().split() for each in Path(f'/proc/{pid}/task').glob('*/children')]
    children = [int(child) for each in lists for child in each]
    return [child for child in children if b'popen_loky' in Path(f'/proc/{child}/cmdline').read_bytes()]


def gone(pids: list[int]) -> bool:
    return not any(Path(f'/proc/{pid}').exists() for pid in pids)


@linux
def test_a_killed_driver_leaves_a_whole_store_and_no_worker(start, tmp_path, undisturbed):
    store = tmp_path / 'store'
    process = start(store)
    wait_for(lambda: runs_in(store), DEADLINE)
    workers = workers_of(process.pid)
    process.kill()  # the driver alone
    process.wait()
    assert workers and wait_for(lambda: gone(workers), DEADLINE)
    left, foreign = store / f'.half.parquet.1{sweep._TEMPORARY}', store / '~budget.tmp'
    for path in (left, foreign): path.write_bytes(b'half')
    assert_same(run(CONFIGS, store), undisturbed)
    assert foreign.exists() and not left.exists()


@pytest.mark.slow
def test_a_driver_and_its_workers_killed_twenty_times(start, tmp_path, undisturbed):
    "At any moment: what is in the store stays whole, and the next sweep makes the rest."
    store, chance, seen, pace = tmp_path / 'store', random.Random(0), set(), 0.0
    for turn in range(20):
        begun, process = time.monotonic(), start(store)
        if turn: time.sleep(pace * chance.uniform(0.1, 1.1))
        else:  # how long a driver takes to its first run
            wait_for(lambda: runs_in(store), DEADLINE)
            pace = time.monotonic() - begun
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        there = set(sweep.load_results(store).runs['key'])
        assert there >= seen
        seen = there
    assert_same(run(CONFIGS, store), undisturbed)
    assert not list(store.glob(f'.*{sweep._TEMPORARY}'))


@linux
def test_ctrl_c_says_how_to_go_on(start, tmp_path):
    store = tmp_path / 'store'
    process = start(store)
    wait_for(lambda: runs_in(store), DEADLINE)
    workers = workers_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=DEADLINE)
    assert process.returncode != 0 and workers and gone(workers)
    found = re.search(r'interrupted: (\d) of 7 runs are in .*; run the same sweep again to go on', said)
    assert found and len(runs_in(store)) == int(found[1]), said


def once_there_is_a_run(store: Path, do) -> threading.Thread:
    def watch() -> None:
        wait_for(lambda: runs_in(store), DEADLINE)
        do()
    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_sigterm_says_how_to_go_on(tmp_path, capsys):
    thread = once_there_is_a_run(tmp_path, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt): run(CONFIGS + ENDLESS, tmp_path)
    thread.join()
    assert re.search(r'interrupted: [1-6] of 7 runs are in', capsys.readouterr().err)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@linux
def test_a_killed_worker_is_replaced(tmp_path, undisturbed):
    killed = []
    def kill() -> None:
        killed.extend(workers_of(os.getpid())[:1])
        os.kill(killed[0], signal.SIGKILL)
    thread = once_there_is_a_run(tmp_path, kill)
    results = run(CONFIGS, tmp_path)
    thread.join()
    assert killed
    assert_same(results, undisturbed)


def kill_this_process(iteration: int) -> bool:
    os.kill(os.getpid(), signal.SIGKILL)
    return True


def test_a_run_that_kills_its_worker_is_a_clear_end(tmp_path):
    record = lambda config: config == CONFIGS[1] and {'every': kill_this_process}
    with pytest.raises(sweep.SweepError, match=r'a worker died three times .*; 1 runs are left'):
        run(CONFIGS[:2], tmp_path, record=record)
    assert [path.stem for path in runs_in(tmp_path)] == [CONFIGS[0].key]


# ---- files

def spoil(content: bytes, how: str, chance: random.Random) -> bytes:
    if how == 'empty': return b''
    if how == 'truncated': return content[:chance.randrange(1, len(content))]
    if how == 'text': return b'not a parquet file'
    if how == 'renamed':  # in the footer, which no checksum covers
        name = chance.choice([b'loss', b'layers', b'accuracy', b'status', b'split', b'momentum'])
        return content.replace(name, name[:-1] + b'_')
    at = chance.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1:]


@pytest.mark.parametrize('how', ['empty', 'truncated', 'text', 'renamed', 'flipped'])
def test_spoilt_file_is_named_or_harmless(one_run, tmp_path, how):
    "A spoilt file is either refused by name, or its numbers are those that were written."
    content, chance, good = one_run.read_bytes(), random.Random(how), sweep.load_results(one_run.parent)
    refused, path = 0, tmp_path / one_run.name
    for _ in range(60):
        path.write_bytes(spoil(content, how, chance))
        try: results = sweep.load_results(tmp_path)
        except sweep.DamagedRun as error:
            assert str(path) in str(error) and 'move it away and run the same sweep' in str(error)
            refused += 1
        else: assert_same(results, good)
    assert refused >= (10 if how == 'flipped' else 60)  # a bit in padding or statistics changes nothing


def test_spoilt_file_is_set_aside_and_run_again(one_run, tmp_path):
    path = tmp_path / one_run.name
    path.write_bytes(one_run.read_bytes()[:-40])
    with pytest.warns(UserWarning, match='was set aside'):
        results = run(CONFIGS[:1], tmp_path)
    assert len(results.runs) == 1 and path.with_suffix('.damaged').exists()


def test_file_under_another_name_is_refused(one_run, tmp_path):
    (tmp_path / f'{CONFIGS[1].key}.parquet').write_bytes(one_run.read_bytes())
    with pytest.raises(sweep.DamagedRun, match='it holds the run'): sweep.load_results(tmp_path)


def test_runs_from_before_a_field_was_added_have_its_default(tmp_path):
    run(CONFIGS[:2], tmp_path)
    path = runs_in(tmp_path)[0]
    older = sweep._read_run(path)
    sweep._write_run(older._replace(runs=older.runs.drop(columns='unit_moment')), path)
    results = sweep.load_results(tmp_path)
    assert results.runs['unit_moment'].eq(False).all() and len(sweep.configs_of(results.runs)) == 2


def test_a_folder_is_what_its_name_says(tmp_path, monkeypatch):
    "The user's own folder, with files of the user's; a name that looks like an address; no name at all."
    monkeypatch.chdir(tmp_path)
    Path('mine.parquet').write_bytes(b'of the user')
    for out in ('.', 's3:runs'):
        assert len(run(CONFIGS[:1], out).runs) == len(sweep.load_results(out).runs) == 1
    assert Path('mine.parquet').read_bytes() == b'of the user' and len(runs_in(Path('s3:runs'))) == 1
    with pytest.raises(ValueError, match="out='': must name a folder"): run(CONFIGS[:1], '')
    with pytest.raises(FileNotFoundError, match='holds no runs: name another folder, or run a sweep'):
        sweep.load_results(tmp_path / 'nothing')


def test_a_second_driver_on_a_folder_is_refused(tmp_path):
    with sweep._only_driver(tmp_path), pytest.raises(sweep.SweepError, match='another sweep writes there'):
        run(CONFIGS[:1], tmp_path)


LOCKS = {errno.ENOLCK: 'on a local disk', errno.EIO: 'on a local disk', errno.EROFS: 'may write to'}


@pytest.mark.parametrize('number, remedy', LOCKS.items())
def test_a_folder_that_cannot_be_locked(tmp_path, monkeypatch, number, remedy):
    import fcntl
    def refuse(*_): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, 'flock', refuse)
    with pytest.raises(sweep.SweepError, match=f'{tmp_path}: {os.strerror(number)}; .*{remedy}'):
        run(CONFIGS[:1], tmp_path)


@pytest.mark.slow
def test_a_real_full_disk(tmp_path, undisturbed):
    "A disk of 64 KiB, in a mount namespace of the driver's own: what was finished is whole."
    if not shutil.which('unshare') or subprocess.run(['unshare', '-rm', 'true']).returncode:
        pytest.skip('only root, or a system that lets users make namespaces, can mount such a disk')
    store, kept = tmp_path / 'store', tmp_path / 'kept'
    for folder in (store, kept): folder.mkdir()
    (tmp_path / 'driver.py').write_text(DRIVER)
    script = f"""mount -t tmpfs -o size=64k tmpfs {store}
        {sys.executable} {tmp_path}/driver.py {store}; code=$?
        cp {store}/* {kept}; ls -A {store}; exit $code"""
    end = subprocess.run(['unshare', '-rm', 'sh', '-c', script], capture_output=True, text=True)
    assert end.returncode == 1 and sweep._TEMPORARY not in end.stdout
    assert 'No space left on device; free some space, then run' in end.stderr
    assert 0 < len(sweep.load_results(kept).runs) < len(CONFIGS)
    assert_same(run(CONFIGS, kept), undisturbed)


def test_a_full_disk(one_run, tmp_path, monkeypatch):
    "The run that was being written is not there, what was there before is."
    path = tmp_path / one_run.name
    for name in (one_run.name, 'environment.json'): shutil.copy(one_run.with_name(name), tmp_path)
    def refuse(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, 'fsync', refuse)
    with pytest.raises(sweep.SweepError, match='No space left on device; free some space, then run'):
        run(CONFIGS[:2], tmp_path)
    monkeypatch.undo()
    assert runs_in(tmp_path) == [path] and not list(tmp_path.glob(f'.*{sweep._TEMPORARY}'))
    (tmp_path / 'a file').touch()
    with pytest.raises(sweep.SweepError, match='a file: File exists'): run(CONFIGS[:1], tmp_path / 'a file')


# ---- what runs were made with

OTHERS = dict(torch='1.4.0', results_version=0, cpu_capability='AVX512')


@pytest.mark.parametrize('name, value', OTHERS.items())
def test_a_store_made_with_something_else_is_refused(tmp_path, name, value):
    run(CONFIGS[:1], tmp_path)
    path = tmp_path / 'environment.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(sweep.SweepError, match=rf'{name} {value}, here is .*use another folder'):
        run(CONFIGS[:2], tmp_path)
    assert len(runs_in(tmp_path)) == 1


def test_a_worker_without_the_settings_is_refused(monkeypatch):
    if not sweep.SETTINGS: pytest.skip('this processor has no settings')
    monkeypatch.delenv('ATEN_CPU_CAPABILITY', raising=False)
    settings = 'ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=COMPATIBLE'
    with pytest.raises(sweep.SweepError, match=f'start it with {settings}'):
        sweep._run_one(CONFIGS[0], False, None)


def test_results_of_several_torches_are_not_mixed(tmp_path, undisturbed):
    mixed = undisturbed.runs.assign(torch=['1.4.0', *undisturbed.runs['torch'][1:]])
    sweep.write_results(undisturbed._replace(runs=mixed), tmp_path)
    with pytest.raises(sweep.SweepError, match=r'mixes runs of .*1\.4\.0'): sweep.load_results(tmp_path)


def test_runs_of_two_devices_are_named(tmp_path, undisturbed):
    mixed = undisturbed.runs.assign(ran_on=['cuda', *undisturbed.runs['ran_on'][1:]])
    sweep.write_results(undisturbed._replace(runs=mixed), tmp_path)
    with pytest.warns(UserWarning, match='mixes runs on cpu and cuda'): sweep.load_results(tmp_path)


# ---- merged results

def test_merged_results_go_there_and_back(tmp_path, undisturbed, one_run):
    results = undisturbed._replace(layers=sweep.load_results(one_run.parent).layers)
    folders = [tmp_path / name for name in ('merged', 'again', 'store')]
    sweep.write_results(results, folders[0])
    assert [sweep.restore_runs(folders[0], folders[2]) for _ in range(2)] == [len(CONFIGS), 0]
    sweep.write_results(sweep.load_results(folders[2]), folders[1])
    files = sorted(path.name for path in folders[0].iterdir())
    assert files == ['correct.parquet', 'epochs.parquet', 'layers.parquet', 'runs.csv', 'steps.parquet']
    for name in files: assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    before = times_of(folders[2])
    assert_same(run(CONFIGS, folders[2]), sweep.load_results(folders[0]))
    assert times_of(folders[2]) == before, 'nothing was computed again'
    with pytest.raises(sweep.SweepError, match='merged results'): run(CONFIGS, folders[0])


def test_a_run_in_two_pieces_of_a_merged_file_is_restored(tmp_path, undisturbed):
    "pandas reads a file of more than 131,072 rows, or of several row groups, as columns in pieces."
    sweep.write_results(undisturbed, tmp_path)
    steps = pq.read_table(tmp_path / 'steps.parquet')
    pq.write_table(steps, tmp_path / 'steps.parquet', row_group_size=3)
    assert sweep.restore_runs(tmp_path, tmp_path / 'store') == len(CONFIGS)
    assert_same(sweep.load_results(tmp_path / 'store'), sweep.load_results(tmp_path))


@pytest.mark.parametrize('how', ['cut', 'empty', 'missing', 'fewer', 'edited'])
@pytest.mark.parametrize('name', ['runs.csv', 'epochs.parquet'])
def test_merged_results_that_do_not_belong_together_are_refused(tmp_path, undisturbed, name, how):
    sweep.write_results(undisturbed, tmp_path)
    path = tmp_path / name
    if how == 'cut': path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    if how == 'empty': path.write_bytes(b'')
    if how == 'missing': path.unlink()
    if how == 'fewer':
        fewer = sweep.Results(*(frame[frame['key'] != CONFIGS[0].key] for frame in undisturbed))
        sweep.write_results(fewer, tmp_path / 'other')
        path.write_bytes((tmp_path / 'other' / name).read_bytes())
    if how == 'edited':
        if name != 'runs.csv': pytest.skip('a number in Parquet is not edited by hand')
        path.write_text(path.read_text().replace('0.004', '0.005'))
    expected = FileNotFoundError if (name, how) == ('runs.csv', 'missing') else sweep.DamagedRun
    with pytest.raises(expected): sweep.restore_runs(tmp_path, tmp_path / 'store')
    assert not runs_in(tmp_path / 'store')


def test_committed_results_are_read(monkeypatch, tmp_path):
    monkeypatch.delenv('WIB_RESULTS', raising=False)
    results = sweep.committed_results()
    assert len(sweep.configs_of(results.runs)) == len(results.runs) > 500
    for frame, names in zip(results, sweep._COLUMNS, strict=True): assert set(names) <= set(frame)
    monkeypatch.setenv('WIB_RESULTS', str(tmp_path))
    assert sweep.committed_results() is None


# ---- a cluster

@pytest.fixture
def cluster(tmp_path):
    "The address of a scheduler, and its two workers, in processes of their own."
    client = pytest.importorskip('distributed', reason='needs the extra cluster').Client
    file, started = tmp_path / 'scheduler.json', []
    def begin(program, *words, **env) -> subprocess.Popen:
        command = [sys.executable, '-m', f'distributed.cli.dask_{program}', *words, '--no-dashboard']
        silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')])
        env = {**os.environ, 'PYTHONPATH': path, **env}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=env, **silent))
        return started[-1]
    def ready(settings, failures) -> tuple[str, subprocess.Popen, list[subprocess.Popen]]:
        scheduler = begin('scheduler', '--host', '127.0.0.1', '--port', '0', '--scheduler-file', str(file),
                          DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=str(failures))
        address = wait_for(lambda: address_in(file), DEADLINE)
        workers = [begin('worker', address, '--nthreads', '1', '--no-nanny', **settings) for _ in range(2)]
        with client(address, timeout=DEADLINE) as waiting: waiting.wait_for_workers(2, timeout=DEADLINE)
        return address, scheduler, workers
    yield ready
    for process in started: process.kill()


def address_in(file: Path) -> str | None:
    "The scheduler's address, once it has been written to the end."
    try: return json.loads(file.read_text())['address']
    except (FileNotFoundError, ValueError): return None


def test_dask_with_a_lost_worker(cluster, start, tmp_path, undisturbed):
    "One worker is killed in mid-sweep: another one makes its runs."
    address, _, workers = cluster(sweep.SETTINGS, failures=5)
    store = tmp_path / 'store'
    driver = start(store, address)
    wait_for(lambda: runs_in(store), DEADLINE)
    workers[0].kill()
    out, said = driver.communicate(timeout=DEADLINE)
    assert driver.returncode == 0 and out.strip() == 'done', said
    assert_same(sweep.load_results(store), undisturbed)


@pytest.mark.slow
def test_dask_gives_up_a_run_that_kills_workers(cluster, tmp_path):
    address, _, _ = cluster(sweep.SETTINGS, failures=0)
    record = lambda config: config == CONFIGS[1] and {'every': kill_this_process}
    results = run(CONFIGS[:2], tmp_path, cluster=address, record=record)
    assert list(results.runs['key']) == [CONFIGS[0].key]
    assert 'KilledWorker' in (tmp_path / f'{CONFIGS[1].key}.error.txt').read_text()


@pytest.mark.slow
def test_dask_with_a_lost_scheduler(cluster, start, tmp_path):
    address, scheduler, _ = cluster(sweep.SETTINGS, failures=0)
    store = tmp_path / 'store'
    driver = start(store, address, 'and the endless one')
    wait_for(lambda: runs_in(store), DEADLINE)
    scheduler.kill()
    _, said = driver.communicate(timeout=DEADLINE)
    assert driver.returncode != 0 and 'SweepError: the Dask scheduler is gone' in said
    assert runs_in(store)


@pytest.mark.slow
def test_dask_with_native_workers(cluster, tmp_path):
    address, _, _ = cluster({}, failures=0)
    with pytest.raises(sweep.SweepError, match='start it with ATEN_CPU_CAPABILITY=avx2'):
        run(CONFIGS[:1], tmp_path, cluster=address)


def test_no_scheduler_at_that_address(tmp_path):
    pytest.importorskip('distributed', reason='needs the extra cluster')
    with pytest.raises(sweep.SweepError, match='no Dask scheduler answers'):
        run(CONFIGS[:1], tmp_path, cluster='tcp://127.0.0.1:1')


@pytest.mark.slow
def test_a_compiled_run(tmp_path):
    assert run([BROKEN], tmp_path).runs['status'].item() == 'finished'
