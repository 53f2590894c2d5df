"""Each notebook by "Restart and run all" against the installed wheel, in a folder that is not the checkout."""
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob('nbs/*.ipynb'))
SKIPPED = re.compile(r'^#\| *(slow|cuda|notest)', re.M)  # what needs hours, a GPU or the full data, as in nbdev_test


@pytest.fixture(scope='module')
def kernel(installed, tmp_path_factory) -> Path:
    "A folder of Jupyter kernels with one, the environment that holds the wheel."
    folder = tmp_path_factory.mktemp('jupyter')
    spec = folder / 'kernels' / 'wheel'
    spec.mkdir(parents=True)
    command = [str(installed), '-m', 'ipykernel_launcher', '-f', '{connection_file}']
    (spec / 'kernel.json').write_text(json.dumps(dict(argv=command, display_name='wheel', language='python')))
    return folder


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_against_the_wheel(notebook, kernel, tmp_path, monkeypatch):
    monkeypatch.setenv('JUPYTER_PATH', str(kernel))
    monkeypatch.delenv('PYTHONPATH', raising=False)
    shutil.copy(notebook, tmp_path)
    content = nbformat.read(tmp_path / notebook.name, 4)
    content.cells = [cell for cell in content.cells if not SKIPPED.search(cell.source)]
    where = nbformat.v4.new_code_cell('import wib_nbdev; print(wib_nbdev.__file__)')
    content.cells.append(where)
    NotebookClient(content, timeout=600, kernel_name='wheel', resources={'metadata': {'path': str(tmp_path)}}).execute()
    assert str(ROOT) not in where.outputs[0].text
    assert [path.name for path in tmp_path.iterdir()] == [notebook.name], 'a notebook leaves nothing beside itself'
