"""The shipped checkpoint: its files, and that its pictures are what their prompts say."""

import pathlib

import numpy as np
import pytest
from safetensors import safe_open

import jaxsd
from launch import retrieval

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
    """A quarter of what launch/evaluate.py measures: 50 plain captions, at guidance 4 and 1."""
    reference = retrieval.read_reference(LISTS / 'emoji_reference.npz')
    captions = (LISTS / 'emoji_eval.txt').read_text().splitlines()[::4]
    rows = {caption: i for i, caption in enumerate(reference['captions'])}
    targets = np.array([rows[caption] for caption in captions])
    scores = {}
    for guidance in (4.0, 1.0):
        images = jaxsd.generate(model, [
            jaxsd.Request(c, seed=0, steps=20, guidance=guidance, weighting='plain')
            for c in captions])
        ranks = retrieval.ranks(retrieval.pool(images), targets, reference['features'])
        scores[guidance] = retrieval.score(ranks)
    assert scores[4.0]['top1'] >= 0.85 and scores[4.0]['top5'] >= 0.95
    assert scores[4.0]['top1'] > scores[1.0]['top1']  # guidance, and so the text, matters


def test_the_prompt_decides_the_picture(model):
    """Another prompt with the same seed is another picture; the same one is the same."""
    first, again, other = jaxsd.generate(model, [
        jaxsd.Request(prompt, seed=3, steps=8, guidance=4.0)
        for prompt in ('red apple', 'red apple', 'flag: japan')])
    assert np.array_equal(first, again)
    assert np.abs(first.astype(int) - other).mean() > 20
