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
    "A cell without what only Quarto understands: option comments in the code, rules in the Markdown of a function's documentation."
    text = ''.join(cell['source'])
    cell.pop('has_sd', None)  # nbdev's mark of cells that it documents, unknown to the notebook format
    if cell['cell_type'] != 'code': return {**cell, 'source': text}
    if re.search(r'^#\|\s*echo:\s*false', text, re.M): cell['metadata'] = {**cell.get('metadata', {}), 'tags': ['remove-input']}
    for output in cell.get('outputs', []):
        page = output.get('data', {}).get('text/markdown')
        if not page: continue
        page = re.sub(r'^---\s*$', '', ''.join(page), flags=re.M)
        output['data']['text/markdown'] = re.sub(r"<class '([\w.]+)'>", r'\1', page)  # a default that is a class, as Python has it
    return {**cell, 'source': re.sub(r'^#\|.*\n?', '', text, flags=re.M)}


def pages() -> list[str]:
    "Puts the processed notebooks and the pages of docs/ into one folder; returns the notebooks' stems in reading order."
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    notebooks = [path for path in sorted((ROOT / '_proc').glob('*.ipynb')) if path.stem != 'index']  # the front page is the README
    for path in notebooks:
        notebook = json.loads(path.read_text())
        notebook['cells'] = [mend(cell) for cell in notebook['cells'] if ''.join(cell['source']).strip()]
        (SOURCE / path.name).write_text(json.dumps(notebook))
    for path in (ROOT / 'docs').glob('*.md'): shutil.copy(path, SOURCE)
    shutil.copy(ROOT / 'CHANGELOG.md', SOURCE / 'changelog.md')
    return [path.stem for path in notebooks]


def main() -> int:
    proc_nbs(n_workers=0, force=True)
    stems = pages()
    tree = '\n'.join(['```{toctree}', ':caption: Notebooks', ':maxdepth: 1', ':hidden:', '', *stems, 'changelog', '```'])
    front = (ROOT / 'README.md').read_text().replace('](nbs/', '](')
    (SOURCE / 'index.md').write_text(f'{front}\n\n{tree}\n')
    shutil.rmtree(SITE, ignore_errors=True)
    settings = ['-c', str(ROOT / 'docs'), '-d', str(ROOT / '_proc' / 'doctrees')]
    code = sphinx(['-W', '--keep-going', '-q', '-b', 'html', *settings, str(SOURCE), str(SITE)])
    if code == 0: print(f'the site is in {SITE.relative_to(ROOT)}: open {SITE.relative_to(ROOT)}/index.html')
    return code


if __name__ == '__main__': sys.exit(main())
