"""What the shipped model makes of sketches, halves and edges: the numbers that the docs promise."""

import pathlib

import numpy as np
import pytest

import jaxsd
from configs import emoji
from jaxsd import recipe
from launch import evaluate, gallery, retrieval

ROOT = pathlib.Path(__file__).resolve().parents[2]
LISTS = ROOT / 'tests' / 'data'
SIZE, COUNT = 64, 40
pytestmark = pytest.mark.usefixtures('optimised')


@pytest.fixture(scope='module')
def given():
    """The model, its recipe, the reference, 40 captions, and their pictures of 16x16 cells."""
    config = emoji.get_config()
    reference = retrieval.read_reference(LISTS / 'emoji_reference.npz')
    captions = (LISTS / 'emoji_eval.txt').read_text().splitlines()[:COUNT]
    rows = {text: row for row, text in enumerate(reference['captions'])}
    sketches = {text: retrieval.sketch(reference['features'][rows[text]], SIZE)
                for text in captions}
    return recipe.load(config)[0], config, reference, captions, sketches


def measured(shared, **how):
    model, config, reference, captions, _ = shared
    draw = evaluate.drawer(model, config, 0, COUNT, **how)
    return evaluate.measure(draw, captions, reference)[0]


@pytest.mark.slow
def test_a_sketch_helps_and_a_half_is_restored(given):
    sketches = given[4]
    right = np.zeros((SIZE, SIZE), bool)
    right[:, SIZE // 2:] = True
    text = measured(given)
    sketched = {'given': {'image': sketches}}
    assert measured(given, **sketched, strength=0.6)['distance'] < text['distance']
    named, nameless = (measured(given, **sketched, mask=right, **prompt)['top1']
                       for prompt in ({}, {'prompt': ''}))
    assert named >= 0.7 and named > nameless


@pytest.mark.slow
def test_edges_place_the_picture(given):
    """The gallery's small apple: drawn where its edges are, and all over the picture without."""
    model = given[0].replace(controlnets={
        'edges': jaxsd.load_controlnet(ROOT / 'checkpoints' / 'emoji_edges')})
    row = {text: image for image, text in gallery.controlled(model)}
    outside = np.ones((SIZE, SIZE), bool)
    outside[16:64, 0:48] = False

    def painted(image):  # the part of what is not white that lies outside
        dark = (image < 200).any(-1)
        return (dark & outside).sum() / dark.sum()

    assert painted(row['tangerine, scale 0']) == pytest.approx(0.291, abs=0.02)  # the emoji's own
    for name in ('red apple', 'tangerine', 'tomato'):
        assert painted(row[name]) < 0.05, name
