"""A run's gallery: what Python writes."""

import base64
import hashlib
import json
import os
import re

import pytest
from galleries import PROMPTS, failed, identity, make_record, make_run

from jaxsd.batch import gallery


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
    good = [make_record(index) for index in range(4)]
    make_run(tmp_path, [failed(good[0], 'early'), good[0], good[1], failed(good[1], 'late'),
                         failed(good[2], 'first'), failed(good[2], 'last')])
    make_run(tmp_path, [good[3]], manifest='manifest-1.jsonl', pictures=False)
    with open(tmp_path / 'manifest.jsonl', 'a') as file:
        file.write(json.dumps(make_record(5))[:-20])
    page = gallery.write(tmp_path)
    assert page == tmp_path / 'index.html'
    assert _cells(page, 'index') == [0, 1, 2, 3]
    assert _cells(page, 'state') == ['finished', 'finished', 'failed', 'finished']
    assert _cells(page, 'error') == [None, None, 'last', None]


def test_fields_are_flat_and_exact(tmp_path):
    requests = [{'seed': 2**64 - 1, 'guidance': [1.0, 2], 'sampler_options': {'a': {'b': True}}},
                {'seed': 2**53 + 1, 'guidance': 1, 'adapters': {}},
                {'seed': 0, 'guidance': float('inf'), 'sampler_options': {'a': {'b': 1}}}]
    page = gallery.write(make_run(tmp_path, [make_record(i, **r) for i, r in enumerate(requests)]))
    column, = (column for column in _data(page)['columns'] if column['name'] == 'seed')
    assert column == {'name': 'seed', 'big': True,
                      'values': ['18446744073709551615', '9007199254740993', '0']}
    assert _cells(page, 'guidance') == ['[1.0, 2]', 1, 'Infinity']
    assert _cells(page, 'sampler_options.a.b') == ['true', None, 1]
    assert _cells(page, 'adapters') == [None, '{}', None]
    assert _cells(page, 'width') == [64] * 3


def test_entry_without_a_request(tmp_path):
    """What could not be read has no place in the plan, and stands last."""
    page = gallery.write(make_run(tmp_path, [{'id': 'a.txt:3', 'error': 'no', 'request': {}},
                                             make_record(0)]))
    assert _cells(page, 'id') == [identity(0), 'a.txt:3']


def test_page_holds_no_foreign_code(tmp_path):
    """Nothing a prompt says ends the data, and the policy names what may run by its hash."""
    prompts = [*PROMPTS, 'half a \ud83d pair']
    where = make_run(tmp_path / '<b>&@data@', [make_record(i, p) for i, p in enumerate(prompts)])
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


@pytest.mark.parametrize('file', [
    '//host/a.png', '/etc/a.png', 'https://host/a.png', '\\\\host\\a.png', '../a.png',
    'javascript:hacked=1', 'pictures/../../a.png', 'pictures/00/other.png', 7, None])
@pytest.mark.parametrize('name', ['file', 'thumb'])
def test_links_lead_to_the_pictures_of_the_run(tmp_path, name, file):
    """Whatever a manifest from elsewhere says."""
    good, bad = make_record(0), make_record(1) | {name: file}
    make_run(tmp_path, [good])
    page = gallery.write(make_run(tmp_path, [bad], pictures=False))
    assert _cells(page, 'file') == [good['file']] and _cells(page, 'id') == [good['id']]


def test_a_key_that_leaves_the_folder(tmp_path):
    for key in ('../../x', '//host', 'a b', ''):
        record = make_record(1) | {'id': key, 'file': f'pictures/{key[:2]}/{key}.png'}
        page = gallery.write(make_run(tmp_path, [record], pictures=False))
        assert not _data(page)['count']


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    page = gallery.write(make_run(tmp_path, [make_record(0)]))
    before, names = page.read_bytes(), sorted(os.listdir(tmp_path))
    make_run(tmp_path, [make_record(1)])

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
