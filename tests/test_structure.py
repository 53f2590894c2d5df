"""One notebook, one module; imports in one direction; whole notebooks; a Makefile that fails in one line."""
import ast
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from graphlib import TopologicalSorter
from pathlib import Path

import nbformat
import pytest
import yaml
from mutants import FAULTS, edit, edit_notebook, notebook_of

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path for path in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in path.parts)
MODULES = sorted(path.stem for path in (ROOT / 'wib_nbdev').glob('[!_]*.py'))
name_of = lambda path: str(path.relative_to(ROOT / 'nbs'))


def test_notebooks_are_found_in_every_folder():
    "nbdev skips folders without a word where recursive is off, and so would a glob of ours."
    from nbdev.doclinks import nbglob
    seen = {path.resolve() for path in nbglob(ROOT / 'nbs', as_path=True)}
    assert seen == {path.resolve() for path in NOTEBOOKS}
    assert len([path for path in NOTEBOOKS if path.parent.name == 'lib']) >= 10


def test_one_notebook_a_module():
    "Two that export to one name overwrite each other without a word."
    exports = {}
    for path in NOTEBOOKS:
        source = '\n'.join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == 'code')
        for name in re.findall(r'^#\|\s*default_exp\s+(\S+)', source, re.M):
            assert name == re.sub(r'^\d\d_', '', path.stem) and name not in exports, path
            exports[name] = path
    assert sorted(exports) == MODULES


def imports(module: str) -> set[tuple[str, str]]:
    "(module, name) of what a module imports from this package, wherever in it the import stands."
    found = set()
    for node in ast.walk(ast.parse((ROOT / 'wib_nbdev' / f'{module}.py').read_text())):
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names if each.name.startswith('wib_nbdev.')]
            found |= {(name.split('.')[1], '') for name in names}
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or '').removeprefix('wib_nbdev').lstrip('.')
            if node.level == 0 and not (node.module or '').startswith('wib_nbdev'): continue
            found |= {(base, each.name) if base else (each.name, '') for each in node.names}
    return found


def test_imports_run_in_no_circle():
    assert imports('training') & {('config', 'TrainConfig')}, 'the rule sees imports'
    order = TopologicalSorter({module: {name for name, _ in imports(module)} & set(MODULES)
                               for module in MODULES})
    order.prepare()  # raises CycleError


def test_no_module_imports_a_private_name():
    private = {(module, name) for module in MODULES for _, name in imports(module) if re.match('_[^_]', name)}
    assert not private


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name_of)
def test_no_cell_mixes_imports_with_code(path):
    """The site executes each cell that holds an import, in a folder of its own, and so what else stands
    in that cell."""
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != 'code': continue
        if re.search(r'^#\| *(export|default_exp|eval: *false)', cell.source, re.M): continue
        if 'import' not in cell.source or cell.source.startswith(('%', '!')): continue
        statements = ast.parse(cell.source).body
        kinds = {isinstance(each, (ast.Import, ast.ImportFrom)) for each in statements}
        assert len(kinds) == 1, cell.source


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name_of)
def test_notebook_is_committed_whole_and_clean(path):
    """Ran from top to bottom without an error, shows nothing of the machine that ran it, and folds what
    a reader need not see first."""
    code = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == 'code']
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.output_type != 'error' for output in outputs)
    text = '\n'.join(str(output.get('text', '')) + str(output.get('data', {}).get('text/plain', ''))
                     for output in outputs)
    assert not re.search(r'(/home/|/root/|/Users/|/tmp/|/work/|site-packages|<Axes:|<matplotlib)', text)
    for cell in code:
        if cell.source.startswith(('#| hide', '#| default_exp', '#| echo: false')):
            folded = {'jupyter': {'source_hidden': True}}
            assert cell.metadata == folded, f'not folded in JupyterLab: {cell.source[:200]}'


def python(code: str, **env: str) -> str:
    words = [sys.executable, '-c', code]
    run = subprocess.run(words, check=True, capture_output=True, text=True, env={**os.environ, **env})
    return run.stdout.strip()


def test_imports_are_light_and_without_side_effects():
    """In one process: the bare package loads nothing heavy; then no module changes a random state,
    a setting of matplotlib, or the folder."""
    report = python(f'''
import sys, wib_nbdev
print(sorted({{"torch", "numpy", "pandas", "matplotlib"}} & set(sys.modules)))
import importlib, os, random
import matplotlib, numpy, torch
state = lambda: (random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state().tolist(),
                 dict(matplotlib.rcParams), torch.get_num_threads(), sorted(os.listdir('.')))
before = state()
for module in {MODULES!r}:
    importlib.import_module('wib_nbdev.' + module)
    assert state() == before and not torch.cuda.is_initialized(), module
''')
    assert report == '[]'


def make(*arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(['make', *arguments], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, **env})


def test_make_alone_prints_the_targets():
    listing = make().stdout
    for target in ('reproduce', 'test', 'lab', 'docs', 'bench'):
        assert re.search(rf'^  {target} ', listing, re.M), listing


@pytest.fixture
def bare_clone(tmp_path):
    "A folder with a space in its name, with what the Makefile reads, and no environment."
    clone = tmp_path / 'a clone'
    clone.mkdir()
    for name in ('Makefile', 'settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'constraints.txt'):
        (clone / name).write_bytes((ROOT / name).read_bytes())
    return clone


def one_clear_line(run: subprocess.CompletedProcess) -> str:
    assert run.returncode != 0 and 'Traceback' not in run.stderr
    lines = [line for line in run.stderr.splitlines() if line.startswith('make: ') and '***' not in line]
    assert len(lines) == 1, run.stderr
    return lines[0]


def test_no_such_python(bare_clone):
    line = one_clear_line(make('test', 'PYTHON=no-such-python', cwd=bare_clone))
    assert "no 'no-such-python'" in line and 'PYTHON=' in line


def test_python_too_old(bare_clone):
    # This Python, judged against a newer minimum than itself: an old Python meets the same comparison.
    line = one_clear_line(make('test', f'PYTHON={sys.executable}', 'OLDEST=3.99', cwd=bare_clone))
    assert 'is too old: Python 3.99 or newer' in line
    assert not (bare_clone / '.venv').exists()


def test_python_without_venv(bare_clone):
    # A path that shadows ensurepip is what a distribution without python3-venv looks like.
    shadow = bare_clone / 'shadow'
    shadow.mkdir()
    (shadow / 'ensurepip.py').write_text('raise ImportError("No module named ensurepip")')
    line = one_clear_line(make('test', f'PYTHON={sys.executable}', cwd=bare_clone, PYTHONPATH=str(shadow)))
    assert 'has no venv' in line and 'python3-venv' in line


def test_no_network(bare_clone):
    """pip that reaches no index: one clear line after pip's own, and no half-made stamp, so that the next
    call tries again."""
    isolated = {name: '' for name in os.environ if name.startswith('PIP_')}
    offline = {**isolated, 'PIP_NO_INDEX': '1', 'PIP_CONFIG_FILE': os.devnull}
    line = one_clear_line(make('test', f'PYTHON={sys.executable}', cwd=bare_clone, **offline))
    assert 'the installation failed' in line
    assert not list((bare_clone / '.venv').glob('.dev-*'))


def test_a_moved_or_copied_clone_gets_a_new_environment(bare_clone):
    """The old one's scripts name another path, and a copy imports the code of the first clone; where the
    Python is gone it does not even start. Otherwise an environment is kept."""
    def pip_of(clone: Path) -> str:
        made = make('.venv/.made', f'PYTHON={sys.executable}', cwd=clone)
        assert made.returncode == 0, made.stderr
        return subprocess.run([clone / '.venv/bin/pip', '--version'], capture_output=True, text=True).stdout
    assert str(bare_clone) in pip_of(bare_clone)
    kept = bare_clone / '.venv' / 'kept'
    kept.touch()
    copy = shutil.copytree(bare_clone, bare_clone.with_name('a copy'), symlinks=True)
    assert str(copy) in pip_of(copy)
    assert str(bare_clone) in pip_of(bare_clone) and kept.exists()
    moved = bare_clone.rename(bare_clone.with_name('moved'))
    assert str(moved) in pip_of(moved)
    python = moved / '.venv' / 'bin' / 'python'
    python.unlink()
    python.symlink_to(moved / 'gone')  # as after a move to another machine
    assert str(moved) in pip_of(moved)


def test_the_tests_of_a_file_share_a_process(request):
    "Else their fixtures are made once in each: minutes."
    if 'PYTEST_XDIST_WORKER' not in os.environ: pytest.skip('needs workers of pytest-xdist')
    assert request.node.nodeid.endswith('@test_structure.py')


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


@pytest.mark.parametrize('fault', FAULTS, ids=lambda fault: fault.name)
def test_a_seeded_fault_still_applies(fault):
    "Its texts stand once in the module and in the notebook, and the test that should catch it exists."
    patch = fault.patch
    module = ROOT / 'wib_nbdev' / f'{patch.module}.py'
    edit(module.read_text('utf-8'), patch.edits, module)
    edit_notebook(notebook_of(ROOT, patch.module), patch.edits)
    file, _, test = patch.test.partition('::')
    assert f"def {test.split('[')[0]}" in (ROOT / file).read_text('utf-8')
