"""Builds the site in _docs from the package registry alone: nbdev processes the notebooks, Sphinx and MyST-NB lay them out.

    python docs/build.py
"""
import json
import re
import shutil
import sys
from pathlib import Path

from nbdev.serve import proc_nbs
from sphinx.cmd.build import main as sphinx

ROOT = Path(__file__).parents[1]
SOURCE, SITE = ROOT / '_proc' / 'site', ROOT / '_docs'


def mend(cell: dict) -> dict:
    "A cell without what only Quarto understands: its option comments, and the div around a function's table."
    text = ''.join(cell['source'])
    if cell['cell_type'] == 'code':
        hidden = bool(re.search(r'^#\|\s*echo:\s*false', text, re.M))
        text = re.sub(r'^#\|.*\n?', '', text, flags=re.M)
        if hidden: cell['metadata'] = {**cell.get('metadata', {}), 'tags': ['remove-input']}
    return {**cell, 'source': text}


def pages() -> list[str]:
    "Puts the processed notebooks and the pages of docs/ into one folder; returns the notebooks' stems in reading order."
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    notebooks = sorted((ROOT / '_proc').glob('*.ipynb'))
    for path in notebooks:
        notebook = json.loads(path.read_text())
        notebook['cells'] = [mend(cell) for cell in notebook['cells'] if ''.join(cell['source']).strip()]
        (SOURCE / path.name).write_text(json.dumps(notebook))
    for path in (ROOT / 'docs').glob('*.md'): shutil.copy(path, SOURCE)
    shutil.copy(ROOT / 'docs' / 'conf.py', SOURCE)
    shutil.copy(ROOT / 'CHANGELOG.md', SOURCE / 'changelog.md')
    return [path.stem for path in notebooks if path.stem != 'index']


def main() -> int:
    proc_nbs(n_workers=0, force=True)
    stems = pages()
    tree = '\n'.join(['```{toctree}', ':caption: Notebooks', ':maxdepth: 1', ':hidden:', '', *stems, 'changelog', '```'])
    (SOURCE / 'index.md').write_text(f"{(ROOT / 'README.md').read_text()}\n\n{tree}\n")
    shutil.rmtree(SITE, ignore_errors=True)
    code = sphinx(['-W', '--keep-going', '-q', '-b', 'html', '-d', str(ROOT / '_proc' / 'doctrees'), str(SOURCE), str(SITE)])
    if code == 0: print(f'the site is in {SITE.relative_to(ROOT)}: open {SITE.relative_to(ROOT)}/index.html')
    return code


if __name__ == '__main__': sys.exit(main())
