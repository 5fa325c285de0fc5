"""A run's gallery: what Python writes, and what a browser makes of it."""

import base64
import hashlib
import itertools
import json
import os
import re
import shlex
import statistics
import time

import browser
import numpy as np
import pytest

from jaxsd.batch import gallery
from jaxsd.run import picture

HOSTILE = ('</script><script>hacked = 1</script><img src=x onerror="hacked = 1"><!-- <script> -->'
           '\u2028\u202e$& \\u003c @data@ &lt; "\'` \x00')
PROMPTS = ('red apple', HOSTILE, 'Ωmega \N{ROCKET} 漢字 עברית', '',
           *(f'thing number {i}' for i in range(16)))
SAMPLERS, GUIDANCE = ('euler', 'dpmpp_2m', 'heun', 'lcm'), (4, 7.5, 1, 10, [4.0, 7.0])
SEEDS = (2**64 - 1, 2**64 - 2, 0, 1, 2**53 + 1)
SECONDS = {'open': 1.0, 'filter': 0.1, 'write': 2.0}  # the most that each may take


def _identity(index):
    return hashlib.sha256(f'{index}'.encode()).hexdigest()[:32]


def _record(index, prompt='red apple', seed=7, **request):
    key = _identity(index)
    fields = {'prompt': prompt, 'seed': seed, 'sampler': 'euler', 'schedule': 'karras', 'steps': 20,
              'guidance': 4, 'width': 64, 'height': 64, **request}
    return {'id': key, 'index': index, 'request': fields, 'time': f'2026-01-01T00:{index % 60:02}',
            'seconds': round(0.5 + (index * 7919 % 1000) / 999, 4),
            'file': f'pictures/{key[:2]}/{key}.png', 'pixels': key * 2, 'width': 64, 'height': 64}


def _failed(record, error):
    return {name: record[name] for name in ('id', 'index', 'request')} | {'error': error}


def _plan(count):
    """Records of a run, every hundredth failed: prompts, times a grid, times seeds, again."""
    points = itertools.cycle(itertools.product(PROMPTS, SAMPLERS, GUIDANCE, SEEDS))
    for index, (prompt, sampler, guidance, seed) in enumerate(itertools.islice(points, count)):
        record = _record(index, prompt, seed, sampler=sampler, guidance=guidance,
                         sampler_options={'order': index % 3 + 1})
        yield _failed(record, 'ValueError: <b>no</b>') if index % 100 == 99 else record


def _run(path, records, axes=None, manifest='manifest.jsonl', pictures=True):
    """A run's folder; its pictures are links to one file for each sampler and guidance."""
    path.mkdir(parents=True, exist_ok=True)
    (path / 'config.json').write_text(json.dumps({
        'model': 'emoji', 'grid': axes, 'command': 'python -m launch.batch --prompt="<b>"',
        'settings': {'weights': 'ab', 'tile': None}}))
    records, made = list(records), {}
    for record in records if pictures else ():
        if 'file' not in record:
            continue
        kind = str((record['request']['sampler'], record['request']['guidance']))
        file = path / record['file']
        file.parent.mkdir(parents=True, exist_ok=True)
        if kind in made:
            os.link(made[kind], file)
        else:
            colour = np.frombuffer(hashlib.sha256(kind.encode()).digest()[:3], np.uint8)
            picture.write_png(file, np.broadcast_to(colour, (64, 64, 3)))
            made[kind] = file
    with open(path / manifest, 'a') as file:
        file.writelines(json.dumps(record) + '\n' for record in records)
    return path


def _data(page):
    return json.loads(re.search('<script type="application/json" id="data">(.*?)</script>',
                                page.read_text('utf-8'), re.DOTALL)[1])


def _cells(page, name):
    """A field of all records, in the page's order."""
    data = _data(page)
    column, = (column for column in data['columns'] if column['name'] == name)
    return [column['values'][i] for i in column.get('at', range(data['count']))]


def test_last_record_counts(tmp_path):
    """Of several manifests; a failure never hides a picture; a torn line is none."""
    good = [_record(index) for index in range(4)]
    _run(tmp_path, [_failed(good[0], 'early'), good[0], good[1], _failed(good[1], 'late'),
                    _failed(good[2], 'first'), _failed(good[2], 'last')])
    _run(tmp_path, [good[3]], manifest='manifest-1.jsonl', pictures=False)
    with open(tmp_path / 'manifest.jsonl', 'a') as file:
        file.write(json.dumps(_record(5))[:-20])
    page = gallery.write(tmp_path)
    assert page == tmp_path / 'index.html'
    assert _cells(page, 'index') == [0, 1, 2, 3]
    assert _cells(page, 'state') == ['finished', 'finished', 'failed', 'finished']
    assert _cells(page, 'error') == [None, None, 'last', None]


def test_fields_are_flat_and_exact(tmp_path):
    requests = [{'seed': 2**64 - 1, 'guidance': [1.0, 2], 'sampler_options': {'a': {'b': True}}},
                {'seed': 2**53 + 1, 'guidance': 1, 'adapters': {}},
                {'seed': 0, 'guidance': float('inf'), 'sampler_options': {'a': {'b': 1}}}]
    page = gallery.write(_run(tmp_path, [_record(i, **r) for i, r in enumerate(requests)]))
    column, = (column for column in _data(page)['columns'] if column['name'] == 'seed')
    assert column == {'name': 'seed', 'big': True,
                      'values': ['18446744073709551615', '9007199254740993', '0']}
    assert _cells(page, 'guidance') == ['[1.0, 2]', 1, 'Infinity']
    assert _cells(page, 'sampler_options.a.b') == ['true', None, 1]
    assert _cells(page, 'adapters') == [None, '{}', None]
    assert _cells(page, 'width') == [64] * 3


def test_entry_without_a_request(tmp_path):
    """What could not be read has no place in the plan, and stands last."""
    page = gallery.write(_run(tmp_path, [{'id': 'a.txt:3', 'error': 'no', 'request': {}},
                                         _record(0)]))
    assert _cells(page, 'id') == [_identity(0), 'a.txt:3']


def test_page_holds_no_foreign_code(tmp_path):
    """Nothing a prompt says ends the data, and the policy names what may run by its hash."""
    prompts = [*PROMPTS, 'half a \ud83d pair']
    where = _run(tmp_path / '<b>&@data@', [_record(i, p) for i, p in enumerate(prompts)])
    page = gallery.write(where)
    text = page.read_text('utf-8')
    assert _cells(page, 'prompt') == prompts
    assert text.count('</script>') == 2 and '<!--' not in text
    assert '<title>&lt;b&gt;&amp;@data@ ' in text
    policy = re.search('Content-Security-Policy" content="(.*?)"', text)[1]
    for tag in ('script', 'style'):
        code = re.search(f'<{tag}>(.*?)</{tag}>', text, re.DOTALL)[1].encode()
        assert base64.b64encode(hashlib.sha256(code).digest()).decode() in policy
    assert "default-src 'none'" in policy and 'unsafe' not in policy
    assert not re.search(r'(src|href|url)\s*[=(]\s*["\']?(https?:)?//', text)


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    page = gallery.write(_run(tmp_path, [_record(0)]))
    before, names = page.read_bytes(), sorted(os.listdir(tmp_path))
    _run(tmp_path, [_record(1)])

    def fail(*args):
        raise OSError('disk full')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', fail)
        with pytest.raises(OSError, match='disk full'):
            gallery.write(tmp_path)
    assert page.read_bytes() == before and sorted(os.listdir(tmp_path)) == names
    assert _cells(gallery.write(tmp_path), 'index') == [0, 1]


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match='config.json'):
        gallery.write(tmp_path)
    assert not os.listdir(tmp_path)


# In a browser.


@pytest.fixture(scope='module')
def window():
    with browser.chromium() as driver:
        driver.set_script_timeout(20)
        driver.execute_cdp_cmd('Browser.grantPermissions', {
            'permissions': ['clipboardReadWrite', 'clipboardSanitizedWrite']})
        yield driver


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """2,000 records in a folder that a shell must have quoted."""
    axes = {'sampler': list(SAMPLERS), 'guidance': list(GUIDANCE)}
    where = _run(tmp_path_factory.mktemp('gallery') / "it's a run", _plan(2000), axes)
    return gallery.write(where)


@pytest.fixture
def visit(window, run):
    """visit(hash, page): open the page -> the driver. The console must stay without errors."""
    browser.resize(window, 1280, 900)
    browser.scheme(window, 'light')

    def visit(state='', page=run):
        window.get('about:blank')
        window.get(page.as_uri() + state)
        return window

    window.get_log('browser')
    yield visit
    errors = [entry for entry in window.get_log('browser') if entry['level'] == 'SEVERE']
    assert not errors


def _wait(test, seconds=5):
    """What a function says, as soon as it says anything."""
    end = time.monotonic() + seconds
    while not (found := test()) and time.monotonic() < end:
        time.sleep(0.02)
    assert found
    return found


def _find(driver, selector):
    return driver.find_element('css selector', selector)


def _all(driver, selector):
    return driver.find_elements('css selector', selector)


def _texts(driver, selector):
    """Text as it stands in the document, also where it is out of sight."""
    return driver.execute_script('return [...document.querySelectorAll(arguments[0])]'
                                 '.map(node => node.textContent)', selector)


def _unfold(driver):
    driver.execute_script('document.querySelectorAll("details").forEach(n => { n.open = true; })')


def _press(driver, *keys):
    from selenium.webdriver.common.keys import Keys
    for key in keys:
        driver.switch_to.active_element.send_keys(getattr(Keys, key, key))


def _focused(driver):
    """The record whose picture has the keyboard."""
    return driver.execute_script('return Number(document.activeElement.dataset.record ?? -1)')


def _first_paint(driver):
    """Seconds from the page's start until it showed something."""
    return _wait(lambda: driver.execute_script(
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
    assert _texts(driver, '#count') == ['2,000 pictures']
    times = _filter_times(driver, WORDS)
    print('2,000 records:', _told(paint, times))
    assert paint < SECONDS['open'] and statistics.median(times) < SECONDS['filter'], times


def test_ten_thousand(visit, tmp_path):
    where = _run(tmp_path / 'many', _plan(10_000), {'sampler': list(SAMPLERS)}, pictures=False)
    start = time.perf_counter()
    page = gallery.write(where)
    wrote = time.perf_counter() - start
    assert wrote < SECONDS['write']
    driver = visit('', page)
    paint, times = _first_paint(driver), _filter_times(driver, WORDS)
    driver.get_log('browser')  # its pictures are not there
    print(f'10,000 records, {page.stat().st_size / 1e6:.1f} MB: written in {wrote:.2f} s,',
          _told(paint, times))
    assert _texts(driver, '#count') == ['10,000 pictures']
    assert paint < 2 * SECONDS['open'] and statistics.median(times) < SECONDS['filter'], times


def test_scrolls_to_the_end_with_few_nodes(visit):
    driver = visit()
    for part in (0.5, 1):
        driver.execute_script('scrollTo(0, arguments[0] * document.body.scrollHeight)', part)
        _wait(lambda part=part: driver.execute_script(
            'const n = document.querySelectorAll("#list li"); '
            'return Number(n[n.length - 1].ariaPosInSet) >= arguments[0]', 2000 * part))
        assert len(_all(driver, '#list li')) < 100
    _wait(lambda: driver.execute_script('''
        const shown = [...document.querySelectorAll('#list img')].filter(
          image => image.getBoundingClientRect().top < innerHeight);
        return shown.length > 10 && shown.every(image => image.naturalWidth === 64)'''))
    last = _all(driver, '#list li')[-1]
    assert last.get_attribute('aria-posinset') == last.get_attribute('aria-setsize') == '2000'
    assert 0 <= last.rect['y'] - driver.execute_script('return scrollY') < 900


def test_keyboard_walks_and_opens(visit):
    driver = visit()
    across = driver.execute_script('return across')
    driver.execute_script('document.querySelector("#list .open").focus()')
    _press(driver, 'ARROW_RIGHT', 'ARROW_DOWN', 'ARROW_LEFT')
    assert _focused(driver) == across
    _press(driver, 'END')
    assert _focused(driver) == 1999
    _press(driver, 'ARROW_RIGHT', 'PAGE_UP', 'HOME', 'ARROW_UP', 'ARROW_LEFT')
    assert _focused(driver) == 0
    _press(driver, 'ENTER')
    assert _find(driver, '#detail').get_attribute('open')
    assert _texts(driver, '#detail-title') == ['Picture #0, 1 of 2,000']
    _press(driver, 'ARROW_RIGHT', 'ARROW_RIGHT', 'ARROW_LEFT', 'ARROW_RIGHT')
    assert _texts(driver, '#detail-title') == ['Picture #2, 3 of 2,000']
    _press(driver, 'ESCAPE')
    _wait(lambda: not _find(driver, '#detail').get_attribute('open'))
    _wait(lambda: _focused(driver) == 2)
    _press(driver, '/')
    assert driver.switch_to.active_element.get_attribute('id') == 'search'
    _press(driver, 'a/b')
    assert _find(driver, '#search').get_property('value') == 'a/b'


def test_tab_reaches_and_leaves_everything(visit):
    """One stop for all pictures, and no trap."""
    driver = visit()
    driver.execute_script('document.getElementById("search").focus()')
    stops = []
    for _ in range(100):
        _press(driver, 'TAB')
        stops.append(driver.execute_script(
            'const n = document.activeElement; return n.id || n.className || n.tagName'))
        if stops[-1] in ('BODY', 'search'):
            break
    assert stops[-1] in ('BODY', 'search'), stops
    assert stops.count('open') == 1 and {'sort', 'down', 'size', 'clear'} <= set(stops)


def test_focus_survives_scrolling(visit):
    driver = visit()
    driver.execute_script('document.querySelector("#list .open").focus(); scrollTo(0, 20000)')
    _wait(lambda: driver.execute_script(
        'return document.querySelectorAll("#list li")[1].ariaPosInSet > 50'))
    assert _focused(driver) == 0


def test_hostile_prompt_is_text(visit):
    driver = visit(f'#shown={_identity(100)}')
    shown = _texts(driver, '#detail dd')
    assert HOSTILE.replace('\x00', '') in [text.replace('\x00', '') for text in shown]
    _press(driver, 'ESCAPE')
    _unfold(driver)
    for view in ('grid', 'failures', 'pictures'):
        driver.execute_script('document.querySelector(`[value=${arguments[0]}]`).click()', view)
    assert driver.execute_script('return typeof hacked') == 'undefined'
    assert not _all(driver, '[onerror], img[src="x"], b')


def test_policy_forbids_what_slips_in(visit):
    """Even a page that had written a prompt as HTML would not run it."""
    driver = visit()
    refused = driver.execute_script('''
        try { document.body.innerHTML = '<img src=x onerror="hacked = 1">'; return false; }
        catch (error) { return error instanceof TypeError; }''')
    driver.get_log('browser')
    assert refused


def test_seed_is_exact(visit):
    driver = visit('#sort=seed&down=true&is:state=finished')
    assert '18446744073709551615' in _texts(driver, '#list li p:last-child')[0]
    _find(driver, '#list .open').click()
    names, cells = _texts(driver, '#all dt'), _texts(driver, '#all dd')
    assert cells[names.index('seed')] == '18446744073709551615'


def test_facets_ranges_and_sorting(visit):
    driver = visit()
    records = list(_plan(2000))

    def counted():
        return _texts(driver, '#count')[0]

    _find(driver, '#fields input[value=heun]').click()
    assert counted() == '500 of 2,000 pictures'
    _find(driver, '#fields input[value=lcm]').click()
    _find(driver, '#fields input[value=failed]').click()
    bad = [r for r in records if 'error' in r and r['request']['sampler'] in ('heun', 'lcm')]
    assert counted() == f'{len(bad)} of 2,000 pictures'
    # What the other values would give is known before they are chosen.
    labels = dict(zip(_texts(driver, '#fields label > span:first-of-type'),
                      _texts(driver, '#fields label > span:last-of-type')))
    assert labels['finished'] == str(1000 - len(bad))
    _find(driver, '#clear').click()
    assert counted() == '2,000 pictures'
    driver.execute_script('''
        const {details, inputs} = byName.get('seconds');
        details.open = true;
        inputs[0].value = '0.75';
        inputs[0].dispatchEvent(new Event('input', {bubbles: true}))''')
    slow = [r for r in records if r.get('seconds', 0) >= 0.75]
    assert counted() == f'{len(slow):,} of 2,000 pictures'
    from selenium.webdriver.support.ui import Select
    Select(_find(driver, '#sort')).select_by_visible_text('seconds')
    ordered = sorted(slow, key=lambda r: r['seconds'])
    first = 'return Number(document.querySelector("#list .open").dataset.record)'
    assert driver.execute_script(first) == ordered[0]['index']
    _find(driver, '#down').click()
    assert driver.execute_script(first) == min(
        r['index'] for r in slow if r['seconds'] == ordered[-1]['seconds'])


def test_every_field_filters_and_sorts(visit):
    """No field breaks the page, and each has a filter."""
    driver = visit()
    names = driver.execute_script('return varying.map(column => column.name)')
    assert {'prompt', 'seed', 'sampler', 'guidance', 'sampler_options.order', 'seconds', 'time',
            'id', 'error', 'state'} <= set(names)
    assert sorted(_texts(driver, '#fields summary')) == sorted(names)
    assert driver.execute_script('''
        for (const {name} of columns) {
          for (const down of [false, true]) Object.assign(state, {sort: name, down}), refresh();
          if (matches.length !== 2000) return name;
          const {text, ranks, at} = byName.get(name), present = matches.filter(
            r => byName.get(name).value(r) !== null);
          for (let i = 1; i < present.length; i++) {
            if (ranks[at[present[i - 1]]] < ranks[at[present[i]]]) return name;
          }
        }''') is None


def test_state_is_in_the_address(visit):
    driver = visit()
    _find(driver, '#search').send_keys('thing')
    _find(driver, '#fields input[value=heun]').click()
    _find(driver, '#down').click()
    driver.execute_script('''
        const size = document.getElementById('size');
        size.value = 96;
        size.dispatchEvent(new Event('input', {bubbles: true}));''')
    _find(driver, '#list .open').click()
    _wait(lambda: 'shown=' in driver.current_url)
    before = driver.current_url, _texts(driver, '#count'), _texts(driver, '#detail-title')
    driver.refresh()
    assert (driver.current_url, _texts(driver, '#count'), _texts(driver, '#detail-title')) == before
    assert _find(driver, '#search').get_property('value') == 'thing'
    assert _find(driver, '#down').is_selected()
    assert _find(driver, '#fields input[value=heun]').is_selected()
    assert _find(driver, '#detail').get_attribute('open')
    driver.execute_script('location.hash = "view=grid&search=apple"')
    _wait(lambda: _find(driver, '#axes').is_displayed())
    assert _texts(driver, '#count') == ['100 of 2,000 pictures']
    _wait(lambda: not _find(driver, '#detail').get_attribute('open'))
    driver.execute_script('location.hash = "sort=nothing&view=x&is:y=z&size=-&shown=q&from:seed=a"')
    _wait(lambda: _texts(driver, '#count') == ['2,000 pictures'])


def test_copies(visit, run):
    driver = visit(f'#shown={_identity(0)}')
    read = 'navigator.clipboard.readText().then(arguments[0])'
    _find(driver, '#copy-command').click()
    _wait(lambda: _texts(driver, '#said') == ['Copied the command'])
    assert shlex.split(driver.execute_async_script(read)) == [
        'python', '-m', 'launch.generate', f'--from={run.parent / _record(0)["file"]}']
    _find(driver, '#copy-seed').click()
    _wait(lambda: _texts(driver, '#said') == ['Copied the seed'])
    assert driver.execute_async_script(read) == str(2**64 - 1)
    assert _find(driver, '#file').get_property('href').endswith(_record(0)['file'])


def test_comparison_marks_what_differs(visit):
    driver = visit()
    driver.execute_script('document.querySelector("#list .open").focus()')
    _press(driver, 'c', 'ARROW_RIGHT')
    assert not _find(driver, '#side-by-side').is_enabled()
    _press(driver, 'c')
    _find(driver, '#side-by-side').click()
    assert len(_all(driver, '#sheet .zoom img')) == 2
    assert _texts(driver, '#sheet tbody th') == ['seed', 'sampler_options.order', 'seconds']
    assert _texts(driver, '#sheet mark')[:4] == [str(2**64 - 1), str(2**64 - 2), '1', '2']
    driver.execute_script('''
        const zoom = document.getElementById('zoom');
        zoom.value = 4;
        zoom.dispatchEvent(new Event('input'));
        document.querySelector('.zoom').scrollTo(100, 50);''')
    _wait(lambda: driver.execute_script('''
        const second = document.querySelectorAll('.zoom')[1];
        return second.scrollLeft === 100 && second.scrollTop === 50'''))
    _press(driver, 'ESCAPE')
    _wait(lambda: not _find(driver, '#compare').get_attribute('open'))
    boxes = _all(driver, '.pick input')
    for box in boxes[2:5]:
        box.click()
    assert [box.is_selected() for box in boxes[:5]] == [True] * 4 + [False]
    assert _texts(driver, '#picks')[0].startswith('4 at most')


@pytest.mark.parametrize('state', ['', '&columns=seed&rows=sampler', '&columns=prompt&rows=',
                                   '&search=apple&columns=sampler_options.order&rows=seed'])
def test_grid_has_the_right_pictures(visit, state):
    driver = visit(f'#view=grid{state}')
    chosen = driver.execute_script('''return Object.fromEntries([...document.querySelectorAll(
        '#choosers select')].map(node => [node.dataset.chooser, node.value]))''')
    head, *rows = driver.execute_script('''return [...document.querySelectorAll('#axes tr')].map(
        row => [...row.cells].map(cell => cell.tagName === 'TH' ? cell.textContent
          : [...cell.querySelectorAll('.open')].map(node => [node.dataset.record,
            node.querySelector('img')?.getAttribute('src') ?? null])))''')
    across, down = chosen.pop('Columns'), chosen.pop('Rows')
    if not state:
        assert (across, down, chosen['prompt']) == ('sampler', 'guidance', 'red apple')
        assert tuple(head[1:]) == SAMPLERS

    def told(record, field):
        request = record['request'] | {
            'sampler_options.order': record['request']['sampler_options']['order']}
        value = request.get(field)
        return json.dumps(value) if isinstance(value, list) else str(value)

    expected, found = {}, {}
    for record in _plan(2000):
        if ('apple' not in record['request']['prompt'] and 'apple' in state) or any(
                value != '*' and told(record, field) != value for field, value in chosen.items()):
            continue
        place = told(record, down) if down else '', told(record, across)
        expected.setdefault(place, []).append([str(record['index']), record.get('file')])
    for name, *cells in rows:
        found |= {(name, column): cell for column, cell in zip(head[1:], cells) if cell}
    assert found == expected
    driver.execute_script('document.querySelector("#axes .open").focus()')
    first = _focused(driver)
    _press(driver, 'ARROW_RIGHT', 'ENTER')
    assert _find(driver, '#detail').get_attribute('open')
    _press(driver, 'ESCAPE')
    _wait(lambda: _focused(driver) not in (first, -1))


def test_failures_say_why(visit):
    driver = visit('#view=failures')
    assert len(_all(driver, '#failures tbody tr')) == 20
    assert set(_texts(driver, '#failures tbody td:nth-child(2)')) == {'ValueError: <b>no</b>'}
    _find(driver, '#failures tbody button').click()
    assert _texts(driver, '#shown pre') == ['ValueError: <b>no</b>']
    assert not _find(driver, '#command').is_displayed()


def test_empty_run(visit, tmp_path):
    driver = visit('', gallery.write(_run(tmp_path, [])))
    assert 'No pictures yet' in _find(driver, '#empty').text
    for view in ('grid', 'pictures'):
        driver.execute_script('document.querySelector(`[value=${arguments[0]}]`).click()', view)
    _press(driver, '/', 'x')


STATES = ('', '#view=grid', '#view=failures', f'#shown={_identity(0)}',
          f'#pick={_identity(0)}&pick={_identity(6)}&comparing=true')


@pytest.mark.parametrize('state', STATES)
def test_everything_has_a_name(visit, state):
    driver = visit(state)
    _unfold(driver)
    tree = driver.execute_cdp_cmd('Accessibility.getFullAXTree', {})['nodes']
    roles = {'button', 'textbox', 'searchbox', 'checkbox', 'radio', 'slider', 'combobox', 'image',
             'link', 'dialog', 'region'}
    nodes = [node for node in tree if node.get('role', {}).get('value') in roles]
    assert len(nodes) > 5
    assert not [node for node in nodes if not node.get('name', {}).get('value', '').strip()]


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
    records = [_record(0), _record(1, width=300, height=200)]
    for record in records:
        size = [record['request'][name] for name in ('width', 'height')]
        image = np.zeros((*size[::-1], 3), np.uint8)
        files = {'file': picture.png(image), 'thumb': picture.thumbnail(image)}
        record |= {'width': size[0], 'height': size[1], 'thumb': record['file'] + '.webp'}
        for name, data in files.items():
            if data is None:
                del record[name]
                continue
            (tmp_path / record[name]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / record[name]).write_bytes(data)
    driver = visit('', gallery.write(_run(tmp_path, records, pictures=False)))
    sizes = '''return [...document.querySelectorAll(arguments[0])].map(image => [
        image.naturalWidth, getComputedStyle(image).imageRendering])'''
    expected = [[64, 'pixelated'], [256, 'auto']]
    _wait(lambda: driver.execute_script(sizes, '#list img') == expected)
    _all(driver, '#list .open')[1].click()
    _wait(lambda: driver.execute_script(sizes, '#shown img') == [[300, 'auto']])
