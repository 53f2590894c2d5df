"""The site that `make docs` built, page by page in a real headless browser: at a desk and on a phone."""
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlparse

import pytest

from wib_nbdev.claims import VERDICTS

SITE = Path(__file__).parents[1] / '_docs'
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob('*.html') if '_static' not in path.parts)
pytestmark = pytest.mark.skipif(not PAGES, reason='no site: run make docs first')
# What Markdown or TeX would be in the text of a page, its code apart.
RAW = r'''() => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) {
    const {textContent: text, parentElement: parent} = walker.currentNode;
    // A frame that a cell shows has its text as it is.
    if (parent.closest('pre, code, script, style, svg, mjx-container, .cell_output table')) continue;
    if (/\*\*|\]\(|`|:::|\$\$|\$\\|\\[([]|\\[a-z]{2,}[{^_ ]|^#{1,6} |^\|.*\|$/m.test(text))
      found.push(text.trim());
  }
  return found;
}'''


@pytest.fixture(scope='module')
def window(browser):
    page = browser.new_page()
    yield page
    page.close()


@pytest.mark.parametrize('name', PAGES)
def test_page(window, name):
    """No error in the console, nothing missing, nothing from elsewhere, no broken picture or inner link,
    no Markdown, no sideways scrolling, and at most 2 MB."""
    window.goto('about:blank')  # what the last page still asked for is not this one's
    wrong = []
    listeners = {
        'console': lambda message: (wrong.append(message.text) if message.type in ('error', 'warning')
                                    else None),
        'pageerror': lambda error: wrong.append(str(error)),
        'requestfailed': lambda request: wrong.append(f'{request.url}: {request.failure}'),
        'request': lambda request: (None if request.url.startswith(('file:', 'data:', 'blob:'))
                                    else wrong.append(request.url)),
    }
    for event, listener in listeners.items(): window.on(event, listener)
    window.set_viewport_size({'width': 1280, 'height': 844})
    window.goto((SITE / name).as_uri(), wait_until='load')
    broken = '[...document.images].filter(x => x.complete && !x.naturalWidth).map(x => x.src)'
    assert window.evaluate(broken) == []
    targets = window.evaluate("[...document.querySelectorAll('a[href]')].map(x => x.href)")
    for target in {target for target in targets if target.startswith('file:')}:
        assert Path(unquote(urlparse(target).path)).exists(), target
    window.evaluate('() => window.MathJax?.startup?.promise?.then(() => null)')
    assert window.evaluate(RAW) == []
    pictures = window.evaluate("[...document.images].map(x => x.src).filter(x => x.startsWith('file:'))")
    files = [SITE / name, *{Path(unquote(urlparse(picture).path)) for picture in pictures}]
    assert sum(file.stat().st_size for file in files) < 2e6
    for width in (1280, 390):
        window.set_viewport_size({'width': width, 'height': 844})
        assert window.evaluate('document.documentElement.scrollWidth') <= width, f'{width} px'
    for event, listener in listeners.items(): window.remove_listener(event, listener)
    assert wrong == []


@pytest.fixture(scope='module')
def address():
    "The site as a server gives it: from files, the search shows no excerpts."
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=SITE))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize('words, page', [('PReLU', '07_comparison'), ('centred_gain', 'mean_shift'),
                                         ('in fewer epochs', 'report')])
def test_search_finds_what_is_there(window, address, words, page):
    window.goto(f'{address}/search.html?q={words}')
    # The results come one after the other.
    result = window.locator('#search-results li', has=window.locator(f'a[href*="{page}"]')).first
    result.locator('.context').wait_for(timeout=300_000)
    assert words.split()[0].lower() in result.inner_text().lower()


def test_the_first_page_on_a_phone(window, address):
    """The verdicts, what they depend on and the commands are seen without scrolling sideways; then the
    explorable, then the chapters in order."""
    window.set_viewport_size({'width': 390, 'height': 844})
    window.goto(address)
    cells = [cell for cell in window.locator('table.promises td').all() if cell.inner_text() in VERDICTS]
    assert len(cells) >= 5
    for cell in cells:
        box = cell.bounding_box()
        assert box['x'] >= 0 and box['x'] + box['width'] <= 390
    edges = "[...document.querySelectorAll('table.choices td')].map(x => x.getBoundingClientRect().right)"
    assert len(found := window.evaluate(edges)) >= 24 and max(found) <= 390 and len(set(found)) == 2
    wide = "[...document.querySelectorAll('.highlight-bash pre')].filter(x => x.scrollWidth > x.clientWidth)"
    assert window.evaluate(f'{wide}.length') == 0
    assert 'With shift' in window.inner_text('.explorable .said')
    links = "[...document.querySelectorAll('.card strong a')].map(x => x.getAttribute('href'))"
    chapters = window.evaluate(links)
    assert chapters == [name for name in PAGES if name[:2].isdigit()]
    assert window.locator('.card img').count() == len(chapters)


def test_chapter_4_opens_with_the_explorable(window, address):
    window.goto(f'{address}/04_activations.html')
    assert 'With shift' in window.inner_text('.explorable .said')
    order = "document.querySelector('h1 ~ p').compareDocumentPosition(document.querySelector('.explorable'))"
    assert window.evaluate(order) & 4, 'it follows the first paragraph'


def test_the_report_is_in_the_sidebar_and_leads_back(window, address):
    window.set_viewport_size({'width': 1280, 'height': 844})
    window.goto(address)
    window.locator('.sidebar-tree a[href="report.html"]').click()
    assert window.title() == 'Does WIB-ReLU work? A reproduction'
    window.get_by_role('link', name='all chapters').click()
    assert window.url == f'{address}/index.html'
