"""The command line, run as a user runs it, on a tiny checkpoint."""

import json
import re

import numpy as np
import pytest
from mains import ROOT, run_main
from PIL import Image

import jaxsd
from launch.generate import Bar

CONFIGS = sorted(p.stem for p in (ROOT / 'configs').glob('*.py') if not p.stem.startswith('train'))


def _run(*flags):
    return run_main('-m', 'launch.generate', *flags)


@pytest.mark.slow
def test_pictures_from_prompts(checkpoint, tmp_path):
    out = tmp_path / 'new' / 'out'
    long = 'red ' * 14 + 'dog'
    code, stdout, stderr = _run(
        f'--checkpoint={checkpoint}', f'--out={out}', '--prompt=', f'--prompt={long}',
        '--num_images=2', '--seed=18446744073709551615', '--negative_prompt=cat',
        '--config.steps=2', '--config.width=64', '--config.height=64', '--config.sampler=unipc',
        '--config.sampler_options=order=1, variant=bh1', '--config.guidance_options=rescale=0.5')
    assert code == 0, stderr
    assert re.search(r'sampling: 100%.*8/8.*(it/s|s/it)', stderr)
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
        assert re.search(f'Seed: {last}, Size: 64x64, Model hash: [0-9a-f]{{10}}, Model: tiny',
                         first.text['parameters'])
        found = json.loads(first.text['jaxsd'])['request']
        assert (found['seed'], found['negative_prompt'], found['steps']) == (last, 'cat', 2)
        assert found['sampler_options'] == {'order': 1, 'variant': 'bh1'}
        assert found['guidance_options'] == {'rescale': 0.5}


@pytest.mark.slow
def test_pictures_from_pictures(checkpoint, tmp_path):
    """Two pictures painted on beside a mask, with a VAE of their own and previews."""
    rng = np.random.default_rng(0)
    given = rng.integers(0, 256, (2, 64, 64, 3), np.uint8)
    for name, image in zip('ab', given):
        Image.fromarray(image).save(tmp_path / f'{name}.png')
    Image.fromarray(np.tile(np.uint8([[0] * 40 + [255] * 24]), (64, 1))).save(tmp_path / 'mask.png')
    out = tmp_path / 'out'
    code, stdout, stderr = _run(
        f'--checkpoint={checkpoint}', f'--vae={checkpoint}', f'--preview={checkpoint}',
        f'--out={out}', '--prompt=cat', '--seed=1', f'--image={tmp_path}/a.png',
        f'--image={tmp_path}/b.png', f'--mask={tmp_path}/mask.png', '--strength=0.5',
        '--config.steps=4', '--config.width=64', '--config.height=64',
        '--config.request=fill=edge, mask_blur=1')
    assert code == 0, stderr
    assert sorted(p.name for p in out.iterdir()) == [
        '00000-1-cat.png', '00001-1-cat.png', '00002-grid.png', 'preview.png']
    for i, image in enumerate(given):
        with Image.open(out / f'0000{i}-1-cat.png') as painted:
            np.testing.assert_array_equal(np.asarray(painted)[:, :36], image[:, :36])
            assert (np.asarray(painted)[:, 40:] != image[:, 40:]).any()
            assert 'Denoising strength: 0.5' in painted.text['parameters']
            found = json.loads(painted.text['jaxsd'])['request']
            assert (found['image'], found['mask_blur']) == (f'{tmp_path}/{"ab"[i]}.png', 1)


@pytest.mark.parametrize('calls, parts', [
    (0, ''),  # strength 0
    (1, r' \(compilation \d+\.\d s, sampling 0\.0 s, decoding \d+\.\d s\)'),
    (3, r' \(compilation \d+\.\d s, sampling \d+\.\d s: \d+\.\d\d steps/s, decoding \d+\.\d s\)')])
def test_what_the_parts_of_a_run_took(calls, parts):
    with Bar() as bar:
        for done in range(1, calls + 1):
            bar(done, calls)
    assert re.fullmatch(parts, bar.parts())


@pytest.mark.slow
@pytest.mark.parametrize('flags, message', [
    (['--config.sampler=dpmpp'], "unknown sampler 'dpmpp': did you mean 'dpmpp_.*Known: euler"),
    (['--config.width=100'], 'width=100: expected a multiple of 8 pixels'),
    (['--checkpoint=missing.safetensors'], 'missing.safetensors: no such file'),
    (['--out={tmp}/file/out'], 'file'),
    (['--config.stepz=3'], 'no such field: stepz Did you mean steps'),
    (['--config=missing.py'], 'missing.py'),
    (['--stepz=3'], 'stepz'),
    (['--config=sd155'], "unknown recipe 'sd155': did you mean 'sd15'"),
    (['--image=missing.png'], 'missing.png: no such file'),
    (['--seed=x'], 'seed'),
    (['--image={tmp}/file'], 'file is not an image'),
    (['--strength=2'], 'strength'),
    (['--mask=mask.png'], 'mask: expected image='),
    (['--image=missing.png', '--outpaint=1,2,x,0'], '--outpaint=1,2,x,0: expected whole numbers'),
    (['--control=image=a.png'], 'expected net=PATH in it'),
    (['--control=net=missing, image={tmp}/file'], 'file is not an image'),
    (['--control=net=a, image={tmp}/a.png, preprocess=canny, lo=3'], 'canny takes no lo'),
    (['--control=net=a, image={tmp}/a.png, mode=edge'], "unknown mode 'edge': did you mean"),
    (['--hires=scal=2'], "unknown field of hires 'scal': did you mean 'scale'"),
    (['--config.request=size=3'], "unknown field of Request 'size': did you mean"),
    (['--vae=missing.safetensors'], 'missing.safetensors: no such file'),
    (['red apple'], 'give prompts as --prompt="red apple"'),
])
def test_bad_input_is_one_clear_line(checkpoint, tmp_path, flags, message):
    (tmp_path / 'file').touch()
    Image.new('RGB', (64, 64)).save(tmp_path / 'a.png')
    code, stdout, stderr = _run(
        f'--checkpoint={checkpoint}', f'--out={tmp_path}/out', '--prompt=cat', '--config.width=64',
        '--config.height=64', *(flag.format(tmp=tmp_path) for flag in flags))
    assert code in (1, 2)
    assert re.fullmatch(r'error: [^\n]*\n', stderr) and re.search(message, stderr), stderr
    assert list(tmp_path.rglob('*.png')) == [tmp_path / 'a.png']


def test_help_needs_no_model():
    code, stdout, _ = _run('--help')
    assert code in (0, 1) and '--prompt' in stdout  # absl exits with 1 after --help
    assert ('--steps: Of the recipe: steps of the sampler, those that suit the model if left out, '
            'most often 25; int.') in ' '.join(stdout.split())


@pytest.mark.slow
def test_a_checkpoint_without_a_recipe_has_its_own_size(checkpoint, tmp_path):
    """And what is far from it is said. --steps=1 is --config.steps=1."""
    config = jaxsd.load(checkpoint).config
    native = config.unet.sample_size * config.vae.factor
    for flags, size in (([], native), ([f'--width={4 * native}', '--height', f'{4 * native}'],
                                       4 * native)):
        code, stdout, stderr = _run(f'--checkpoint={checkpoint}', f'--out={tmp_path}',
                                    '--prompt=cat', '--steps=1', *flags)
        assert code == 0 and f'1 picture(s) of {size}x{size}' in stdout, stderr
        said = f'this model is made for {native}x{native}'
        assert (said in stderr) == (size != native)
        with Image.open(sorted(tmp_path.glob('*.png'))[-1]) as image:
            assert json.loads(image.text['jaxsd'])['request']['steps'] == 1


@pytest.mark.parametrize('name', CONFIGS)
def test_recipes(name):
    scope = {'__file__': str(ROOT / 'configs' / f'{name}.py')}
    exec((ROOT / 'configs' / f'{name}.py').read_text(), scope)
    recipe = scope['get_config']()
    jaxsd.Request(**{k: recipe[k] for k in ('sampler', 'schedule', 'steps', 'guidance')})
    if name in jaxsd.versions():
        native = jaxsd.read_config(name).unet.sample_size * 8
        native = None if name == 'x4_upscaler' else native  # what the picture's size makes it
        assert (recipe.width, recipe.height) == (native, native)
