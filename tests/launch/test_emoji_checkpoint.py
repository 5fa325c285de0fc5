"""The shipped checkpoint: its files, and that its pictures are what their prompts say."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from mains import run_main
from safetensors import safe_open

import jaxsd
from jaxsd.run import resolve
from jaxsd.train import methods
from jaxsd.train.config import AdapterConfig
from launch import retrieval

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER, LISTS = ROOT / 'checkpoints' / 'emoji', ROOT / 'tests' / 'data'


@pytest.fixture(scope='module')
def model():
    return jaxsd.load(FOLDER)


def test_small_and_in_float16():
    files = [p for p in FOLDER.rglob('*') if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 40e6
    for path in FOLDER.glob('*/*.safetensors'):
        with safe_open(path, 'numpy') as file:
            assert {file.get_slice(k).get_dtype() for k in file.keys()} == {'F16'}  # noqa: SIM118


@pytest.mark.slow
@pytest.mark.usefixtures('optimised')
def test_pictures_are_found_by_their_captions(model):
    """A quarter of what launch/evaluate.py measures: 50 plain captions, at the model's own guidance
    and at 7, which most front ends ask for; and that it is the captions that say what is drawn."""
    reference = retrieval.read_reference(LISTS / 'emoji_reference.npz')
    captions = (LISTS / 'emoji_eval.txt').read_text().splitlines()[::4]
    rows = {caption: i for i, caption in enumerate(reference['captions'])}
    targets = np.array([rows[caption] for caption in captions])
    scores = {}
    for guidance in (None, 7.0, 0.0):
        images = jaxsd.generate(model, [
            jaxsd.Request(c, seed=0, guidance=guidance, weighting='plain') for c in captions])
        ranks = retrieval.ranks(retrieval.pool(images), targets, reference['features'])
        scores[guidance] = retrieval.score(ranks)
    assert scores[None]['top1'] >= 0.98 and scores[None]['top5'] == 1
    assert scores[7.0]['top1'] >= scores[None]['top1'] - 0.04
    assert scores[0.0]['top1'] <= 0.1


def test_what_suits_it_is_in_its_folder(model, tmp_path):
    """Without a recipe, and after it was saved again."""
    jaxsd.save(model, tmp_path / 'a')
    for found in (model, jaxsd.load(tmp_path / 'a')):
        [request] = resolve([jaxsd.Request('red apple')], found.config)
        assert (request.steps, request.guidance, request.sampler, request.schedule) == (
            20, 2.0, 'dpmpp_2m', 'karras')
        [request] = resolve([jaxsd.Request('red apple', steps=9, guidance=1)], found.config)
        assert (request.steps, request.guidance) == (9, 1)


def test_the_prompt_decides_the_picture(model):
    """Another prompt with the same seed is another picture; the same one is the same."""
    first, again, other = jaxsd.generate(model, [
        jaxsd.Request(prompt, seed=3, steps=8)
        for prompt in ('red apple', 'red apple', 'flag: japan')])
    assert np.array_equal(first, again)
    assert np.abs(first.astype(int) - other).mean() > 20


def test_evaluate_draws_with_a_lora_and_looks_up_in_ink(model, tmp_path):
    """A LoRA that does nothing changes no picture, one of noise lowers the score; from emoji in
    ink, which are all blue, coloured pictures are farther off."""
    (tmp_path / 'emoji_eval.txt').write_text('rocket\nred apple\nalien\nclamp\n')
    shutil.copy(LISTS / 'emoji_reference.npz', tmp_path)
    method = methods.lora(model, AdapterConfig(rank=2), np.random.default_rng(0))
    for name, size in ('nothing', 0.0), ('noise', 1.0):
        jaxsd.save_adapter(method.result({part: {layer: arrays | {
            'up': np.full_like(arrays['up'], size)} for layer, arrays in layers.items()}
            for part, layers in method.trainable.items()}), tmp_path / f'{name}.safetensors')

    def measured(*flags):
        out = tmp_path / 'out.json'
        code, text, error = run_main(
            '-m', 'launch.evaluate', '--plain', f'--lists={tmp_path}', '--batch=4', f'--out={out}',
            '--config.steps=6', *flags)
        assert code == 0, error
        found = json.loads(out.read_text())
        assert found['seconds per picture'] > 0 and 'seconds per picture' in text
        assert 'plain, guidance 1' not in found
        return found

    plain = measured()['plain, guidance 2']
    assert plain['n'] == 4 and plain['top1'] >= 0.75
    assert measured(f'--lora={tmp_path / "nothing.safetensors"}')['plain, guidance 2'] == plain
    noise = measured(f'--lora={tmp_path / "noise.safetensors"}')['plain, guidance 2']
    assert noise['top1'] < plain['top1'] and noise['distance'] > plain['distance'] + 20
    assert measured('--ink')['plain, guidance 2']['distance'] > plain['distance'] + 10
