"""Noise of other programs, against values that they published or wrote."""

import ast
import pathlib

import numpy as np
import pytest

from jaxsd.sampling import sources

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens' / 'sources.npz'
# The docstring of stable-diffusion-webui's modules/rng_philox.py: seed 0, shape (3, 4).
PUBLISHED = [[-0.92466259, -0.42534415, -2.6438457, 0.14518388],
             [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
             [-1.07454231, -0.36314407, -1.67105067, 2.26550497]]


def test_philox_as_published():
    found = sources.randn('philox', 0, (1, 3, 4))
    assert found.shape == (3, 4, 1) and found.dtype == np.float32
    np.testing.assert_array_max_ulp(found[..., 0], np.float32(PUBLISHED), 1)


def test_philox_words_are_those_of_random123():
    """kat_vectors of Random123: all zeros, and the counter and key that are digits of pi."""
    assert [*sources.philox([0, 0, 0, 0], 0)] == [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]
    counter = [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344]
    assert [*sources.philox(counter, 0x299f31d0_a4093822)] == [
        0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]


def test_philox_draws_and_seeds_differ():
    one, next_one, large = (sources.randn('philox', seed, (4, 8, 8), draw)
                            for seed, draw in ((3, 0), (3, 1), (2**32 + 3, 0)))
    assert abs(np.corrcoef([one.ravel(), next_one.ravel(), large.ravel()]) - np.eye(3)).max() < 0.2
    np.testing.assert_array_equal(one, sources.randn('philox', 3, (4, 8, 8), 0, batch=(2, 5)))


@pytest.mark.parametrize('seed', np.load(GOLDENS))
def test_torch_as_torch_wrote_it(seed):
    """Seeds beyond 32 bits, sizes below 16 and such that are no multiple of 16, batches, draws."""
    for draw, images in enumerate(np.load(GOLDENS)[seed]):
        for place, image in enumerate(images):
            found = sources.randn('torch', int(seed), image.shape, draw, (place, len(images)))
            assert found.dtype == np.float32
            # float32 roundings of the logarithm and the sine
            np.testing.assert_allclose(found.transpose(2, 0, 1), image, rtol=0, atol=1e-6)


@pytest.mark.parametrize('source', ['torch', 'philox'])
def test_standard_normal(source):
    found = np.sort(sources.randn(source, 11, (4, 64, 64)).ravel().astype(float))
    assert abs(found.mean()) < 4 / 128 and abs(found.std() - 1) < 4 / 181  # 4 standard errors
    assert abs(np.median(found)) < 5 / 128


BROWNIAN = np.load(GOLDENS.with_name('brownian.npz'))  # by torchsde, see make_brownian.py
LEVELS = (14.6146, 9.7, 4.25, 1.5, 0.6, 0.0292)
SPANS = [*zip(LEVELS[:3], LEVELS[1:4]), (14.6146, 1.5), *zip(LEVELS[3:5], LEVELS[4:]),
         (4.25, 4.25 - 3e-6)]


@pytest.mark.parametrize('key', [key for key in BROWNIAN if 'dpmpp' not in key])
def test_brownian_trees_of_torchsde(key):
    """A whole path, a step that goes over several, and one of three roundings of torchsde."""
    seed, _, shape = key.partition(' ')
    ends = LEVELS[-1], LEVELS[0]
    if shape == 'of two':
        found = [sources.brownian('torch', int(seed), (4, 6, 5), SPANS[1:2], ends, (i, 2))[0]
                 for i in range(2)]
    else:
        found = sources.brownian('torch', int(seed), ast.literal_eval(shape), SPANS, ends)
    assert found[0].dtype == np.float32
    np.testing.assert_allclose(np.moveaxis(found, -1, 1), BROWNIAN[key], rtol=0, atol=1e-6)


def test_brownian_trees_of_philox():
    """The same tree with other numbers: steps that touch add up, and the order is no matter."""
    whole, first, second = sources.brownian('philox', 3, (4, 8, 8), [(9, 1), (9, 4), (4, 1)],
                                            (0.03, 14.6))
    np.testing.assert_allclose(whole * 8**0.5, first * 5**0.5 + second * 3**0.5, atol=1e-5)
    again = sources.brownian('philox', 3, (4, 8, 8), [(4, 1)], (0.03, 14.6))[0]
    np.testing.assert_array_equal(again, second)
    back, none, clamped, end = sources.brownian(
        'philox', 3, (4, 8, 8), [(1, 4), (2, 2), (99, 9), (14.6, 9)], (0.03, 14.6))
    np.testing.assert_array_equal(back, -second)
    assert not none.any()
    np.testing.assert_allclose(clamped * 90**0.5, end * 5.6**0.5, rtol=1e-5)
    assert abs(whole.std() - 1) < 0.15
