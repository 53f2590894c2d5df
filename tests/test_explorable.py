"""The explorable in a real browser: its script's formulas are the library's, and it works by keyboard."""
import random

import pytest
import torch

from wib_nbdev.activations import CENTRED_SHIFT, make_activation, predict_depth
from wib_nbdev.report import explorable

HEAD = ('<!doctype html><html lang="en"><style>:root { color-scheme: light dark }</style>'
        '<meta name="viewport" content="width=device-width">')
PREDICT = "settings => settings.map(each => document.querySelector('.explorable').predict(...each))"


@pytest.fixture(scope='module')
def window(browser):
    page = browser.new_page()
    wrong, asked = [], []
    page.on('console', lambda message: wrong.append(message.text))
    page.on('pageerror', lambda error: wrong.append(str(error)))
    page.on('request', lambda request: asked.append(request.url))
    page.set_content(f'{HEAD}<body>{explorable()}</body></html>')
    yield page
    assert wrong == asked == []
    page.close()


@pytest.fixture
def in_double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_script_computes_what_python_computes(window, in_double_precision):
    """Mean and second moment of each layer, to 1e-6 of the size of the activations, in 200 random settings.
    A layer takes Python milliseconds, so most are few."""
    names = window.evaluate("[...document.querySelectorAll('.explorable option')].map(each => each.value)")
    draw = random.Random(0)
    settings = [(names[i % len(names)], draw.uniform(0, 1), draw.uniform(0.4, 2.4), draw.randint(1, 3))
                for i in range(197)]
    settings += [(name, 0.3, 1.8, 30) for name in ('relu', 'selu', 'silu')]
    for (name, shift, gain, depth), layers in zip(settings, window.evaluate(PREDICT, settings), strict=True):
        unit = make_activation(name)
        frame = predict_depth(lambda z, unit=unit, shift=shift: unit(z) - shift, gain, depth)
        assert len(layers) == depth
        for ours, theirs in zip(layers, frame.itertuples(), strict=True):
            second = theirs.mean**2 + theirs.std**2
            assert abs(ours['second'] - second) <= 1e-6 * max(1, second), (name, shift, gain, theirs)
            assert abs(ours['mean'] - theirs.mean) <= 1e-6 * max(1, second)**0.5, (name, shift, gain, theirs)


def said(window): return window.inner_text('.explorable .said')


def dots(window): return window.locator('.explorable circle').count()


def test_it_opens_with_the_paper_and_says_what_is_seen(window):
    assert said(window).startswith(
        'With shift 0.56 and Kaiming’s gain the mean is 0 after the first layer, but −0.28 after 30 layers.')
    assert dots(window) > 100
    window.get_by_role('button', name='The centred gain').click()
    for words in ('the signal keeps its size (5 real networks, layer 30: ', 'the signal explodes'):
        assert words in said(window)
    assert dots(window) > 100


def test_by_keyboard(window):
    "Each control has a name, is reached by Tab, and changes what is said; off the measured settings no dots."
    window.get_by_role('button', name='The paper').click()
    for name in ('Shift', 'Gain', 'Layers'):
        slider, before = window.get_by_role('slider', name=name), said(window)
        window.keyboard.press('Tab')
        while not slider.evaluate('each => each === document.activeElement'): window.keyboard.press('Tab')
        window.keyboard.press('ArrowLeft')
        assert said(window) != before and slider.get_attribute('aria-valuetext')
    assert dots(window) == 0
    window.get_by_role('combobox', name='Activation').select_option('gelu')
    window.get_by_role('button', name='mean in layer 1').press('Enter')
    assert 'GELU' in window.locator('.explorable svg').first.get_attribute('aria-label')


def test_a_value_with_a_name_is_meant_exactly(window):
    "A slider moves in hundredths; near the centred shift it means the centred shift."
    window.get_by_role('button', name='The centred gain').click()
    assert float(window.get_by_role('slider', name='Shift').input_value()) == round(CENTRED_SHIFT, 2)
    window.get_by_role('slider', name='Layers').fill('50')
    assert 'mean is 0.00 after 50 layers. The second moment is 1.00: ' in said(window)


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [390, 1280])
def test_it_fits(window, width, scheme):
    window.set_viewport_size({'width': width, 'height': 844})
    window.emulate_media(color_scheme=scheme)
    assert window.evaluate('document.documentElement.scrollWidth') <= width
    for box in window.locator('.explorable svg').all(): assert box.bounding_box()['height'] > 150
