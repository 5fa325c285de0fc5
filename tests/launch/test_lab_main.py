"""The laboratory's command line, run as a user runs it, on a tiny checkpoint."""

import csv
import json
import re

import pytest
from mains import run_main
from PIL import Image

import jaxsd
from jaxsd import sampling

SIZE = '--config.width=64', '--config.height=64'


def _run(*flags, start=('-m', 'launch.lab')):
    return run_main(*start, *flags)


@pytest.mark.slow
def test_sweep_writes_its_three_files(checkpoint, tmp_path):
    code, stdout, stderr = _run(
        'sweep', f'--checkpoint={checkpoint}', *SIZE, '--samplers=euler, dpmpp_2m_sde(eta=0.5)',
        '--schedules=karras', '--steps=2,4', '--guidance=1', '--prompt=cat', '--seeds=3',
        '--batch_size=4', '--reference_steps=20', f'--out={tmp_path}/out')
    assert code == 0, stderr
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == [
        'grid.png', 'report.html', 'results.csv']
    assert re.search(r'sampling: 100%', stderr) and stdout.count('\n') == 3
    with open(tmp_path / 'out' / 'results.csv') as file:
        rows = list(csv.DictReader(file))
    assert [(r['sampler'], r['steps'], r['calls']) for r in rows] == [
        (name, n, n) for name in ('euler', 'dpmpp_2m_sde(eta=0.5)') for n in '24']
    assert all(float(r['error']) > 0 for r in rows)
    page = (tmp_path / 'out' / 'report.html').read_text()
    assert 'Samplers and schedules on tiny' in page and '--reference_steps=20' in page


@pytest.mark.slow
def test_trace_writes_a_picture_and_its_numbers(checkpoint, tmp_path):
    code, _, stderr = _run('trace', f'--checkpoint={checkpoint}', *SIZE, '--prompt=cat',
                           '--config.steps=3', f'--out={tmp_path}/t.png')
    assert code == 0, stderr
    with Image.open(tmp_path / 't.png') as image:
        assert image.format == 'PNG'
    found = json.loads((tmp_path / 't.json').read_text())
    assert found['request']['prompt'] == 'cat' and len(found['calls']) == 3


@pytest.mark.slow
def test_a_found_schedule_can_be_walked(checkpoint, tmp_path):
    path = tmp_path / 's.json'
    code, stdout, stderr = _run(
        'schedule', f'--checkpoint={checkpoint}', *SIZE, '--steps=3,5', '--prompt=cat',
        '--seeds=1', '--options=levels=12', f'--out={path}')
    assert code == 0, stderr
    model = jaxsd.load(checkpoint)
    assert len(sampling.schedule(str(path), 3, model.config.schedule)) == 4
    assert '5 steps: ' in stdout


@pytest.mark.parametrize('flags, message', [
    ([], 'expected a command, sweep, trace, schedule; found None'),
    (['swep'], "found 'swep'"),
    (['sweep', '--samplers=eulr'], "unknown sampler 'eulr': did you mean 'euler'"),
    (['sweep', '--samplers=unipc(order=9)'], 'order=9: expected a whole number from 1 to 3'),
    (['sweep', '--schedules=karas'], "unknown schedule 'karas': did you mean 'karras'"),
    (['sweep', '--steps=5,x'], 'expected whole numbers'),
    (['sweep', '--retrieval', '--prompt=qwerty'], r"no captions of emoji: \['qwerty'\]"),
    (['sweep', '--config.stepz=3'], 'no such field: stepz'),
    (['sweep', 'more'], "unexpected argument 'more'"),
    (['trace'], '--prompt is missing'),
    (['schedule', '--out=x.txt'], 'ends in .json'),
    (['schedule', '--method=gitz', '--out={tmp}/x.json'], "did you mean 'gits'"),
])
def test_bad_input_is_one_clear_line(checkpoint, tmp_path, flags, message):
    command, *rest = flags or [None]
    if command in ('sweep', 'trace', 'schedule'):
        rest = [f'--checkpoint={checkpoint}', *SIZE, *rest]
        if command == 'sweep':
            rest.append(f'--out={tmp_path}/out')
    words = ([command] if command else []) + [w.format(tmp=tmp_path) for w in rest]
    code, _, stderr = _run(*words)
    assert code in (1, 2)
    assert re.fullmatch(r'error: [^\n]*\n', stderr) and re.search(message, stderr), stderr
    assert not [path for path in tmp_path.rglob('*') if path.is_file()]


def test_missing_matplotlib_is_one_clear_line(checkpoint, tmp_path):
    hidden = ('import runpy, sys; sys.modules["matplotlib"] = None\n'
              'runpy.run_module("launch.lab", run_name="__main__")')
    code, _, stderr = _run('sweep', f'--checkpoint={checkpoint}', f'--out={tmp_path}',
                           start=('-c', hidden))
    assert code == 1 and re.fullmatch(r'error: .*pip install matplotlib.*\n', stderr), stderr


def test_help_needs_no_model():
    code, stdout, _ = _run('--help')
    assert code in (0, 1) and 'sweep' in stdout
