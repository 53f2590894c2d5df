"""Each notebook by nbdev's own runner, once, with the solutions of its exercises after its cells."""
import re
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
from nbdev.test import test_nb as run_notebook

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path for path in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in path.parts)
FACTS = ConfigParser(delimiters=['='])
FACTS.read(ROOT / 'settings.ini')


def solutions(notebook: nbformat.NotebookNode) -> list[str]:
    "The Python of the folded solutions."
    text = '\n'.join(cell.source for cell in notebook.cells if cell.cell_type == 'markdown')
    folded = re.findall(r'<details>.*?</details>', text, re.S)
    return [code for fold in folded for code in re.findall(r'^```python\n(.*?)^```', fold, re.S | re.M)]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT / 'nbs')))
def test_notebook(path, tmp_path, monkeypatch, capfd):
    "Runs from top to bottom in a folder that is not the checkout, and leaves nothing there."
    notebook = nbformat.read(path, 4)
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in solutions(notebook)]
    copy = tmp_path / path.name
    nbformat.write(notebook, copy)
    monkeypatch.setenv('IN_TEST', '1')
    passed, _ = run_notebook(copy, skip_flags=FACTS['DEFAULT']['tst_flags'].split())
    assert passed, capfd.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == [path.name], 'it leaves nothing beside itself'
