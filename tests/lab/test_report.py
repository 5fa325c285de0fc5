"""The grid, the CSV and the page of a sweep."""

import base64
import csv
import html.parser
import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from jaxsd.lab import report, sweep


def _results():
    return [{'sampler': sampler, 'schedule': schedule, 'guidance': guidance, 'steps': steps,
             'prompt': '<b>"x"</b>, y', 'seed': 0, 'calls': steps, 'error': error / steps,
             'seconds': 0.1 * steps, 'rank': rank}
            for sampler, error, rank in (('euler', 1.0, 0), ('lcm', np.nan, 2))
            for schedule in ('karras', 'a&b.json') for guidance in (1.0, 4.0)
            for steps in (5, 10, 20)]


GRID = np.full((20, 30, 3), (200, 30, 30), np.uint8)


@pytest.fixture(scope='module')
def page():
    lines = sweep.lines(_results(), 0.0, 0.1)
    return report.page(
        lines, GRID, 'the <grid>', title='T & t', summary='S', method=('M',), command='run "x"',
        versions='V', floor=1e-3, tolerance=0.1).decode()


def test_files_are_there_whole_or_not_at_all(tmp_path, monkeypatch):
    report.write(tmp_path / 'a', b'old')

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report.os, 'replace', fail)
    with pytest.raises(KeyboardInterrupt):
        report.write(tmp_path / 'a', b'new')
    assert [p.name for p in tmp_path.iterdir()] == ['a'] and (tmp_path / 'a').read_bytes() == b'old'


def test_csv_reads_back():
    rows = list(csv.DictReader(io.StringIO(report.table(_results()).decode())))
    assert len(rows) == 24 and rows[0]['prompt'] == '<b>"x"</b>, y'
    assert float(rows[0]['error']) == 0.2 and rows[-1]['error'] == ''


def test_grid_puts_pictures_under_their_labels():
    colours = {'5': (255, 0, 0), '10': (0, 0, 255)}
    images = {('t', schedule, sampler, column): np.full((8, 8, 3), colour, np.uint8)
              for schedule in 'kn' for sampler in ('euler', 'heun')
              for column, colour in colours.items()}
    del images['t', 'n', 'heun', '5']
    sheet = report.grid(images, 16)
    red, blue = ((sheet == colour).all(-1) for colour in colours.values())
    assert (red.sum(), blue.sum()) == (3 * 16 * 16, 4 * 16 * 16)
    assert red.any(0).argmax() + 16 == blue.any(0).argmax()  # 5 left of 10
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(report.encode(sheet)))), sheet)


class _Tags(html.parser.HTMLParser):
    """The elements of a page, and whether they nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ('meta', 'img', 'br'):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def test_page_is_sound_and_needs_no_network(page):
    tags = _Tags(page)
    assert not tags.open
    fetched = [value for _, attrs in tags.seen for name, value in attrs.items()
               if name in ('src', 'href', 'xlink:href')]
    assert all(value.startswith(('data:', '#')) for value in fetched)
    assert not re.search(r'@import|url\((?!#)', page)
    ids = [attrs['id'] for _, attrs in tags.seen if 'id' in attrs]
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in fetched if value[0] == '#'} <= set(ids)
    inside = base64.b64decode(re.search('data:image/webp;base64,([^"]+)', page)[1])
    with Image.open(io.BytesIO(inside)) as picture:
        assert abs(np.asarray(picture.convert('RGB')).astype(int) - GRID).max() < 8


def test_page_can_be_read_aloud_and_in_the_dark(page):
    tags = _Tags(page)
    assert all(attrs.get('alt') for tag, attrs in tags.seen if tag == 'img')
    drawings = re.findall(r'<svg.*?</svg>', page, re.S)
    assert len(drawings) == 2 * 4  # for each guidance: fewest calls, errors, retrieval, time
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.get('role') == 'img' and root.get('aria-label')
        assert 'currentColor' in drawing and report.INK not in drawing
        assert '<text' in drawing  # not outlines
    assert 'color-scheme: light dark' in page


def test_table_holds_every_line_and_escapes(page):
    body = page[page.index('<tbody>'):page.index('</tbody>')]
    assert body.count('<tr>') == 8 and 'a&amp;b.json' in body
    first = re.search(r'<tr>.*?</tr>', body, re.S)[0]
    assert re.findall(r'data-value="([^"]*)"', first)[:8] == [
        'euler', 'karras', '1', '1', '10', '0.2', '0.1', '0.05']
    assert page.count('<button') == body.split('</tr>')[0].count('data-value')
    assert '<h1>T &amp; t</h1>' in page and 'the &lt;grid&gt;' in page
