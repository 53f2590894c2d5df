"""Writes README.md from nbs/index.ipynb, its outputs included.

    python docs/readme.py            # write
    python docs/readme.py --check    # fail if README.md or a picture of it is not what would be written
"""
import base64
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
NOTE = '<!-- Written from nbs/index.ipynb by docs/readme.py (make readme): edit there. -->\n\n'


def readme() -> dict[Path, bytes]:
    "README.md and its pictures: the index notebook as Markdown, with links from the top of the repository."
    notebook = nbformat.read(ROOT / 'nbs' / 'index.ipynb', 4)
    notebook.cells = [cell for cell in notebook.cells if not cell.source.startswith('#| hide')]
    notebook.cells[0].source = ''  # its title; the front page has one that the verdicts set
    # The language of the fences; nbdev keeps only the kernel's name.
    notebook.metadata['language_info'] = {'name': 'python'}
    pictures = {}
    for cell in notebook.cells:
        alt = ''.join(re.findall(r'^#\| fig-alt: (.*)', cell.source, re.M))
        if cell.cell_type == 'code' and cell.source.startswith('#| echo: false'): cell.source = ''
        for output in cell.get('outputs', []):
            if 'image/png' not in output.get('data', {}): continue
            path = ROOT / 'docs' / f'readme_{len(pictures)}.png'
            pictures[path] = base64.b64decode(output['data'].pop('image/png'))
            output['data'] = {'text/markdown': f'![{alt}](docs/{path.name})'}
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    text = re.sub(r'\]\(((?:lib/)?\w+\.ipynb)\)', r'](nbs/\1)', re.sub(r'```python\s*```', '', text))
    return {ROOT / 'README.md': (NOTE + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n').encode(), **pictures}


if __name__ == '__main__':
    for path, content in readme().items():
        if '--check' not in sys.argv: path.write_bytes(content)
        elif not path.exists() or path.read_bytes() != content:
            sys.exit(f'{path.relative_to(ROOT)} is not what nbs/index.ipynb gives: '
                     'run make readme and commit it')
