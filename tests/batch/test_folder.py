"""A run's folder: whole pictures, torn lines, full disks, two processes."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxsd.batch import folder

CONFIG = {'settings': {'weights': 'abc', 'microbatch': 8}}


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
    (tmp_path / 'pictures/ab/.torn.tmp').write_bytes(b'half')
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
    with pytest.raises(ValueError, match='microbatch 8, here 4'):
        folder.Folder(tmp_path, {'settings': {'weights': 'abc', 'microbatch': 4}})
    folder.Folder(tmp_path, CONFIG).close()


def test_one_process_at_a_time(tmp_path):
    run = folder.Folder(tmp_path, CONFIG)
    code = f'from jaxsd.batch import folder; folder.Folder({str(tmp_path)!r}, None)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'Busy' in done.stderr and 'another process makes pictures there' in done.stderr
    folder.Folder(tmp_path, process=1).close()  # another of the same run has a file of its own
    run.close()
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_a_partial_line_is_taken_back(tmp_path, monkeypatch):
    """As a full disk leaves it: some bytes are written, then there is no room."""
    run = folder.Folder(tmp_path, CONFIG)
    _add(run, 'ab12')
    before, write = (tmp_path / 'manifest.jsonl').read_bytes(), os.pwrite

    def full(handle, data, offset):
        if offset > len(before):
            raise OSError(28, 'No space left on device')
        return write(handle, data[:10], offset)

    monkeypatch.setattr(os, 'pwrite', full)
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
