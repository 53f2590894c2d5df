"The report: its sentences for whatever runs find, its page for whatever runs there are, and in a browser."
import importlib
import itertools
import json
import re
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from wib_nbdev import claims, report
from wib_nbdev.claims import CLAIMS, NOTHING, judge
from wib_nbdev.plan import MAIN, PAPER_ARMS, SETTINGS
from wib_nbdev.statistics import MIN_PAIRS, effect_in_words, paired_differences, select
from wib_nbdev.sweep import load_results

ROOT = Path(__file__).parents[1]

STATES = ('better', 'worse', 'equal', 'undecided')
LABELS = ('Fashion-MNIST', 'CIFAR-10')
OWN_SCRIPTS = [{'type': 'application/json'}, {}]  # the explorable's
HOSTILE = '"\'><script>alert(1)</script><img src=x onerror=alert(2)>'


@pytest.fixture(scope='module')
def full():
    "The committed results: the runs of their main setting, and the first arms' grid."
    return load_results()


@pytest.fixture(scope='module')
def sample(full):
    "Three seeds of the paper's arms, as if they had been run on the sample."
    part = select(full, **report.main_setting(full), arm=list(PAPER_ARMS))
    few = select(part, seed=sorted(part.runs['seed'].unique())[:3])
    return few._replace(runs=few.runs.drop(columns='arm').assign(sample=True))


@pytest.fixture(scope='module')
def theory():
    "What needs no runs, judged once."
    return judge()


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(report, 'PICTURES', ())


class Page(HTMLParser):
    "The elements of a page, its text, and whether every tag was closed in its turn."
    def __init__(self, page: str):
        super().__init__()
        self.elements, self.text, self.open = [], '', []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ('meta', 'link', 'br', 'img'): self.open.append(tag)

    def handle_startendtag(self, tag, attrs): self.elements.append((tag, dict(attrs)))
    def handle_endtag(self, tag): assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (['style'], ['script']): self.text += data

    def all(self, *tags): return [attrs for tag, attrs in self.elements if tag in tags]


# Sentences

def table(n=10, **states):
    "A table of `against_relu`, by quantity the states on the two data sets."
    rows = [dict(dataset=dataset, quantity=quantity, state=state, n=n) for quantity, pair in states.items()
            for dataset, state in zip(('fashion_mnist', 'cifar10'), pair, strict=True)]
    return pd.DataFrame(rows, columns=['dataset', 'quantity', 'metric', 'n', 'effect', 'state'])


def says(sentence, word):
    "The data sets of which a clause says a word: none, 'both', or their names."
    found = re.search(rf'\b{word}(?: than ReLU to reach the same training loss)?( on ([\w-]+))?', sentence)
    if not found: return set()
    return {found[2]} if found[2] in LABELS else set(LABELS)


@pytest.mark.parametrize('quantity, better, worse', [
    ('epochs', 'needs fewer epochs', 'needs more epochs'),
    ('accuracy', 'ends more accurate', 'ends less accurate'), ('loss', 'is lower', 'is higher')])
def test_headline_is_true_of_every_combination(quantity, better, worse):
    "Better is said where it is so and nowhere else; worse too, save beside equal: 'no better'."
    for pair in itertools.product(STATES, repeat=2):
        for others in STATES:
            states = dict.fromkeys(('epochs', 'accuracy', 'loss'), (others, others)) | {quantity: pair}
            sentence = report.headline(table(**states))
            assert sentence.startswith('WIB-ReLU ') and sentence.endswith('.') and sentence.count('.') == 1
            where = {state: {name for name, each in zip(LABELS, pair, strict=True) if each == state}
                     for state in STATES}
            assert says(sentence, better) == where['better'], sentence
            if set(pair) != {'equal', 'worse'}: assert says(sentence, worse) == where['worse'], sentence
            if 'undecided' in pair: assert 'undecided' in sentence or 'not shown' in sentence


def test_headline_joins_what_agrees_and_what_does_not():
    alike = table(epochs=('better',) * 2, accuracy=('better',) * 2, loss=('better',) * 2)
    assert report.headline(alike) == (
        'WIB-ReLU needs fewer epochs than ReLU to reach the same training loss and ends more accurate; '
        'its last validation loss is lower.')
    apart = table(epochs=('better',) * 2, accuracy=('equal',) * 2, loss=('worse',) * 2)
    assert report.headline(apart) == (
        'WIB-ReLU needs fewer epochs than ReLU to reach the same training loss but ends about as accurate; '
        'its last validation loss is higher.')
    mixed = table(epochs=('better', 'better'), accuracy=('equal', 'worse'), loss=('worse', 'undecided'))
    assert report.headline(mixed) == (
        'WIB-ReLU needs fewer epochs than ReLU to reach the same training loss but ends no more accurate; '
        'its last validation loss is higher on Fashion-MNIST (undecided on CIFAR-10).')


def test_headline_without_enough_runs(full, sample):
    nothing = report.against_relu(NOTHING)
    assert 'do not compare' in report.headline(nothing) and report.numbers(nothing) == ''
    assert 'do not compare' in report.headline(report.against_relu(select(full, arm='relu')))
    assert report.headline(report.against_relu(sample)) == (
        f'Undecided: 3 pairs of seeds, too few to tell WIB-ReLU from ReLU ({MIN_PAIRS} are needed).')
    one = select(full, **report.main_setting(full), dataset='cifar10')
    assert report.headline(report.against_relu(one)).startswith('On CIFAR-10, WIB-ReLU ')


def test_what_another_setting_says_otherwise(full):
    "The same runs with ReLU's and WIB-ReLU's exchanged, as if made in another setting of the plan."
    main = report.main_setting(full)
    others = {name: fields for name, fields in SETTINGS.items() if not fields.items() <= main.items()}
    (name, fields), (second, more) = others.items()
    pairs = select(full, **main, arm=['relu', 'wib_relu'])
    runs = pairs.runs.drop(columns='arm')
    apart = runs.assign(**fields, key='x' + runs['key'])
    apart = apart[apart['seed'] < apart['seed'].max()]  # fewer, so that the main setting stays what it is
    swap = {'relu': 'wib_relu', 'wib_relu': 'relu'}
    keys = pairs.runs.set_index(['dataset', 'seed', 'arm'])['key']
    other = {keys[dataset, seed, arm]: 'x' + keys[dataset, seed, swap[arm]]
             for dataset, seed, arm in keys.index}
    epochs = pairs.epochs.assign(key=pairs.epochs['key'].map(other))
    both = full._replace(runs=pd.concat([runs, apart]), epochs=pd.concat([pairs.epochs, epochs]))
    said = report.elsewhere(both)
    assert said.startswith(f'With {name}, WIB-ReLU needs more epochs than ReLU to reach the same ')
    assert report.elsewhere(full._replace(runs=runs)) == '', 'no other setting has runs'
    third = apart.assign(**more, key='x' + apart['key'])
    three = both._replace(runs=pd.concat([both.runs, third]),
                          epochs=pd.concat([both.epochs, epochs.assign(key='x' + epochs['key'])]))
    assert report.elsewhere(three) == f'{said} {said.replace(name, second)}'
    few = both._replace(runs=pd.concat([runs, apart[apart['seed'] < runs['seed'].min() + 3]]))
    assert report.elsewhere(few) == '', 'too few'


def test_the_numbers_are_those_of_the_comparison(full):
    "The same change is written in the sentence, in the table of promises and by `statistics`."
    main = select(full, **report.main_setting(full))
    rows = paired_differences(main, rivals=['relu'], metrics=['valid loss'])
    written = [effect_in_words(row) for row in rows.itertuples()]
    table = report.against_relu(full)
    promised = report.promises(table).set_index('the paper promises')
    assert list(promised.loc['up to 20 % less loss', list(LABELS)]) == written and len(promised) <= 6
    assert all(text in report.numbers(table) for text in written)


@pytest.mark.parametrize('rows, verdict', [
    ([(-.25, -.15), (-.3, -.1)], 'holds'), ([(-.25, -.15), (-.12, -.05)], 'holds in part'),
    ([(-.25, -.15), (-.21, -.01)], 'holds in part'), ([(-.21, -.01), (-.22, .01)], 'undecided'),
    ([(-.015, .01), (-.25, -.15)], 'holds in part'), ([(.01, .1), (-.1, .1)], 'does not hold')])
def test_a_promise_holds_by_its_rule(rows, verdict):
    "Of the loss: each interval reaches -20 % and lies below -2 %."
    frame = pd.DataFrame([
        dict(dataset=name, quantity='loss', metric='valid loss', n=10, effect=low, effect_low=low,
             effect_high=high, claimed=low <= -.2, state=report.state_of(low, high, 10, 'valid loss'))
        for name, (low, high) in zip(('fashion_mnist', 'cifar10'), rows, strict=True)])
    promised = report.promises(frame).set_index('the paper promises')['verdict']
    assert promised['up to 20 % less loss'] == verdict
    assert promised['outperforms ReLU'] == 'cannot be tested'
    few = report.promises(frame.assign(n=3)).set_index('the paper promises')['verdict']
    assert few['up to 20 % less loss'] == 'undecided'


def test_reasons_are_sentences(full, theory):
    "With a verb; no field name, no name as it is typed. With runs and without."
    judged = report.judge_main(full, committed=True)
    others = ('not run yet: runs with sample=True, epochs=5', 'cifar10: wib_relu_04 [SGD 0.4; Adam 0.004: -]')
    for why in (*theory['why'], *judged['why'], *others):
        sentence = report.reason(why)
        assert sentence[0] == sentence[0].upper() and sentence.endswith('.')
        words = re.sub(r'; this is with .*', '', sentence)
        assert re.search(r'\b(is|are|has|lie|gives|grows|lack|measured)\b', words), sentence
        assert not re.search(r'\d\. ', words), 'a list is one sentence'
        typed = r'wib_relu|fashion_mnist|cifar10|\w+=|`|gradient_rms|near_zero'
        assert not re.search(typed, sentence), sentence


def test_terminal_summary(full, sample):
    few = report.terminal_summary(sample, 'runs/quick/report.html')
    all_ = report.terminal_summary(full, 'x/report.html')
    for text in (few, all_):
        lines = text.splitlines()
        assert len(lines) <= 12 and max(map(len, lines)) <= 100 and 'report.html' in text
    assert 'decides nothing' in few and report.headline(report.against_relu(full))[:40] in few
    assert 'Known' not in all_ and 'wib-nbdev claims x' in all_


def test_markdown_keeps_its_columns():
    lines = report.as_markdown(pd.DataFrame({'a|b': ['1|2\n3'], 'c': [4]})).splitlines()
    assert lines == ['| a\\|b | c |', '| --- | --- |', '| 1\\|2 3 | 4 |']


# The page

@pytest.fixture(scope='module')
def page(sample, theory): return report.render(sample, verdicts=theory, made='on a Tuesday')


def test_the_first_screen_answers(page, full):
    parsed = Page(page)
    text = ' '.join(parsed.text.split())
    top = report.headline(report.against_relu(full))
    order = [top, 'What the paper promises', 'in the first row, with Adam 0.002, 20 epochs',
             'How far to trust this', 'on a Tuesday']
    assert sorted(order, key=text.index) == order and re.search(r'\[¬?Re.*?\] means', text)
    first = page[:page.index('id="claims"')]
    assert first.count('<svg') == 2 and first.index('valid loss') < first.index('valid accuracy')
    links = [attrs['href'] for attrs in parsed.all('a')]
    assert report.PAPER in links and report.PROJECT in links and report.SITE in links


def test_the_page_is_self_contained(page):
    parsed = Page(page)
    assert "default-src 'none'" in page
    assert not parsed.all('img', 'iframe', 'object', 'base', 'form')
    assert parsed.all('script') == OWN_SCRIPTS and f"script-src '{report._script_digest(page)}'" in page
    assert not re.search(r'@import|@font-face|url\((?!#)', page)
    ids = [attrs['id'] for _, attrs in parsed.elements if 'id' in attrs]
    assert len(ids) == len(set(ids))
    links = {attrs.get('href') or attrs.get('xlink:href', '') for _, attrs in parsed.elements}
    inside = {link[1:] for link in links if link.startswith('#')}
    assert inside | set(re.findall(r'url\(#([^)$]+)\)', page)) <= set(ids)
    assert len(page) < 2e6


def test_a_sample_stands_beside_the_full_reproduction(page, full):
    text = ' '.join(Page(page).text.split())
    assert 'decide nothing about the paper' in text and 'this sample: undecided' in text
    assert 'p, corrected by Holm' not in text  # three pairs cannot support it


def test_a_reproduction_is_not_compared_with_itself(full, theory, no_pictures):
    assert report.full_reproduction(full) is None and report.full_reproduction(NOTHING) is not None
    text = Page(report.render(full, verdicts=theory)).text
    assert 'committed full reproduction' not in text and 'this sample' not in text
    assert 'p, corrected by Holm' in text


def test_every_claim_is_there_once_with_its_words(page):
    parsed = Page(page)
    assert [attrs['id'] for attrs in parsed.all('article')] == [
        f'claim-{claim.id}' for theme in claims.THEMES for claim in CLAIMS if claim.theme == theme]
    said = parsed.text.replace('`', '')
    words = [text.replace('`', '') for claim in CLAIMS for text in (claim.quote, claim.criterion)]
    assert [text for text in words if text not in said] == []


def test_pictures_are_drawn_or_name_the_runs_that_they_lack(page, theory):
    empty = report.render(NOTHING, verdicts=theory)
    lacking = re.findall(r'Not drawn: these runs lack ([^.]+)', Page(empty).text)
    assert len(lacking) == len(report.PICTURES) - 6 and all('run' in words for words in lacking)
    assert [attrs['role'] for attrs in Page(page).all('svg')] == ['img'] * page.count('<svg ')
    assert all(len(attrs['aria-label']) > 15 for attrs in Page(page).all('svg'))


def test_links_lead_to_what_makes_a_picture(page):
    facts = ConfigParser(delimiters=['='])
    facts.read(ROOT / 'settings.ini', encoding='utf-8')
    assert facts['DEFAULT']['git_url'] == report.PROJECT
    assert facts['DEFAULT']['doc_host'] + facts['DEFAULT']['doc_baseurl'] == report.SITE
    for picture in report.PICTURES:
        module = picture.make.__module__.removeprefix('wib_nbdev.')
        cells = json.loads((ROOT / f'nbs/{report.NOTEBOOKS[module]}.ipynb').read_text())['cells']
        assert any(f'def {picture.make.__name__}(' in ''.join(cell['source']) for cell in cells)
        assert picture.make.__name__ in importlib.import_module(f'wib_nbdev.{module}').__all__
    found = re.findall(rf'<a href="{report.PROJECT}/blob/main/(.*?)#L(\d+)"><code>\w+\.(\w+)<', page)
    assert len(found) == len(report.PICTURES) + 1 and found[0][2] == 'figure_forest'
    for path, line, name in found:
        assert (ROOT / path).read_text().splitlines()[int(line) - 1].startswith(f'def {name}(')
    chapters = re.findall(rf'of <a href="{report.SITE}/(\w+)\.html">chapter \d', page)
    assert len(chapters) == len(found) and set(chapters) == set(report.NOTEBOOKS.values())


@pytest.mark.parametrize('field, values', [('amp', [False, True]), ('device', ['auto', 'cpu'])])
def test_a_sweep_over_what_is_no_arm_has_a_report(sample, theory, no_pictures, field, values):
    "Runs at one seed that differ in the device are two set-ups, and the report says which it shows."
    twice = [sample.runs.assign(**{field: value, 'key': sample.runs['key'] + str(i)})
             for i, value in enumerate(values)]
    epochs = [sample.epochs.assign(key=sample.epochs['key'] + str(i)) for i in range(2)]
    both = sample._replace(runs=pd.concat(twice), epochs=pd.concat(epochs))
    setting = report.main_setting(both)
    assert setting[field] in values and f'{field} {setting[field]}' in report.setting_in_words(setting)
    assert f'{field} {setting[field]}' in Page(report.render(both, verdicts=theory)).text


def test_runs_of_no_arm_have_a_report(sample, theory, no_pictures):
    other = sample._replace(runs=sample.runs.assign(network='mlp', depth=3))
    assert report.main_setting(other) == MAIN
    assert 'do not compare' in report.render(other, verdicts=theory)


@pytest.fixture(scope='module')
def hostile_page(sample, theory):
    "Markup in the environment, the date, and all that a claim says."
    runs = sample.runs.assign(processor=HOSTILE, commit=HOSTILE, torch=HOSTILE)
    texts = ('quote', 'reading', 'criterion', 'place', 'threshold_from', 'why', 'quantity')
    spoilt = theory.assign(**dict.fromkeys(texts, HOSTILE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, 'PICTURES', report.PICTURES[:1])
        return report.render(sample._replace(runs=runs), verdicts=spoilt, made=HOSTILE)


def test_whatever_comes_from_outside_is_text(hostile_page):
    parsed = Page(hostile_page)
    assert not parsed.all('img') and parsed.all('script') == OWN_SCRIPTS
    assert not [name for _, attrs in parsed.elements for name in attrs if name.startswith('on')]
    assert parsed.text.count(HOSTILE) > 4 * len(CLAIMS)
    svg = Page(report.as_svgs(report.figure_2(), HOSTILE, 'x')[0])
    assert svg.all('svg')[0]['aria-label'].startswith(HOSTILE) and not svg.all('script', 'img')


def test_written_whole_or_not_at_all(theory, no_pictures, tmp_path, monkeypatch):
    path = report.write_report(NOTHING, tmp_path / 'new' / 'report.html', verdicts=theory)
    page = path.read_text(encoding='utf-8')
    assert page == report.render(NOTHING, verdicts=theory) and list(path.parent.iterdir()) == [path]
    (tmp_path / 'link.html').symlink_to(path)
    path.write_text('the old one')
    assert report.write_report(NOTHING, tmp_path / 'link.html', verdicts=theory).is_symlink()
    assert path.read_text() == page
    with pytest.raises(OSError, match='is not a file'):
        report.write_report(NOTHING, tmp_path, verdicts=theory)
    monkeypatch.setattr(report, 'headline', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError): report.write_report(NOTHING, path, verdicts=theory)
    assert path.read_text() == page


# In a real browser

@pytest.fixture
def visit(browser, tmp_path):
    "Opens a page in a window. In the end nothing went wrong and nothing was asked for but the file."
    opened = []

    def open_page(html: str, width: int = 1280, **options):
        (tmp_path / 'report.html').write_text(html, encoding='utf-8')
        window = browser.new_page(viewport={'width': width, 'height': 844}, **options)
        wrong, asked = [], []
        window.on('console', lambda message: wrong.append(message.text))
        window.on('pageerror', lambda error: wrong.append(str(error)))
        window.on('dialog', lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        window.on('request', lambda request: asked.append(request.url))
        window.goto((tmp_path / 'report.html').as_uri())
        opened.append((window, wrong, asked))
        return window
    yield open_page
    for window, wrong, asked in opened:
        assert wrong == [] and len(asked) == 1
        window.close()


UNFOLD = "document.querySelectorAll('details').forEach(each => each.open = true)"
CONTRAST = '''() => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(x => x / 255)
    .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = element => {
    for (let each = element; each; each = each.parentElement) {
      const colour = numbers(getComputedStyle(each).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const hasText = element => [...element.childNodes]
    .some(node => node.nodeType === 3 && node.textContent.trim());
  const elements = [...document.body.querySelectorAll('*')];
  return elements.filter(each => !each.closest('svg') && hasText(each)).map(each => {
    const [a, b] = [light(numbers(getComputedStyle(each).color)), light(ground(each))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), each.outerHTML.slice(0, 80)];
  }).sort((x, y) => x[0] - y[0])[0];
}'''


@pytest.mark.slow
@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [390, 1280])
def test_in_a_browser(visit, page, width, scheme):
    "Folded or not, nothing is wider than the window, no picture is missing, and text can be read."
    window = visit(page, width, color_scheme=scheme)
    assert window.evaluate('document.documentElement.scrollWidth') <= width
    badges = '''[...document.querySelectorAll('.promises .badge')]
      .map(each => each.getBoundingClientRect().right)'''
    assert len(edges := window.evaluate(badges)) >= 6 and max(edges) <= width
    first = "document.querySelector('.promises .badge').getBoundingClientRect().bottom"
    assert window.evaluate(first) <= 844, 'a verdict is on the first screen'
    window.evaluate(UNFOLD)
    assert 'With shift' in window.inner_text('.explorable .said'), 'the policy lets its script run'
    assert window.evaluate('document.documentElement.scrollWidth') <= width
    boxes = window.evaluate('''() => [...document.querySelectorAll('svg')].map(svg => {
      const box = svg.getBoundingClientRect(); return [box.width, box.height] })''')
    assert len(boxes) == page.count('<svg ') and all(w > 200 and h > 80 for w, h in boxes)
    wide = '''() => [...document.querySelectorAll('.chart')]
      .filter(each => each.scrollWidth > each.clientWidth)
      .map(each => getComputedStyle(each, '::before').content)'''
    assert all('scroll' in cue for cue in window.evaluate(wide))
    contrast, where = window.evaluate(CONTRAST)
    assert contrast >= 4.5, where


@pytest.mark.slow
def test_by_keyboard_and_on_paper(visit, page):
    "A heading unfolds by the Enter key. Paper is white; the claims are printed on ten pages at most."
    window = visit(page, 794, color_scheme='dark')
    window.focus('summary')
    window.keyboard.press('Enter')
    assert window.evaluate("document.querySelector('details').open")
    window.emulate_media(media='print')
    assert window.evaluate('getComputedStyle(document.body).backgroundColor') == 'rgb(255, 255, 255)'
    heights = "[...document.querySelectorAll('article')].map(each => each.getBoundingClientRect().height)"
    assert min(window.evaluate(heights)) > 10
    assert window.evaluate(CONTRAST)[0] >= 4.5
    assert len(re.findall(rb'/Type\s*/Page[^s]', window.pdf(format='A4'))) <= 10


@pytest.mark.slow
def test_hostile_text_does_nothing_in_a_browser(visit, hostile_page):
    window = visit(hostile_page, 390)
    window.evaluate(UNFOLD)
    assert window.evaluate("document.querySelectorAll('script, img').length") == len(OWN_SCRIPTS)
    assert window.evaluate('document.documentElement.scrollWidth') <= 390


def test_the_script_has_a_formula_for_every_unit_of_the_explorable():
    html = str(report.explorable())
    formulas = re.search(r'const units = \{(.*?)\n *\};', html, re.S).group(1)
    assert re.findall(r'^ *(\w+):', formulas, re.M) == list(report._UNITS)
