"""The wheel and the sdist: what they hold, and that they install and import where the checkout is not."""
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {path.name for path in (ROOT / 'wib_nbdev').glob('*.py')}


@pytest.fixture(scope='module')
def built(tmp_path_factory) -> Path:
    "A folder with the wheel and the sdist, built from the files that git would commit; the wheel is built from the sdist."
    source, dist = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('dist')
    listing = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    files = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True)
    for name in files.stdout.decode().split('\0'):
        if not name or not (ROOT / name).is_file(): continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', dist, source], check=True, capture_output=True)
    return dist


def names_in_wheel(dist: Path) -> list[str]:
    return zipfile.ZipFile(next(dist.glob('*.whl'))).namelist()


def test_wheel_holds_what_it_needs_and_nothing_else(built):
    names = names_in_wheel(built)
    assert {f'wib_nbdev/{module}' for module in MODULES} <= set(names)
    assert 'wib_nbdev/py.typed' in names
    tops = {name.split('/')[0] for name in names}
    assert tops == {'wib_nbdev', next(top for top in tops if top.endswith('.dist-info'))}
    assert not [name for name in names if name.endswith('.ipynb') or 'test' in Path(name).name]
    suffixes = {Path(name).suffix for name in names if name.startswith('wib_nbdev/')}
    assert suffixes <= {'.py', '.typed', '.npz', '.md', '.csv', '.parquet'}
    assert next(built.glob('*.whl')).stat().st_size < 10e6


def test_sdist_holds_what_a_build_needs(built):
    with tarfile.open(next(built.glob('*.tar.gz'))) as archive: names = {name.split('/', 1)[-1] for name in archive.getnames()}
    assert {'setup.py', 'settings.ini', 'pyproject.toml', 'README.md', 'LICENSE', 'wib_nbdev/__init__.py'} <= names
    assert not [name for name in names if name.startswith(('nbs/', 'data/', 'runs/', '.venv', '.github'))]
    assert next(built.glob('*.tar.gz')).stat().st_size < 10e6


def test_metadata(built):
    wheel = zipfile.ZipFile(next(built.glob('*.whl')))
    metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith('/METADATA'))).decode()
    lines = ('Name: wib_nbdev', 'License-Expression: Apache-2.0', 'Requires-Python: >=3.10', 'Provides-Extra: dev', 'Requires-Dist: torch')
    for line in lines:
        assert line in metadata, metadata[:2000]


def test_installs_and_imports_away_from_the_checkout(built, tmp_path):
    """The wheel alone in an empty environment: the bare package imports there; each module imports beside the dependencies of this one.

    Installing torch anew for one test would take gigabytes; the dependencies come from this environment through a .pth file.
    """
    environment = tmp_path / 'empty'
    subprocess.run([sys.executable, '-m', 'venv', environment], check=True)
    python = environment / 'bin' / 'python'
    subprocess.run([python, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', next(built.glob('*.whl'))], check=True)
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}

    def run(code: str) -> str:
        return subprocess.run([python, '-c', code], cwd=tmp_path, env=env, check=True, capture_output=True, text=True).stdout.strip()

    assert str(environment) in run('import wib_nbdev; print(wib_nbdev.__file__)')
    site = run('import sysconfig; print(sysconfig.get_path("purelib"))')
    here = sysconfig.get_path('purelib')
    # A plain path line adds the folder but does not run its own .pth files, so the editable checkout stays out of reach.
    (Path(site) / 'dependencies.pth').write_text(here + '\n')
    modules = sorted(Path(module).stem for module in MODULES if not module.startswith('_'))
    imports = '; '.join(f'import wib_nbdev.{module}' for module in modules)
    assert run(f'{imports}; import wib_nbdev.style as s; print(s.__file__)').startswith(str(environment))
