"""Files that are damaged in every way we can think of, the download, the sample, and the numbers behind standardisation."""
import gzip
import hashlib
import http.server
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchvision import datasets as tv

from wib_nbdev import data

FULL_ROOT = Path(os.environ.get('WIB_DATA') or Path(__file__).parents[1]/'data')
PARTS = ('x_train', 'y_train', 'x_test', 'y_test')
IDX, RECORDS, PICKLES = data.LAYOUTS['fashion_mnist'] + data.LAYOUTS['cifar10']


def sha(content):
    return hashlib.sha256(content).hexdigest()


def need_full(name):
    if data._complete(name, FULL_ROOT) is None:
        pytest.skip(f'needs the full {name} in data/ or WIB_DATA')
    return data.load(name, FULL_ROOT, download=False)


# The three layouts with the embedded sample's images in them: real files in the authors' formats, small enough to damage by the thousand.

def small_arrays(name):
    dataset = data.load(name, sample=True)
    return {part: getattr(dataset, part).to(torch.uint8).numpy() for part in PARTS}


def idx_contents(arrays):
    def images(x): return np.array([0x803, len(x), 28, 28], '>u4').tobytes() + x.tobytes()
    def labels(y): return np.array([0x801, len(y)], '>u4').tobytes() + y.tobytes()
    return [images(arrays['x_train']), labels(arrays['y_train']), images(arrays['x_test']), labels(arrays['y_test'])]


def batches(arrays):
    size = len(arrays['x_train']) // 5
    train = [(arrays['x_train'][i * size:(i + 1) * size], arrays['y_train'][i * size:(i + 1) * size]) for i in range(5)]
    return [*train, (arrays['x_test'], arrays['y_test'])]


def record_contents(arrays):
    return [np.concatenate([y[:, None], x.reshape(len(x), -1)], 1).tobytes() for x, y in batches(arrays)]


def pickle_contents(arrays):
    def entry(x, y): return {'data': x.reshape(len(x), -1), 'labels': y.tolist(), 'batch_label': 'a batch'}
    return [pickle.dumps(entry(x, y), protocol=2) for x, y in batches(arrays)]


def small_layout(layout, contents, arrays, hash_file):
    files = tuple(replace(file, digest=hash_file(content), n_bytes=file.n_bytes and len(content))
                  for file, content in zip(layout.files, contents, strict=True))
    return replace(layout, files=files, digests={part: sha(arrays[part].tobytes()) for part in PARTS})


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def write(root, layout, contents, packed=False):
    folder = Path(root)/layout.folder
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in zip(layout.files, contents, strict=True):
        if packed: (folder/f'{file.name}.gz').write_bytes(gzip.compress(content, mtime=0))
        else: (folder/file.name).write_bytes(content)


KINDS = ('idx', 'idx.gz', 'records', 'pickles')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "For each kind of layout: a root with whole files, the layout, the arrays."
    found = {}
    for kind in KINDS:
        name, layout, pack, hash_file = {
            'idx': ('fashion_mnist', IDX, idx_contents, sha), 'idx.gz': ('fashion_mnist', IDX, idx_contents, sha),
            'records': ('cifar10', RECORDS, record_contents, sha), 'pickles': ('cifar10', PICKLES, pickle_contents, md5),
        }[kind]
        root, arrays = tmp_path_factory.mktemp(kind), small_arrays(name)
        contents = pack(arrays)
        layout = small_layout(layout, contents, arrays, hash_file)
        write(root, layout, contents, packed=kind.endswith('gz'))
        found[kind] = root, layout, arrays
    return found


def assert_same(dataset, arrays):
    for part in PARTS: np.testing.assert_array_equal(getattr(dataset, part).numpy(), arrays[part])


@pytest.mark.parametrize('kind', KINDS)
def test_each_layout_gives_the_same_arrays(whole, kind):
    root, layout, arrays = whole[kind]
    dataset = data.read_layout(root, layout)
    assert_same(dataset, arrays)
    assert dataset.source == layout.folder and dataset.y_train.dtype == torch.int64


# Damage

def mutate(content, how, rng):
    "A copy of `content`, damaged."
    if how == 'empty': return b''
    if how == 'cut': return content[:rng.randrange(len(content))]
    if how == 'longer': return content + rng.randbytes(rng.randint(1, 100))
    damaged = bytearray(content)
    at = rng.randrange(len(content))
    if how == 'bit': damaged[at] ^= 1 << rng.randrange(8)
    if how == 'zeros': damaged[at:at + 4096] = bytes(len(damaged[at:at + 4096]))
    if how == 'noise': damaged[at:at + 64] = rng.randbytes(len(damaged[at:at + 64]))
    if how == 'lost block': del damaged[at:at + 512]
    if how == 'swapped bytes': damaged[:at] = damaged[:at][::-1]
    return bytes(damaged)


HOWS = ('empty', 'cut', 'longer', 'bit', 'zeros', 'noise', 'lost block', 'swapped bytes')


@settings(max_examples=300, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(KINDS), how=st.sampled_from(HOWS), index=st.integers(0, 5), seed=st.integers(0, 2**32))
def test_no_damaged_file_gets_through(whole, tmp_path, kind, how, index, seed):
    root, layout, arrays = whole[kind]
    file = layout.files[index % len(layout.files)]
    path = data._locate(root, layout, file)
    content = path.read_bytes()
    damaged = mutate(content, how, random.Random(seed))
    if damaged == content: return
    path.write_bytes(damaged)
    try:
        try: dataset = data.read_layout(root, layout)
        except ValueError as problem:
            assert file.name in str(problem) and 'is damaged' in str(problem) and 'Delete it. Either load with' in str(problem)
        else: # the packing's own header (a time stamp, say) may differ; the images may not
            assert kind == 'idx.gz'
            assert_same(dataset, arrays)
    finally: path.write_bytes(content)


@pytest.mark.parametrize('kind', ['idx', 'records', 'pickles'])
def test_every_bit_of_a_header_counts(whole, kind):
    root, layout, _ = whole[kind]
    path = data._locate(root, layout, layout.files[0])
    content = path.read_bytes()
    try:
        for bit in range(16 * 8):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match='content has changed'): data.read_file(root, layout, layout.files[0])
    finally: path.write_bytes(content)


@pytest.mark.parametrize('kind', ['idx', 'idx.gz', 'records', 'pickles'])
def test_swapped_files_are_named(whole, tmp_path, kind):
    root, layout, _ = whole[kind]
    first, last = (data._locate(root, layout, layout.files[i]) for i in (0, 2))
    (tmp_path/layout.folder).mkdir(parents=True)
    for file in layout.files:
        path = data._locate(root, layout, file)
        (tmp_path/layout.folder/{first: last, last: first}.get(path, path).name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=f'{layout.files[0].name}.* is damaged: it holds the content of {layout.files[2].name}'):
        data.read_layout(tmp_path, layout)


def test_a_folder_in_the_place_of_a_file(whole, tmp_path):
    _, layout, _ = whole['idx']
    (tmp_path/layout.folder/layout.files[0].name).mkdir(parents=True)
    with pytest.raises(ValueError, match='is damaged: it cannot be read'): data.read_file(tmp_path, layout, layout.files[0])


def test_a_packed_file_is_not_unpacked_without_limit(whole, tmp_path):
    _, layout, _ = whole['idx']
    (tmp_path/layout.folder).mkdir(parents=True)
    bomb = gzip.compress(bytes(200_000_000))
    assert len(bomb) < 1_000_000
    (tmp_path/layout.folder/f'{layout.files[1].name}.gz').write_bytes(bomb)
    with pytest.raises(ValueError, match='it is longer than'): data.read_file(tmp_path, layout, layout.files[1])
    assert len(data._content(tmp_path/layout.folder/f'{layout.files[1].name}.gz', layout.files[1])) == layout.files[1].n_bytes + 1


class Touch:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def test_an_unverified_pickle_is_never_loaded(tmp_path):
    trace = tmp_path/'pickle was loaded'
    hostile = pickle.dumps(Touch(trace))
    write(tmp_path, PICKLES, [hostile] * 6)
    with pytest.raises(ValueError, match='data_batch_1 is damaged'): data.load('cifar10', tmp_path, download=False)
    assert set(data.inspect(tmp_path).query("layout == 'cifar-10-batches-py'").status) == {'damaged'}
    assert not trace.exists()
    pickle.loads(hostile)
    assert trace.exists() # the file was indeed a dangerous one


def test_arrays_are_checked_besides_files(whole):
    root, layout, _ = whole['pickles']
    with pytest.raises(ValueError, match='y_test in cifar-10-batches-py has digest'):
        data.read_layout(root, replace(layout, digests=layout.digests | {'y_test': '0' * 64}))


def test_md5_digests_are_torchvisions():
    assert [[file.name, file.digest] for file in PICKLES.files] == tv.CIFAR10.train_list + tv.CIFAR10.test_list
    assert [f'{file.name}.gz' for file in IDX.files] == [name for name, _ in tv.FashionMNIST.resources]
    assert list(data.CLASS_NAMES['fashion_mnist']) == tv.FashionMNIST.classes


# Full data

@pytest.mark.parametrize('name', data.DATASETS)
def test_full_data_have_the_published_digests(name):
    dataset = need_full(name)
    for part in PARTS: assert sha(getattr(dataset, part).to(torch.uint8).numpy().tobytes()) == data.DIGESTS[name][part]


def test_torchvision_reads_the_same_fashion_mnist():
    ours = need_full('fashion_mnist')
    for train, x, y in ((True, ours.x_train, ours.y_train), (False, ours.x_test, ours.y_test)):
        theirs = tv.FashionMNIST(FULL_ROOT, train=train, download=False)
        assert torch.equal(theirs.data, x[:, 0]) and torch.equal(theirs.targets, y)


def test_full_cifar_in_the_python_layout(tmp_path):
    dataset = need_full('cifar10')
    arrays = {part: getattr(dataset, part).to(torch.uint8).numpy() for part in PARTS}
    contents = pickle_contents(arrays)
    files = tuple(replace(file, digest=md5(content)) for file, content in zip(PICKLES.files, contents, strict=True))
    write(tmp_path, PICKLES, contents)
    assert_same(data.read_layout(tmp_path, replace(PICKLES, files=files)), arrays) # against the published digests of the arrays


def test_one_bit_in_the_full_test_labels(tmp_path):
    need_full('fashion_mnist')
    (tmp_path/IDX.folder).mkdir(parents=True)
    for file in IDX.files[:3]: os.symlink((FULL_ROOT/IDX.folder/file.name).resolve(), tmp_path/IDX.folder/file.name)
    content = bytearray((FULL_ROOT/IDX.folder/IDX.files[3].name).read_bytes())
    content[5000] ^= 1
    (tmp_path/IDX.folder/IDX.files[3].name).write_bytes(content)
    with pytest.raises(ValueError, match='t10k-labels-idx1-ubyte is damaged: its content has changed'):
        data.load('fashion_mnist', tmp_path, download=False)


@pytest.mark.parametrize('name', data.DATASETS)
def test_the_sample_can_be_drawn_again(name, tmp_path):
    again = data.make_sample(need_full(name))
    shipped = data.load(name, sample=True)
    for part in PARTS: assert torch.equal(getattr(again, part), getattr(shipped, part))
    path = data.save_sample(again, tmp_path)
    assert os.listdir(tmp_path) == [path.name]
    with np.load(path, allow_pickle=False) as stored: assert_same(shipped, {part: stored[part] for part in PARTS})


@pytest.mark.parametrize(('counts', 'message'), [
    (dict(n_train=500), 'n_train=500: must be at most 100'), (dict(n_test=51), 'n_test=51: must be at most 50'),
])
def test_a_sample_has_what_it_says_it_has(counts, message):
    sample = data.load('cifar10', sample=True)
    with pytest.raises(ValueError, match=message): data.make_sample(sample, **counts)
    assert data.make_sample(sample, 100, 50).y_train.bincount().tolist() == [100] * 10


# Missing files and the download

def test_missing_files_are_listed(tmp_path):
    write(tmp_path, IDX, [b'x'] * 4)
    (tmp_path/IDX.folder/'t10k-images-idx3-ubyte').unlink()
    advice = r'lacks t10k-images-idx3-ubyte\. Either load with download=True .*FashionMNIST/raw yourself'
    with pytest.raises(FileNotFoundError, match=advice):
        data.load('fashion_mnist', tmp_path, download=False)


def test_the_layout_that_is_nearly_whole_is_the_one_spoken_of(tmp_path):
    layout = data.LAYOUTS['cifar10'][1]
    (tmp_path/layout.folder).mkdir()
    for file in layout.files[:-1]: (tmp_path/layout.folder/file.name).write_bytes(b'x')
    with pytest.raises(FileNotFoundError, match=r'cifar-10-batches-py lacks test_batch\. .*cifar-10-python'):
        data.load('cifar10', tmp_path, download=False)


@pytest.mark.parametrize(('name', 'home', 'lacking'), [
    ('fashion_mnist', 'zalandoresearch', 'train-images'), ('cifar10', 'cifar-10-binary', 'data_batch_1')])
def test_no_network_is_a_clear_error(name, home, lacking, tmp_path, monkeypatch):
    monkeypatch.setenv('no_proxy', '')
    for variable in ('http_proxy', 'https_proxy'): monkeypatch.setenv(variable, 'http://127.0.0.1:9') # nobody listens there
    root = tmp_path/'new'
    with pytest.raises(FileNotFoundError, match=f'{lacking}.*{home}.*The download failed'): data.load(name, root)
    assert not root.exists()


@pytest.fixture
def site(tmp_path, monkeypatch):
    "A real web server with small packed files of Fashion-MNIST where torchvision looks: its folder, a root, the arrays."
    folder, root = tmp_path/'site', tmp_path/'root'
    folder.mkdir()
    arrays = small_arrays('fashion_mnist')
    contents = idx_contents(arrays)
    layout = small_layout(IDX, contents, arrays, sha)
    for file, content in zip(layout.files, contents, strict=True):
        (folder/f'{file.name}.gz').write_bytes(gzip.compress(content, mtime=0))
    handler = type('Quiet', (http.server.SimpleHTTPRequestHandler,), {'log_message': lambda *args: None})
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(tv.FashionMNIST, 'mirrors', [f'http://127.0.0.1:{server.server_port}/'])
    monkeypatch.setattr(tv.FashionMNIST, 'resources', [(path.name, md5(path.read_bytes())) for path in sorted(folder.iterdir())])
    monkeypatch.setattr(data, '_IDX', layout)
    monkeypatch.setitem(data.LAYOUTS, 'fashion_mnist', (layout,))
    yield folder, root, arrays
    server.shutdown()
    server.server_close()


def test_download(site):
    folder, root, arrays = site
    assert_same(data.load('fashion_mnist', root), arrays)
    assert sorted(path.name for path in root.rglob('*') if path.is_file()) == sorted(file.name for file in IDX.files)
    for path in folder.iterdir(): path.unlink()
    assert_same(data.load('fashion_mnist', root), arrays) # from the disk


def test_a_download_cut_short_leaves_nothing(site):
    folder, root, _ = site
    path = folder/'t10k-images-idx3-ubyte.gz'
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(FileNotFoundError, match='The download failed'): data.load('fashion_mnist', root)
    assert not root.exists()


def test_a_download_does_not_replace_a_damaged_file(site):
    _, root, _ = site
    data.load('fashion_mnist', root)
    path = root/IDX.folder/'train-labels-idx1-ubyte'
    path.write_bytes(b'mine')
    with pytest.raises(ValueError, match='train-labels-idx1-ubyte is damaged: it is cut short, 4 of 1,008 bytes'):
        data.load('fashion_mnist', root)
    assert path.read_bytes() == b'mine'
    path.unlink()
    assert len(data.load('fashion_mnist', root).y_train) == 1000


def test_root_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv('WIB_DATA', str(tmp_path/'elsewhere'))
    with pytest.raises(FileNotFoundError, match='elsewhere'): data.load('cifar10', download=False)
    monkeypatch.setenv('WIB_DATA', '')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match='is not whole in data:'): data.load('cifar10', download=False)


def test_inspect_tells_whole_from_missing_and_damaged(whole, tmp_path, monkeypatch):
    root, layout, _ = whole['idx']
    monkeypatch.setitem(data.LAYOUTS, 'fashion_mnist', (layout,))
    (tmp_path/layout.folder).mkdir(parents=True)
    for file in layout.files[:3]: (tmp_path/layout.folder/file.name).write_bytes((root/layout.folder/file.name).read_bytes())
    (tmp_path/layout.folder/layout.files[1].name).write_bytes(b'')
    frame = data.inspect(tmp_path).query("dataset == 'fashion_mnist'")
    assert frame.status.tolist() == ['whole', 'damaged', 'whole', 'missing']
    assert frame.advice[1].startswith('it is empty: delete it, put a whole copy into')
    assert frame.bytes[2] == layout.files[2].n_bytes and frame.advice[0] == ''


def test_inspect_needs_only_one_layout(whole, monkeypatch):
    root, layout, _ = whole['records']
    monkeypatch.setitem(data.LAYOUTS, 'cifar10', (layout, PICKLES))
    frame = data.inspect(root).query("dataset == 'cifar10'")
    assert frame.advice.tolist() == [''] * 6 + ['not needed'] * 6


# The embedded sample

def test_the_sample_is_small_balanced_and_documented():
    folder = resources.files('wib_nbdev')/'sample'
    files = {path.name: len(path.read_bytes()) for path in folder.iterdir()}
    assert set(files) == {'README.md', 'fashion_mnist.npz', 'cifar10.npz'} and sum(files.values()) < 6_000_000
    text = (folder/'README.md').read_text()
    assert 'MIT licence' in text and 'Zalando SE' in text and 'no explicit licence' in text and 'Krizhevsky' in text
    for name in data.DATASETS:
        sample = data.load(name, sample=True)
        assert sample.y_train.bincount().tolist() == [100] * 10 and sample.y_test.bincount().tolist() == [50] * 10
        assert len(torch.cat([sample.x_train, sample.x_test]).flatten(1).unique(dim=0)) == 1500


def test_a_damaged_sample_is_not_parsed(tmp_path):
    "In a process of its own, on a copy of the package, whose sample has a flipped bit."
    shutil.copytree(Path(data.__file__).parent, tmp_path/'wib_nbdev', ignore=shutil.ignore_patterns('__pycache__'))
    path = tmp_path/'wib_nbdev'/'sample'/'cifar10.npz'
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    code = "from wib_nbdev import data; print(len(data.load('fashion_mnist', sample=True).y_test)); data.load('cifar10', sample=True)"
    environment = os.environ | {'PYTHONPATH': str(tmp_path)}
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.stdout == '500\n' and done.returncode == 1
    assert 'ValueError: the sample cifar10.npz inside the package is damaged: reinstall wib_nbdev' in done.stderr


def test_importing_data_does_not_import_torchvision():
    code = "import sys; from wib_nbdev import data; data.load('cifar10', sample=True); assert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, '-c', code], check=True, cwd=Path(__file__).parents[1])


# Numbers

uint8_images = st.integers(1, 3).flatmap(lambda channels: st.tuples(
    st.just(channels), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32 - 1)))


@settings(max_examples=100)
@given(uint8_images)
def test_channel_stats_are_numpys(shape):
    channels, n, height, width, seed = shape
    x = np.random.default_rng(seed).integers(0, 256, (n, channels, height, width), np.uint8)
    mean, std = data.channel_stats(torch.from_numpy(x))
    np.testing.assert_allclose(mean, (x / 255).mean((0, 2, 3)), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(std, (x / 255).std((0, 2, 3)), rtol=1e-9, atol=1e-12)


@settings(max_examples=100)
@given(uint8_images, st.sampled_from([torch.preserve_format, torch.contiguous_format, torch.channels_last]))
def test_standardise_is_float64s_answer(shape, memory_format):
    channels, n, height, width, seed = shape
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.integers(0, 256, (n, channels, height, width), np.uint8))
    before = x.clone()
    mean, std = torch.from_numpy(rng.uniform(0, 1, channels)), torch.from_numpy(rng.uniform(0.05, 1, channels))
    z = data.standardise(x, mean, std, memory_format)
    exact = (x.double() / 255 - mean[:, None, None]) / std[:, None, None]
    assert z.dtype == torch.float32 and z.shape == x.shape and torch.equal(x, before)
    torch.testing.assert_close(z.double(), exact, rtol=0, atol=float(4 * torch.finfo(torch.float32).eps / std.min()))


def test_standardise_keeps_or_sets_the_memory_format():
    sample = data.load('cifar10', sample=True)
    statistics = data.channel_stats(sample.x_train)
    last = data.standardise(sample.x_train, *statistics, torch.channels_last)
    assert last.is_contiguous(memory_format=torch.channels_last)
    kept = data.standardise(sample.x_train.contiguous(memory_format=torch.channels_last), *statistics)
    assert kept.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, kept) and torch.equal(last, data.standardise(sample.x_train, *statistics))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_everything_stays_on_the_gpu():
    sample = data.load('cifar10', sample=True)
    on_gpu = sample.to('cuda')
    statistics = data.channel_stats(on_gpu.x_train)
    assert all(torch.equal(*pair) for pair in zip(statistics, data.channel_stats(sample.x_train), strict=True))
    z = data.standardise(on_gpu.x_train, *statistics)
    assert z.is_cuda and z.dtype == torch.float32
    torch.testing.assert_close(z.cpu(), data.standardise(sample.x_train, *statistics))
    held = data.holdout(on_gpu)
    assert held.x_train.is_cuda and torch.equal(held.x_test.cpu(), data.holdout(sample).x_test)


@pytest.mark.cuda
def test_a_sample_is_saved_from_the_gpu(tmp_path):
    sample = data.make_sample(data.load('cifar10', sample=True).to('cuda'), 5, 5)
    with np.load(data.save_sample(sample, tmp_path), allow_pickle=False) as stored: assert_same(sample.to('cpu'), stored)


def test_standardise_allocates_its_result_and_little_else():
    sample = data.load('cifar10', sample=True)
    statistics = data.channel_stats(sample.x_train)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        z = data.standardise(sample.x_train, *statistics)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert allocated < z.nbytes + 10_000


@settings(max_examples=50)
@given(st.floats(0.02, 0.5), st.integers(0, 1000), st.sampled_from(data.DATASETS))
def test_holdout_parts_the_training_set(fraction, seed, name):
    sample = data.load(name, sample=True)
    numbers = torch.arange(1000, dtype=torch.int32)
    numbered = replace(sample, x_train=numbers.view(torch.uint8).view(-1, 1, 2, 2)) # each image is its own number
    held = data.holdout(numbered, fraction, seed)
    def number(x): return x.contiguous().view(-1, 4).view(torch.int32).flatten()
    assert torch.equal(torch.cat([number(held.x_train), number(held.x_test)]).sort().values, numbers)
    assert torch.equal(sample.y_train[number(held.x_test).long()], held.y_test)
    assert set(held.y_test.bincount().tolist()) == {round(100 * fraction)}
    again = data.holdout(numbered, fraction, seed)
    assert torch.equal(again.x_test, held.x_test) and 'of the training images' in held.source


def test_random_draws_leave_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    sample = data.load('cifar10', sample=True)
    data.make_sample(sample, 5, 5)
    data.first_layer_preacts(sample.x_train[:2].float(), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_dataset_survives_pickling_and_moving():
    sample = data.load('fashion_mnist', sample=True)
    again = pickle.loads(pickle.dumps(sample)).to('cpu')
    assert torch.equal(again.x_train, sample.x_train) and repr(again) == repr(sample)
    assert sample.image_shape == (1, 28, 28) and sample.n_classes == 10
