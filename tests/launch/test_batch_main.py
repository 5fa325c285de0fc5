"""launch.batch as people use it: killed, out of room, interrupted, over processes; and verified."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_ip_adapters
from conftest import TINY
from mains import ROOT, devices, environment, free_port, run_main
from PIL import Image

import jaxsd
from jaxsd.batch import folder

pytestmark = pytest.mark.slow


def _batch(out, *flags, **more):
    return run_main('-m', 'launch.batch', f'--out={out}', *flags, **more)


def _start(*arguments, **more):
    return subprocess.Popen([sys.executable, '-m', 'launch.batch', *map(str, arguments)], cwd=ROOT,
                            env=environment(**more), stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def _hashes(out):
    """{id: hash} of a run, each file opened and its pixels compared with the manifest."""
    found = {key: record for key, record in folder.read(out).items() if 'file' in record}
    for record in found.values():
        with Image.open(out / record['file']) as image:
            image.load()
            assert folder.pixels(np.asarray(image)) == record['pixels']
    return {key: record['pixels'] for key, record in found.items()}


def _lines(out):
    file = out / 'manifest.jsonl'
    return file.read_bytes().count(b'\n') if file.exists() else 0


MANY = ('--prompt=red apple', '--prompt=rocket', '--prompt=alien', '--prompt=rooster',
        '--prompt=red heart', '--seeds=0-9', '--grid=sampler=euler,euler_ancestral',
        '--grid=steps=1,2')  # 200 pictures


@pytest.mark.slow
def test_killed_again_and_again(tmp_path, kills=8):
    whole = tmp_path / 'whole'
    status, _, error = _batch(whole, *MANY)
    assert status == 0, error
    expected = _hashes(whole)
    assert len(expected) == 200
    random_ = random.Random(0)
    broken = tmp_path / 'broken'
    for kill in range(kills):
        process = _start(f'--out={broken}', *MANY)
        if kill < 0.75 * kills:  # amid pictures, else anywhere from the start on
            until = _lines(broken) + random_.randrange(1, 15)
            while _lines(broken) < until and process.poll() is None:
                time.sleep(0.002)
            time.sleep(random_.random() * 0.1)
        else:
            time.sleep(random_.random() * 4)
        assert process.poll() is None, process.stdout.read()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert 0.75 * kills <= _lines(broken) < 200
    status, out, error = _batch(broken, *MANY)
    assert status == 0, error
    assert _hashes(broken) == expected
    files = [path for path in broken.rglob('*') if path.suffix in ('.png', '.tmp')]
    assert len(files) == 200
    ids = [json.loads(line)['id'] for line in (broken / 'manifest.jsonl').read_text().splitlines()]
    assert len(ids) == len(set(ids)) == 200
    status, out, error = _batch(broken, *MANY)
    assert status == 0 and '0 to make' in error


FEW = ('--prompt=red apple', '--seeds=0-11', '--config.steps=2')


@pytest.fixture(scope='module')
def few(tmp_path_factory):
    """A run of twelve pictures, and what it should hold."""
    out = tmp_path_factory.mktemp('few') / 'run'
    status, _, error = _batch(out, *FEW)
    assert status == 0, error
    return out, _hashes(out)


@pytest.fixture
def disk(tmp_path):
    """A file system of 80 kB."""
    path = tmp_path / 'disk'
    path.mkdir()
    if os.geteuid() or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=80k', 'tmpfs', path],
                                      capture_output=True).returncode:
        pytest.skip('needs the right to mount a small tmpfs')
    yield path
    subprocess.run(['umount', path], check=True)


def _remount(path, options):
    subprocess.run(['mount', '-o', f'remount,{options}', path], check=True)


def test_a_full_disk_stops_cleanly_and_the_run_goes_on(disk, few):
    status, _, error = _batch(disk / 'run', *FEW)
    last = error.strip().splitlines()[-1]
    assert status == 1 and 'No space left on device' in last and 'the same command' in last
    safe = _hashes(disk / 'run')
    assert 0 < len(safe) < 12 and safe.items() <= few[1].items()
    assert not list(disk.rglob('*.tmp'))
    _remount(disk, 'size=8m')
    status, _, error = _batch(disk / 'run', *FEW)
    assert status == 0, error
    assert _hashes(disk / 'run') == few[1]


def test_a_folder_that_cannot_be_written(disk, few):
    _remount(disk, 'ro')
    status, _, error = _batch(disk / 'run', *FEW)
    assert status == 1 and 'Read-only file system' in error.strip().splitlines()[-1]
    _remount(disk, 'rw,size=8m')
    status, _, error = _batch(disk / 'run', *FEW)
    assert status == 0 and _hashes(disk / 'run') == few[1]


def test_interrupted_it_finishes_what_it_began(tmp_path, few):
    out = tmp_path / 'run'
    process = _start(f'--out={out}', *MANY)
    while _lines(out) < 10 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 143, text
    assert len(_hashes(out)) == _lines(out) < 200 and (out / 'index.html').exists()


def test_two_processes_make_the_same_pictures(tmp_path, few):
    port, out = free_port(), tmp_path / 'run'
    both = [_start(f'--out={out}', *FEW, '--distributed', '--num_processes=2', f'--process_id={i}',
                   f'--coordinator_address=localhost:{port}')
            for i in range(2)]
    texts = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    assert _hashes(out) == few[1]
    own = [(out / name).read_bytes().count(b'\n') for name in (
        'manifest.jsonl', 'manifest-1.jsonl')]
    assert own == [6, 6]


@pytest.mark.slow
def test_two_devices_make_the_same_pictures(tmp_path, few):
    status, _, error = _batch(tmp_path / 'run', *FEW, **devices(2))
    assert status == 0 and '2 device(s)' in error
    assert _hashes(tmp_path / 'run') == few[1]


def test_verify(tmp_path, few):
    status, out, error = run_main('-m', 'launch.verify', few[0], '--sample=5')
    assert status == 0 and '5 of 5 pictures are equal to the bit' in out, error
    broken = tmp_path / 'broken'
    shutil.copytree(few[0], broken)
    records = list(folder.read(broken).values())
    first, second = (broken / record['file'] for record in records[:2])
    shutil.copy(first, second)  # another picture than its record says
    first.write_bytes(first.read_bytes()[:-40])
    with open(broken / 'manifest.jsonl', 'a') as file:  # a record of another picture
        file.write(json.dumps({**records[2], 'pixels': '0' * 64}) + '\n')
    status, out, error = run_main('-m', 'launch.verify', broken, '--sample=all')
    assert status == 1 and '9 of 12 pictures are equal to the bit' in out, (out, error)
    status, _, error = run_main('-m', 'launch.verify', tmp_path)
    assert status == 1 and 'expected the folder of a run' in error


def test_damage_is_told_and_made_again(tmp_path, few):
    """A picture that is cut, and a line of the manifest lost to a power failure."""
    run = tmp_path / 'run'
    shutil.copytree(few[0], run)
    cut, lost, *_ = folder.read(run).values()
    os.truncate(run / cut['file'], 100)
    file = run / 'manifest.jsonl'
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1] = b'\0' * (len(lines[1]) - 1) + b'\n'
    file.write_bytes(b''.join(lines))
    status, _, error = _batch(run, *FEW)
    assert status == 0 and '10 pictures are there, 2 to make' in error, error
    assert f'{cut["file"]}: 100 bytes, expected {cut["file_bytes"]}' in error
    assert 'manifest.jsonl:2: damaged' in error and '--repair' in error
    assert _hashes(run) == few[1]
    (run / lost['file']).write_bytes(b'')
    status, out, error = run_main('-m', 'launch.verify', run, '--repair')
    assert status == 0 and 'manifest.jsonl:2: damaged' in out, error
    assert f'{lost["file"]}: 0 bytes' in out and '2 damaged pictures and lines' in out
    assert folder.finished(run) == set(few[1]) - {lost['id']}
    status, _, error = _batch(run, *FEW)
    assert status == 0 and 'damaged' not in error and _hashes(run) == few[1]


def test_a_picture_of_a_run_is_made_again_from_its_file(tmp_path, few):
    record = next(iter(folder.read(few[0]).values()))
    status, out, error = run_main('-m', 'launch.generate', f'--from={few[0] / record["file"]}',
                                  f'--out={tmp_path}')
    assert status == 0, error
    assert folder.pixels_of(next(tmp_path.glob('0*.png'))) == record['pixels']


def test_failures_are_recorded_and_the_run_goes_on(tmp_path, few):
    plan = tmp_path / 'plan.jsonl'
    plan.write_text('\n'.join([
        '{"prompt": "red apple", "steps": 2, "seed": 0}', '{"prompt": "red apple", "steps": 2}',
        '{"prompt": "a", "image": "gone.png"}', '{"prompt": "b", "width": 65}',
        '{"prompt": "<lora:none:1>"}', '{"prompt": "c", "stepps": 3}', '{"prompt": "d",']))
    status, _, error = _batch(tmp_path / 'run', f'--requests={plan}')
    assert status == 1 and not (tmp_path / 'run').exists()
    assert 'plan.jsonl:6:17: unknown field' in error and 'plan.jsonl:7:16' in error
    assert '--skip_bad' in error
    status, _, error = _batch(tmp_path / 'run', f'--requests={plan}', '--skip_bad')
    assert status == 3, error
    found = folder.read(tmp_path / 'run')
    made = {key: record['pixels'] for key, record in found.items() if 'file' in record}
    assert len(made) == 1 and made.items() <= few[1].items()  # the first two are one
    errors = sorted(record['error'] for record in found.values() if 'error' in record)
    assert len(errors) == 5
    for words in ('gone.png', 'width=65', "adapter 'none'", "did you mean 'steps'", 'Expecting'):
        assert any(words in error for error in errors), errors


def test_dry_run(tmp_path):
    status, out, error = _batch(tmp_path / 'run', *MANY, '--dry_run')
    assert status == 0, error
    assert '200 requests, 0 pictures are there, 200 to make' in out
    assert re.search('200 pictures, [0-9]+ at a time; 300 model calls', out)
    assert 'TFLOP' in out and 'GiB on each device' in out
    assert not (tmp_path / 'run').exists()


def test_a_folder_of_something_else_is_refused_first(tmp_path):
    (tmp_path / 'index.html').write_text('mine')
    (tmp_path / '.mine.tmp').write_text('mine')
    status, _, error = _batch(tmp_path, '--prompt=a', '--config.checkpoint=nowhere')
    assert status == 1 and 'holds index.html' in error and len(error.strip().splitlines()) == 1
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        'index.html': 'mine', '.mine.tmp': 'mine'}


@pytest.mark.parametrize('flags, words', [
    ((), 'no requests: expected --requests=FILE'),
    (('--prompt=a', '--seeds=x'), '--seeds=x: expected'),
    (('--prompt=a', '--seeds=0-99999999999'), '100000000000 seeds, expected at most 1000000'),
    (('--prompt=a', '--config.width=65536', '--config.height=65536'), '65536x65536: expected at'),
    (('--prompt=a', '--grid=stesp=3'), "did you mean 'steps'"),
    (('--prompt=a', '--image_prompt=net=x'), 'expected image= or embeds='),
    (('--requests=nothing.jsonl',), 'nothing.jsonl')])
def test_wrong_flags_are_told_in_one_line(tmp_path, flags, words):
    status, _, error = _batch(tmp_path / 'run', *flags)
    assert status == 1 and words in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_image_prompts(checkpoint, tmp_path):
    """Of a plan, relative to its file, and by a flag for requests that have none."""
    tiny_ip_adapters.adapters(TINY['sd1'].unet, tmp_path, plus='plus')
    jaxsd.save_network(tiny_ip_adapters.encoder(), tmp_path / 'look')
    for name, seed in (('a', 0), ('b', 1)):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f'{name}.png')
    plan = tmp_path / 'plan.jsonl'
    plan.write_text('\n'.join(json.dumps({'prompt': 'cat', **fields}) for fields in (
        {}, {'image_prompts': [{'net': 'plus', 'image': 'b.png', 'weight': 0.5}]},
        {'image_prompts': [{'net': 'plus', 'image': 'a.png'}]})))
    flags = (f'--checkpoint={checkpoint}', f'--requests={plan}', '--steps=2', '--seeds=0',
             f'--ip_adapter={tmp_path}/plus.safetensors', f'--image_encoder={tmp_path}/look',
             f'--image_prompt=net=plus, image={tmp_path}/a.png')
    status, _, error = _batch(tmp_path / 'run', *flags)
    assert status == 0, error
    assert len(set(_hashes(tmp_path / 'run').values())) == 2  # the last is the flag's, made once
    status, _, error = _batch(tmp_path / 'run', *flags)
    assert status == 0 and '0 to make' in error
