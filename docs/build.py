"""Builds the site in _docs from the package registry alone: nbdev processes, Sphinx and MyST-NB lay out.

    python docs/build.py
"""
import base64
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

from wib_nbdev import report
from wib_nbdev.sweep import load_results

ROOT = Path(__file__).parents[1]
PROCESSED, SITE = ROOT / '_proc', ROOT / '_docs'
SOURCE = PROCESSED / 'site'
EXPLORED = '04_activations'  # the chapter that opens with the explorable
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
    if cell['cell_type'] != 'code':  # the pages of docs/ lie beside the chapters
        return {**cell, 'source': text.replace('](../docs/', '](')}
    if re.search(r'^#\|\s*echo:\s*false', text, re.M):
        cell['metadata'] = {**cell.get('metadata', {}), 'tags': ['remove-input']}
    for output in cell.get('outputs', []):
        page = output.get('data', {}).get('text/markdown')
        if page:  # MyST-NB follows links to notebooks in what is written, not in what a cell prints
            page = re.sub(r'(\]\([\w./]+)\.ipynb\b', r'\1.html', tidy(''.join(page)))
            output['data']['text/markdown'] = page
    return {**cell, 'source': re.sub(r'^#\|.*\n?', '', text, flags=re.M)}


def explorable() -> str:
    return f'````{{raw}} html\n{report.explorable()}\n````\n'


def explored(cells: list[dict]) -> list[dict]:
    "A chapter's cells with the explorable after its first paragraph."
    title, opening, *rest = cells
    first, _, others = opening['source'].partition('\n\n')
    parts = {'opening': first, 'explorable': explorable(), 'others': others}
    return [title, *(dict(cell_type='markdown', id=name, metadata={}, source=text)
                     for name, text in parts.items()), *rest]


def put_notebooks() -> list[Path]:
    "Puts the processed notebooks and the pages of docs/ into one folder; returns the former, relative to it."
    shutil.rmtree(SOURCE, ignore_errors=True)
    names = [path.relative_to(ROOT / 'nbs') for path in sorted((ROOT / 'nbs').rglob('*.ipynb'))]
    # The index is left out: the README is in front.
    names = [name for name in names if name.stem != 'index' and '.ipynb_checkpoints' not in name.parts]
    for name in names:
        notebook = json.loads((PROCESSED / name).read_text())
        sources = [(cell, ''.join(cell['source']).strip()) for cell in notebook['cells']]
        # nbdev warns in a cell that this is a copy.
        first, *rest = [cell for cell, text in sources if text and not text.startswith('<!-- WARNING')]
        notebook['cells'] = [titled(first), *map(mend, rest)]
        if name.stem == EXPLORED: notebook['cells'] = explored(notebook['cells'])
        (SOURCE / name).parent.mkdir(parents=True, exist_ok=True)
        (SOURCE / name).write_text(json.dumps(notebook))
    for path in [*(ROOT / 'docs').glob('*.md'), *(ROOT / 'docs').glob('*.png')]: shutil.copy(path, SOURCE)
    shutil.copy(ROOT / 'CHANGELOG.md', SOURCE / 'changelog.md')
    return names


def sections(docstring: str) -> str:
    "What a NumPy docstring says in its sections, as Markdown."
    _, *found = re.split(r'^(\w+)\n-+\n', docstring, flags=re.M)
    parts = []
    for name, body in zip(found[::2], found[1::2], strict=True):
        entries = re.sub(r'\n +', ' ', re.sub(r'^(\S.*)\n +', r'- `\1`: ', body, flags=re.M))
        parts += [f'**{name}**', f'```pycon\n{body}\n```' if name == 'Examples' else entries]
    return '\n\n'.join(parts)


def bare(page: str) -> str:
    "A page whose signature has no comments, because sections say the same."
    heading, signature, rest = page.split('```', 2)
    signature = re.sub(r'(^\)[^#\n]*:).*', r'\1\n', re.sub(r'\n? +#.*', '', signature), flags=re.S | re.M)
    return f'{heading}```{signature}```{rest}'


def api_page(module: str) -> str:
    "Everything public in a module, as nbdev documents it, with a link to each source."
    loaded = importlib.import_module(f'wib_nbdev.{module}')
    repository = FACTS['DEFAULT']['git_url']
    parts = [f'# wib_nbdev.{module}', loaded.__doc__.strip()]
    for name in loaded.__all__:
        thing = getattr(loaded, name)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)): continue
        if thing.__module__ != loaded.__name__: continue
        page = tidy(show_doc(thing, renderer=BasicMarkdownRenderer, title_level=2)._repr_markdown_())
        details = sections(inspect.getdoc(thing) or '')
        source = f'{repository}/blob/main/wib_nbdev/{module}.py#L{inspect.getsourcelines(thing)[1]}'
        parts += [bare(page) if '**Parameters**' in details else page, details, f'[source]({source})']
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


def put_report() -> str:
    """A page that says what the report of the committed full reproduction found, for the search and the
    sidebar. Returns the report, which takes its place."""
    results = load_results()
    table = report.against_relu(results)
    found = f'{report.headline(table)} {report.numbers(table)} {report.elsewhere(results)}'
    (SOURCE / 'report.md').write_text(f'# The report\n\n{found}\n')
    page = report.render(results).replace(f'href="{report.SITE}"', 'href="index.html"')
    return page.replace(f'href="{report.SITE}/', 'href="')


def card(name: str, minutes: dict[str, str]) -> str:
    "A chapter on the map: its first picture, its question, and how long it takes."
    cells = json.loads((ROOT / 'nbs' / f'{name}.ipynb').read_text())['cells']
    title, subtitle = re.match(r'# (.*)\s+> (.*)', ''.join(cells[0]['source'])).groups()
    pictures = [output['data']['image/png'] for cell in cells for output in cell.get('outputs', [])
                if 'image/png' in output.get('data', {})]
    (SOURCE / f'{name}.png').write_bytes(base64.b64decode(''.join(pictures[0])))
    picture, link = f'![{title}]({name}.png)', f'({name}.ipynb)'
    parts = [f'[{picture}]{link}', f'**[{int(name[:2])} {title}]{link}**', subtitle]
    if name in minutes: parts.append(f'{minutes[name]} minutes')
    return '\n\n'.join(['::::{container} card', *parts, '::::'])


def front_page(chapters: list[str]) -> str:
    "The README, with the explorable and a map of the chapters in pictures after what was found."
    text = (ROOT / 'README.md').read_text().replace('](nbs/', '](').replace('](docs/', '](')
    minutes = dict(re.findall(r'\((\w+)\.ipynb\) \|[^|\n]*\| (\d+) \|', text))
    cards = '\n\n'.join([':::::{container} cards', *(card(name, minutes) for name in chapters), ':::::\n'])
    for name, first in {'promises': 'claim', 'choices': 'what changes'}.items():
        text = re.sub(rf'^(?=\| {first})', f'{{.{name}}}\n', text, flags=re.M)
    found, *sections = re.split(r'^(?=## )', text, flags=re.M)
    table = re.compile(r'^\|.*\(01_variance\.ipynb\)', re.M)
    place, = (i for i, section in enumerate(sections) if table.search(section))
    chapter_map = re.sub(r'(^\|.*\n)+', lambda _: cards, sections.pop(place), flags=re.M)
    return '\n\n'.join([found, '## Try it', explorable(), chapter_map, *sections])


def main() -> int:
    proc_nbs(n_workers=0, force=True)
    names = [str(name.with_suffix('')) for name in put_notebooks()]
    whole_report = put_report()
    chapters, library = ([name for name in names if name.startswith('lib/') is is_library]
                         for is_library in (False, True))
    trees = {'Chapters': chapters, 'Results': ['report'], 'Guides': ['which', 'cluster', 'letter'],
             'Library': library, 'API': put_api(), 'Project': ['changelog']}
    parts = [front_page(chapters), *(toctree(*tree) for tree in trees.items())]
    (SOURCE / 'index.md').write_text('\n\n'.join(parts))
    built = PROCESSED / 'html'  # myst-nb leaves a folder beside what it builds
    for folder in (built, SITE): shutil.rmtree(folder, ignore_errors=True)
    settings = ['-c', str(ROOT / 'docs'), '-d', str(PROCESSED / 'doctrees')]
    code = sphinx(['-W', '--keep-going', '-q', '-b', 'html', *settings, str(SOURCE), str(built)])
    if code == 0:
        (built / 'report.html').write_text(whole_report)
        shutil.move(built, SITE)
        print(f'the site is in {SITE.relative_to(ROOT)}: open {SITE.relative_to(ROOT)}/index.html')
    return code


if __name__ == '__main__': sys.exit(main())
