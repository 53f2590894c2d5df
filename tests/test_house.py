"""The house's plan: one notebook, one module, in reading order; and a Makefile that fails in one clear line."""
import ast
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob('nbs/[0-9][0-9]_*.ipynb'))
ORDER = [notebook.stem[3:] for notebook in NOTEBOOKS]


def sources(notebook: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == 'code']


def imported_modules(tree: ast.AST) -> set[str]:
    "The modules of this package that a file imports, wherever in it the import stands."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name.split('.')[1] for name in node.names if name.name.startswith('wib_nbdev.')}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 1 or node.module == 'wib_nbdev':
                found |= {node.module.split('.')[0]} if node.level == 1 and node.module else {name.name for name in node.names}
            elif node.module and node.module.startswith('wib_nbdev.'): found.add(node.module.split('.')[1])
    return found


def test_there_is_a_plan():
    assert ORDER[:6] == ['config', 'style', 'variance', 'initializers', 'mean_shift', 'activations']
    numbers = [int(notebook.stem[:2]) for notebook in NOTEBOOKS]
    assert numbers[:2] == [0, 0] and numbers[1:] == sorted(set(numbers)), 'one number each, but for the two prefaces'


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_stem_is_module(notebook):
    exports = [match[1] for source in sources(notebook) if (match := re.search(r'^#\|\s*default_exp\s+(\S+)', source, re.M))]
    assert exports == [notebook.stem[3:]]
    assert (ROOT / 'wib_nbdev' / f'{exports[0]}.py').exists()


@pytest.mark.parametrize('notebook', sorted(ROOT.glob('nbs/*.ipynb')), ids=lambda path: path.stem)
def test_what_the_site_leaves_out_is_folded_in_jupyterlab(notebook):
    "Solutions, edge cases and the installation in Colab: there for whoever opens them. To fold a cell: View > Collapse Selected Code."
    for cell in nbformat.read(notebook, 4).cells:
        hidden = cell.cell_type == 'code' and cell.source.startswith('#| hide')
        assert cell.metadata == ({'jupyter': {'source_hidden': True}} if hidden else {}), cell.source[:200]


def test_every_module_has_its_notebook():
    modules = {path.stem for path in ROOT.glob('wib_nbdev/*.py')} - {'__init__', '_modidx'}
    assert modules == set(ORDER)


@pytest.mark.parametrize('module', ORDER)
def test_imports_only_from_rooms_before(module):
    tree = ast.parse((ROOT / 'wib_nbdev' / f'{module}.py').read_text())
    later = imported_modules(tree) & set(ORDER[ORDER.index(module):])
    assert not later, f'{module} imports from {later}, which come at or after it'


def test_the_import_rule_sees_every_form():
    tree = ast.parse('from .a import x\nfrom . import b\nimport wib_nbdev.c\nfrom wib_nbdev.d import y\nfrom wib_nbdev import e\nimport os')
    assert imported_modules(tree) == set('abcde')


def python(code: str, **env: str) -> str:
    return subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True, env={**os.environ, **env}).stdout


def test_bare_import_loads_no_torch():
    assert python('import sys, wib_nbdev; print(sorted({"torch", "numpy", "pandas", "matplotlib"} & set(sys.modules)))').strip() == '[]'


@pytest.mark.parametrize('module', ORDER)
def test_import_has_no_side_effect(module):
    report = python(f'''
import os, random
import matplotlib, numpy, torch
before = random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state(), dict(matplotlib.rcParams), torch.get_num_threads()
files = set(os.listdir('.'))
import wib_nbdev.{module}
after = random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state(), dict(matplotlib.rcParams), torch.get_num_threads()
assert before[2].equal(after[2]) and before[:2] == after[:2] and before[3:] == after[3:]
assert set(os.listdir('.')) == files and not torch.cuda.is_initialized()
''')
    assert report == ''


@pytest.mark.parametrize('notebook', sorted(ROOT.glob('nbs/*.ipynb')), ids=lambda path: path.stem)
def test_notebook_is_committed_whole_and_clean(notebook):
    "Ran from top to bottom without an error, and shows nothing of the machine that ran it."
    cells = [cell for cell in nbformat.read(notebook, 4).cells if cell.cell_type == 'code']
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(output.output_type != 'error' for output in outputs)
    text = '\n'.join(str(output.get('text', '')) + str(output.get('data', {}).get('text/plain', '')) for output in outputs)
    assert not re.search(r'(/home/|/root/|/Users/|/tmp/|/work/|site-packages|<Axes:|<matplotlib)', text)


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(['make', *arguments], cwd=cwd, capture_output=True, text=True)


def test_make_alone_prints_the_targets():
    listing = make().stdout
    for target in ('reproduce', 'test', 'lab', 'docs', 'bench'): assert re.search(rf'^  {target} ', listing, re.M), listing


@pytest.fixture
def bare_clone(tmp_path):
    "A folder with what the Makefile reads, and no environment."
    for name in ('Makefile', 'settings.ini', 'setup.py', 'pyproject.toml', 'README.md'):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    return tmp_path


def one_clear_line(run: subprocess.CompletedProcess) -> str:
    assert run.returncode != 0 and 'Traceback' not in run.stderr
    lines = [line for line in run.stderr.splitlines() if line.startswith('make: ') and '***' not in line]
    assert len(lines) == 1, run.stderr
    return lines[0]


def test_no_such_python(bare_clone):
    line = one_clear_line(make('test', 'PYTHON=no-such-python', cwd=bare_clone))
    assert "no 'no-such-python'" in line and 'PYTHON=' in line


def test_python_too_old(bare_clone):
    # This Python, judged against a newer minimum than itself: the comparison is the one that an old Python meets.
    line = one_clear_line(make('test', f'PYTHON={sys.executable}', 'OLDEST=3.99', cwd=bare_clone))
    assert 'is too old: Python 3.99 or newer' in line
    assert not (bare_clone / '.venv').exists()


def test_python_without_venv(bare_clone):
    # `-S -I` leaves the standard library; a path that shadows ensurepip is what a distribution without python3-venv looks like.
    shadow = bare_clone / 'shadow'
    shadow.mkdir()
    (shadow / 'ensurepip.py').write_text('raise ImportError("No module named ensurepip")')
    run = subprocess.run(['make', 'test', f'PYTHON={sys.executable}'], cwd=bare_clone, capture_output=True, text=True,
                         env={**os.environ, 'PYTHONPATH': str(shadow)})
    assert 'has no venv' in one_clear_line(run) and 'python3-venv' in one_clear_line(run)


def test_no_network(bare_clone):
    "pip that reaches no index: one clear line after pip's own, and no half-made stamp, so that the next call tries again."
    isolated = {name: value for name, value in os.environ.items() if not name.startswith('PIP_')}
    run = subprocess.run(['make', 'test', f'PYTHON={sys.executable}'], cwd=bare_clone, capture_output=True, text=True,
                         env={**isolated, 'PIP_NO_INDEX': '1', 'PIP_CONFIG_FILE': os.devnull})
    assert 'the installation failed' in one_clear_line(run)
    assert not list((bare_clone / '.venv').glob('.dev-*'))


def test_pins_keep_nbdev_working():
    facts = ConfigParser(delimiters=['='])
    facts.read(ROOT / 'settings.ini')
    dev = facts['DEFAULT']['dev_requirements'].split()
    assert {'nbdev>=2.4,<3', 'execnb<0.2', 'fastcore<2', 'ghapi<2'} <= set(dev)
    library = {re.split(r'[<>=~!]', name)[0] for name in facts['DEFAULT']['requirements'].split()}
    assert not library & {'nbdev', 'fastcore', 'execnb', 'jupyterlab', 'pytest'}


def test_the_site_of_quarto_has_its_files():
    "nbdev_docs builds with Quarto where that is installed: its settings parse, and what they name is there."
    settings = yaml.safe_load((ROOT / 'nbs' / '_quarto.yml').read_text())
    assert (ROOT / 'nbs' / settings['format']['html']['css']).exists()
    facts = yaml.safe_load((ROOT / 'nbs' / 'nbdev.yml').read_text())
    assert settings['metadata-files'][0] == 'nbdev.yml' and facts['website']['title'] == 'wib_nbdev'
