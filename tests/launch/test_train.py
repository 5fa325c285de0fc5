"""The trainer from end to end: a real process, killed, started again, its export used."""

import functools
import importlib
import operator
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import write_tokenizer
from PIL import Image
from safetensors.numpy import load_file

import jaxsd
from jaxsd.models import spec
from jaxsd.train.from_scratch import model_config

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECIPE = """
from configs.train_emoji64 import get_config as full


def get_config():
    c = full()
    c.data, c.tokenizer, c.out, c.export = 'data.npz', 'tokenizer', 'run', 'model'
    c.vae.update(block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, sample_size=16)
    c.text_encoder.update(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                          num_attention_heads=2, max_position_embeddings=16)
    c.unet.update(in_channels=4, out_channels=4, block_out_channels=(16,), transformer_layers=(1,),
                  heads=(2,), only_cross_attention=(False,), cross_attention_dim=32,
                  norm_num_groups=4)
    for stage in c.stages.values():
        stage.train.update(steps=6, batch_size=4, save_every=2, sample_every=2, log_every=1)
        stage.optimizer.warmup = 1
    return c
"""


def train(folder, *arguments):
    environment = os.environ | {'PYTHONPATH': str(ROOT), 'PYTHONUNBUFFERED': '1'}
    return subprocess.Popen(
        [sys.executable, '-m', 'launch.train', f'--config={folder / "recipe.py"}', *arguments],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'recipe.py').write_text(RECIPE)
    write_tokenizer(tmp_path / 'tokenizer')
    rng = np.random.default_rng(0)
    np.savez(tmp_path / 'data.npz', images=rng.integers(0, 256, (12, 16, 16, 3), np.uint8),
             captions=np.array(['red apple', 'green cat', 'a dog'] * 4),
             plain=np.ones(12, bool), heldout=np.arange(12) == 11)
    return tmp_path


@pytest.mark.slow
def test_killed_and_resumed(folder):
    process = train(folder)
    for line in process.stdout:  # in the middle of the first stage, after a state was written
        if '"step": 3' in line:
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (folder / 'model').exists()

    process = train(folder)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert '"step": 1,' not in out.split('\n')[0]  # it went on, not from the beginning
    for name in ('vae', 'text', 'unet', 'decoder'):
        assert {'checkpoints', 'log.csv', 'curve.png'} <= {
            p.name for p in (folder / 'run' / name).iterdir()}
    assert (folder / 'run' / 'vae' / 'samples' / '000006.png').exists()
    assert (folder / 'run' / 'unet' / 'samples' / '000006.png').exists()

    model = jaxsd.load(folder / 'model')
    assert model.config.schedule.prediction_type == 'v_prediction'
    images = jaxsd.generate(model, [jaxsd.Request('red apple', seed=1, steps=2)])
    assert images.shape == (1, 16, 16, 3)

    process = train(folder)  # nothing is left to do
    out, err = process.communicate()
    assert process.returncode == 0 and 'step' not in out

    further = ['--config.start=model', '--config.out=run2', '--config.export=model2']
    process = train(folder, *further, "--config.skip=('vae','text')")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert {p.name for p in (folder / 'run2').iterdir() if p.is_dir()} == {'unet', 'decoder'}
    before, after = model.params, jaxsd.load(folder / 'model2').params

    def same(*path):
        return all(np.array_equal(a, b) for a, b in zip(*(
            jax.tree.leaves(functools.reduce(operator.getitem, path, p))
            for p in (before, after))))

    assert same('vae', 'encoder') and same('vae', 'quant_conv')
    assert not same('vae', 'decoder') and not same('unet') and not same('text_encoder')

    process = train(folder, *further, '--config.unet.heads=(4,)')
    _, err = process.communicate()
    assert process.returncode == 1 and 'start=model: its unet is not the one' in err

    process = train(folder, '--config.start=model', "--config.start_parts=('vae',)",
                    '--config.unet.heads=(4,)', "--config.skip=('vae','text','decoder')",
                    '--config.out=run3', '--config.export=model3')
    _, err = process.communicate()
    assert process.returncode == 0, err
    after = jaxsd.load(folder / 'model3').params
    assert same('vae') and not same('text_encoder')
    assert jaxsd.load(folder / 'model3').config.unet.heads == (4,)


def test_missing_data_is_one_line(folder):
    (folder / 'data.npz').unlink()
    process = train(folder)
    _, err = process.communicate()
    assert process.returncode == 1 and 'Traceback' not in err
    assert 'launch.emoji_data' in err.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize('flags, said', [
    (['--config.stages.vae.optimizer.warmup=6'],
     'stages.vae.optimizer.warmup=6: expected less than its 6 steps'),
    (["--config.skip=('vea',)"], "skip: expected of decoder, text, unet, vae; found 'vea'"),
    (["--config.start_parts=('clip',)"],
     "start_parts: expected of unet, vae, text_encoder; found 'clip'"),
    ([f'--config={ROOT}/configs/sd15.py'], 'expected a training recipe, such as'),
    (['--config.export=tokenizer'], 'export=tokenizer: is there already')])
def test_what_would_fail_later_is_said_first(folder, flags, said):
    process = train(folder, *flags)
    _, err = process.communicate()
    assert process.returncode == 1 and said in err and err.count('\n') == 1
    assert not (folder / 'run').exists() and (folder / 'tokenizer' / 'vocab.json').exists()


@pytest.mark.slow
def test_states_may_be_written_more_often_than_the_log(folder):
    process = train(folder, *(f'--config.stages.{name}.train.log_every=5'
                              for name in ('vae', 'text', 'unet', 'decoder')))
    _, err = process.communicate()
    assert process.returncode == 0, err


@pytest.mark.parametrize('name', ['train_emoji64', 'train_emoji64_longer', 'train_emoji128'])
def test_the_shipped_recipes_fit_40_megabytes_in_float16(name):
    recipe = importlib.import_module(f'configs.{name}').get_config()
    recipe.tokenizer = str(ROOT / recipe.tokenizer)
    config = model_config(recipe)
    assert 2 * spec.count(spec.spec(config)) < 39e6
    assert config.unet.sample_size * config.vae.factor == config.vae.sample_size


@pytest.mark.slow
def test_a_lora_killed_mid_epoch_is_the_same_file(tmp_path, checkpoint):
    """Twice killed with SIGKILL, between and amid its epochs of five steps: the same bytes."""
    rng = np.random.default_rng(0)
    (tmp_path / 'pictures').mkdir()
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(
            tmp_path / 'pictures' / f'{i}.png')
        (tmp_path / 'pictures' / f'{i}.txt').write_text(['red apple', 'a dog'][i % 2])

    def start(name):
        flags = {'model': checkpoint, 'out': f'runs/{name}', 'export': f'{name}.safetensors',
                 'data.sets.pictures.path': 'pictures', 'data.resolution': 64, 'data.flip': True,
                 'data.cache': f'cache/{name}', 'lora.rank': 2, 'optimizer.warmup': 0,
                 'train.dtype': 'float32', 'train.steps': 14, 'train.batch_size': 2,
                 'train.save_every': 3, 'train.log_every': 1, 'train.sample_every': 0}
        return subprocess.Popen(
            [sys.executable, '-m', 'launch.train', f'--config={ROOT}/configs/train_lora.py',
             *(f'--config.{field}={value}' for field, value in flags.items())], cwd=tmp_path,
            env=os.environ | {'PYTHONPATH': str(ROOT), 'PYTHONUNBUFFERED': '1'}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    for step in (4, 8):
        process = start('killed')
        for line in process.stdout:
            if f'"step": {step},' in line or f'"step": {step}}}' in line:
                process.send_signal(signal.SIGKILL)
                break
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    for name in ('killed', 'whole'):
        process = start(name)
        _, err = process.communicate()
        assert process.returncode == 0, err
    killed, whole = (load_file(tmp_path / f'{name}.safetensors') for name in ('killed', 'whole'))
    assert killed.keys() == whole.keys() and any(a.any() for k, a in whole.items() if 'up' in k)
    for key, array in whole.items():
        np.testing.assert_array_equal(killed[key], array)
