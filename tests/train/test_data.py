"""Data sets as people have them, and the batches that come of them."""

import collections
import dataclasses
import io
import json
import os
import random
import tarfile
import time

import grain
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image

from jaxsd.train import buckets, data
from jaxsd.train.data_config import DataConfig, data_config
from jaxsd.train.examples import Example, read_sets
from jaxsd.train.layouts import Source, expand_shards

SMALL = dict(resolution=64, bucket_step=16)


def noise(seed, width=48, height=32, channels=3):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), np.uint8).squeeze()


def encoded(picture, format='PNG', **how):
    file = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(file, format, **how)
    return file.getvalue()


def folder_of(path, count, caption='{}', **size):
    path.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (path / f'{i:03}.png').write_bytes(encoded(noise(i, **size)))
        (path / f'{i:03}.txt').write_text(caption.format(i))
    return path


def config_of(*sets, **fields):
    return data_config({'sets': [str(s) if not isinstance(s, dict) else s for s in sets],
                        **SMALL, **fields})


def names(captions):
    """A 'tokenizer' that numbers captions which are numbers."""
    return {'tokens': {'text_encoder': np.array([int(c) if c.isdigit() else -1 for c in captions])}}


# ---- a thousand odd files

RED = np.full((30, 50, 3), (200, 30, 40), np.uint8)


def rotated():
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by a quarter: it is seen 30 wide and 50 high
    return encoded(RED, 'JPEG', exif=exif, quality=95)


def odd_kinds():
    """{kind: (extension, bytes, whether it is good)}, pictures 50 wide and 30 high."""
    red, gray = Image.fromarray(RED), Image.fromarray(RED[..., 0])
    jpeg, png = encoded(noise(1, 50, 30), 'JPEG'), encoded(noise(1, 50, 30))
    deep = Image.fromarray(np.full((30, 50), 200 * 257, np.uint16))
    glass = red.convert('RGBA')
    glass.putalpha(128)
    frames = [Image.new('P', (50, 30), i) for i in range(3)]
    return {
        'plain': ('.jpg', encoded(red, 'JPEG', quality=95), True),
        'capital': ('.JPG', encoded(red, 'JPEG', quality=95), True),
        'cmyk': ('.jpg', encoded(red.convert('CMYK'), 'JPEG', quality=95), True),
        '16bit': ('.png', encoded(deep), True),
        '16bit_tiff': ('.tif', encoded(deep, 'TIFF'), True),
        'palette': ('.png', encoded(red.convert('P', palette=Image.Palette.ADAPTIVE)), True),
        'palette_alpha': ('.png', encoded(glass.quantize(8)), True),
        'gray': ('.png', encoded(gray), True),
        'bits': ('.png', encoded(gray.convert('1')), True),
        'gray_alpha': ('.png', encoded(glass.convert('LA')), True),
        'alpha': ('.webp', encoded(glass, 'WEBP', lossless=True), True),
        'bmp': ('.bmp', encoded(red, 'BMP'), True),
        'animated': ('.gif', encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:]),
                     True),
        'rotated': ('.jpg', rotated(), True),
        'cut_jpeg': ('.jpg', jpeg[:len(jpeg) // 2], False),
        'cut_png': ('.png', png[:len(png) // 2], False),
        'text': ('.png', b'a text file called .png\n', False),
        'nothing': ('.png', b'', False),
        'page': ('.jpg', b'<!DOCTYPE html><html>404</html>', False),
        'long': ('.png', encoded(noise(1, 50, 30)) + b'what another program wrote behind it', True),
    }


@pytest.fixture(scope='module')
def odd(tmp_path_factory):
    """(folder, names of the good files, of the bad ones): 1,000 files of 20 kinds."""
    folder, good, bad = tmp_path_factory.mktemp('odd'), [], []
    for i in range(50):
        for kind, (extension, content, fine) in odd_kinds().items():
            file = folder / f'{kind}_{i:02}{extension}'
            # Of a JPEG or PNG, what stands behind the picture is no part of it: all bytes differ.
            file.write_bytes(content + f'{i}'.encode() if fine and i else content)
            caption = f'a {kind} picture'.encode()
            if kind == 'plain' and i < 7:
                caption = b''
            elif kind == 'plain' and i < 10:
                caption = 'ein Bär in Köln'.encode('latin-1')
            elif kind == 'plain' and i < 12:
                caption = b'\xef\xbb\xbf' + 'ein Bär in Köln'.encode()
            file.with_suffix('.txt').write_bytes(caption)
            (good if fine else bad).append(str(file))
    return folder, good, bad


def test_a_thousand_odd_files(odd, tmp_path):
    folder, good, bad = odd
    assert len(good) + len(bad) == 1000
    sets = read_sets(config_of(folder, cache=str(tmp_path)))
    assert sorted(e.source.path for e in sets.examples) == sorted(good)
    assert len(sets.problems) == len(bad) == 250
    for path in bad:
        assert sum(path in problem for problem in sets.problems) == 1
    assert not any('\n' in problem for problem in sets.problems)
    latin = [note for note in sets.notes if 'Latin-1' in note]
    assert len(latin) == 3
    assert {f'plain_{i:02}.txt' for i in (7, 8, 9)} == {
        os.path.basename(n.split(':')[0]) for n in latin}
    assert 'captions that are empty: 7' in sets.notes
    captions = {os.path.basename(e.source.path): e.captions for e in sets.examples}
    assert {captions[f'plain_{i:02}.jpg'] for i in range(7, 12)} == {('ein Bär in Köln',)}
    sizes = {e.source.path: (e.width, e.height) for e in sets.examples}
    assert {s for p, s in sizes.items() if 'rotated' in p} == {(30, 50)}
    assert {s for p, s in sizes.items() if 'rotated' not in p} == {(50, 30)}


def test_every_good_file_is_trained_on_in_an_epoch(odd, tmp_path):
    folder, good, _ = odd
    config = config_of(folder, cache=str(tmp_path))
    examples = [dataclasses.replace(e, captions=(str(i),))
                for i, e in enumerate(read_sets(config).examples)]
    plan = data.Buckets(examples, config, 10).plan
    loader, seen = data.batches(examples, config, 10, tokenize=names), collections.Counter()
    colours = {}
    for _ in range(plan.steps(1)):
        batch = next(loader)
        tokens = batch['tokens']['text_encoder']
        seen.update(tokens.tolist())
        for i, image in zip(tokens, batch['image']):
            colours[os.path.basename(examples[i].source.path)] = image.mean((0, 1))
    loader.close()
    assert set(seen) == set(range(len(good))) and max(seen.values()) == 1
    for kind in ('plain_20.jpg', 'capital_20.JPG', 'cmyk_20.jpg', 'palette_20.png', 'bmp_20.bmp',
                 'rotated_20.jpg'):
        np.testing.assert_allclose(colours[kind], RED[0, 0], atol=3, err_msg=kind)
    for kind in '16bit_20.png', '16bit_tiff_20.tif', 'gray_20.png':
        np.testing.assert_allclose(colours[kind], 200, atol=1, err_msg=kind)
    over_white = RED[0, 0] * (128 / 255) + 127
    np.testing.assert_allclose(colours['alpha_20.webp'], over_white, atol=3)


def test_strict_stops_and_says_how_many(odd):
    folder, _, bad = odd
    with pytest.raises(ValueError, match=r'strict is set, and of 1000 files there are 250 bad: .*'
                       r'cut_jpeg_00\.jpg') as error:
        read_sets(config_of(folder, strict=True))
    assert '\n' not in str(error.value) and sum(path in str(error.value) for path in bad) == 5


def test_a_folder_without_a_good_picture_is_said(tmp_path):
    (tmp_path / 'x.png').write_bytes(b'nothing')
    with pytest.raises(ValueError, match=r'no pictures to train on in .*; 1 bad: .*x\.png is not'):
        read_sets(config_of(tmp_path))
    with pytest.raises(ValueError, match='no such folder'):
        read_sets(config_of(tmp_path / 'missing'))
    with pytest.raises(ValueError, match='no pictures to train on in sets'):
        read_sets(config_of())


# ---- the index

def test_what_was_read_once_is_not_read_again(tmp_path):
    folder, cache = folder_of(tmp_path / 'in', 4), str(tmp_path / 'cache')
    first = read_sets(config_of(folder, cache=cache))
    file = folder / '001.png'
    times, size = file.stat(), file.stat().st_size
    file.write_bytes(bytes(size))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # nobody can tell
    again = read_sets(config_of(folder, cache=cache))
    assert again == first and len(first.examples) == 4
    os.utime(file)  # now one can
    changed = read_sets(config_of(folder, cache=cache))
    assert len(changed.examples) == 3 and '001.png' in changed.problems[0]


def test_a_torn_index_loses_a_line_only(tmp_path):
    folder, cache = folder_of(tmp_path / 'in', 4), str(tmp_path / 'cache')
    first = read_sets(config_of(folder, cache=cache))
    index = tmp_path / 'cache' / 'index.jsonl'
    lines = index.read_bytes()
    index.write_bytes(lines[:-20])
    assert read_sets(config_of(folder, cache=cache)) == first
    assert index.read_bytes().startswith(lines[:-20] + b'\n')
    assert len(index.read_bytes().splitlines()) == 1 + 5  # the blank first, and one line torn


# ---- layouts

def test_kohyas_folders_repeat_and_caption(tmp_path):
    folder_of(tmp_path / '10_sks dog', 2)
    (tmp_path / '10_sks dog' / '000.txt').unlink()
    folder_of(tmp_path / '3_cat' / 'more', 1)
    folder_of(tmp_path / 'others', 1)
    (tmp_path / 'others' / '000.txt').unlink()
    (tmp_path / 'others' / 'left.txt').write_text('a caption of nothing')
    (tmp_path / 'others' / 'notes.md').write_text('')
    (tmp_path / '.hidden').mkdir()
    (tmp_path / '.hidden' / 'x.png').write_text('')
    sets = read_sets(config_of(tmp_path))
    assert [(e.repeats, *e.captions) for e in sets.examples] == [
        (10, 'sks dog'), (10, '1'), (3, '0'), (1, '')]
    assert sets.notes == [f'{tmp_path}/10_sks dog: 2 pictures, 10 times',
                          f'{tmp_path}/3_cat/more: 1 pictures, 3 times',
                          'caption files without a picture: 1',
                          'files that are no pictures (.md): 1',
                          'pictures without a caption, trained with an empty one: 1']
    said = read_sets(config_of({'path': str(tmp_path), 'repeats': 2, 'caption': 'a dog'}))
    assert [(e.repeats, *e.captions) for e in said.examples] == [
        (20, 'a dog'), (20, '1'), (6, '0'), (2, 'a dog')]
    (tmp_path / '2024_photos').mkdir()
    own = read_sets(config_of(folder_of(tmp_path / '2024_photos', 1)))
    assert own.examples[0].repeats == 1 and 'not from its own' in own.notes[0]


def test_what_a_folder_looks_like(tmp_path):
    folder_of(tmp_path, 2)
    shard_of(tmp_path / 'backup.tar', {'0.png': encoded(noise(0))})
    sets = read_sets(config_of(tmp_path))
    assert len(sets.examples) == 2 and sets.notes == ['files that are no pictures (.tar): 1']
    (tmp_path / '0_none').mkdir()
    folder_of(tmp_path / '0_none', 1)
    (tmp_path / 'x.png').write_bytes(encoded(noise(7)))
    (tmp_path / 'x.txt').symlink_to(tmp_path / 'gone')
    sets = read_sets(config_of(tmp_path))
    assert len(sets.examples) == 2
    assert [p.rpartition('/')[2][:30] for p in sets.problems] == [
        "x.txt'", '0_none is repeated 0 times: re']


def test_of_several_lines_the_first_counts_unless_said(tmp_path):
    folder_of(tmp_path, 1, caption='one\n two \n\nthree\n')
    sets = read_sets(config_of(tmp_path))
    assert sets.examples[0].captions == ('one',)
    assert sets.notes == ['captions of several lines, of which the first counts: 1']
    sets = read_sets(config_of(tmp_path, caption_lines='random'))
    assert sets.examples[0].captions == ('one', 'two', 'three')


@pytest.mark.parametrize('file', ['metadata.jsonl', 'metadata.csv'])
def test_imagefolder(tmp_path, file):
    folder_of(tmp_path / 'train', 4)
    rows = [{'file_name': '000.png', 'text': 'first'}, {'file_name': 'gone.png', 'text': 'gone'},
            {'file_name': '002.png', 'text': 'third, with a comma'}]
    if file.endswith('csv'):
        lines = ['file_name,text', *(f'{r["file_name"]},"{r["text"]}"' for r in rows)]
    else:
        lines = [*map(json.dumps, rows), '{"file_name": ']
    (tmp_path / 'train' / file).write_text('\n'.join(lines) + '\n')
    sets = read_sets(config_of(tmp_path))
    assert [e.captions for e in sets.examples] == [('first',), ('third, with a comma',)]
    bad = [p for p in sets.problems if 'gone.png' in p]
    assert len(bad) == 1 and 'no such file' in bad[0]
    torn = [p for p in sets.problems if 'metadata.jsonl:4 is no JSON object' in p]
    assert len(torn) == len(sets.problems) - 1 == (file == 'metadata.jsonl')
    assert sets.notes[0].startswith('pictures that no line of metadata names, such as ')
    assert sets.notes[0].endswith('001.png: 2')


def test_imagefolders_other_columns(tmp_path):
    folder_of(tmp_path, 2)
    folder_of(tmp_path / 'hints', 2)
    rows = [{'file_name': f'00{i}.png', 'prompt': ['a', 'b'], 'edges': f'hints/00{i}.png'}
            for i in range(2)]
    (tmp_path / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    one = {'path': str(tmp_path), 'text_column': 'prompt', 'hint_column': 'edges'}
    sets = read_sets(config_of(one))
    assert [e.captions for e in sets.examples] == [('a', 'b')] * 2 and not sets.notes
    assert sets.examples[1].hint.path == str(tmp_path / 'hints' / '001.png')
    with pytest.raises(ValueError, match=r"metadata\.jsonl:1: expected file_name and text .* found "
                       'file_name, prompt, edges'):
        read_sets(config_of({'path': str(tmp_path)}))


def shard_of(path, members):
    with tarfile.open(path, 'w') as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_webdataset(tmp_path):
    shard_of(tmp_path / 'a-000.tar', {
        'x/00.jpg': encoded(noise(0), 'JPEG'), 'x/00.txt': b'first', 'x/00.json': b'{}',
        'x/01.json': b'{"caption": "second", "url": "..."}', 'x/01.webp': encoded(noise(1), 'WEBP'),
        'x/02.v1.png': b'', 'x/03.PNG': encoded(noise(3)), 'x/03.cls': b'7'})
    shard_of(tmp_path / 'a-001.tar', {
        '00.png': b'no picture', '00.txt': b'bad', '01.png': encoded(noise(5)),
        '01.json': b'{"text": "last"}', '01.hint.png': encoded(noise(6))})
    sets = read_sets(config_of(tmp_path / 'a-{000..001}.tar', cache=str(tmp_path / 'cache')))
    assert [e.captions[0] for e in sets.examples] == ['first', 'second', '', 'last']
    assert [e.source.name.rpartition(':')[2] for e in sets.examples] == [
        'x/00.jpg', 'x/01.webp', 'x/03.PNG', '01.png']
    np.testing.assert_array_equal(data.read_picture(sets.examples[3].source), noise(5))
    np.testing.assert_array_equal(data.read_picture(sets.examples[3].hint), noise(6))
    assert len(sets.problems) == 1 and 'a-001.tar:00.png' in sets.problems[0]
    assert [note.rpartition(': ')[2] for note in sets.notes] == ['1'] * 4, sets.notes
    for other in (tmp_path, tmp_path / 'a-*.tar', tmp_path / 'a-{000,001}.tar'):
        assert read_sets(config_of(other)).examples == sets.examples
    assert read_sets(config_of(tmp_path, cache=str(tmp_path / 'cache'))) == sets  # by the index


@pytest.mark.parametrize('size, captions', [
    (512 + 100, []), (512 + 2048, ['']), (512 + 2048 + 100, ['']), (512 + 2048 + 512 + 2, ['']),
    (512 + 2048 + 1024, ['zero']), (512 + 2048 + 1024 + 10, ['zero'])])
def test_a_truncated_shard_is_named_and_the_rest_is_used(tmp_path, size, captions):
    """Cut within the first picture, behind it, within its caption's head and text, and later."""
    picture = encoded(noise(0, 16, 16)).ljust(2048, b' ')
    assert len(picture) == 2048
    whole = shard_of(tmp_path / 'whole.tar', {'0.png': picture, '0.txt': b'zero',
                                              '1.png': picture, '1.txt': b'one'})
    cut = tmp_path / 'cut.tar'
    cut.write_bytes(whole.read_bytes()[:size])
    sets = read_sets(config_of(whole, cut))
    assert len(sets.problems) == 1 and f'{cut} is cut off or damaged behind' in sets.problems[0]
    assert [e.captions[0] for e in sets.examples] == ['zero', 'one', *captions]


def test_a_member_that_is_there_twice(tmp_path):
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        for i in range(2):
            info = tarfile.TarInfo('0.png')
            info.size = len(content := encoded(noise(i)))
            tar.addfile(info, io.BytesIO(content))
    sets = read_sets(config_of(tmp_path))
    np.testing.assert_array_equal(data.read_picture(sets.examples[0].source), noise(0))
    assert sets.problems == [f'{tmp_path}/a.tar:0.png is there twice: the first is used']


def test_shards_that_are_missing_or_compressed_are_named(tmp_path):
    shard_of(tmp_path / 'a-1.tar', {'0.png': encoded(noise(0))})
    (tmp_path / 'a-2.tar').write_bytes(b'\x1f\x8b' + bytes(range(256)) * 8)
    sets = read_sets(config_of(tmp_path / 'a-{1..3}.tar'))
    assert len(sets.examples) == 1
    assert [p.rpartition('/')[2][:30] for p in sets.problems] == [
        'a-2.tar is no uncompressed tar', 'a-3.tar: no such file']


def test_names_of_shards():
    assert expand_shards('s-{08..11}-{a,b}.tar')[:4] == [
        's-08-a.tar', 's-08-b.tar', 's-09-a.tar', 's-09-b.tar']
    assert len(expand_shards('{0..9}{0..9}.tar')) == 100


def test_npz(tmp_path):
    pictures = np.stack([noise(i, 64, 64) for i in range(6)])
    arrays = dict(images=pictures, captions=np.array([f'{i}' for i in range(6)]),
                  plain=np.arange(6) % 2 == 0, heldout=np.arange(6) >= 4)
    np.savez(tmp_path / 'a.npz', **arrays)
    config = config_of({'path': str(tmp_path / 'a.npz'), 'plain_repeats': 4}, resolution=64)
    sets = read_sets(config)
    assert [(e.captions, e.repeats) for e in sets.examples] == [
        (('0',), 4), (('1',), 1), (('2',), 4), (('3',), 1)]
    assert [e.captions for e in sets.heldout] == [('4',), ('5',)]
    loader = data.batches(sets.examples, config, 10, tokenize=names)
    batch = next(loader)
    loader.close()
    np.testing.assert_array_equal(batch['image'], pictures[batch['tokens']['text_encoder']])
    np.savez(tmp_path / 'b.npz', images=pictures)
    with pytest.raises(ValueError, match='has no array captions: .* found images'):
        read_sets(config_of(tmp_path / 'b.npz'))
    np.savez(tmp_path / 'c.npz', images=pictures, captions=arrays['captions'][:3])
    with pytest.raises(ValueError, match='6 images and 3 of captions'):
        read_sets(config_of(tmp_path / 'c.npz'))
    (tmp_path / 'd.npz').write_bytes(b'PK\x03\x04 no zip')
    with pytest.raises(ValueError, match=r'd\.npz is no \.npz of arrays'):
        read_sets(config_of(tmp_path / 'd.npz'))


def test_class_pictures_come_as_often_as_the_others(tmp_path):
    folder_of(tmp_path / 'mine', 3)
    folder_of(tmp_path / 'class', 4)
    mine = {'path': str(tmp_path / 'mine'), 'repeats': 3}
    prior = {'path': str(tmp_path / 'class'), 'prior': True, 'caption': 'dog'}
    sets = read_sets(config_of(mine, prior, prior_weight=0.5, heldout=0.0))
    assert [(e.repeats, e.weight) for e in sets.examples] == [(3, 1)] * 3 + [
        (3, 0.5), (2, 0.5), (2, 0.5), (2, 0.5)]
    sets = read_sets(config_of({**mine, 'repeats': 1}, prior))
    assert [(e.repeats, e.weight) for e in sets.examples] == [(1, 1)] * 6
    assert any(note.endswith('more than others: 1') for note in sets.notes)


def test_hints_by_name(tmp_path):
    folder_of(tmp_path / 'in', 4)
    folder_of(tmp_path / 'hints', 2)
    (tmp_path / 'hints' / '002.jpg').write_bytes(encoded(noise(2, 48, 48), 'JPEG'))
    one = {'path': str(tmp_path / 'in'), 'hints': str(tmp_path / 'hints')}
    sets = read_sets(config_of(one))
    assert [os.path.basename(e.hint.path) for e in sets.examples] == ['000.png', '001.png']
    assert len(sets.problems) == 2
    assert any('003.png has no hint of the same name' in p for p in sets.problems)
    assert any('002.jpg: has 48x48 pixels: expected the proportions of' in p
               for p in sets.problems)
    config = config_of(one, crop='random', flip=True, resolution=16)
    loader = data.batches(read_sets(config).examples, config, 6)
    for _ in range(4):
        batch = next(loader)
        np.testing.assert_array_equal(batch['hint'], batch['image'])  # cut and mirrored alike
    loader.close()


def test_what_is_held_out_depends_on_the_bytes(tmp_path):
    folder_of(tmp_path / 'in', 200, height=8, width=8)
    before = read_sets(config_of(tmp_path / 'in', heldout=0.2))
    assert 20 < len(before.heldout) < 60 and len(before.heldout) + len(before.examples) == 200
    for i in range(100):
        (tmp_path / 'in' / f'{i:03}.png').rename(tmp_path / 'in' / f'z{i:03}.png')
    folder_of(tmp_path / 'in' / 'more', 30, height=9, width=8)
    after = read_sets(config_of(tmp_path / 'in', heldout=0.2))
    old = {e.sha256 for e in after.heldout if 'more' not in e.source.path}
    assert old == {e.sha256 for e in before.heldout}


# ---- settings

def test_settings_from_a_recipe():
    recipe = ConfigDict({'sets': {'mine': {'path': 'a'}, 'prior': {'path': 'b', 'prior': True}},
                         'resolution': 768, 'flip': True})
    config = data_config(recipe)
    assert config.size == (768, 768) and [s.path for s in config.sets] == ['a', 'b']
    assert config.bucket_limits == (384, 1536)
    assert data_config({'sets': 'a', 'resolution': [512, 768]}).size == (512, 768)


@pytest.mark.parametrize('settings, said', [
    ({'shufle_tags': True}, 'unknown: shufle_tags; expected fields of DataConfig: sets, '),
    ({'sets': [{'path': 'a', 'repeat': 2}]}, 'unknown: repeat; expected fields of SetConfig'),
    ({'sets': [{'repeats': 2}]}, 'expected a path'),
    ({'resolution': 500}, 'multiples of 8'), ({'resolution': (8, 8, 8)}, 'one or two'),
    ({'bucket_step': 60}, 'bucket_step=60: expected a multiple of 8'),
    ({'bucket_max': 500}, 'bucket_max=500: expected multiples'),
    ({'bucket_min': 576}, 'bucket_min=576'), ({'crop': 'left'}, "crop='left'"),
    ({'caption_dropout': 1.5}, 'caption_dropout'), ({'heldout': 1.0}, 'heldout'),
    ({'caption_extension': 'txt'}, 'a dot first'), ({'tag_separator': ' '}, 'tag_separator'),
    ({'cache_latents': True}, 'expected a folder in cache'),
    ({'cache_latents': True, 'cache': 'c', 'crop': 'random'}, "crop='random'"),
    ({'cache_texts': True, 'cache': 'c', 'shuffle_tags': True}, 'shuffle_tags'),
    ({'cache_texts': True, 'cache': 'c', 'tag_dropout': 0.1}, 'tag_dropout')])
def test_settings_that_are_refused(settings, said):
    with pytest.raises(ValueError, match=said) as error:
        data_config({'sets': 'a', **settings})
    assert '\n' not in str(error.value)


# ---- buckets, against what kohya's sd-scripts give (library/train_util.py, BucketManager)

KOHYA_512 = {(256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640),
             (448, 576), (512, 512)}


def test_kohyas_buckets():
    sizes = buckets.bucket_sizes(DataConfig())
    assert set(sizes) == KOHYA_512 | {(h, w) for w, h in KOHYA_512}
    assert sizes == sorted(sizes)
    xl = buckets.bucket_sizes(data_config({'resolution': 1024}))
    assert (1024, 1024) in xl and (832, 1216) in xl and (1344, 768) in xl and (512, 2048) in xl
    assert all(w * h <= 1024**2 for w, h in xl)
    assert buckets.bucket_sizes(data_config({'resolution': (512, 768), 'buckets': False})) == [
        (512, 768)]
    assert buckets.bucket_sizes(data_config({'resolution': 64})) == [(64, 64)]  # the emoji's


@pytest.mark.parametrize('size, bucket, resized', [
    ((1920, 1080), (640, 384), (683, 384)), ((1080, 1920), (384, 640), (384, 683)),
    ((512, 512), (512, 512), (512, 512)), ((100, 100), (512, 512), (512, 512)),
    ((320, 704), (320, 704), (320, 704)), ((1000, 1100), (512, 512), (512, 563)),
    ((5000, 10), (1024, 256), (128000, 256))])
def test_kohyas_choice(size, bucket, resized):
    config = DataConfig()
    assert buckets.place(config, buckets.bucket_sizes(config), *size) == (bucket, resized)


@pytest.mark.parametrize('size, bucket, resized', [
    ((1920, 1080), (640, 384), (683, 384)), ((300, 200), (256, 192), (300, 200)),
    ((512, 512), (512, 512), (512, 512)), ((1000, 260), (960, 256), (1000, 260)),
    ((3000, 2000), (576, 384), (576, 384))])
def test_kohyas_choice_without_upscaling(size, bucket, resized):
    config = DataConfig(no_upscale=True)
    assert buckets.place(config, buckets.bucket_sizes(config), *size) == (bucket, resized)


def test_too_small_for_a_bucket_is_named(tmp_path):
    folder_of(tmp_path, 2, width=100)
    (tmp_path / 'small.png').write_bytes(encoded(noise(0, 100, 15)))
    sets = read_sets(config_of(tmp_path, no_upscale=True))
    assert len(sets.examples) == 2
    assert 'small.png: has 100x15 pixels: expected at least 16' in sets.problems[0]


@given(st.integers(1, 4000), st.integers(1, 4000), st.booleans(), st.sampled_from([64, 512, 768]),
       st.sampled_from([8, 32, 64]))
@example(123, 2574, True, 512, 8)  # 112x2344 has 384 pixels more than 512x512
def test_what_is_scaled_covers_its_bucket(width, height, no_upscale, resolution, step):
    config = data_config(dict(resolution=resolution, bucket_step=step, no_upscale=no_upscale))
    sizes = buckets.bucket_sizes(config)
    try:
        (w, h), (across, down) = buckets.place(config, sizes, width, height)
    except ValueError:
        assert no_upscale
        return
    assert across >= w > 0 and down >= h > 0 and w % step == h % step == 0
    if no_upscale:
        assert across <= width and down <= height
        # One side is at most that of the resolution's area, rounded to a pixel.
        assert (across * down <= resolution**2
                or (across - 0.5)**2 * height <= resolution**2 * width
                or (down - 0.5)**2 * width <= resolution**2 * height)
    else:
        assert w * h <= resolution**2 and (across == w or down == h)


# ---- pictures

@pytest.mark.parametrize('flip', [False, True])
def test_a_cut_is_the_scaled_picture_less_its_rest(flip):
    smooth = Image.fromarray(noise(0, 20, 12)).resize((300, 180), Image.Resampling.BICUBIC)
    placement = buckets.Placement((64, 48), (100, 60))
    whole = np.asarray(smooth.resize((100, 60), Image.Resampling.LANCZOS))
    expected = whole[5:53, 20:84]
    out = data.cut(np.asarray(smooth), placement, 20, 5, flip)
    assert np.abs(out[:, ::-1 if flip else 1].astype(int) - expected).max() <= 1
    mirrored = data.cut(np.asarray(smooth), placement, 20, 5, not flip)
    np.testing.assert_array_equal(out, mirrored[:, ::-1])


def test_time_ids_are_where_the_crop_was(tmp_path):
    """A ramp of the columns: the corner in time_ids is what the picture shows there."""
    ramp = np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    (tmp_path / 'x.png').write_bytes(encoded(ramp))
    config = config_of(tmp_path, crop='random', flip=True, buckets=False)
    loader = data.batches(read_sets(config).examples, config, 16)
    batch = next(loader)
    loader.close()
    flipped = batch['image'][:, 0, 0, 0] > batch['image'][:, 0, -1, 0]
    assert 0 < flipped.sum() < 16 and len(np.unique(batch['time_ids'][:, 3])) > 4
    left = np.where(flipped, 199 - batch['image'][:, 0, 0, 0].astype(int),
                    batch['image'][:, 0, 0, 0])
    np.testing.assert_array_equal(batch['time_ids'], [
        [64, 200, 0, column, 64, 64] for column in left])
    assert batch['time_ids'].dtype == batch['weight'].dtype == np.float32


# ---- captions

@given(st.lists(st.sampled_from('abcdefgh'), min_size=1, max_size=8, unique=True),
       st.integers(0, 9), st.integers(0, 99))
def test_kept_tags_stay_and_others_are_shuffled(tags, keep, seed):
    config = data_config({'shuffle_tags': True, 'keep_tags': keep})
    out = data.vary_caption([','.join(tags)], config, np.random.default_rng(seed)).split(', ')
    assert out[:keep] == tags[:keep] and sorted(out) == sorted(tags)


def test_shuffling_gives_other_orders_and_dropping_drops():
    rng, tags = np.random.default_rng(0), [f't{i}' for i in range(20)]
    config = data_config({'shuffle_tags': True, 'keep_tags': 2})
    orders = {data.vary_caption([', '.join(tags)], config, rng) for _ in range(50)}
    assert len(orders) == 50
    config = data_config({'tag_dropout': 0.25, 'keep_tags': 4, 'tag_separator': ';'})
    kept = [data.vary_caption(['; '.join(tags)], config, rng).split('; ') for _ in range(400)]
    assert all(k[:4] == tags[:4] and k == [t for t in tags if t in k] for k in kept)
    assert abs(np.mean([len(k) - 4 for k in kept]) - 12) < 0.3  # of 16, +- 1.7 / 20
    config = data_config({'caption_dropout': 0.3})
    out = [data.vary_caption(['one, two ,three', 'x'], config, rng) for _ in range(2000)]
    assert set(out) == {'', 'one, two ,three', 'x'}  # what is not shuffled stays as it is
    assert abs(out.count('') / 2000 - 0.3) < 0.05 and abs(out.count('x') / 2000 - 0.35) < 0.05


# ---- the plan

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=5).map(tuple)


@settings(max_examples=60)
@given(SIZES, st.integers(1, 12), st.integers(0, 3))
def test_every_slot_comes_equally_often(sizes, batch_size, seed):
    plan, epochs = data.Plan(sizes, batch_size, seed), 6
    seen, steps = collections.Counter(), plan.steps(epochs)
    for step in range(steps):
        bucket, positions = plan.batch(step)
        assert len(positions) == batch_size
        seen.update((bucket, plan.slot(bucket, p)) for p in positions)
    for bucket, size in enumerate(sizes):
        counts = [seen[bucket, slot] for slot in range(size)]
        assert max(counts) - min(counts) <= 1
        assert epochs * size - sum(counts) in range(batch_size)  # the rest comes first afterwards


@settings(max_examples=60)
@given(SIZES, st.integers(1, 12), st.integers(0, 500))
def test_the_epoch_of_a_step(sizes, batch_size, step):
    plan = data.Plan(sizes, batch_size)
    epoch = plan.epoch(step)
    assert plan.steps(epoch) <= step < plan.steps(epoch + 1)


def test_epochs_are_shuffled_anew_and_seeds_differ():
    def order(seed, epoch):
        plan = data.Plan((50, 30), 5, seed)
        return [[plan.slot(b, p) + 100 * b for p in positions] for b, positions in map(
            plan.batch, range(plan.steps(epoch), plan.steps(epoch + 1)))]
    first = order(0, 0)
    assert first == order(0, 0) != order(0, 1) != order(1, 1)
    assert first != order(1, 0)
    assert len({batch[0] >= 100 for batch in first[:8]}) == 2  # buckets are mixed


# ---- loading

def some(tmp_path, count=24, **fields):
    for i in range(count):
        rng = random.Random(i)
        (tmp_path / f'{i}.png').write_bytes(
            encoded(noise(i, rng.randrange(40, 90), rng.randrange(40, 90))))
        (tmp_path / f'{i}.txt').write_text(f'{i}')
    config = config_of(tmp_path, crop='random', flip=True, caption_dropout=0.2, **fields)
    return read_sets(config).examples, config


def take(loader, count):
    out = [next(loader) for _ in range(count)]
    loader.close()
    return out


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert a.keys() == b.keys()
        for name in a:
            x, y = (batch[name]['text_encoder'] if name == 'tokens' else batch[name]
                    for batch in (a, b))
            np.testing.assert_array_equal(x, y)


def test_taken_up_at_any_step_the_batches_are_the_same(tmp_path):
    examples, config = some(tmp_path)
    plan = data.Buckets(examples, config, 4).plan
    assert 3 < plan.steps(1) < 12  # the 14 steps are more than an epoch
    whole = take(data.batches(examples, config, 4, 7, names), 14)
    for start in (1, 3, plan.steps(1), 11):
        same(take(data.batches(examples, config, 4, 7, names, start=start), 14 - start),
             whole[start:])
        loader = data.batches(examples, config, 4, 7, names)
        for _ in range(start):
            next(loader)
        state = json.loads(json.dumps(loader.get_state()))  # as a checkpoint has it
        assert state == {'next_index': start}
        loader.close()
        loader = data.batches(examples, config, 4, 7, names)
        next(loader)
        loader.set_state(state)
        same(take(loader, 14 - start), whole[start:])
    other = take(data.batches(examples, config, 4, 8, names), 3)
    assert any(not np.array_equal(a['time_ids'], b['time_ids']) for a, b in zip(whole, other))


@pytest.mark.parametrize('processes', [2, 4])
def test_hosts_share_the_batch_of_one_host(tmp_path, processes):
    examples, config = some(tmp_path)
    whole = take(data.batches(examples, config, 8, 3, names), 5)
    parts = [take(data.batches(examples, config, 8, 3, names, process=p, processes=processes,
                               start=1), 4) for p in range(processes)]
    for step, batch in enumerate(whole[1:]):
        for name in 'image', 'time_ids', 'weight':
            np.testing.assert_array_equal(
                batch[name], np.concatenate([part[step][name] for part in parts]))


def test_threads_change_nothing(tmp_path):
    examples, config = some(tmp_path)
    one, many = (take(data.batches(
        examples, dataclasses.replace(config, threads=n), 4, 3, names), 6) for n in (1, 16))
    same(one, many)


def test_batches_that_cannot_be_shared_or_mixed(tmp_path):
    examples, config = some(tmp_path, 4)
    with pytest.raises(ValueError, match='batch_size=5 for process 0 of 2'):
        data.batches(examples, config, 5, processes=2)
    mixed = [dataclasses.replace(examples[0], hint=examples[0].source), *examples[1:]]
    with pytest.raises(ValueError, match='1 of 4 pictures have a hint: expected all or none'):
        data.batches(mixed, config, 4)


def test_a_file_that_vanishes_is_named(tmp_path):
    examples, config = some(tmp_path, 4)
    (tmp_path / '2.png').unlink()
    loader = data.batches(examples, config, 4)
    with pytest.raises(FileNotFoundError, match=r'no such file: .*2\.png'):
        for _ in range(8):
            next(loader)
    loader.close()


def test_the_fingerprint_is_of_what_batches_depend_on(tmp_path):
    examples, config = some(tmp_path, 6)
    first = data.fingerprint(examples, config, 4)
    moved = [dataclasses.replace(e, source=Source('elsewhere', 'x')) for e in examples]
    assert first == data.fingerprint(moved, dataclasses.replace(config, threads=3), 4)
    others = [data.fingerprint(examples[1:], config, 4), data.fingerprint(examples, config, 8),
              data.fingerprint(examples, config, 4, seed=1),
              data.fingerprint(examples, dataclasses.replace(config, flip=False), 4)]
    assert len({first, *others}) == 5


def test_lines_of_the_buckets():
    examples = [Example(Source(f'{i}', f'{i}'), f'{i}', *size, ('',), 2)
                for i, size in enumerate([(64, 64), (64, 64), (90, 40)])]
    lines = data.Buckets(examples, config_of(), 1).describe()
    assert lines == ['64x64: 2 pictures, 4 with repeats', '80x48: 1 pictures, 2 with repeats']


@pytest.mark.slow
def test_the_step_does_not_wait_for_its_pictures(tmp_path):
    """Where a step takes twice as long as its pictures, it waits for none after the first."""
    for i in range(64):
        (tmp_path / f'{i}.jpg').write_bytes(encoded(noise(i, 640, 640), 'JPEG'))
    config = config_of(tmp_path, resolution=256, bucket_step=64)
    examples = read_sets(config).examples
    loader = data.batches(examples, config, 8)
    next(loader)
    start = time.perf_counter()
    for _ in range(20):
        next(loader)
    alone = (time.perf_counter() - start) / 20
    waits = []
    for _ in range(12):
        time.sleep(2 * alone)
        start = time.perf_counter()
        next(loader)
        waits.append(time.perf_counter() - start)
    loader.close()
    print(f'{8 / alone:.0f} pictures/s; waits {np.median(waits) * 1e3:.1f} ms')
    assert np.median(waits[2:]) < 0.1 * alone


def test_grain_is_the_loader(tmp_path):
    examples, config = some(tmp_path, 4)
    loader = data.batches(examples, config, 4)
    assert isinstance(loader, grain.DatasetIterator)
    loader.close()
