"""Builds the site in _docs from the package registry alone: nbdev processes, Sphinx and MyST-NB lay out.

    python docs/build.py
"""
import importlib
import inspect
import json
import re
import shutil
import sys
from configparser import ConfigParser
from pathlib import Path

import yaml
from nbdev.serve import proc_nbs
from nbdev.showdoc import BasicMarkdownRenderer, show_doc
from sphinx.cmd.build import main as sphinx

ROOT = Path(__file__).parents[1]
PROCESSED, SITE = ROOT / '_proc', ROOT / '_docs'
SOURCE, EXTRA = PROCESSED / 'site', PROCESSED / 'extra'
FACTS = ConfigParser(delimiters=['='])
FACTS.read(ROOT / 'settings.ini', encoding='utf-8')


def tidy(page: str) -> str:
    "A function's documentation without its rule, and a default that is a class as Python has it."
    return re.sub(r"<class '([\w.]+)'>", r'\1', re.sub(r'^---\s*$', '', page, flags=re.M)).strip()


def titled(cell: dict) -> dict:
    "The first cell, which nbdev has made into Quarto's front matter, as a title and a subtitle."
    facts = yaml.safe_load(''.join(cell['source']).strip().strip('-'))
    text = f"# {facts['title']}\n\n> {facts.get('description', '')}"
    return dict(cell_type='markdown', id='title', metadata={}, source=text)


def mend(cell: dict) -> dict:
    "A cell without what only Quarto understands: option comments in the code, rules in documentation."
    text = ''.join(cell['source'])
    cell.pop('has_sd', None)  # nbdev's mark of cells that it documents, unknown to the notebook format
    if cell['cell_type'] != 'code': return {**cell, 'source': text}
    if re.search(r'^#\|\s*echo:\s*false', text, re.M):
        cell['metadata'] = {**cell.get('metadata', {}), 'tags': ['remove-input']}
    for output in cell.get('outputs', []):
        page = output.get('data', {}).get('text/markdown')
        if page: output['data']['text/markdown'] = tidy(''.join(page))
    return {**cell, 'source': re.sub(r'^#\|.*\n?', '', text, flags=re.M)}


def put_notebooks() -> list[Path]:
    "Puts the processed notebooks and the pages of docs/ into one folder; returns the former, relative to it."
    shutil.rmtree(SOURCE, ignore_errors=True)
    names = [path.relative_to(ROOT / 'nbs') for path in sorted((ROOT / 'nbs').rglob('*.ipynb'))]
    # The index is left out: the README is in front.
    names = [name for name in names if name.stem != 'index' and '.ipynb_checkpoints' not in name.parts]
    for name in names:
        notebook = json.loads((PROCESSED / name).read_text())
        first, *rest = [cell for cell in notebook['cells'] if ''.join(cell['source']).strip()]
        notebook['cells'] = [titled(first), *map(mend, rest)]
        (SOURCE / name).parent.mkdir(parents=True, exist_ok=True)
        (SOURCE / name).write_text(json.dumps(notebook))
    for path in [*(ROOT / 'docs').glob('*.md'), *(ROOT / 'docs').glob('*.png')]: shutil.copy(path, SOURCE)
    shutil.copy(ROOT / 'CHANGELOG.md', SOURCE / 'changelog.md')
    return names


def api_page(module: str) -> str:
    "Everything public in a module, as nbdev documents it, with a link to each source."
    loaded = importlib.import_module(f'wib_nbdev.{module}')
    repository = FACTS['DEFAULT']['git_url']
    parts = [f'# wib_nbdev.{module}', loaded.__doc__.strip()]
    for name in loaded.__all__:
        thing = getattr(loaded, name)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)): continue
        if thing.__module__ != loaded.__name__: continue
        page = show_doc(thing, renderer=BasicMarkdownRenderer, title_level=2)._repr_markdown_()
        line = inspect.getsourcelines(thing)[1]
        parts += [tidy(page), f'[source]({repository}/blob/main/wib_nbdev/{module}.py#L{line})']
    return '\n\n'.join(parts) + '\n'


def put_api() -> list[str]:
    "Writes a page a module; returns their names."
    (SOURCE / 'api').mkdir()
    modules = sorted(path.stem for path in (ROOT / 'wib_nbdev').glob('[!_]*.py'))
    for module in modules: (SOURCE / 'api' / f'{module}.md').write_text(api_page(module))
    return [f'api/{module}' for module in modules]


def toctree(caption: str, names: list[str]) -> str:
    head = ['```{toctree}', f':caption: {caption}', ':maxdepth: 1', ':hidden:', '']
    return '\n'.join([*head, *names, '```', ''])


def put_report() -> None:
    "The report of the committed full reproduction, beside the pages that link to it; a page leads there."
    from wib_nbdev.report import write_report
    from wib_nbdev.sweep import load_results
    EXTRA.mkdir(parents=True, exist_ok=True)
    write_report(load_results(), EXTRA / 'report.html')
    text = ('# The report\n\nEverything that the full reproduction found, on one page: '
            '<a href="report.html">open the report</a>.\n')
    (SOURCE / 'full-report.md').write_text(text)


def main() -> int:
    proc_nbs(n_workers=0, force=True)
    names = [str(name.with_suffix('')) for name in put_notebooks()]
    put_report()
    chapters, library = ([name for name in names if name.startswith('lib/') is is_library]
                         for is_library in (False, True))
    trees = {'Chapters': chapters, 'Results': ['full-report'], 'Guides': ['which', 'cluster'],
             'Library': library, 'API': put_api(), 'Project': ['changelog']}
    front = (ROOT / 'README.md').read_text().replace('](nbs/', '](').replace('](docs/', '](')
    (SOURCE / 'index.md').write_text('\n\n'.join([front, *(toctree(*tree) for tree in trees.items())]))
    built = PROCESSED / 'html'  # myst-nb leaves a folder beside what it builds
    for folder in (built, SITE): shutil.rmtree(folder, ignore_errors=True)
    settings = ['-c', str(ROOT / 'docs'), '-d', str(PROCESSED / 'doctrees')]
    code = sphinx(['-W', '--keep-going', '-q', '-b', 'html', *settings, str(SOURCE), str(built)])
    if code == 0:
        shutil.move(built, SITE)
        print(f'the site is in {SITE.relative_to(ROOT)}: open {SITE.relative_to(ROOT)}/index.html')
    return code


if __name__ == '__main__': sys.exit(main())
