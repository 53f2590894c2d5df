"""Damaged files, downloads over a slow line that breaks, the sample, and identities of what is drawn."""
import gzip
import hashlib
import http.server
import io
import os
import pickle
import re
import signal
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wib_nbdev import data
from wib_nbdev.style import DATASET_LABELS

sys.path.insert(0, str(Path(__file__).parents[1] / 'tools'))
from make_sample import draw_sample

FULL_ROOT = Path(os.environ.get('WIB_DATA') or Path(__file__).parents[1] / 'data')
ARRAY_DIGESTS = {  # first digits, of x_train, y_train, x_test, y_test: what every committed run was made with
    'fashion_mnist': ['2e487a6c', '657fbd22', 'c867c93f', '3d0e6c6e'],
    'cifar10': ['9d5c2edd', '2b7cd2f2', '177777c3', 'cec8a24a'],
}


def load_full(name):
    if data._missing(FULL_ROOT, data._choose_layout(name, FULL_ROOT)):
        pytest.skip(f'needs the full {name} in data/ or WIB_DATA')
    return data.load(name, FULL_ROOT, download=False)


def assert_same(dataset, other):
    for part in data._PARTS: assert torch.equal(getattr(dataset, part), getattr(other, part)), part


def digest_of(content): return hashlib.sha256(content).hexdigest()


# The published layouts with the embedded sample's images: real files in their publishers' formats, but small.

def arrays_of(sample): return [getattr(sample, part).to(torch.uint8).numpy() for part in data._PARTS]


def idx_contents(sample):
    def header(*numbers): return np.array(numbers, '>u4').tobytes()
    x_train, y_train, x_test, y_test = arrays_of(sample)
    return [header(0x803, 1000, 28, 28) + x_train.tobytes(), header(0x801, 1000) + y_train.tobytes(),
            header(0x803, 500, 28, 28) + x_test.tobytes(), header(0x801, 500) + y_test.tobytes()]


def cifar_batches(sample):
    x_train, y_train, x_test, y_test = arrays_of(sample)
    batches = [*zip(np.split(x_train, 5), np.split(y_train, 5), strict=True), (x_test, y_test)]
    return [(x.reshape(len(x), -1), y) for x, y in batches]


def record_contents(sample):
    return [np.concatenate([y[:, None], x], 1).tobytes() for x, y in cifar_batches(sample)]


def pickle_contents(sample):
    return [pickle.dumps({'data': x, 'labels': y.tolist()}, protocol=2) for x, y in cifar_batches(sample)]


KINDS = {'idx': ('fashion_mnist', 0, idx_contents), 'records': ('cifar10', 0, record_contents),
         'pickles': ('cifar10', 1, pickle_contents)}


@pytest.fixture
def small(monkeypatch):
    "From a kind to its layout, the contents of its small files, which `load` then expects, and the images."
    def make(kind):
        name, index, pack = KINDS[kind]
        sample = data.load(name, sample=True)
        contents, layouts = pack(sample), list(data._LAYOUTS[name])
        digests = dict(zip(layouts[index].digests, map(digest_of, contents), strict=True))
        layouts[index] = layouts[index]._replace(digests=digests)
        monkeypatch.setitem(data._LAYOUTS, name, tuple(layouts))
        return layouts[index], contents, sample
    return make


def packages(layout, contents):
    "What the publisher offers: path below the root -> bytes. The archive's order is its own."
    pairs = [*zip(layout.digests, contents, strict=True)]
    if '.tar' not in layout.packed:
        return {layout.package(file): gzip.compress(content) for file, content in pairs}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode='w:gz') as tar:
        for file, content in reversed(pairs):
            member = tarfile.TarInfo(f'{layout.folder}/{file}')
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return {layout.packed: archive.getvalue()}


def write(root, layout, contents, is_packed=False):
    "The files below `root`, unpacked or packed; returns their paths."
    paths = [f'{layout.folder}/{file}' for file in layout.digests]
    files = packages(layout, contents) if is_packed else dict(zip(paths, contents, strict=True))
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return [root / path for path in files]


@pytest.mark.parametrize('is_packed', [False, True], ids=['plain', 'packed'])
@pytest.mark.parametrize('kind', KINDS)
def test_each_layout_gives_the_same_images(kind, is_packed, small, tmp_path):
    layout, contents, sample = small(kind)
    write(tmp_path, layout, contents, is_packed)
    dataset = data.load(sample.name, tmp_path, download=False)
    assert_same(dataset, sample)
    assert dataset.source == layout.folder and dataset.y_train.dtype == torch.int64


# Damage

DAMAGES = {
    'empty': lambda content: b'',
    'cut': lambda content: content[:-1],
    'longer': lambda content: content + b'\0',
    'bit': lambda content: content[:-1] + bytes([content[-1] ^ 4]),
}


@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('kind', KINDS)
def test_a_damaged_file_is_named(kind, damage, small, tmp_path):
    layout, contents, sample = small(kind)
    path, spoilt = write(tmp_path, layout, contents)[2], DAMAGES[damage](contents[2])
    path.write_bytes(spoilt)
    problem = f'is not the published file: its {len(spoilt):,} bytes have another digest'
    with pytest.raises(ValueError, match=f'{path}: {path.name} {problem}.*Delete it and load again'):
        data.load(sample.name, tmp_path)
    frame = data.inspect(tmp_path).query('dataset == @sample.name')
    assert frame.status.tolist() == ['damaged' if row == 2 else 'whole' for row in range(len(frame))]
    assert frame.problem.iloc[2].startswith(problem) and path.is_file()


@pytest.mark.parametrize('kind', ['idx', 'records'])
def test_a_packed_file_cut_short(kind, small, tmp_path):
    layout, contents, sample = small(kind)
    path = write(tmp_path, layout, contents, is_packed=True)[-1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f'{path.name}: .* cannot be read .*Delete it'):
        data.load(sample.name, tmp_path)


def test_an_archive_of_something_else(small, tmp_path):
    layout, _, sample = small('pickles')
    with tarfile.open(tmp_path / layout.packed, 'w:gz') as tar:
        tar.addfile(tarfile.TarInfo('cifar-100-python/train'))
    with pytest.raises(ValueError, match='data_batch_1 is not in the archive'):
        data.load(sample.name, tmp_path)


def test_a_file_that_may_not_be_read(small, tmp_path):
    layout, contents, sample = small('idx')
    path = write(tmp_path, layout, contents)[3]
    if os.geteuid(): path.chmod(0)
    else:  # nothing is closed to the superuser, but a folder cannot be read as a file either
        path.unlink()
        path.mkdir()
    with pytest.raises(ValueError, match=f'{path.name} cannot be read .*(Permission denied|Is a directory)'):
        data.load(sample.name, tmp_path)


class Touch:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('is_packed', [False, True], ids=['plain', 'packed'])
def test_an_unverified_pickle_is_never_opened(is_packed, tmp_path):
    trace = tmp_path / 'was opened'
    hostile = pickle.dumps(Touch(trace))
    write(tmp_path, data._LAYOUTS['cifar10'][1], [hostile] * 6, is_packed)
    with pytest.raises(ValueError, match='data_batch_1 is not the published file'):
        data.load('cifar10', tmp_path)
    status = data.inspect(tmp_path).query("dataset == 'cifar10'").status
    assert set(status) == {'damaged'} and not trace.exists()
    pickle.loads(hostile)
    assert trace.exists()  # the file was indeed a dangerous one


# Missing files

def test_missing_files_are_listed_with_what_to_do(small, tmp_path, monkeypatch):
    layout, contents, _ = small('pickles')
    write(tmp_path, layout, contents)[5].unlink()
    monkeypatch.setenv('WIB_DATA', str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught: data.load('cifar10', download=False)
    for words in (f'not complete in {tmp_path}: cifar-10-batches-py lacks test_batch.',
                  'put cifar-10-python.tar.gz from https', 'WIB_MIRROR', '--root', '--sample'):
        assert words in str(caught.value)
    status = data.inspect().query("dataset == 'cifar10'").status
    assert status.tolist() == ['whole'] * 5 + ['missing']


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f'not complete in {tmp_path}/data'):
        data.load('cifar10', root='~/data', download=False)


def test_no_network_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv('WIB_MIRROR', 'http://127.0.0.1:9')  # nobody listens there
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.delenv('WIB_DATA', raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r'not complete in data: .*The download failed: .*refused'):
        data.load('fashion_mnist')
    assert names(tmp_path) == []


# The download, from a server of our own on this machine

class Server(http.server.ThreadingHTTPServer):
    """Serves `files`, with a `pause` (seconds) before each small piece. Its first `cuts` answers end after
    `limit` bytes; then `on_cut` is called."""
    daemon_threads = True

    def __init__(self, files, cuts=0, limit=0, on_cut=lambda server: None, knows_ranges=True, pause=0):
        self.files, self.pause = files, pause
        self.cuts, self.limit, self.on_cut, self.knows_ranges = cuts, limit, on_cut, knows_ranges
        self.starts = []  # the first byte of each answer
        super().__init__(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def stop(self):
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def do_GET(self):
        server = self.server
        content = server.files.get(self.path.removeprefix('/pub/'))
        if content is None: return self.send_error(404)
        wanted = int(re.fullmatch(r'bytes=(\d+)-', self.headers['Range'])[1])
        start = wanted if server.knows_ranges else 0
        if start >= len(content): return self.send_error(416)
        server.starts.append(start)
        self.send_response(206 if server.knows_ranges else 200)
        self.send_header('Content-Length', str(len(content) - start))
        self.end_headers()
        is_cut = len(server.starts) <= server.cuts
        end = min(start + server.limit, len(content)) if is_cut else len(content)
        for at in range(start, end, 10_000):  # in small pieces, as a slow line gives them
            time.sleep(server.pause)
            self.wfile.write(content[at:min(at + 10_000, end)])
        if is_cut: server.on_cut(server)


@pytest.fixture
def serve(monkeypatch):
    "A function that starts a server and makes it the mirror."
    servers = []
    monkeypatch.setenv('no_proxy', '127.0.0.1')

    def start(files, **options):
        servers.append(Server(files, **options))
        monkeypatch.setenv('WIB_MIRROR', f'http://127.0.0.1:{servers[-1].server_port}/pub/')
        return servers[-1]
    yield start
    for server in servers: server.stop()


def names(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob('*') if path.is_file())


@pytest.mark.parametrize('kind', KINDS)
def test_a_download_survives_ten_cuts(kind, small, serve, tmp_path):
    layout, contents, sample = small(kind)
    offered = packages(layout, contents)
    longest = max(map(len, offered.values()))
    server = serve(offered, cuts=10, limit=longest // 12, pause=0.001)
    assert_same(data.load(sample.name, tmp_path), sample)
    assert names(tmp_path) == sorted(offered)
    assert len(server.starts) == 10 + len(offered) and max(server.starts) > longest // 2
    assert_same(data.load(sample.name, tmp_path), sample)
    assert len(server.starts) == 10 + len(offered)  # the second time, nothing was fetched


def test_a_slow_download_writes_lines_into_a_log_file(small, serve, tmp_path, capsys, monkeypatch):
    "What has arrived, its share and the pace, every minute."
    layout, contents, _ = small('records')
    monkeypatch.setattr(data, '_LOG_SECONDS', 0.1)
    monkeypatch.delitem(sys.modules, 'ipykernel', raising=False)
    serve(packages(layout, contents), pause=0.002)
    data.load('cifar10', tmp_path)
    first, *lines = capsys.readouterr().err.splitlines()
    assert first.startswith('downloading http') and len(lines) >= 2
    line = rf'{layout.packed}: +\d+%\|.*\| [\d.]+[kM]?/[\d.]+M \[.*, [\d.]+[kM]?B/s\]'
    assert [each for each in lines if not re.fullmatch(line, each)] == []


def test_a_lost_server_leaves_a_part_that_another_continues(small, serve, tmp_path, capsys):
    layout, contents, sample = small('records')
    offered = packages(layout, contents)
    serve(offered, cuts=1, limit=100_000, on_cut=Server.stop)
    with pytest.raises(FileNotFoundError, match=r'The download failed: .*refused'):
        data.load('cifar10', tmp_path)
    part = tmp_path / f'{layout.packed}.part'
    assert names(tmp_path) == [part.name] and part.stat().st_size == 100_000
    assert f'{part} keeps 100,000 bytes; the next download continues there' in capsys.readouterr().err
    server = serve(offered)
    assert_same(data.load('cifar10', tmp_path), sample)
    assert server.starts == [100_000] and names(tmp_path) == [layout.packed]


def test_ctrl_c_leaves_a_part_that_is_continued(small, serve, tmp_path, capsys):
    layout, contents, sample = small('records')
    part, reader = tmp_path / f'{layout.packed}.part', threading.get_ident()

    def interrupt(server):
        for _ in range(6000):  # a minute at most
            if part.exists() and part.stat().st_size >= 3 * 2**15: break
            threading.Event().wait(0.01)
        signal.pthread_kill(reader, signal.SIGINT)
    server = serve(packages(layout, contents), cuts=1, limit=100_000, on_cut=interrupt)
    with pytest.raises(KeyboardInterrupt): data.load('cifar10', tmp_path)
    size = part.stat().st_size
    assert size and names(tmp_path) == [part.name]
    assert f'{part} keeps {size:,} bytes' in capsys.readouterr().err
    assert_same(data.load('cifar10', tmp_path), sample)
    assert server.starts == [0, size]


def test_a_server_that_cannot_continue_starts_again(small, serve, tmp_path):
    layout, contents, sample = small('records')
    (tmp_path / f'{layout.packed}.part').write_bytes(b'older')
    server = serve(packages(layout, contents), knows_ranges=False)
    assert_same(data.load('cifar10', tmp_path), sample)
    assert server.starts == [0]


def test_a_server_that_always_sends_nothing_is_given_up(small, serve, tmp_path):
    layout, contents, _ = small('records')
    server = serve(packages(layout, contents), cuts=100)
    with pytest.raises(FileNotFoundError, match='the connection was cut'): data.load('cifar10', tmp_path)
    assert server.starts == [0]


def test_a_whole_part_only_wants_its_name(small, serve, tmp_path):
    layout, contents, sample = small('records')
    offered = packages(layout, contents)
    (tmp_path / f'{layout.packed}.part').write_bytes(offered[layout.packed])
    server = serve(offered)
    assert_same(data.load('cifar10', tmp_path), sample)
    assert not server.starts and names(tmp_path) == [layout.packed]


def test_a_mirror_with_other_images_is_not_believed(small, serve, tmp_path):
    layout, contents, _ = small('records')
    serve(packages(layout, [*contents[:5], contents[5][:-1] + b'\7']))
    problem = r'is not the published file; the download was deleted: test_batch\.bin is not'
    with pytest.raises(FileNotFoundError, match=problem):
        data.load('cifar10', tmp_path)
    assert names(tmp_path) == []


def test_a_mirror_with_the_python_version_alone(small, serve, tmp_path):
    layout, contents, sample = small('pickles')
    serve(packages(layout, contents))
    assert_same(data.load('cifar10', tmp_path), sample)
    assert names(tmp_path) == ['cifar-10-python.tar.gz']


def test_an_empty_mirror(serve, tmp_path):
    serve({})
    with pytest.raises(FileNotFoundError, match='The download failed: HTTP Error 404'):
        data.load('cifar10', tmp_path)
    assert names(tmp_path) == []


def test_only_what_is_missing_is_fetched(small, serve, tmp_path):
    layout, contents, sample = small('idx')
    write(tmp_path, layout, contents)[1].unlink()
    server = serve(packages(layout, contents))
    assert_same(data.load('fashion_mnist', tmp_path), sample)
    assert server.starts == [0] and layout.package(list(layout.digests)[1]) in names(tmp_path)


def test_two_downloads_at_once(small, serve, tmp_path):
    layout, contents, sample = small('records')
    server = serve(packages(layout, contents), cuts=2, limit=50_000)
    found = []
    fetch = lambda: found.append(data.load('cifar10', tmp_path))
    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join(60)
    assert len(found) == 2 and len(server.starts) == 3
    for dataset in found: assert_same(dataset, sample)


# The full data and the sample

@pytest.mark.parametrize('name', data.DATASETS)
def test_the_full_data_and_the_sample_drawn_from_it(name):
    full, sample = load_full(name), data.load(name, sample=True)
    assert [digest_of(array.tobytes())[:8] for array in arrays_of(full)] == ARRAY_DIGESTS[name]
    assert_same(sample, draw_sample(full))


@pytest.mark.parametrize('name', data.DATASETS)
def test_a_data_set_is_everywhere_where_it_must_be(name):
    places = {'CLASS_NAMES': data.CLASS_NAMES, '_LAYOUTS': data._LAYOUTS,
              '_SAMPLE_DIGESTS': data._SAMPLE_DIGESTS,
              'DATASET_LABELS': DATASET_LABELS, 'ARRAY_DIGESTS': ARRAY_DIGESTS}
    assert [place for place, known in places.items() if name not in known] == []
    sample = Path(data.__file__).parent / 'sample'
    assert f'`{name}.npz`' in (sample / 'README.md').read_text() and (sample / f'{name}.npz').exists()


def test_the_sample_is_balanced_and_documented():
    text = (Path(data.__file__).parent / 'sample' / 'README.md').read_text()
    for words in ('MIT licence', 'Zalando SE', 'no explicit licence', 'Krizhevsky'): assert words in text
    for name in data.DATASETS:
        sample = data.load(name, sample=True)
        assert sample.y_train.bincount().tolist() == [100] * 10
        assert sample.y_test.bincount().tolist() == [50] * 10
        assert len(torch.cat([sample.x_train, sample.x_test]).flatten(1).unique(dim=0)) == 1500


def test_a_damaged_sample_is_not_read(tmp_path, monkeypatch):
    content = bytearray((Path(data.__file__).parent / 'sample' / 'cifar10.npz').read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / 'sample').mkdir()
    (tmp_path / 'sample' / 'cifar10.npz').write_bytes(content)
    monkeypatch.setattr(data.resources, 'files', lambda package: tmp_path)
    with pytest.raises(ValueError, match=r'the sample cifar10\.npz .* damaged: install wib_nbdev again'):
        data.load('cifar10', sample=True)


# Identities

shapes = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=50)
@given(shapes, st.integers(0, 999))
def test_standardising_is_what_numpy_computes(shape, seed):
    x = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    mean, std = data.channel_stats(torch.from_numpy(x))
    np.testing.assert_allclose(mean, (x / 255).mean((0, 2, 3)), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(std, (x / 255).std((0, 2, 3)), rtol=1e-9, atol=1e-12)
    z = data.standardise(torch.from_numpy(x), mean, std + 0.05)
    exact = (x / 255 - mean.numpy()[:, None, None]) / (std.numpy()[:, None, None] + 0.05)
    np.testing.assert_allclose(z, exact, rtol=0, atol=4 * torch.finfo(torch.float32).eps / 0.05)


@pytest.fixture(scope='module')
def numbered():
    "The sample with 1,000 training images that are their own numbers."
    sample = data.load('cifar10', sample=True)
    return replace(sample, x_train=torch.arange(1000, dtype=torch.int32).view(torch.uint8).view(-1, 1, 2, 2))


def numbers(x): return x.contiguous().view(-1, 4).view(torch.int32).flatten()


@settings(max_examples=40)
@given(st.floats(0.02, 0.5))
def test_holdout_is_a_partition(numbered, fraction):
    held = data.holdout(numbered, fraction)
    together = torch.cat([numbers(held.x_train), numbers(held.x_test)])
    assert torch.equal(together.sort().values, torch.arange(1000, dtype=torch.int32))
    assert torch.equal(numbered.y_train[numbers(held.x_test).long()], held.y_test)
    assert set(held.y_test.bincount().tolist()) == {round(100 * fraction)}


@settings(max_examples=40)
@given(st.integers(1, 1000), st.integers(1, 1000))
def test_subsets_are_nested(numbered, n, m):
    n, m = sorted((n, m))
    few, many = data.subset(numbered, n), data.subset(numbered, m)
    assert torch.equal(few.x_train, many.x_train[:n]) and torch.equal(few.y_train, many.y_train[:n])
    assert len(numbers(many.x_train).unique()) == m and few.x_test is numbered.x_test
    assert torch.equal(numbered.y_train[numbers(few.x_train).long()], few.y_train)


def test_draws_leave_the_global_generator_alone(numbered):
    before = torch.get_rng_state()
    data.holdout(numbered)
    data.subset(numbered, 10)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.cuda
def test_everything_stays_on_the_gpu():
    sample = data.load('cifar10', sample=True)
    on_gpu, statistics = sample.to('cuda'), data.channel_stats(sample.x_train)
    for ours, theirs in zip(data.channel_stats(on_gpu.x_train), statistics, strict=True):
        assert torch.equal(ours, theirs)
    expected = data.standardise(sample.x_train, *statistics)
    torch.testing.assert_close(data.standardise(on_gpu.x_train, *statistics).cpu(), expected)
    for draw in (data.holdout, lambda dataset: data.subset(dataset, 50)):
        assert draw(on_gpu).x_train.is_cuda
        assert_same(draw(on_gpu).to('cpu'), draw(sample))
