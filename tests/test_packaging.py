"""The wheel and the sdist: what they hold, and that they install and import where the checkout is not."""
import os
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = {path.name for path in (ROOT / 'wib_nbdev').glob('*.py')}


def names_in_wheel(dist: Path) -> list[str]:
    return zipfile.ZipFile(next(dist.glob('*.whl'))).namelist()


def test_wheel_holds_what_it_needs_and_nothing_else(built):
    names = names_in_wheel(built)
    assert {f'wib_nbdev/{module}' for module in MODULES} <= set(names)
    data = ('py.typed', 'claims.ini', 'depth.ini', 'results/pace.csv')
    assert {f'wib_nbdev/{name}' for name in data} <= set(names)
    tops = {name.split('/')[0] for name in names}
    assert tops == {'wib_nbdev', next(top for top in tops if top.endswith('.dist-info'))}
    assert not [name for name in names if name.endswith('.ipynb') or 'test' in Path(name).name]
    suffixes = {Path(name).suffix for name in names if name.startswith('wib_nbdev/')}
    assert suffixes <= {'.py', '.typed', '.npz', '.md', '.csv', '.parquet', '.html', '.css', '.ini'}
    templates = ('report.html', 'report.css', 'explorable.html')
    assert {f'wib_nbdev/templates/{name}' for name in templates} <= set(names)
    assert next(built.glob('*.whl')).stat().st_size < 10e6


def test_sdist_holds_what_a_build_needs(built):
    with tarfile.open(next(built.glob('*.tar.gz'))) as archive:
        names = {name.split('/', 1)[-1] for name in archive.getnames()}
    assert {'setup.py', 'settings.ini', 'pyproject.toml', 'README.md', 'LICENSE',
            'wib_nbdev/__init__.py'} <= names
    assert not [name for name in names if name.startswith(('nbs/', 'data/', 'runs/', '.venv', '.github'))]
    assert next(built.glob('*.tar.gz')).stat().st_size < 10e6


def test_metadata(built):
    wheel = zipfile.ZipFile(next(built.glob('*.whl')))
    metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith('/METADATA'))).decode()
    lines = ('Name: wib_nbdev', 'License-Expression: Apache-2.0', 'Requires-Python: >=3.10',
             'Provides-Extra: dev', 'Requires-Dist: torch')
    for line in lines:
        assert line in metadata, metadata[:2000]


def test_installs_and_imports_away_from_the_checkout(installed, tmp_path):
    """The wheel alone in an environment of its own, at a path with a space: the bare package and each module
    import there, not from the checkout, and the command line finds its results and templates."""
    env = {name: value for name, value in os.environ.items() if name not in ('PYTHONPATH', 'WIB_RESULTS')}

    def call(*words: str | Path) -> str:
        end = subprocess.run(words, cwd=tmp_path, env=env, check=True, capture_output=True, text=True)
        return end.stdout.strip()

    def run(code: str) -> str: return call(installed, '-c', code)

    environment = str(installed.parents[1])
    assert environment in run('import wib_nbdev; print(wib_nbdev.__file__)')
    modules = sorted(Path(module).stem for module in MODULES if not module.startswith('_'))
    imports = '; '.join(f'import wib_nbdev.{module}' for module in modules)
    assert run(f'{imports}; import wib_nbdev.style as s; print(s.__file__)').startswith(environment)
    code = 'from wib_nbdev.data import load; print(len(load("cifar10", sample=True).x_train) > 0)'
    assert run(code) == 'True'
    command = installed.with_name('wib-nbdev')
    assert re.search(r'^\d+ claims: ', call(command, 'claims'), re.M)
    assert call(command, 'report', '--out', 'x.html') == 'x.html'
    assert (tmp_path / 'x.html').read_text().rstrip().endswith('</html>')
