"""The small sets of pictures for fine-tuning the emoji model."""

import numpy as np
import pytest
from mains import run_main
from PIL import Image
from test_emoji_data import LISTS, needs_font

from launch import emoji_sets, retrieval


def test_ink_is_linear_in_darkness():
    drawn = emoji_sets.ink(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 0, 255]]))
    tint = 255 - (255 - emoji_sets.INK) * 2 / 3
    assert np.allclose(drawn, [[255] * 3, emoji_sets.INK, tint, tint])


@needs_font
def test_pictures_and_captions(tmp_path):
    """The styles' words are not those that measure it; the star is one thing in five places."""
    code, _, error = run_main('-m', 'launch.emoji_sets', f'--out={tmp_path}', '--size=32')
    assert code == 0, error
    captions = {path.read_text().strip() for path in (tmp_path / 'ink').glob('*.txt')}
    assert captions == set(emoji_sets.INKED) and len(captions) == 20
    assert not captions & set((LISTS / 'emoji_eval.txt').read_text().splitlines())
    for caption in captions:
        image = np.asarray(Image.open(tmp_path / 'ink' / f'{caption.replace(" ", "_")}.png'))
        amount = (255 - image.astype(float)) / (255 - emoji_sets.INK)  # one colour, thinned
        assert image.shape == (32, 32, 3) and np.ptp(amount, -1).max() < 0.02 < amount.max() - 0.2
    stars = [np.asarray(Image.open(path)) for path in sorted((tmp_path / 'star').iterdir())]
    assert len(stars) == 5 and len({star.tobytes() for star in stars}) == 5
    for star in stars:
        body = np.abs(star.astype(int) - emoji_sets.BODY).max(-1) < 8
        assert 0.1 < body.mean() < 0.5


@pytest.mark.slow
def test_the_nearer_of_two_draws_is_preferred():
    reference = retrieval.read_reference(LISTS / 'emoji_reference.npz')
    found = emoji_sets.pairs(3)
    assert len(found) == 3
    assert not found.keys() & set((LISTS / 'emoji_eval.txt').read_text().splitlines())
    for caption, images in found.items():
        row = list(reference['captions']).index(caption)
        nearer, other = np.abs(retrieval.pool(np.stack(images)) - reference['features'][row]
                               ).mean(1)
        assert nearer < other < 60  # of 255
