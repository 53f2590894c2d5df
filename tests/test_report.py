"""The report: whole or not there, text and nothing but text, the same each time, and in a real headless browser."""
import hashlib
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest

from wib_nbdev import claims, report
from wib_nbdev.comparison import MAIN
from wib_nbdev.sweep import PAPER_ARMS, WATCHED, Results, arm_grid, load_results, run_sweep

SMALL = dict(sample=True, epochs=3, batch_size=100)
HOSTILE = '"\'><script>alert(1)</script><img src=x onerror=alert(2)>'
VOID = {'meta', 'link', 'br', 'img'}


class Page(HTMLParser):
    "The elements of a page: (tag, attributes) in order, the text, and whether every tag was closed in its turn."
    def __init__(self, page: str):
        super().__init__()
        self.elements, self.text, self.open = [], '', []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID: self.open.append(tag)

    def handle_startendtag(self, tag, attrs): self.elements.append((tag, dict(attrs)))
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.text += data

    def all(self, *tags): return [attrs for tag, attrs in self.elements if tag in tags]


@pytest.fixture(scope='module')
def store(tmp_path_factory) -> Path:
    "Two seeds of the five activations on both data sets, and one watched run on one of them."
    store = tmp_path_factory.mktemp('store')
    watched = arm_grid(WATCHED[:1], seed=0, dataset='cifar10', **SMALL)
    run_sweep([*arm_grid(PAPER_ARMS, seed=range(2), **SMALL), *watched], store, n_jobs=1, progress=False,
              record=lambda config: config in watched and {'every': 1})
    return store


@pytest.fixture(scope='module')
def results(store) -> Results: return load_results(store)


@pytest.fixture(scope='module')
def page(results) -> str: return report.render(results, reference=results, made='on a Tuesday')


@pytest.fixture(scope='module')
def parsed(page) -> Page: return Page(page)


@pytest.fixture(scope='module')
def empty() -> str: return report.render(claims.NOTHING)


def test_it_says_what_was_run_and_how_far_to_trust_it(parsed):
    text = ' '.join(parsed.text.split())
    for words in ('A try-out on the sample: 21 runs', 'core-hours, reported on a Tuesday.', 'the embedded sample', 'a guess',
                  'sample=True, epochs=3, batch_size=100', '2 finished', 'Fewer than 8 pairs', 'on the sample'):
        assert words in text, words
    for claim in claims.CLAIMS: assert f'“{claim.quote}”' in parsed.text
    for key in ('torch', 'numpy', 'processor', 'threads'): assert key in text


def test_every_figure_is_drawn_or_names_its_runs(parsed, empty):
    "Theory, forest, one watched arm, Fig. 12 and 13, two data sets beside the reference; without runs, theory alone."
    assert len(parsed.all('svg')) == 6 + 1 + 2 + 2 + 2
    missing = re.findall(r'Not drawn: (.*)', Page(empty).text)
    assert len(Page(empty).all('svg')) == 6 and len(missing) == len(report.FIGURES) - 6 + 2
    assert all('runs' in sentence or 'seeds' in sentence for sentence in missing)


def test_runs_of_one_activation_only(results):
    "No rival, no difference; the curves of what is there."
    lone = report.measured_differences(claims.Evidence(report.select(results, arm='wib_relu'), {**MAIN, **SMALL}))
    assert lone.empty
    assert report.figure_12(report.select(results, arm='wib_relu')).axes


def test_self_contained(parsed, page):
    names = ('src', 'href', 'xlink:href', 'action', 'data', 'srcset')
    links = [attrs[name] for _, attrs in parsed.elements for name in names if name in attrs]
    assert links and all(link.startswith(('#', 'data:')) for link in links)
    assert not parsed.all('script', 'iframe', 'object', 'embed', 'img', 'base', 'form')
    assert not re.search(r'@import|@font-face|url\((?!#)', page)
    assert "default-src 'none'" in page


def test_ids_are_unique_and_every_reference_has_its_target(parsed, page):
    ids = Counter(attrs['id'] for _, attrs in parsed.elements if 'id' in attrs)
    assert max(ids.values()) == 1
    wanted = {attrs[name][1:] for _, attrs in parsed.elements for name in ('href', 'xlink:href') if attrs.get(name, '').startswith('#')}
    assert wanted | set(re.findall(r'url\(#([^)]+)\)', page)) <= set(ids)


def test_accessible_without_sight_or_mouse(parsed):
    assert parsed.all('html')[0]['lang'] == 'en' and parsed.all('title')
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch('h[1-6]', tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(after <= before + 1 for before, after in pairwise(levels))
    assert all(svg['role'] == 'img' and len(svg['aria-label']) > 30 for svg in parsed.all('svg'))
    boxes = [attrs for _, attrs in parsed.elements if attrs.get('class') in ('scroll', 'chart')]
    assert len(boxes) == len(parsed.all('svg')) + len(parsed.all('table'))
    assert all(box['tabindex'] == '0' and box['aria-label'] for box in boxes)


def test_the_same_results_give_the_same_page_in_another_process(store, page):
    code = ('import sys, hashlib; from wib_nbdev import report, sweep; results = sweep.load_results(sys.argv[1]); '
            'page = report.render(results, reference=results, made="on a Tuesday"); print(hashlib.sha256(page.encode()).hexdigest())')
    run = subprocess.run([sys.executable, '-c', code, str(store)], capture_output=True, text=True, check=True,
                         env={**os.environ, 'PYTHONHASHSEED': '7'})
    assert run.stdout.strip() == hashlib.sha256(page.encode()).hexdigest()


@pytest.fixture(scope='module')
def hostile_page(results) -> str:
    "Markup in the environment, a key, a config of other runs, a quote, a reason and the date."
    others = results.runs.assign(optimizer=HOSTILE, key=results.runs['key'] + HOSTILE).head(3)
    runs = pd.concat([results.runs.assign(processor=HOSTILE, commit=HOSTILE), others])
    spoilt = tuple(replace(claim, quote=HOSTILE, reading=HOSTILE, place=HOSTILE) for claim in claims.CLAIMS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, 'CLAIMS', spoilt)
        return report.render(results._replace(runs=runs), setting={**MAIN, **SMALL}, made=HOSTILE)


def test_whatever_comes_from_outside_is_text(hostile_page):
    parsed = Page(hostile_page)
    assert not parsed.all('script', 'img') and not [name for _, attrs in parsed.elements for name in attrs if name.startswith('on')]
    assert parsed.text.count(HOSTILE) >= 3 * len(claims.CLAIMS) + 6


def test_alt_text_is_escaped():
    svg = report.as_svg(report.figure_2(), HOSTILE, 'x')
    parsed = Page(svg)
    assert parsed.all('svg')[0]['aria-label'] == HOSTILE and not parsed.all('script', 'img')


def test_guessed_setting_is_the_most_frequent(results):
    runs = results.runs
    more = pd.concat([runs, *(runs.assign(lr=0.01, key=f'{i}' + runs['key']) for i in range(2))])
    assert report.guess_setting(results._replace(runs=more)) == {**MAIN, **SMALL, 'lr': 0.01}
    assert report.guess_setting(claims.NOTHING) == MAIN


def test_trust_is_full_only_for_the_full_reproduction(results):
    "Twenty epochs of the full data, eight seeds of each arm on both data sets; with one run less, or one that diverged, a part."
    rows = [dict(row, arm=row['activation'], seed=seed, sample=False, epochs=20, batch_size=256) for seed in range(8)
            for row in results.runs.query("seed == 0 and init == 'kaiming_normal'").to_dict('records')]
    whole = results._replace(runs=pd.DataFrame(rows))
    judged = pd.DataFrame({'why': ['seen'] * 3})
    def level(runs): return report.trust(claims.Evidence(whole._replace(runs=runs)), judged)[0]
    assert level(whole.runs) == report.LEVELS[2]
    assert level(whole.runs.iloc[1:]) == level(whole.runs.assign(status=['diverged'] + ['finished'] * (len(rows) - 1))) == report.LEVELS[1]
    assert report.trust(claims.Evidence(whole), pd.DataFrame({'why': ['not run yet: x']}))[0] == report.LEVELS[1]
    assert level(whole.runs.query("activation != 'wib_relu'")) == report.LEVELS[1]


WRITER = '''
import os, resource, sys
from pathlib import Path
from wib_nbdev import claims, report
path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try: report.write_report(claims.NOTHING, path)
except OSError as error: print(error.strerror, sorted(each.name for each in path.parent.iterdir()), path.read_text(), flush=True)
os.mkfifo(path.with_name(f'{path.name}.{os.getpid()}.tmp'))
print('pipe', flush=True)
report.write_report(claims.NOTHING, path)
'''


def test_half_written_never(tmp_path):
    "First the file may not grow beyond 100 kB. Then the temporary file is a pipe, so that the process is killed surely while it writes."
    path = tmp_path / 'report.html'
    path.write_text('the old one')
    process = subprocess.Popen([sys.executable, '-c', WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "File too large ['report.html'] the old one"
    assert process.stdout.readline().strip() == 'pipe'
    with open(tmp_path / f'report.html.{process.pid}.tmp', 'rb') as pipe:
        assert pipe.read(1000).startswith(b'<!doctype html>')
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert path.read_text() == 'the old one'


def test_written_whole_into_a_new_folder(results, empty, tmp_path):
    path = report.write_report(claims.NOTHING, tmp_path / 'new' / 'report.html')
    assert path.read_text(encoding='utf-8') == empty and list(path.parent.iterdir()) == [path]


# In a real browser

@pytest.fixture
def visit(browser, tmp_path):
    "Opens a page in a window of its own; at the end nothing may have gone wrong and nothing been asked for but the file."
    opened = []
    def open_page(html: str, width: int = 1280, **options):
        (tmp_path / 'report.html').write_text(html, encoding='utf-8')
        window = browser.new_page(viewport={'width': width, 'height': 844}, **options)
        wrong, asked = [], []
        window.on('console', lambda message: wrong.append(message.text))
        window.on('pageerror', lambda error: wrong.append(str(error)))
        window.on('requestfailed', lambda request: wrong.append(request.url))
        window.on('dialog', lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        window.on('request', lambda request: asked.append(request.url))
        window.goto((tmp_path / 'report.html').as_uri())
        opened.append((window, wrong, asked))
        return window
    yield open_page
    for window, wrong, asked in opened:
        assert wrong == [] and len(asked) == 1
        window.close()


CONTRAST = '''() => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(x => x / 255).map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = element => {
    for (let each = element; each; each = each.parentElement) {
      const colour = numbers(getComputedStyle(each).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const hasText = element => [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
  return [...document.body.querySelectorAll('*')].filter(element => !element.closest('svg') && hasText(element)).map(element => {
    const [a, b] = [light(numbers(getComputedStyle(element).color)), light(ground(element))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), element.outerHTML.slice(0, 80)];
  }).sort((x, y) => x[0] - y[0])[0];
}'''


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [390, 1280])
def test_in_a_browser(visit, page, parsed, width, scheme):
    "No picture missing, nothing wider than the window, ink that can be read."
    window = visit(page, width, color_scheme=scheme)
    assert window.evaluate('document.documentElement.scrollWidth') <= width
    boxes = window.evaluate('''() => [...document.querySelectorAll('svg')].map(svg => {
      const box = svg.getBoundingClientRect(); return [box.width, box.height, svg.querySelectorAll('path, use').length] })''')
    assert len(boxes) == len(parsed.all('svg')) and all(w > 200 and h > 100 and shapes > 10 for w, h, shapes in boxes)
    cards = window.evaluate("[...document.querySelectorAll('.chart')].map(card => getComputedStyle(card).backgroundColor)")
    assert set(cards) == {'rgb(255, 255, 255)'}
    ground = window.evaluate('getComputedStyle(document.body).backgroundColor')
    assert (ground == 'rgb(255, 255, 255)') == (scheme == 'light')
    contrast, where = window.evaluate(CONTRAST)
    assert contrast >= 4.5, where


def wait_for(window, condition: str) -> bool:
    "Whether it comes true. wait_for_function evaluates its text inside the page once it has to wait, which the page's policy forbids."
    return window.evaluate(f'''() => new Promise(done => {{
      const look = () => {condition} ? done(true) : requestAnimationFrame(look);
      look(); setTimeout(() => done(false), 10_000) }})''')


def test_by_keyboard(visit, page):
    window = visit(page, 390)
    window.keyboard.press('Tab')
    assert window.evaluate('document.activeElement.className') == 'skip'
    assert window.evaluate('document.activeElement.getBoundingClientRect().left') >= 0
    target = window.evaluate('document.activeElement.hash')
    window.keyboard.press('Enter')
    assert wait_for(window, f"document.activeElement.matches('{target}')")
    window.keyboard.press('Tab')
    assert window.evaluate("document.activeElement.matches('.scroll')")
    scrolls = '''() => {
      const box = [...document.querySelectorAll('.scroll')].find(each => each.scrollWidth > each.clientWidth);
      box.focus(); return box.scrollWidth }'''
    assert window.evaluate(scrolls) > 390
    window.keyboard.press('ArrowRight')
    assert wait_for(window, 'document.activeElement.scrollLeft > 0')
    window.focus('summary')
    window.keyboard.press('Enter')
    assert window.evaluate("document.querySelector('details').open")


def test_on_paper(visit, page):
    "Dark or not on the screen, paper is white; what is folded away is printed; what is for the screen is not."
    window = visit(page, 794, color_scheme='dark')
    window.emulate_media(media='print')
    assert window.evaluate('getComputedStyle(document.body).backgroundColor') == 'rgb(255, 255, 255)'
    assert window.evaluate("getComputedStyle(document.querySelector('nav')).display") == 'none'
    assert window.evaluate("[...document.querySelectorAll('details p')].every(p => p.getBoundingClientRect().height > 10)")
    assert window.evaluate('document.documentElement.scrollWidth') <= 794
    assert window.evaluate(CONTRAST)[0] >= 4.5
    assert window.pdf(format='A4').startswith(b'%PDF')


def test_hostile_text_does_nothing_in_a_browser(visit, hostile_page):
    window = visit(hostile_page, 390)
    assert window.evaluate("document.querySelectorAll('script, img').length") == 0
    assert window.evaluate('document.documentElement.scrollWidth') <= 390
