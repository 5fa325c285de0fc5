"""A run's gallery in a browser: how fast it is there, and whether everybody can see it."""

import statistics
import time

import browser
import numpy as np
import pytest
from browser import find_all, texts, unfold, wait
from galleries import SAMPLERS, identity, make_record, make_run, planned

from jaxsd.batch import gallery
from jaxsd.run import picture

SECONDS = {'open': 1.0, 'filter': 0.1, 'write': 2.0}  # the most that each may take


def _first_paint(driver):
    """Seconds from the page's start until it showed something."""
    return wait(lambda: driver.execute_script(
        'return performance.getEntriesByName("first-contentful-paint")[0]?.startTime')) / 1e3


def _filter_times(driver, words):
    """Seconds from each word typed to the frame that shows what matches."""
    return [driver.execute_async_script('''
        const [typed, done] = arguments, search = document.getElementById('search');
        search.value = typed;
        const start = performance.now();
        search.dispatchEvent(new Event('input', {bubbles: true}));
        requestAnimationFrame(() => {
          const channel = new MessageChannel();  // after the frame is drawn
          channel.port1.onmessage = () => done(performance.now() - start);
          channel.port2.postMessage(0);
        });''', word) / 1e3 for word in words]


def _told(paint, times):
    return (f'first paint {paint:.2f} s, filter {1e3 * statistics.median(times):.0f} ms, at most '
            f'{1e3 * max(times):.0f} ms')


WORDS = ('t', 'th', 'thing', 'thing 1', '', 'apple', 'nothing at all', 'number 7', 'rocket', '')


def test_opens_and_filters_in_time(visit):
    """And asks for the pictures in sight alone."""
    driver = visit()
    paint = _first_paint(driver)
    time.sleep(0.3)
    assert 10 < browser.requests(driver, '/pictures/') < 100
    assert texts(driver, '#count') == ['2,000 pictures']
    times = _filter_times(driver, WORDS)
    print('2,000 records:', _told(paint, times))
    assert paint < SECONDS['open'] and statistics.median(times) < SECONDS['filter'], times


def test_ten_thousand(visit, tmp_path):
    axes = {'sampler': list(SAMPLERS)}
    where = make_run(tmp_path / 'many', planned(10_000), axes, pictures=False)
    start = time.perf_counter()
    page = gallery.write(where)
    wrote = time.perf_counter() - start
    assert wrote < SECONDS['write']
    driver = visit('', page)
    paint, times = _first_paint(driver), _filter_times(driver, WORDS)
    driver.get_log('browser')  # its pictures are not there
    print(f'10,000 records, {page.stat().st_size / 1e6:.1f} MB: written in {wrote:.2f} s,',
          _told(paint, times))
    assert texts(driver, '#count') == ['10,000 pictures']
    assert paint < 2 * SECONDS['open'] and statistics.median(times) < SECONDS['filter'], times


STATES = ('', '#view=grid', '#view=failures', f'#shown={identity(0)}',
          f'#pick={identity(0)}&pick={identity(6)}&comparing=true')


@pytest.mark.parametrize('state', STATES)
def test_everything_has_a_name(visit, state):
    driver = visit(state)
    unfold(driver)
    tree = driver.execute_cdp_cmd('Accessibility.getFullAXTree', {})['nodes']
    roles = {'button', 'textbox', 'searchbox', 'checkbox', 'radio', 'slider', 'combobox', 'image',
             'link', 'dialog', 'region'}
    nodes = [node for node in tree if node.get('role', {}).get('value') in roles]
    assert len(nodes) > 5
    assert not [node for node in nodes if not node.get('name', {}).get('value', '').strip()]


@pytest.mark.slow
@pytest.mark.parametrize('name', ['light', 'dark'])
@pytest.mark.parametrize('state', STATES)
def test_contrast(visit, name, state):
    """WCAG's 4.5 for all text that is in sight."""
    driver = visit()
    browser.scheme(driver, name)
    driver = visit(state)
    time.sleep(0.2)  # transitions
    ratios = driver.execute_script('''
        const pen = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
        const rgba = colour => {
          pen.clearRect(0, 0, 1, 1);
          pen.fillStyle = colour;
          pen.fillRect(0, 0, 1, 1);
          return pen.getImageData(0, 0, 1, 1).data;
        };
        const light = colour => rgba(colour).slice(0, 3).reduce((sum, value, i) => {
          const part = value / 255;
          return sum + [0.2126, 0.7152, 0.0722][i]
            * (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        }, 0);
        const behind = node => node === null ? 'white'
          : rgba(getComputedStyle(node).backgroundColor)[3] === 255
          ? getComputedStyle(node).backgroundColor : behind(node.parentElement);
        const root = document.querySelector('dialog[open]') ?? document.body;
        return [...root.querySelectorAll('*')].filter(node => node.checkVisibility()
          && [...node.childNodes].some(n => n.nodeType === 3 && n.data.trim())
          && !['SCRIPT', 'OPTION'].includes(node.tagName) && !node.disabled).map(node => {
          const [a, b] = [light(getComputedStyle(node).color), light(behind(node))];
          return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05),
                  node.tagName + ' ' + node.textContent];
        });''')
    assert len(ratios) > 5
    assert not [(ratio, text) for ratio, text in ratios if ratio < 4.5]
    dark = driver.execute_script(
        'return getComputedStyle(document.body).backgroundColor') != 'rgb(255, 255, 255)'
    assert dark == (name == 'dark')


@pytest.mark.parametrize('state', STATES)
def test_fits_a_narrow_screen(visit, window, state):
    browser.resize(window, 360, 740)
    driver = visit(state)
    assert driver.execute_script('''
        const root = document.querySelector('dialog[open]') ?? document.documentElement;
        return root.scrollWidth <= root.clientWidth''')
    if not state:
        assert driver.execute_script('return across') == 2


def test_pictures_of_all_sizes(visit, tmp_path):
    """Small ones keep their pixels; of large ones thumbnails are shown, until they are opened."""
    records = [make_record(0), make_record(1, width=300, height=200)]
    for record in records:
        size = [record['request'][name] for name in ('width', 'height')]
        image = np.zeros((*size[::-1], 3), np.uint8)
        files = {'file': picture.png(image), 'thumb': picture.thumbnail(image)}
        record |= {'width': size[0], 'height': size[1], 'thumb': record['file'].replace(
            'pictures', 'thumbs').replace('.png', '.webp')}
        for name, data in files.items():
            if data is None:
                del record[name]
                continue
            (tmp_path / record[name]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / record[name]).write_bytes(data)
    driver = visit('', gallery.write(make_run(tmp_path, records, pictures=False)))
    sizes = '''return [...document.querySelectorAll(arguments[0])].map(image => [
        image.naturalWidth, getComputedStyle(image).imageRendering])'''
    expected = [[64, 'pixelated'], [256, 'auto']]
    wait(lambda: driver.execute_script(sizes, '#list img') == expected)
    find_all(driver, '#list .open')[1].click()
    wait(lambda: driver.execute_script(sizes, '#shown img') == [[300, 'auto']])
