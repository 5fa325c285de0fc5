"""Files of requests, grids and seeds; and what is said of those that cannot be read."""

import contextlib
import csv
import io
import json

import pytest
from conftest import at_most
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsd.batch import plan


def _read(tmp_path, name, text, **defaults):
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return plan.read(file, defaults)


def test_jsonl(tmp_path):
    items, bad = _read(tmp_path, 'a.jsonl', '\ufeff' + '\n'.join([
        '{"prompt": "ein Öl-Bild", "steps": 7, "guidance": [1, 2, 3, 4, 5, 6, 7]}', '',
        '{"prompt": "b", "image": "x/y.png", "strength": 0.5, "outpaint": null}\r',
        '{"seed": 18446744073709551615, "guidance_options": {"rescale": 0.7}}']), steps=9)
    assert not bad
    assert [item.source for item in items] == ['a.jsonl:1', 'a.jsonl:3', 'a.jsonl:4']
    first, second, third = (item.fields for item in items)
    assert first == {'prompt': 'ein Öl-Bild', 'steps': 7, 'guidance': (1, 2, 3, 4, 5, 6, 7)}
    assert second['image'] == str(tmp_path / 'x/y.png') and second['steps'] == 9
    assert plan.expand([items[2]], [1], {})[0].seed == 2**64 - 1


def test_controls_are_objects(tmp_path):
    items, bad = _read(tmp_path, 'a.jsonl', json.dumps(
        {'controls': [{'net': 'nets/edges', 'image': 'edges.png', 'scale': 0.5,
                       'mode': 'canny'}]}) + '\n'
        + '{"controls": [{"net": "a", "image": "b", "sale": 1}]}')
    control, = items[0].fields['controls']
    assert (control.net, control.image, control.scale, control.mode) == (
        'nets/edges', str(tmp_path / 'edges.png'), 0.5, 'canny')
    assert bad[0].source == 'a.jsonl:2:2' and "did you mean 'scale'" in bad[0].error


def test_image_prompts_are_objects(tmp_path):
    items, bad = _read(tmp_path, 'a.jsonl', '\n'.join(map(json.dumps, [
        {'image_prompts': [{'net': 'plus', 'image': ['a.png', 'b.png'], 'weight': 0.5},
                           {'net': 'face', 'embeds': 'face.npy', 'mask': 'm.png'}]},
        {'image_prompts': [{'net': 'plus', 'image': 'a.png', 'wieght': 1}]},
        {'image_prompts': [{'net': 'plus', 'image': 3}]}, {'image_prompts': [3]},
        {'image_prompts': [{'net': 'plus'}]}])))
    plus, face = items[0].fields['image_prompts']
    assert (plus.net, plus.weight, face.net, face.image) == ('plus', 0.5, 'face', None)
    assert plus.image == (str(tmp_path / 'a.png'), str(tmp_path / 'b.png'))
    assert (face.embeds, face.mask) == (str(tmp_path / 'face.npy'), str(tmp_path / 'm.png'))
    assert [one.source.split(':')[1] for one in bad] == ['2', '3', '4', '5']
    for one, words in zip(bad, ("did you mean 'weight'", '3: expected a path',
                                'expected objects with net and image', 'expected image= or')):
        assert words in one.error


def test_a_reference_is_an_object(tmp_path):
    items, bad = _read(tmp_path, 'a.jsonl', '\n'.join(map(json.dumps, [
        {'reference': {'image': 'a.png', 'weight': 0.5}}, {'reference': None},
        {'reference': {'image': 'a.png', 'wieght': 1}}, {'reference': 'a.png'},
        {'reference': {'weight': 1}}])))
    one = items[0].fields['reference']
    assert (one.image, one.weight, one.fidelity) == (str(tmp_path / 'a.png'), 0.5, 0.5)
    assert items[1].fields['reference'] is None
    assert [one.source.split(':')[1] for one in bad] == ['3', '4', '5']
    assert "did you mean 'weight'" in bad[0].error
    assert all('expected an object with image' in one.error for one in bad[1:])


@pytest.mark.parametrize('line, column, words', [
    ('{"prompt": "a",}', 16, 'property name'),
    ('{"prompt": "a" "steps": 3}', 16, "','"),
    ('[1, 2]', 1, 'expected an object'),
    ('{"prompt": "a", "stesp": 3}', 17, "did you mean 'steps'"),
    ('{"prompt": "a", "steps": 0}', 17, 'steps=0'),
    ('{"prompt": 3}', 2, 'prompt=3'),
    ('{"steps": 3, "steps": 4}', 2, 'twice'),
    ('{"prompt": "a", "eta": NaN}', 24, 'NaN'),
    ('{"prompt": "a", "sampler": "eular"}', 17, "did you mean 'euler'"),
    ('[' * 100000, 1, 'recursion'),
    ('{"seed": ' + '9' * 5000 + '}', 1, 'digit'),
    (b'{"prompt": "\xff"}', 13, 'UTF-8'),
])
def test_broken_lines_name_line_and_column(tmp_path, line, column, words):
    line = line if isinstance(line, bytes) else line.encode()
    items, (bad,) = _read(tmp_path, 'a.jsonl', b'{"prompt": "good"}\n' + line + b'\n{}\n')
    assert len(items) == 2
    assert bad.source == f'a.jsonl:2:{column}' and words in bad.error


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=60).map(lambda b: b.replace(b'\n', b'')), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(
        ['prompt', 'steps', 'controls', 'image', 'guidance', 'adapters', 'seed', 'x', 'net',
         'image_prompts', 'reference']), x),
    max_leaves=6).map(lambda v: json.dumps(v).encode())), max_size=4))
def test_whatever_stands_in_a_file_is_an_item_or_bad(lines):
    text = b'\n'.join(lines).decode(errors='surrogateescape')
    for _, parse in plan.READERS['.jsonl'](text):
        try:
            fields = plan._checked(*parse(), {}, '.')
        except plan._Problem as problem:
            assert str(problem) and problem.column >= 1
        else:
            assert isinstance(fields, dict)



def test_csv(tmp_path):
    items, bad = _read(tmp_path, 'a.csv', (
        'prompt,steps,sampler,guidance,adapters,outpaint\r\n'
        '"a, ""quoted""\r\nprompt",7,heun,"(1, 2, 3, 4, 5, 6, 7)","{""x"": 0.5}",\r\n'
        '12,,,4.5,,\r\n'
        'c,many,euler,,,\r\n'
        'd,1,2,3,4,5,6\r\n'))
    assert items[0].fields == {'prompt': 'a, "quoted"\r\nprompt', 'steps': 7, 'sampler': 'heun',
                               'guidance': (1, 2, 3, 4, 5, 6, 7), 'adapters': {'x': 0.5}}
    assert items[1].fields == {'prompt': '12', 'guidance': 4.5}
    assert [b.source for b in bad] == ['a.csv:5:2', 'a.csv:6:7']


def test_csv_of_another_encoding_or_with_a_field_twice(tmp_path):
    text = 'prompt,steps\ncaf\u00e9,7\ntea,8\n'
    (item, _), bad = _read(tmp_path, 'a.csv', '\ufeff' + text)
    assert item.fields == {'prompt': 'caf\u00e9', 'steps': 7} and not bad
    (item,), (bad,) = _read(tmp_path, 'b.csv', text.encode('latin-1'))
    assert item.fields['prompt'] == 'tea' and bad.source == 'b.csv:2:1'
    assert 'is no UTF-8' in bad.error
    items, (bad,) = _read(tmp_path, 'a.csv', text.replace('steps', '\u00e9').encode('latin-1'))
    assert not items and bad.source == 'a.csv:1:2'
    items, (bad,) = _read(tmp_path, 'a.csv', 'prompt,steps,prompt\na,7,b\n')
    assert not items and bad == ('a.csv:1:3', "'prompt' stands there twice")


EXCEL = [['prompt', 'steps', 'guidance', 'crop'],
         ['caf\u00e9; "au lait", \u6f22', '7', '4.5', ''],
         ['a\tb', '12', '', '(8, 0)']]


def _table(delimiter, head=''):
    """As Python's csv module, and Excel with a European locale, write EXCEL."""
    text = io.StringIO(newline='')
    csv.writer(text, delimiter=delimiter).writerows(EXCEL)
    return head + text.getvalue()


@pytest.mark.parametrize('delimiter, head', [
    (',', ''), (';', ''), ('\t', ''), (';', 'sep=;\r\n'), (',', 'sep=,\r\n'), (';', '\r\n')])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-be'])
def test_csv_as_spreadsheets_write_it(tmp_path, delimiter, head, encoding):
    text = _table(delimiter, head)
    mark = '\ufeff' if encoding == 'utf-16-be' else ''
    items, bad = _read(tmp_path, 'a.csv', (mark + text).encode(encoding))
    assert not bad and [item.fields for item in items] == [
        {'prompt': EXCEL[1][0], 'steps': 7, 'guidance': 4.5},
        {'prompt': 'a\tb', 'steps': 12, 'crop': (8, 0)}]
    assert items[0].source == f'a.csv:{2 + bool(head)}'


def test_csv_with_decimal_commas_or_an_unknown_field(tmp_path):
    (item,), (bad,) = _read(tmp_path, 'a.csv', 'prompt;guidance\na;7,5\nb;7.5\n')
    assert item.fields == {'prompt': 'b', 'guidance': 7.5}
    assert bad == ('a.csv:2:2', "guidance: '7,5': expected one value: a number as 7.5, a list as "
                   '(7, 5)')
    items, (bad,) = _read(tmp_path, 'a.csv', 'prompt;stesp\na;7\n')
    assert not items and bad.source == 'a.csv:2:2' and "did you mean 'steps'" in bad.error
    (bad,) = _read(tmp_path, 'a.csv', 'steps\n' + '-' * 10**5 + '1')[1]
    assert bad.source == 'a.csv:2:1'


def test_other_encodings_of_utf16(tmp_path):
    for name in ('a.jsonl', 'a.txt'):
        text = '{"prompt": "\u6f22"}' if name == 'a.jsonl' else '\u6f22\r\n'
        (item,), bad = _read(tmp_path, name, text.encode('utf-16'))
        assert item.fields == {'prompt': '\u6f22'} and not bad
    with pytest.raises(ValueError, match=r'a\.csv: its byte order mark.*save it as UTF-8'):
        _read(tmp_path, 'a.csv', 'prompt\na'.encode('utf-16')[:-1])
    for encoding in ('utf-16-le', 'utf-16-be', 'utf-32'):
        with pytest.raises(ValueError, match=r'a\.csv begins with zero bytes.*save it as UTF-8'):
            _read(tmp_path, 'a.csv', 'prompt\na'.encode(encoding))


def test_text_is_prompts(tmp_path):
    items, bad = _read(tmp_path, 'a.txt', ' red apple \n\n{not json}\n# no comment')
    assert [item.fields['prompt'] for item in items] == ['red apple', '{not json}', '# no comment']
    assert not bad


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r'a\.yaml: expected a file that ends in \.jsonl'):
        _read(tmp_path, 'a.yaml', '')


def test_grids_and_seeds_multiply():
    axes = plan.grid(['sampler=euler, dpmpp_2m', 'guidance=4,7.5', 'schedule=karras,a/b.json'])
    assert axes == {'sampler': ['euler', 'dpmpp_2m'], 'guidance': [4, 7.5],
                    'schedule': ['karras', 'a/b.json']}
    axes.pop('schedule')
    items = [plan.Item({'prompt': 'a'}, 'x:1'), plan.Item({'prompt': 'b', 'seed': 5}, 'x:2')]
    found = plan.expand(items, plan.seeds('0-1,7'), axes)
    assert len(found) == 4 * 3 + 4
    assert [(r.sampler, r.guidance, r.seed) for r in found[:4]] == [
        ('euler', 4, 0), ('euler', 4, 1), ('euler', 4, 7), ('euler', 7.5, 0)]
    assert {r.seed for r in found[12:]} == {5}


@pytest.mark.parametrize('texts, words', [
    (['steps'], 'expected a field and its values'), (['steps='], 'expected a field'),
    (['stesp=3'], "did you mean 'steps'"), (['seed=1,2'], '--seeds=1,2'),
    (['steps=1', 'steps=2'], 'already')])
def test_bad_grids(texts, words):
    with pytest.raises(ValueError, match=words):
        plan.grid(texts)


def test_a_bad_point_of_a_grid_is_named():
    with pytest.raises(ValueError, match=r"x:1: at steps=0, sampler='euler': steps=0: expected"):
        plan.expand([plan.Item({'prompt': 'a'}, 'x:1')], [0],
                    plan.grid(['steps=0', 'sampler=euler']))


@pytest.mark.parametrize('text, count', [
    ('0-99999999999', 10**11), ('0-18446744073709551615', 2**64), ('0-999999,7', 10**6 + 1)])
def test_more_seeds_than_memory_holds(text, count):
    with pytest.raises(ValueError, match=f'{text}: {count} seeds, expected at most 1000000'):
        plan.seeds(text)


def test_more_pictures_than_memory_holds():
    """Each factor is small; requests with a seed of their own are not multiplied by seeds."""
    items = [plan.Item({'prompt': 'a'}, 'x:1'), plan.Item({'prompt': 'b', 'seed': 5}, 'x:2')]
    axes = {'steps': list(range(1, 1001)), 'guidance': list(range(1, 101))}
    with pytest.raises(ValueError, match='2 requests times 100000 points of the grid times 10 '
                       'seeds: 1100000 pictures, expected at most 1000000'):
        plan.expand(items, plan.seeds('0-9'), axes)


@pytest.mark.slow
@pytest.mark.parametrize('piece', ['a', ' ', '(', '[', '{', '"', ',', ';', '\t', 'a,', '()', '-',
                                   '1', '1,', '"a":1,', '{"a":', '[1],', 'a='])
def test_a_megabyte_of_anything_is_read_in_linear_time(piece):
    text = (piece * 10**6)[:10**6]
    with at_most(20):  # measured: 2 at most
        for head in ('', 'prompt,steps\n', 'prompt\n"', '{', '{"prompt": "'):
            for reader in set(plan.READERS.values()):
                for _, parse in reader(f'{head}{text}'):
                    with contextlib.suppress(ValueError):
                        parse()
        for reader in (plan.seeds, lambda text: plan.grid([f'steps={text}'])):
            with contextlib.suppress(ValueError):
                reader(text[:plan.LONGEST - 10])
            with pytest.raises(ValueError, match='characters, expected at most'):
                reader(text)


@pytest.mark.parametrize('text', ['', 'a', '3-1', '-1', '1,,2', str(2**64)])
def test_bad_seeds(text):
    with pytest.raises(ValueError, match='expected whole numbers from 0'):
        plan.seeds(text)
