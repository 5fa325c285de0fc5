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
from launch import evaluate, retrieval

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


def write_lora(model, path, size):
    """A LoRA of rank 2 whose second factors are filled with `size`."""
    method = methods.lora(model, AdapterConfig(rank=2), np.random.default_rng(0))
    jaxsd.save_adapter(method.result({part: {layer: arrays | {
        'up': np.full_like(arrays['up'], size)} for layer, arrays in layers.items()}
        for part, layers in method.trainable.items()}), path)


def test_evaluate_draws_with_a_lora_and_looks_up_in_ink(model, tmp_path):
    """A LoRA that does nothing changes no picture, one of noise lowers the score; from emoji in
    ink, which are all blue, coloured pictures are farther off."""
    (tmp_path / 'emoji_eval.txt').write_text('rocket\nred apple\nalien\nclamp\n')
    shutil.copy(LISTS / 'emoji_reference.npz', tmp_path)
    for name, size in ('nothing', 0.0), ('noise', 1.0):
        write_lora(model, tmp_path / f'{name}.safetensors', size)

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


def test_evaluate_measures_networks_and_edges(model, tmp_path):
    """Of pictures of 16x16 cells: a LoRA of noise raises the errors of the predicted latents and
    leaves the VAE's PSNR; edges are kept to with the ControlNet."""
    captions = ['rocket', 'red apple', 'alien', 'clamp']
    (tmp_path / 'emoji_eval.txt').write_text('\n'.join(captions) + '\n')
    shutil.copy(LISTS / 'emoji_reference.npz', tmp_path)
    data, out = tmp_path / 'data.npz', tmp_path / 'out.json'

    def measured(*flags):
        return run_main('-m', 'launch.evaluate', f'--lists={tmp_path}', f'--data={data}',
                        f'--out={out}', '--config.steps=6', *flags)

    code, _, error = measured('--errors')
    assert code == 1 and f'{data}: no such file. Build the data set first' in error, error
    code, _, error = measured('--errors', '--grid=grid.png')
    assert code == 1 and '--grid: expected neither' in error, error

    reference = retrieval.read_reference(LISTS / 'emoji_reference.npz')
    some = reference['heldout'] | np.isin(reference['captions'], captions)
    np.savez(data, captions=reference['captions'][some],
             images=np.stack([retrieval.sketch(f, 64) for f in reference['features'][some]]))
    write_lora(model, tmp_path / 'noise.safetensors', 1.0)
    found = []
    for lora in ([], [f'--lora={tmp_path / "noise.safetensors"}']):
        code, text, error = measured('--errors', '--batch=49', *lora)
        assert code == 0 and 'captions' not in text and 'dB' in text, error
        found.append(json.loads(out.read_text()))
    assert found[0]['vae_psnr'] == found[1]['vae_psnr'] > 20
    (plain, toned), (noisy, _) = ([f['prediction_errors'][name] for name in ('plain', 'held out')]
                                  for f in found)
    assert plain[0] < plain[-1] < 0.5 < noisy[-1] and toned[-1] < 0.5

    code, text, error = measured(f'--edges={ROOT}/checkpoints/emoji_edges', '--batch=4')
    assert code == 0 and 'found' in text, error
    rows = json.loads(out.read_text())
    free, kept = (rows[f'no caption, edges times {scale}, guidance 1'] for scale in (0, 1))
    assert kept['found'] > free['found'] + 0.1 and kept['drawn'] > free['drawn'] + 0.1


def test_kept_edges_are_near():
    edges, others = np.zeros((2, 1, 9, 9), bool)
    edges[0, 2, 2] = edges[0, 7, 7] = others[0, 4, 4] = True
    assert (evaluate.kept(edges, others), evaluate.kept(others, edges)) == (0.5, 1.0)
