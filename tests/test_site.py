"""The site that `make docs` built, page by page in a real headless browser: at a desk and on a phone."""
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

SITE = Path(__file__).parents[1] / '_docs'
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob('*.html') if '_static' not in path.parts)
pytestmark = pytest.mark.skipif(not PAGES, reason='no site: run make docs first')


@pytest.fixture(scope='module')
def window(browser):
    page = browser.new_page()
    yield page
    page.close()


@pytest.mark.parametrize('name', PAGES)
def test_page(window, name):
    """No error in the console, nothing missing, nothing from elsewhere, no broken picture or inner link,
    no sideways scrolling."""
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
    for width in (1280, 390):
        window.set_viewport_size({'width': width, 'height': 844})
        assert window.evaluate('document.documentElement.scrollWidth') <= width, f'{width} px'
    for event, listener in listeners.items(): window.remove_listener(event, listener)
    assert wrong == []


def test_search_finds_what_is_there(window):
    window.goto((SITE / 'search.html').as_uri() + '?q=centred_gain')
    # The results come one after the other.
    window.wait_for_selector('#search-results li a[href*="mean_shift"]', timeout=20_000)
