"""Conditioning: layout, SDXL's vector, zeros for an empty negative prompt."""

import jax
import numpy as np

from jaxsd.models import clip
from jaxsd.prompt import blocks, conditioning
from jaxsd.prompt.emphasis import Segment


def _encode(model, ids=None, zero=None):
    images = [[[Segment(text, 1.0)] for text in pair] for pair in (['dog', 'red apple'],
                                                                   ['', 'cat'])]
    texts, _ = blocks.texts(model.tokenizers, lambda name: images, ['a1111'] * 2, ['comma'] * 2)
    run = jax.jit(lambda *data: conditioning.encode(data[0], model.config, *data[1:]))
    return texts, run(model.params, texts, ids, zero)


def test_the_pair_is_negative_then_positive(tiny_model):
    model = tiny_model('sd1')
    _, found = _encode(model)
    alone = clip.encode(model.params['text_encoder'], model.config.text_encoder,
                        model.tokenizers['text_encoder'](['dog', 'red apple', '', 'cat'])).hidden
    assert found.added is None
    np.testing.assert_allclose(found.context.reshape(alone.shape), alone, atol=1e-5)


def test_sdxl_concatenates_features_and_appends_the_time_ids(tiny_model):
    model = tiny_model('sdxl')
    ids = np.stack([conditioning.time_ids((64, 48), (1, 2), (64, 64))] * 2)
    assert ids[0].tolist() == [[64, 48, 1, 2, 64, 64]] * 2
    texts, found = _encode(model, ids, np.array([[False, False], [True, False]]))
    first, second = (clip.encode(model.params[n], getattr(model.config, n), texts[n].tokens[:, 1])
                     for n in ('text_encoder', 'text_encoder_2'))
    np.testing.assert_allclose(found.context[:, 1, :, :32], first.hidden, atol=1e-5)
    np.testing.assert_allclose(found.context[:, 1, :, 32:], second.hidden, atol=1e-5)
    np.testing.assert_allclose(found.added[:, 1, :24], second.pooled, atol=1e-5)
    angles = 48 * 10000.0 ** (-np.arange(4) / 4)  # the second id, in 8 sinusoids, cosines first
    np.testing.assert_allclose(found.added[0, 1, 32:40],
                               np.concatenate([np.cos(angles), np.sin(angles)]), atol=1e-5)
    # Only the second image asked for zeros; the time ids are not text and stay.
    assert np.any(found.context[0, 0]) and not np.any(found.context[1, 0])
    assert np.any(found.added[0, 0, :24]) and not np.any(found.added[1, 0, :24])
    np.testing.assert_array_equal(found.added[1, 0, 24:], found.added[1, 1, 24:])


def test_the_refiner_takes_scores(tiny_model):
    model = tiny_model('refiner')
    ids = np.stack([conditioning.aesthetic_ids((64, 64), (0, 0))] * 2)
    assert ids[0].tolist() == [[64, 64, 0, 0, 2.5], [64, 64, 0, 0, 6.0]]
    _, found = _encode(model, ids)
    assert found.context.shape == (2, 2, 16, 48) and found.added.shape == (2, 2, 24 + 40)
