"""Damaged files, downloads over a slow line that breaks, the sample, and identities of what is drawn."""
import gzip
import hashlib
import http.server
import io
import os
import pickle
import signal
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wib_nbdev import data

FULL_ROOT = Path(os.environ.get('WIB_DATA') or Path(__file__).parents[1] / 'data')
PARTS = ('x_train', 'y_train', 'x_test', 'y_test')
ARRAY_DIGESTS = {  # of the four arrays' bytes, as they have been since the project's first run
    'fashion_mnist': ('2e487a6c', '657fbd22', 'c867c93f', '3d0e6c6e'),
    'cifar10': ('9d5c2edd', '2b7cd2f2', '177777c3', 'cec8a24a'),
}


def load_full(name):
    if data._missing(FULL_ROOT, data._choose_layout(name, FULL_ROOT)):
        pytest.skip(f'needs the full {name} in data/ or WIB_DATA')
    return data.load(name, FULL_ROOT, download=False)


def assert_same(dataset, other):
    for part in PARTS: assert torch.equal(getattr(dataset, part), getattr(other, part)), part


# The published layouts, written with the embedded sample's images: real files in their publishers' formats, but small.

def arrays_of(sample):
    return [getattr(sample, part).to(torch.uint8).numpy() for part in PARTS]


def idx_contents(sample):
    x_train, y_train, x_test, y_test = arrays_of(sample)

    def images(x): return np.array([0x803, len(x), 28, 28], '>u4').tobytes() + x.tobytes()
    def labels(y): return np.array([0x801, len(y)], '>u4').tobytes() + y.tobytes()
    return [images(x_train), labels(y_train), images(x_test), labels(y_test)]


def cifar_batches(sample):
    x_train, y_train, x_test, y_test = arrays_of(sample)
    return [*zip(np.split(x_train, 5), np.split(y_train, 5), strict=True), (x_test, y_test)]


def record_contents(sample):
    return [np.concatenate([y[:, None], x.reshape(len(x), -1)], 1).tobytes() for x, y in cifar_batches(sample)]


def pickle_contents(sample):
    return [pickle.dumps({'data': x.reshape(len(x), -1), 'labels': y.tolist()}, protocol=2)
            for x, y in cifar_batches(sample)]


CONTENTS = {'idx': ('fashion_mnist', 0, idx_contents), 'records': ('cifar10', 0, record_contents),
            'pickles': ('cifar10', 1, pickle_contents)}


@pytest.fixture
def small(monkeypatch):
    "A function from a kind of layout to the layout of small files, their contents and the images; `load` knows the layout too."
    def make(kind):
        name, index, pack = CONTENTS[kind]
        sample = data.load(name, sample=True)
        contents = pack(sample)
        layouts = list(data._LAYOUTS[name])
        files = tuple(file._replace(n_bytes=len(content), digest=hashlib.sha256(content).hexdigest())
                      for file, content in zip(layouts[index].files, contents, strict=True))
        layouts[index] = layouts[index]._replace(files=files)
        monkeypatch.setitem(data._LAYOUTS, name, tuple(layouts))
        return layouts[index], contents, sample
    return make


def packages(layout, contents):
    "What the publisher would offer: names and bytes of the packed files."
    if '.tar' not in layout.packed:
        return {f'{file.name}.gz': gzip.compress(content) for file, content in zip(layout.files, contents, strict=True)}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode='w:gz') as tar:
        for file, content in reversed([*zip(layout.files, contents, strict=True)]):
            info = tarfile.TarInfo(f'{layout.folder}/{file.name}')
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return {layout.packed: archive.getvalue()}


def write(root, layout, contents, is_packed=False):
    "The files below `root`; returns their paths."
    folder = root / layout.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not is_packed: found = {folder / file.name: content for file, content in zip(layout.files, contents, strict=True)}
    else: found = {root / Path(layout.packed).parent / name: content for name, content in packages(layout, contents).items()}
    for path, content in found.items(): path.write_bytes(content)
    return list(found)


@pytest.mark.parametrize('is_packed', [False, True], ids=['plain', 'packed'])
@pytest.mark.parametrize('kind', CONTENTS)
def test_each_layout_gives_the_same_images(kind, is_packed, small, tmp_path):
    layout, contents, sample = small(kind)
    write(tmp_path, layout, contents, is_packed)
    dataset = data.load(sample.name, tmp_path, download=False)
    assert_same(dataset, sample)
    assert dataset.source == layout.folder and dataset.y_train.dtype == torch.int64


# Damage

DAMAGES = {
    'empty': (lambda content: b'', 'is empty'),
    'cut': (lambda content: content[:-1], 'is cut short'),
    'longer': (lambda content: content + b'\0', 'is longer'),
    'bit': (lambda content: content[:500] + bytes([content[500] ^ 4]) + content[501:], 'has changed'),
    'block lost': (lambda content: content[:4096] + content[4608:], 'is cut short'),
}


@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('kind', CONTENTS)
def test_a_damaged_file_is_named(kind, damage, small, tmp_path):
    layout, contents, sample = small(kind)
    spoil, problem = DAMAGES[damage]
    path = write(tmp_path, layout, contents)[2]
    path.write_bytes(spoil(contents[2]))
    with pytest.raises(ValueError) as caught: data.load(sample.name, tmp_path)
    assert f'{path}: {path.name} {problem}' in str(caught.value) and 'Delete it and load again' in str(caught.value)
    frame = data.inspect(tmp_path).query('dataset == @sample.name')
    assert frame.status.tolist() == ['damaged' if i == 2 else 'whole' for i in range(len(frame))]
    assert frame.problem.iloc[2].startswith(problem) and path.is_file()


@settings(max_examples=40)
@given(st.sampled_from(['idx', 'records', 'pickles']), st.floats(0, 1), st.integers(1, 255), st.booleans())
def test_any_changed_byte_is_noticed(kind, place, flip, is_packed):
    name, index, pack = CONTENTS[kind]
    content = bytearray(pack(data.load(name, sample=True))[1])
    layout = data._LAYOUTS[name][index]
    file = layout.files[1]._replace(n_bytes=len(content), digest=hashlib.sha256(content).hexdigest())
    content[min(int(place * len(content)), len(content) - 1)] ^= flip
    assert data._find_problem(bytes(content), file, layout) == 'has changed'


def test_swapped_files_are_named(small, tmp_path):
    layout, contents, sample = small('records')
    write(tmp_path, layout, [contents[1], contents[0], *contents[2:]])
    with pytest.raises(ValueError, match=r'data_batch_1\.bin holds the content of data_batch_2\.bin'):
        data.load(sample.name, tmp_path)


@pytest.mark.parametrize('kind', ['idx', 'records'])
def test_a_packed_file_cut_short_cannot_be_read(kind, small, tmp_path):
    layout, contents, sample = small(kind)
    path = write(tmp_path, layout, contents, is_packed=True)[-1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf'{path.name}: .* cannot be read .*Delete it'): data.load(sample.name, tmp_path)


def test_an_archive_of_something_else(small, tmp_path):
    layout, _, sample = small('pickles')
    with tarfile.open(tmp_path / layout.packed, 'w:gz') as tar: tar.addfile(tarfile.TarInfo('cifar-100-python/train'))
    with pytest.raises(ValueError, match=r'data_batch_1 is not in the archive'): data.load(sample.name, tmp_path)


def test_a_packed_file_is_not_unpacked_without_limit(small, tmp_path):
    layout, contents, sample = small('idx')
    path = write(tmp_path, layout, contents, is_packed=True)[1]
    path.write_bytes(gzip.compress(bytes(50_000_000)))
    assert len(data._unpack(path, layout.files[1:2])[layout.files[1].name]) == len(contents[1]) + 1
    with pytest.raises(ValueError, match=r'ubyte is longer than 1,008 bytes'): data.load(sample.name, tmp_path)


def test_a_file_that_may_not_be_read(small, tmp_path, monkeypatch):
    layout, contents, sample = small('idx')
    path = write(tmp_path, layout, contents)[3]
    path.unlink()
    path.mkdir()  # for a superuser too, a folder is a file that cannot be opened
    with pytest.raises(ValueError, match=rf'{path.name} cannot be read'): data.load(sample.name, tmp_path)
    if os.geteuid():
        path.rmdir()
        path.write_bytes(contents[3])
        path.chmod(0)
        with pytest.raises(ValueError, match='cannot be read .*Permission denied'): data.load(sample.name, tmp_path)


class Touch:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('is_packed', [False, True], ids=['plain', 'packed'])
def test_an_unverified_pickle_is_never_opened(is_packed, tmp_path):
    trace = tmp_path / 'was opened'
    hostile = pickle.dumps(Touch(trace))
    write(tmp_path, data._LAYOUTS['cifar10'][1], [hostile] * 6, is_packed)
    with pytest.raises(ValueError, match='data_batch_1 is cut short'): data.load('cifar10', tmp_path)
    assert set(data.inspect(tmp_path).query("dataset == 'cifar10'").status) == {'damaged'} and not trace.exists()
    pickle.loads(hostile)
    assert trace.exists()  # the file was indeed a dangerous one


# Missing files

def test_missing_files_are_listed_with_what_to_do(small, tmp_path, monkeypatch):
    layout, contents, _ = small('pickles')
    write(tmp_path, layout, contents)[5].unlink()
    monkeypatch.setenv('WIB_DATA', str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught: data.load('cifar10', download=False)
    for words in (f'not whole in {tmp_path}: cifar-10-batches-py lacks test_batch.', 'put cifar-10-python.tar.gz from https',
                  'WIB_MIRROR', '--root', '--sample'):
        assert words in str(caught.value)
    assert data.inspect().query("dataset == 'cifar10'").status.tolist() == ['whole'] * 5 + ['missing']


def test_no_network_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv('WIB_MIRROR', 'http://127.0.0.1:9')  # nobody listens there
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('WIB_DATA', raising=False)
    with pytest.raises(FileNotFoundError, match=r'not whole in data: .*The download failed: .*refused'):
        data.load('fashion_mnist')
    assert not any(path.is_file() and path.suffix != '.lock' for path in tmp_path.rglob('*'))


# The download, from a server of our own on this machine

class Server(http.server.ThreadingHTTPServer):
    "Serves `files` (name -> bytes), at most `limit` bytes an answer for the first `cuts` answers; then cuts the line."
    daemon_threads = True

    def __init__(self, files, cuts=0, limit=0, knows_ranges=True):
        self.files, self.cuts, self.limit, self.knows_ranges = files, cuts, limit, knows_ranges
        self.starts = []  # first byte of each answer
        super().__init__(('127.0.0.1', 0), Handler)

    @property
    def address(self): return f'http://127.0.0.1:{self.server_port}/pub/'


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def do_GET(self):
        content = self.server.files.get(Path(self.path).name)
        if content is None: return self.send_error(404)
        start = int(self.headers['Range'].removeprefix('bytes=').removesuffix('-')) if self.server.knows_ranges else 0
        if start >= len(content): return self.send_error(416)
        self.server.starts.append(start)
        self.send_response(206 if self.server.knows_ranges else 200)
        self.send_header('Content-Length', str(len(content) - start))
        if self.server.knows_ranges: self.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
        self.end_headers()
        is_cut = len(self.server.starts) <= self.server.cuts
        end = start + self.server.limit if is_cut else len(content)
        for at in range(start, min(end, len(content)), 10_000): # slowly: in small pieces
            self.wfile.write(content[at:min(at + 10_000, end)])
            self.wfile.flush()
        self.close_connection = True


@pytest.fixture
def serve(monkeypatch):
    "A function that starts a server and makes it the mirror."
    servers = []
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(data.time, 'sleep', lambda seconds: None)

    def start(files, **options):
        servers.append(Server(files, **options))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        monkeypatch.setenv('WIB_MIRROR', servers[-1].address)
        return servers[-1]
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def names(root): return sorted(path.name for path in root.rglob('*') if path.is_file() and path.suffix != '.lock')


@pytest.mark.parametrize('kind', CONTENTS)
def test_a_download_survives_ten_cut_lines(kind, small, serve, tmp_path):
    layout, contents, sample = small(kind)
    offered = packages(layout, contents)
    longest = max(map(len, offered.values()))
    server = serve(offered, cuts=10, limit=longest // 12)
    assert_same(data.load(sample.name, tmp_path), sample)
    assert names(tmp_path) == sorted(offered)
    assert len(server.starts) == 10 + len(offered) and max(server.starts) > longest // 2
    assert_same(data.load(sample.name, tmp_path), sample)
    assert len(server.starts) == 10 + len(offered)  # the second time, nothing was fetched


def test_a_lost_server_leaves_a_part_that_is_continued(small, serve, tmp_path, capsys):
    layout, contents, sample = small('records')
    offered = packages(layout, contents)
    server = serve(offered, cuts=99, limit=0)
    server.cuts, server.limit = 1, 100_000
    real_get = Handler.do_GET
    try:
        Handler.do_GET = lambda self: real_get(self) if not server.starts else None  # gone after the first answer
        with pytest.raises(FileNotFoundError, match='The download failed'): data.load('cifar10', tmp_path)
    finally: Handler.do_GET = real_get
    part = tmp_path / f'{layout.packed}.part'
    assert names(tmp_path) == [part.name] and part.stat().st_size == 100_000
    assert f'{part} keeps 100,000 bytes; the next download continues there' in capsys.readouterr().err
    server.cuts = 0
    assert_same(data.load('cifar10', tmp_path), sample)
    assert server.starts == [0, 100_000] and names(tmp_path) == [layout.packed]


def test_ctrl_c_leaves_a_part_that_is_continued(small, serve, tmp_path, capsys, monkeypatch):
    layout, contents, sample = small('idx')
    server = serve(packages(layout, contents))
    real_write, written = Handler.do_GET, []

    def interrupt(*args, **kwargs):
        bar = real_bar(*args, **kwargs)
        update = bar.update

        def update_and_interrupt(n):
            update(n)
            written.append(n)
            if len(written) == 3: signal.raise_signal(signal.SIGINT)
        bar.update = update_and_interrupt
        return bar
    real_bar = data.tqdm
    monkeypatch.setattr(data, 'tqdm', interrupt)
    with pytest.raises(KeyboardInterrupt): data.load('fashion_mnist', tmp_path)
    assert names(tmp_path) == ['train-images-idx3-ubyte.gz.part'] and real_write
    assert f'keeps {sum(written):,} bytes' in capsys.readouterr().err
    assert_same(data.load('fashion_mnist', tmp_path), sample)
    assert server.starts[:2] == [0, sum(written)]


def test_a_server_that_cannot_continue_starts_again(small, serve, tmp_path):
    layout, contents, sample = small('records')
    (tmp_path / f'{layout.packed}.part').write_bytes(b'older')
    server = serve(packages(layout, contents), knows_ranges=False)
    assert_same(data.load('cifar10', tmp_path), sample)
    assert server.starts == [0]


def test_a_whole_part_only_wants_its_name(small, serve, tmp_path):
    layout, contents, sample = small('records')
    offered = packages(layout, contents)
    (tmp_path / f'{layout.packed}.part').write_bytes(offered[layout.packed])
    server = serve(offered)
    assert_same(data.load('cifar10', tmp_path), sample)
    assert not server.starts


def test_a_mirror_that_sends_other_images_is_not_believed(small, serve, tmp_path):
    layout, contents, _ = small('records')
    server = serve(packages(layout, [*contents[:5], contents[5][:-1] + b'\7']))
    with pytest.raises(FileNotFoundError, match=r'is not the published file and was deleted: test_batch\.bin has changed'):
        data.load('cifar10', tmp_path)
    assert names(tmp_path) == [] and len(server.starts) == 1


def test_a_mirror_with_the_python_version_alone(small, serve, tmp_path):
    layout, contents, sample = small('pickles')
    serve(packages(layout, contents))
    assert_same(data.load('cifar10', tmp_path), sample)
    assert names(tmp_path) == ['cifar-10-python.tar.gz']


def test_an_empty_mirror(serve, tmp_path):
    server = serve({})
    with pytest.raises(FileNotFoundError, match='The download failed: HTTP Error 404'): data.load('cifar10', tmp_path)
    assert not server.starts and names(tmp_path) == []


def test_only_what_is_missing_is_fetched(small, serve, tmp_path):
    layout, contents, sample = small('idx')
    write(tmp_path, layout, contents)[1].unlink()
    server = serve(packages(layout, contents))
    assert_same(data.load('fashion_mnist', tmp_path), sample)
    assert server.starts == [0] and f'{layout.files[1].name}.gz' in names(tmp_path)


def test_two_downloads_at_once(small, serve, tmp_path):
    layout, contents, sample = small('records')
    server = serve(packages(layout, contents), cuts=2, limit=50_000)
    found = []
    threads = [threading.Thread(target=lambda: found.append(data.load('cifar10', tmp_path))) for _ in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join(60)
    assert len(found) == 2 and len(server.starts) == 3
    for dataset in found: assert_same(dataset, sample)


# The full data and the sample

@pytest.mark.parametrize('name', data.DATASETS)
def test_the_full_arrays_are_those_of_the_first_run(name):
    full = load_full(name)
    digests = [hashlib.sha256(array.tobytes()).hexdigest()[:8] for array in arrays_of(full)]
    assert tuple(digests) == ARRAY_DIGESTS[name]
    held = data.holdout(full)
    assert len(held.x_test) == len(full.x_train) // 10 and set(held.y_test.bincount().tolist()) == {len(held.x_test) // 10}


@pytest.mark.parametrize('name', data.DATASETS)
def test_the_sample_is_drawn_from_the_full_data(name):
    full, sample = load_full(name), data.load(name, sample=True)
    train = data.holdout(full, 1000 / len(full.y_train))
    test = data.holdout(replace(full, x_train=full.x_test, y_train=full.y_test), 500 / len(full.y_test))
    assert_same(sample, replace(sample, x_train=train.x_test, y_train=train.y_test, x_test=test.x_test, y_test=test.y_test))


def test_torchvision_reads_the_same_fashion_mnist():
    from torchvision import datasets
    ours = load_full('fashion_mnist')
    for train, x, y in ((True, ours.x_train, ours.y_train), (False, ours.x_test, ours.y_test)):
        theirs = datasets.FashionMNIST(FULL_ROOT, train=train, download=False)
        assert torch.equal(theirs.data, x[:, 0]) and torch.equal(theirs.targets, y)


def test_the_sample_is_balanced_and_documented():
    folder = Path(data.__file__).parent / 'sample'
    text = (folder / 'README.md').read_text()
    assert 'MIT licence' in text and 'Zalando SE' in text and 'no explicit licence' in text and 'Krizhevsky' in text
    for name in data.DATASETS:
        sample = data.load(name, sample=True)
        assert sample.y_train.bincount().tolist() == [100] * 10 and sample.y_test.bincount().tolist() == [50] * 10
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

small_images = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(0, 999))


@settings(max_examples=50)
@given(small_images, st.sampled_from([torch.preserve_format, torch.channels_last]))
def test_standardising_is_what_numpy_computes(shape, memory_format):
    *shape, seed = shape
    x = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    mean, std = data.channel_stats(torch.from_numpy(x))
    np.testing.assert_allclose(mean, (x / 255).mean((0, 2, 3)), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(std, (x / 255).std((0, 2, 3)), rtol=1e-9, atol=1e-12)
    z = data.standardise(torch.from_numpy(x), mean, std + 0.05, memory_format)
    exact = (x / 255 - mean.numpy()[:, None, None]) / (std.numpy()[:, None, None] + 0.05)
    assert z.dtype == torch.float32 and (memory_format is torch.preserve_format or z.is_contiguous(memory_format=memory_format))
    np.testing.assert_allclose(z, exact, rtol=0, atol=4 * torch.finfo(torch.float32).eps / 0.05)


@pytest.fixture(scope='module')
def numbered():
    "The sample with images that are their own numbers."
    sample = data.load('cifar10', sample=True)
    return replace(sample, x_train=torch.arange(1000, dtype=torch.int32).view(torch.uint8).view(-1, 1, 2, 2))


def numbers(x): return x.contiguous().view(-1, 4).view(torch.int32).flatten()


@settings(max_examples=40)
@given(st.floats(0.02, 0.5), st.integers(0, 1000))
def test_holdout_is_a_partition(numbered, fraction, seed):
    held = data.holdout(numbered, fraction, seed)
    assert torch.equal(torch.cat([numbers(held.x_train), numbers(held.x_test)]).sort().values, torch.arange(1000))
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
    on_gpu = sample.to('cuda')
    statistics = data.channel_stats(on_gpu.x_train)
    assert all(torch.equal(*pair) for pair in zip(statistics, data.channel_stats(sample.x_train), strict=True))
    torch.testing.assert_close(data.standardise(on_gpu.x_train, *statistics).cpu(), data.standardise(sample.x_train, *statistics))
    for part in (data.holdout(on_gpu), data.subset(on_gpu, 50)): assert part.x_train.is_cuda and part.y_train.is_cuda
    assert_same(data.holdout(on_gpu).to('cpu'), data.holdout(sample))
