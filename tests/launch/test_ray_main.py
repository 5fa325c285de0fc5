"""launch.ray_batch on a local Ray: the same pictures, also where actors are killed."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from mains import ROOT, environment, run_main

from jaxsd.batch import folder

pytest.importorskip('ray')
FLAGS = ('--prompt=red apple', '--prompt=rocket', '--seeds=0-15', '--grid=steps=1,2,3',
         '--config.sampler=euler_ancestral')


def _actors():
    """The process ids of Ray's map workers on this machine."""
    found = []
    for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
        try:
            if path.read_bytes().startswith(b'ray::') and b'FlatMap' in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def _pixels(out):
    found = {key: record['pixels'] for key, record in folder.read(out).items()}
    for record in folder.read(out).values():
        assert folder.pixels_of(out / record['file']) == record['pixels']
    return found


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='needs /proc')
@pytest.mark.slow
def test_the_same_pictures_though_an_actor_is_killed(tmp_path):
    plain, out = tmp_path / 'plain', tmp_path / 'ray'
    status, _, error = run_main('-m', 'launch.batch', f'--out={plain}', *FLAGS)
    assert status == 0, error
    process = subprocess.Popen(
        [sys.executable, '-m', 'launch.ray_batch', f'--out={out}', '--actors=2', *FLAGS], cwd=ROOT,
        env=environment(RAY_DEDUP_LOGS='0'), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True)
    manifest, start = out / 'manifest.jsonl', time.monotonic()
    while not manifest.exists() or not manifest.read_bytes().count(b'\n'):
        assert process.poll() is None and time.monotonic() < start + 300, process.stdout.read()
        time.sleep(0.02)
    victims = _actors()
    assert victims
    os.kill(victims[0], signal.SIGKILL)
    text, _ = process.communicate(timeout=400)
    assert process.returncode == 0, text
    assert len(_pixels(plain)) == 96
    assert _pixels(out) == _pixels(plain)
    assert len(manifest.read_bytes().splitlines()) == 96
    status, _, error = run_main('-m', 'launch.ray_batch', f'--out={out}', *FLAGS)
    assert status == 0 and '96 pictures are there, 0 to make' in error


def test_bad_actors_are_told(tmp_path):
    status, _, error = run_main('-m', 'launch.ray_batch', f'--out={tmp_path}', '--prompt=a',
                                '--actors=4-2')
    assert status == 1 and '--actors=4-2: expected a number' in error
