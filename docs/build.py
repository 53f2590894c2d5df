"""Builds the site in _docs from the package registry alone: nbdev processes the notebooks, Sphinx and MyST-NB lay them out.

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
SOURCE, SITE, EXTRA = ROOT / '_proc' / 'site', ROOT / '_docs', ROOT / '_proc' / 'extra'


def tidy(page: str) -> str:
    "A function's documentation without its rule, and a default that is a class as Python has it."
    return re.sub(r"<class '([\w.]+)'>", r'\1', re.sub(r'^---\s*$', '', page, flags=re.M)).strip()


def titled(cell: dict) -> dict:
    "The first cell, which nbdev has made into Quarto's front matter, as a title and a subtitle."
    facts = yaml.safe_load(''.join(cell['source']).strip().strip('-'))
    return dict(cell_type='markdown', id='title', metadata={}, source=f"# {facts['title']}\n\n> {facts.get('description', '')}")


def mend(cell: dict) -> dict:
    "A cell without what only Quarto understands: option comments in the code, rules in the Markdown of a function's documentation."
    text = ''.join(cell['source'])
    cell.pop('has_sd', None)  # nbdev's mark of cells that it documents, unknown to the notebook format
    if cell['cell_type'] != 'code': return {**cell, 'source': text}
    if re.search(r'^#\|\s*echo:\s*false', text, re.M): cell['metadata'] = {**cell.get('metadata', {}), 'tags': ['remove-input']}
    for output in cell.get('outputs', []):
        page = output.get('data', {}).get('text/markdown')
        if not page: continue
        output['data']['text/markdown'] = tidy(''.join(page))
    return {**cell, 'source': re.sub(r'^#\|.*\n?', '', text, flags=re.M)}


def pages() -> list[str]:
    "Puts the processed notebooks and the pages of docs/ into one folder; returns the notebooks' stems in reading order."
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    notebooks = [path for path in sorted((ROOT / '_proc').glob('*.ipynb')) if path.stem != 'index']  # the front page is the README
    for path in notebooks:
        notebook = json.loads(path.read_text())
        first, *rest = [cell for cell in notebook['cells'] if ''.join(cell['source']).strip()]
        notebook['cells'] = [titled(first), *map(mend, rest)]
        (SOURCE / path.name).write_text(json.dumps(notebook))
    for path in (ROOT / 'docs').glob('*.md'): shutil.copy(path, SOURCE)
    for path in (ROOT / 'docs').glob('*.png'): shutil.copy(path, SOURCE)
    shutil.copy(ROOT / 'CHANGELOG.md', SOURCE / 'changelog.md')
    return [path.stem for path in notebooks]


def api_page(module: str, repository: str) -> str:
    "Everything public in a module, as nbdev documents it, with a link to each source."
    loaded = importlib.import_module(f'wib_nbdev.{module}')
    parts = [f'# wib_nbdev.{module}', loaded.__doc__.strip()]
    for name in loaded.__all__:
        thing = getattr(loaded, name)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)): continue
        page = show_doc(thing, renderer=BasicMarkdownRenderer, title_level=2)._repr_markdown_()
        line = inspect.getsourcelines(thing)[1]
        parts += [tidy(page), f'[source]({repository}/blob/main/wib_nbdev/{module}.py#L{line})']
    return '\n\n'.join(parts) + '\n'


def api(stems: list[str]) -> list[str]:
    "Writes a page a module; returns their names for the table of contents."
    facts = ConfigParser(delimiters=['='])
    facts.read(ROOT / 'settings.ini', encoding='utf-8')
    (SOURCE / 'api').mkdir()
    modules = [stem[3:] for stem in stems]
    for module in modules: (SOURCE / 'api' / f'{module}.md').write_text(api_page(module, facts['DEFAULT']['git_url']))
    return [f'api/{module}' for module in modules]


def toctree(caption: str, names: list[str]) -> str:
    return '\n'.join(['```{toctree}', f':caption: {caption}', ':maxdepth: 1', ':hidden:', '', *names, '```', ''])


def report() -> None:
    "The report of the committed full reproduction, beside the pages that link to it."
    from wib_nbdev.report import write_report
    from wib_nbdev.sweep import load_results
    EXTRA.mkdir(parents=True, exist_ok=True)
    write_report(load_results(ROOT / 'results'), EXTRA / 'report.html')


def main() -> int:
    proc_nbs(n_workers=0, force=True)
    stems = pages()
    chapters = {'Start': ['which', 'cluster'], 'Notebooks': stems, 'Library': api(stems), 'Project': ['changelog']}
    trees = [toctree(caption, names) for caption, names in chapters.items()]
    front = (ROOT / 'README.md').read_text().replace('](nbs/', '](').replace('](docs/', '](')
    (SOURCE / 'index.md').write_text('\n\n'.join([front, *trees]))
    report()
    built = ROOT / '_proc' / 'html'  # myst-nb leaves a folder beside what it builds
    for folder in (built, SITE): shutil.rmtree(folder, ignore_errors=True)
    settings = ['-c', str(ROOT / 'docs'), '-d', str(ROOT / '_proc' / 'doctrees')]
    code = sphinx(['-W', '--keep-going', '-q', '-b', 'html', *settings, str(SOURCE), str(built)])
    shutil.move(built, SITE)
    if code == 0: print(f'the site is in {SITE.relative_to(ROOT)}: open {SITE.relative_to(ROOT)}/index.html')
    return code


if __name__ == '__main__': sys.exit(main())
