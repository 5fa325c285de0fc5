"""The command line, run as a user runs it, on a tiny checkpoint."""

import json
import re

import numpy as np
import pytest
from mains import ROOT, run_main
from PIL import Image

import jaxsd

CONFIGS = sorted(p.stem for p in (ROOT / 'configs').glob('*.py') if not p.stem.startswith('train'))


def _run(*flags):
    return run_main('-m', 'launch.generate', *flags)


def test_pictures_from_prompts(checkpoint, tmp_path):
    out = tmp_path / 'new' / 'out'
    long = 'red ' * 14 + 'dog'
    code, stdout, stderr = _run(
        f'--checkpoint={checkpoint}', f'--out={out}', '--prompt=', f'--prompt={long}',
        '--num_images=2', '--seed=18446744073709551615', '--negative_prompt=cat',
        '--config.steps=2', '--config.width=64', '--config.height=64', '--config.sampler=unipc',
        '--config.sampler_options=order=1, variant=bh1', '--config.guidance_options=rescale=0.5')
    assert code == 0, stderr
    assert "warning: prompt too long: 15 tokens" in stderr and "dropped: 'dog'" in stderr
    assert re.search(r'sampling: 100%.*2/2.*it/s', stderr)
    assert re.search(r'4 picture\(s\) of 64x64 in .*steps/s', stdout)
    last = 2**64 - 1  # the seed after it is 0
    names = [f'00000-{last}-no-prompt.png', '00001-0-no-prompt.png',
             f'00002-{last}-{"red-" * 10}'[:-1] + '.png', f'00003-0-{"red-" * 10}'[:-1] + '.png',
             '00004-grid.png']
    assert sorted(p.name for p in out.iterdir()) == names
    assert [line for line in stdout.splitlines() if line.endswith('.png')] == [
        str(out / name) for name in names]
    with Image.open(out / names[0]) as first, Image.open(out / names[-1]) as grid:
        assert first.size == (64, 64) and grid.size == (128, 128)
        np.testing.assert_array_equal(np.asarray(grid)[:64, :64], np.asarray(first))
        assert f'Seed: {last}, Size: 64x64, Model: tiny' in first.text['parameters']
        found = json.loads(first.text['jaxsd'])['request']
        assert (found['seed'], found['negative_prompt'], found['steps']) == (last, 'cat', 2)
        assert found['sampler_options'] == {'order': 1, 'variant': 'bh1'}
        assert found['guidance_options'] == {'rescale': 0.5}


@pytest.mark.parametrize('flags, message', [
    (['--config.sampler=dpmpp'], "unknown sampler 'dpmpp': did you mean 'dpmpp_.*Known: euler"),
    (['--config.width=100'], 'width=100: expected a multiple of 8 pixels'),
    (['--checkpoint=missing.safetensors'], 'missing.safetensors: no such file'),
    (['--out={tmp}/file/out'], 'file'),
    (['--config.stepz=3'], 'no such field: stepz Did you mean steps'),
    (['--config=missing.py'], 'missing.py'),
    (['--seed=x'], 'seed'),
    (['red apple'], 'give prompts as --prompt="red apple"'),
])
def test_bad_input_is_one_clear_line(checkpoint, tmp_path, flags, message):
    (tmp_path / 'file').touch()
    code, stdout, stderr = _run(
        f'--checkpoint={checkpoint}', f'--out={tmp_path}/out', '--prompt=cat', '--config.width=64',
        '--config.height=64', *(flag.format(tmp=tmp_path) for flag in flags))
    assert code in (1, 2)
    assert re.fullmatch(r'error: [^\n]*\n', stderr) and re.search(message, stderr), stderr
    assert not list(tmp_path.rglob('*.png'))


def test_help_needs_no_model():
    code, stdout, _ = _run('--help')
    assert code in (0, 1) and '--prompt' in stdout  # absl exits with 1 after --help


@pytest.mark.parametrize('name', CONFIGS)
def test_recipes(name):
    scope = {'__file__': str(ROOT / 'configs' / f'{name}.py')}
    exec((ROOT / 'configs' / f'{name}.py').read_text(), scope)
    recipe = scope['get_config']()
    jaxsd.Request(**{k: recipe[k] for k in ('sampler', 'schedule', 'steps', 'guidance')})
    if name != 'emoji':
        native = jaxsd.read_config(name).unet.sample_size * 8
        assert (recipe.width, recipe.height) == (native, native)
