"""Writes README.md from nbs/index.ipynb, its outputs included.

    python docs/readme.py            # write
    python docs/readme.py --check    # fail if README.md is not what would be written
"""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
NOTE = '<!-- Written from nbs/index.ipynb by docs/readme.py (make readme): edit there. -->\n\n'


def readme() -> str:
    "The index notebook as Markdown, with links that work from the top of the repository."
    notebook = nbformat.read(ROOT / 'nbs' / 'index.ipynb', 4)
    notebook.cells = [cell for cell in notebook.cells if not cell.source.startswith('#| hide')]
    notebook.metadata['language_info'] = {'name': 'python'}  # of the fences; nbdev keeps only the kernel's name
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    text = re.sub(r'\]\((\w+\.ipynb)\)', r'](nbs/\1)', text)
    return NOTE + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


if __name__ == '__main__':
    path = ROOT / 'README.md'
    if '--check' not in sys.argv: path.write_text(readme())
    elif path.read_text() != readme(): sys.exit('README.md is not what nbs/index.ipynb gives: run make readme and commit it')
