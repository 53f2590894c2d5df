"""What the tests share: the option that runs slow tests, and the skips that say why."""
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).parents[1]
os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('OMP_NUM_THREADS', '1')  # several test processes share the cores
# Tests send Ctrl-C to processes. A shell ignores it for what runs in its background; children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
hypothesis.settings.register_profile('ours', deadline=None)  # no test measures time
hypothesis.settings.load_profile('ours')


def pytest_addoption(parser):
    parser.addoption('--run-slow', action='store_true', help='run the tests that take minutes')


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(config, items):
    skip_slow = pytest.mark.skip(reason='takes minutes; run with --run-slow')
    for item in items:
        # The tests of a file run in one process and share its fixtures; each notebook is a job of its own.
        # (pytest 9.2 ignores such groups: pytest-xdist's issue 1386.)
        if item.path.name != 'test_notebooks.py': item.add_marker(pytest.mark.xdist_group(item.path.name))
        if 'slow' in item.keywords and not config.getoption('--run-slow'): item.add_marker(skip_slow)
        if 'cuda' in item.keywords:
            import torch
            if not torch.cuda.is_available(): item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))
        for marker in item.iter_markers('bench'):
            missing = [name for name in marker.args if importlib.util.find_spec(name) is None]
            why = f"needs {', '.join(missing)} (the extra bench)"
            if missing: item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(autouse=True)
def fresh_compiler():
    """torch.compile counts recompilations by code object, and every model shares nn.Sequential's:
    each test starts from none."""
    yield
    if 'torch._dynamo' in sys.modules: sys.modules['torch'].compiler.reset()



@pytest.fixture(scope='session')
def history() -> None:
    "Skips a test where the commit of the criteria is not there."
    ask = ['git', '-C', ROOT, 'cat-file', '-e', '507e505']
    try: there = subprocess.run(ask, capture_output=True).returncode == 0
    except FileNotFoundError: there = False
    if not there: pytest.skip('needs git and the history of the project')


@pytest.fixture(scope='session')
def built(tmp_path_factory) -> Path:
    "A folder with the sdist of the files that git would commit, and the wheel, built from the sdist."
    source, dist = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('dist')
    listing = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    files = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True)
    for name in files.stdout.decode().split('\0'):
        if not name or not (ROOT / name).is_file(): continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, '-m', 'build', '--no-isolation', '--outdir', dist, source]
    subprocess.run(build, check=True, capture_output=True)
    return dist


@pytest.fixture(scope='session')
def installed(built, tmp_path_factory) -> Path:
    """The Python of an environment that holds the wheel; the dependencies come from this environment.

    Installing torch anew for some tests would take gigabytes, so a .pth file points here. A plain path line
    adds the folder but does not run its own .pth files, so the editable checkout stays out of reach.
    """
    environment = tmp_path_factory.mktemp('an environment')
    subprocess.run([sys.executable, '-m', 'venv', environment], check=True)
    python = environment / 'bin' / 'python'
    install = [python, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', next(built.glob('*.whl'))]
    subprocess.run(install, check=True)
    ask = [python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))']
    site = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    (Path(site) / 'dependencies.pth').write_text(sysconfig.get_path('purelib') + '\n')
    return python


@pytest.fixture(scope='session')
def browser():
    "A real headless Chromium."
    why = 'needs playwright (pip install playwright; no browser of its own)'
    api = pytest.importorskip('playwright.sync_api', reason=why)
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not chromium: pytest.skip('needs a Chromium on the PATH (Debian, Ubuntu: apt install chromium)')
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield browser
        browser.close()
