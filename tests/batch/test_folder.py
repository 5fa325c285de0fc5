"""A run's folder: whole pictures, torn lines, full disks, two processes."""

import json
import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from jaxsd.batch import folder

CONFIG = {'settings': {'weights': 'abc', 'slots': 8}}


def _image(n=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, n, 3), np.uint8)


def _add(run, key, **record):
    run.add(key, folder.encode(_image(), {'parameters': 'p'}), {'request': {}, **record})


def test_a_picture_and_its_record(tmp_path):
    run = folder.Folder(tmp_path / 'run', CONFIG)
    _add(run, 'ab12', index=3)
    run.add('cd34', folder.encode(_image(300), {}), {'request': {}})
    run.close()
    found = folder.read(tmp_path / 'run')
    assert found['ab12']['index'] == 3 and 'thumb' not in found['ab12']
    assert found['ab12']['pixels'] == folder.pixels_of(tmp_path / 'run' / found['ab12']['file'])
    assert found['cd34']['thumb'] == 'thumbs/cd/cd34.webp'
    assert (tmp_path / 'run/thumbs/cd/cd34.webp').stat().st_size < 300**2
    assert folder.finished(tmp_path / 'run') == {'ab12', 'cd34'}
    (tmp_path / 'run' / found['ab12']['file']).unlink()
    assert folder.finished(tmp_path / 'run') == {'cd34'}


def test_names_of_files_that_are_no_text(tmp_path):
    name = os.fsdecode(b'sk\xe9.png')
    run = folder.Folder(tmp_path, {**CONFIG, 'command': name})
    texts = {'jaxsd': json.dumps({'image': f'é {name}'}, ensure_ascii=False)}
    run.add('ab12', folder.encode(_image(), texts), {'request': {'image': f'é {name}'}})
    run.fail('cd34', f'{name}: no such file', {'request': {}})
    run.close()
    found = folder.read(tmp_path)
    assert found['ab12']['request']['image'] == f'é {name}'
    assert found['cd34']['error'] == f'{name}: no such file'
    assert folder.read_config(tmp_path)['command'] == name
    with Image.open(tmp_path / found['ab12']['file']) as file:
        assert json.loads(file.text['jaxsd']) == {'image': f'é {name}'}


def test_hashes_are_of_shape_and_pixels():
    image = _image()
    assert folder.pixels(image) == folder.pixels(image[::1].copy())
    assert folder.pixels(image) != folder.pixels(image.reshape(4, 16, 3))
    assert folder.pixels(image) != folder.pixels(image ^ 1)


@pytest.mark.parametrize('torn', [b'{"id": "x', b'', b'\xff' * 70000])
def test_a_torn_line_goes(tmp_path, torn):
    run = folder.Folder(tmp_path, CONFIG)
    _add(run, 'ab12')
    run.close()
    with open(tmp_path / 'manifest.jsonl', 'ab') as file:
        file.write(torn)
    for name in ('pictures/ab/.ab12.png.abcd_123.tmp', '.index.html.abcd_123.tmp'):
        (tmp_path / name).write_bytes(b'half')
    assert folder.finished(tmp_path) == {'ab12'}
    run = folder.Folder(tmp_path, CONFIG)
    _add(run, 'cd34')
    run.close()
    lines = (tmp_path / 'manifest.jsonl').read_bytes().splitlines()
    assert [json.loads(line)['id'] for line in lines] == ['ab12', 'cd34']
    assert not list(tmp_path.rglob('*.tmp'))


def test_an_error_never_hides_a_picture(tmp_path):
    run = folder.Folder(tmp_path, CONFIG)
    run.fail('ab12', ValueError('no'), {'request': {}})
    assert folder.read(tmp_path)['ab12']['error'] == 'no' and not folder.finished(tmp_path)
    _add(run, 'ab12')
    run.fail('ab12', 'again', {'request': {}})
    assert folder.finished(tmp_path) == {'ab12'}
    run.close()


def test_other_settings_are_refused(tmp_path):
    folder.Folder(tmp_path, CONFIG).close()
    with pytest.raises(ValueError, match='slots 8, here 4'):
        folder.Folder(tmp_path, {'settings': {'weights': 'abc', 'slots': 4}})
    folder.Folder(tmp_path, CONFIG).close()


def test_one_process_at_a_time(tmp_path):
    run = folder.Folder(tmp_path, CONFIG)
    code = f'from jaxsd.batch import folder; folder.Folder({str(tmp_path)!r}, None)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'Busy' in done.stderr and 'another process makes pictures there' in done.stderr
    folder.Folder(tmp_path, process=1).close()  # another of the same run has a file of its own
    run.close()
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_a_killed_process_holds_nothing(tmp_path):
    code = ('import sys; from jaxsd.batch import folder\n'
            f"held = folder.Folder({str(tmp_path)!r}, None); print('held'); sys.stdout.flush()\n"
            'sys.stdin.read()')
    with subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b'held\n'
        with pytest.raises(folder.Busy):
            folder.Folder(tmp_path, CONFIG)
        process.kill()
        process.wait()
        folder.Folder(tmp_path, CONFIG).close()


def test_a_folder_is_closed_by_any_thread(tmp_path):
    run = folder.Folder(tmp_path, CONFIG)
    closing = threading.Thread(target=run.close)
    closing.start()
    closing.join()
    folder.Folder(tmp_path, CONFIG).close()


def test_a_partial_line_is_taken_back(tmp_path, monkeypatch):
    """As a full disk leaves it: some bytes are written, then there is no room."""
    run = folder.Folder(tmp_path, CONFIG)
    _add(run, 'ab12')
    before, write = (tmp_path / 'manifest.jsonl').read_bytes(), os.write

    def full(handle, data):
        if os.lseek(handle, 0, os.SEEK_CUR) > len(before):
            raise OSError(28, 'No space left on device')
        return write(handle, data[:10])

    monkeypatch.setattr(os, 'write', full)
    with pytest.raises(OSError, match='No space'):
        _add(run, 'cd34')
    monkeypatch.undo()
    assert (tmp_path / 'manifest.jsonl').read_bytes() == before
    _add(run, 'cd34')
    run.close()
    assert folder.finished(tmp_path) == {'ab12', 'cd34'}


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f'{tmp_path}: expected the folder')):
        folder.read_config(tmp_path)
    assert folder.read(tmp_path / 'nowhere') == {}


FOREIGN = {'manifest.jsonl': '{"audio": "a.wav"}\n{"audio": "b.w', 'index.html': '<p>mine</p>',
           'pictures/holiday.jpg': 'x', 'thumbs/a': 'x', 'config.json': '{"hidden_size": 768}'}


def _state(path):
    return {name: (name.is_symlink(), name.read_bytes() if name.is_file() else None)
            for name in path.rglob('*')}


@pytest.mark.parametrize('name', FOREIGN)
def test_a_folder_of_something_else_is_not_touched(tmp_path, name):
    for other, text in {name: FOREIGN[name], '.notes.tmp': 'x', 'a/.draft.tmp': 'x'}.items():
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text(text)
    before = _state(tmp_path)
    with pytest.raises(ValueError, match='give (another|a run)'):
        folder.Folder(tmp_path, CONFIG)
    with pytest.raises(ValueError, match=name.split('/')[0]):
        folder.check(tmp_path)
    assert _state(tmp_path) == before


@pytest.mark.parametrize('name', ['manifest.jsonl', 'config.json', 'index.html', 'pictures'])
def test_links_are_not_followed(tmp_path, name):
    other = tmp_path / 'other'
    folder.Folder(other, CONFIG).close()
    (other / 'pictures').mkdir()
    (other / 'index.html').write_text('x')
    (other / 'manifest.jsonl').write_text('{"torn": ')
    run = tmp_path / 'run'
    folder.Folder(run, CONFIG).close()
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(other / name)
    before = _state(tmp_path)
    with pytest.raises(ValueError, match=f'{name} is a link'):
        folder.Folder(run, CONFIG)
    assert _state(tmp_path) == before


def test_files_beside_a_run_stay(tmp_path):
    names = ('notes.txt', '.swap.tmp', 'a/.draft.tmp', 'pictures/ab/.mine.tmp', 'manifest-x.jsonl')
    run = folder.Folder(tmp_path, CONFIG)
    _add(run, 'ab12')
    run.close()
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('mine')
    folder.Folder(tmp_path, CONFIG).close()
    assert all((tmp_path / name).read_text() == 'mine' for name in names)
    assert folder.finished(tmp_path) == {'ab12'}


def _cut(file):
    file.write_bytes(file.read_bytes()[:-9])


def _empty(file):
    file.write_bytes(b'')


def _replace(file):
    file.write_bytes(folder.encode(_image(9, seed=1), {})['file'])


def _link(file):
    file.rename(file.with_suffix('.other'))
    file.symlink_to(file.with_suffix('.other'))


@pytest.mark.parametrize('spoil', [_cut, _empty, _replace, _link, os.unlink])
@pytest.mark.parametrize('name', ['file', 'thumb'])
def test_what_is_not_as_it_was_written_is_made_again(tmp_path, spoil, name):
    run, encoded = folder.Folder(tmp_path, CONFIG), folder.encode(_image(300), {})
    run.add('ab12', encoded, {'request': {}})
    _add(run, 'cd34')
    spoil(tmp_path / folder.read(tmp_path)['ab12'][name])
    troubles = []
    assert folder.finished(tmp_path, troubles) == {'cd34'}
    assert len(troubles) == 1 and 'ab12' in troubles[0]
    run.add('ab12', encoded, {'request': {}})
    run.close()
    assert folder.finished(tmp_path) == {'ab12', 'cd34'} and not folder.repair(tmp_path)


@pytest.mark.parametrize('line', [
    b'\0' * 4096, b'{"id": "ab12"', b'\xff', b'[1]', b'{}', b'{"id": 7, "error": ""}', b'[' * 10**5,
    b'{"id": "ab12"}', b'{"id": "ab12", "file": "pictures/ab/ab12.png"}',
    b'{"id": "ab12", "error": "", "index": "a"}', b'{"id": "ab12", "error": "", "request": 1}',
    b'{"id": "ab12", "file": "/etc/passwd", "pixels": ""}',
    b'{"id": "ab12", "file": "//host/a.png", "pixels": ""}',
    b'{"id": "../..", "file": "pictures/../../...png", "pixels": ""}',
    b'{"id": "ab12", "error": "", "thumb": "https://host/"}'])
def test_a_damaged_line_is_named_and_repaired(tmp_path, line):
    run = folder.Folder(tmp_path, CONFIG)
    for key in ('ab12', 'cd34', 'ef56'):
        _add(run, key)
    run.close()
    file = tmp_path / 'manifest.jsonl'
    lines = file.read_bytes().splitlines()
    file.write_bytes(b'\n'.join([lines[0], line, lines[2], b'']))
    troubles = []
    assert folder.finished(tmp_path, troubles) == {'ab12', 'ef56'}
    assert len(troubles) == 1 and troubles[0].startswith(f'{file}:2: ')
    assert folder.repair(tmp_path) == troubles
    assert file.read_bytes().splitlines() == [lines[0], lines[2]]
    assert folder.repair(tmp_path) == []


def test_repair_forgets_what_sizes_do_not_tell(tmp_path):
    run = folder.Folder(tmp_path, CONFIG)
    _add(run, 'ab12')
    _add(run, 'cd34')
    with pytest.raises(folder.Busy):
        folder.repair(tmp_path)
    run.close()
    file = tmp_path / folder.read(tmp_path)['ab12']['file']
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    assert folder.finished(tmp_path) == {'ab12', 'cd34'}
    trouble, = folder.repair(tmp_path)
    assert 'pictures/ab/ab12.png' in trouble and folder.finished(tmp_path) == {'cd34'}
