"""A run's gallery in a browser: walked through, filtered, compared, copied from."""

import json
import shlex

import pytest
from browser import find, find_all, focused, press, texts, unfold, wait
from galleries import HOSTILE, SAMPLERS, identity, make_record, make_run, planned

from jaxsd.batch import gallery


def test_scrolls_to_the_end_with_few_nodes(visit):
    driver = visit()
    for part in (0.5, 1):
        driver.execute_script('scrollTo(0, arguments[0] * document.body.scrollHeight)', part)
        wait(lambda part=part: driver.execute_script(
            'const n = document.querySelectorAll("#list li"); '
            'return Number(n[n.length - 1].ariaPosInSet) >= arguments[0]', 2000 * part))
        assert len(find_all(driver, '#list li')) < 100
    wait(lambda: driver.execute_script('''
        const shown = [...document.querySelectorAll('#list img')].filter(
          image => image.getBoundingClientRect().top < innerHeight);
        return shown.length > 10 && shown.every(image => image.naturalWidth === 64)'''))
    last = find_all(driver, '#list li')[-1]
    assert last.get_attribute('aria-posinset') == last.get_attribute('aria-setsize') == '2000'
    assert 0 <= last.rect['y'] - driver.execute_script('return scrollY') < 900


def test_keyboard_walks_and_opens(visit):
    driver = visit()
    across = driver.execute_script('return across')
    driver.execute_script('document.querySelector("#list .open").focus()')
    press(driver, 'ARROW_RIGHT', 'ARROW_DOWN', 'ARROW_LEFT')
    assert focused(driver) == across
    press(driver, 'END')
    assert focused(driver) == 1999
    press(driver, 'ARROW_RIGHT', 'PAGE_UP', 'HOME', 'ARROW_UP', 'ARROW_LEFT')
    assert focused(driver) == 0
    press(driver, 'ENTER')
    assert find(driver, '#detail').get_attribute('open')
    assert texts(driver, '#detail-title') == ['Picture #0, 1 of 2,000']
    press(driver, 'ARROW_RIGHT', 'ARROW_RIGHT', 'ARROW_LEFT', 'ARROW_RIGHT')
    assert texts(driver, '#detail-title') == ['Picture #2, 3 of 2,000']
    press(driver, 'ESCAPE')
    wait(lambda: not find(driver, '#detail').get_attribute('open'))
    wait(lambda: focused(driver) == 2)
    press(driver, '/')
    assert driver.switch_to.active_element.get_attribute('id') == 'search'
    press(driver, 'a/b')
    assert find(driver, '#search').get_property('value') == 'a/b'


def test_tab_reaches_and_leaves_everything(visit):
    """One stop for all pictures, and no trap."""
    driver = visit()
    driver.execute_script('document.getElementById("search").focus()')
    stops = []
    for _ in range(100):
        press(driver, 'TAB')
        stops.append(driver.execute_script(
            'const n = document.activeElement; return n.id || n.className || n.tagName'))
        if stops[-1] in ('BODY', 'search'):
            break
    assert stops[-1] in ('BODY', 'search'), stops
    assert stops.count('open') == 1 and {'sort', 'down', 'size', 'clear'} <= set(stops)


def test_focus_survives_scrolling(visit):
    driver = visit()
    driver.execute_script('document.querySelector("#list .open").focus(); scrollTo(0, 20000)')
    wait(lambda: driver.execute_script(
        'return document.querySelectorAll("#list li")[1].ariaPosInSet > 50'))
    assert focused(driver) == 0


def test_hostile_prompt_is_text(visit):
    driver = visit(f'#shown={identity(100)}')
    shown = texts(driver, '#detail dd')
    assert HOSTILE.replace('\x00', '') in [text.replace('\x00', '') for text in shown]
    press(driver, 'ESCAPE')
    unfold(driver)
    for view in ('grid', 'failures', 'pictures'):
        driver.execute_script('document.querySelector(`[value=${arguments[0]}]`).click()', view)
    assert driver.execute_script('return typeof hacked') == 'undefined'
    assert not find_all(driver, '[onerror], img[src="x"], b')


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
    assert '18446744073709551615' in texts(driver, '#list li p:last-child')[0]
    find(driver, '#list .open').click()
    names, cells = texts(driver, '#all dt'), texts(driver, '#all dd')
    assert cells[names.index('seed')] == '18446744073709551615'


def test_facets_ranges_and_sorting(visit):
    driver = visit()
    records = list(planned(2000))

    def counted():
        return texts(driver, '#count')[0]

    find(driver, '#fields input[value=heun]').click()
    assert counted() == '500 of 2,000 pictures'
    find(driver, '#fields input[value=lcm]').click()
    find(driver, '#fields input[value=failed]').click()
    bad = [r for r in records if 'error' in r and r['request']['sampler'] in ('heun', 'lcm')]
    assert counted() == f'{len(bad)} of 2,000 pictures'
    # What the other values would give is known before they are chosen.
    labels = dict(zip(texts(driver, '#fields label > span:first-of-type'),
                      texts(driver, '#fields label > span:last-of-type')))
    assert labels['finished'] == str(1000 - len(bad))
    find(driver, '#clear').click()
    assert counted() == '2,000 pictures'
    driver.execute_script('''
        const {details, inputs} = byName.get('seconds');
        details.open = true;
        inputs[0].value = '0.75';
        inputs[0].dispatchEvent(new Event('input', {bubbles: true}))''')
    slow = [r for r in records if r.get('seconds', 0) >= 0.75]
    assert counted() == f'{len(slow):,} of 2,000 pictures'
    from selenium.webdriver.support.ui import Select
    Select(find(driver, '#sort')).select_by_visible_text('seconds')
    ordered = sorted(slow, key=lambda r: r['seconds'])
    first = 'return Number(document.querySelector("#list .open").dataset.record)'
    assert driver.execute_script(first) == ordered[0]['index']
    find(driver, '#down').click()
    assert driver.execute_script(first) == min(
        r['index'] for r in slow if r['seconds'] == ordered[-1]['seconds'])


def test_every_field_filters_and_sorts(visit):
    """No field breaks the page, and each has a filter."""
    driver = visit()
    names = driver.execute_script('return varying.map(column => column.name)')
    assert {'prompt', 'seed', 'sampler', 'guidance', 'sampler_options.order', 'seconds', 'time',
            'id', 'error', 'state'} <= set(names)
    assert sorted(texts(driver, '#fields summary')) == sorted(names)
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
    find(driver, '#search').send_keys('thing')
    find(driver, '#fields input[value=heun]').click()
    find(driver, '#down').click()
    driver.execute_script('''
        const size = document.getElementById('size');
        size.value = 96;
        size.dispatchEvent(new Event('input', {bubbles: true}));''')
    find(driver, '#list .open').click()
    wait(lambda: 'shown=' in driver.current_url)
    before = driver.current_url, texts(driver, '#count'), texts(driver, '#detail-title')
    driver.refresh()
    assert (driver.current_url, texts(driver, '#count'), texts(driver, '#detail-title')) == before
    assert find(driver, '#search').get_property('value') == 'thing'
    assert find(driver, '#down').is_selected()
    assert find(driver, '#fields input[value=heun]').is_selected()
    assert find(driver, '#detail').get_attribute('open')
    driver.execute_script('location.hash = "view=grid&search=apple"')
    wait(lambda: find(driver, '#axes').is_displayed())
    assert texts(driver, '#count') == ['100 of 2,000 pictures']
    wait(lambda: not find(driver, '#detail').get_attribute('open'))
    driver.execute_script('location.hash = "sort=nothing&view=x&is:y=z&size=-&shown=q&from:seed=a"')
    wait(lambda: texts(driver, '#count') == ['2,000 pictures'])


def test_copies(visit, big_gallery):
    driver = visit(f'#shown={identity(0)}')
    read = 'navigator.clipboard.readText().then(arguments[0])'
    find(driver, '#copy-command').click()
    wait(lambda: texts(driver, '#said') == ['Copied the command'])
    assert shlex.split(driver.execute_async_script(read)) == [
        'python', '-m', 'launch.generate', f'--from={big_gallery.parent / make_record(0)["file"]}']
    find(driver, '#copy-seed').click()
    wait(lambda: texts(driver, '#said') == ['Copied the seed'])
    assert driver.execute_async_script(read) == str(2**64 - 1)
    assert find(driver, '#file').get_property('href').endswith(make_record(0)['file'])


def test_comparison_marks_what_differs(visit):
    driver = visit()
    driver.execute_script('document.querySelector("#list .open").focus()')
    press(driver, 'c', 'ARROW_RIGHT')
    assert not find(driver, '#side-by-side').is_enabled()
    press(driver, 'c')
    find(driver, '#side-by-side').click()
    assert len(find_all(driver, '#sheet .zoom img')) == 2
    assert texts(driver, '#sheet tbody th') == ['seed', 'sampler_options.order', 'seconds']
    assert texts(driver, '#sheet mark')[:4] == [str(2**64 - 1), str(2**64 - 2), '1', '2']
    driver.execute_script('''
        const zoom = document.getElementById('zoom');
        zoom.value = 4;
        zoom.dispatchEvent(new Event('input'));
        document.querySelector('.zoom').scrollTo(100, 50);''')
    wait(lambda: driver.execute_script('''
        const second = document.querySelectorAll('.zoom')[1];
        return second.scrollLeft === 100 && second.scrollTop === 50'''))
    press(driver, 'ESCAPE')
    wait(lambda: not find(driver, '#compare').get_attribute('open'))
    boxes = find_all(driver, '.pick input')
    for box in boxes[2:5]:
        box.click()
    assert [box.is_selected() for box in boxes[:5]] == [True] * 4 + [False]
    assert texts(driver, '#picks')[0].startswith('4 at most')


@pytest.mark.slow
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
    for record in planned(2000):
        if ('apple' not in record['request']['prompt'] and 'apple' in state) or any(
                value != '*' and told(record, field) != value for field, value in chosen.items()):
            continue
        place = told(record, down) if down else '', told(record, across)
        expected.setdefault(place, []).append([str(record['index']), record.get('file')])
    for name, *cells in rows:
        found |= {(name, column): cell for column, cell in zip(head[1:], cells) if cell}
    assert found == expected
    driver.execute_script('document.querySelector("#axes .open").focus()')
    first = focused(driver)
    press(driver, 'ARROW_RIGHT', 'ENTER')
    assert find(driver, '#detail').get_attribute('open')
    press(driver, 'ESCAPE')
    wait(lambda: focused(driver) not in (first, -1))


def test_failures_say_why(visit):
    driver = visit('#view=failures')
    assert len(find_all(driver, '#failures tbody tr')) == 20
    assert set(texts(driver, '#failures tbody td:nth-child(2)')) == {'ValueError: <b>no</b>'}
    find(driver, '#failures tbody button').click()
    assert texts(driver, '#shown pre') == ['ValueError: <b>no</b>']
    assert not find(driver, '#command').is_displayed()


def test_empty_run(visit, tmp_path):
    driver = visit('', gallery.write(make_run(tmp_path, [])))
    assert 'No pictures yet' in find(driver, '#empty').text
    for view in ('grid', 'pictures'):
        driver.execute_script('document.querySelector(`[value=${arguments[0]}]`).click()', view)
    press(driver, '/', 'x')
