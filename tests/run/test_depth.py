"""Depth maps on their way to the U-Net."""

import re

import numpy as np
import pytest

from jaxsd.run import depth


@pytest.mark.parametrize('value', [0.5, 0.1, 0.0, -3e7])
def test_one_value_is_no_depth_map(value):
    with pytest.raises(ValueError, match=re.escape(f'found only {value:g};')):
        depth.condition(np.full((1, 9, 7), value, np.float32), 8, 8)


def test_one_flat_map_of_several():
    maps = np.random.default_rng(0).random((3, 9, 7), np.float32)
    maps[1] = 0.25
    with pytest.raises(ValueError, match='only 0.25'):
        depth.condition(maps, 8, 8)


@pytest.mark.parametrize('wrong', [np.nan, np.inf])
def test_not_finite(wrong):
    maps = np.zeros((1, 4, 4), np.float32)
    maps[0, 1, 1] = wrong
    with pytest.raises(ValueError, match='NaN or infinity'):
        depth.condition(maps, 8, 8)


def test_no_batch():
    with pytest.raises(ValueError, match=r'expected \[B,H,W\], found \[4, 4\]'):
        depth.condition(np.eye(4), 8, 8)


def test_scale_and_offset_are_of_no_effect():
    maps = np.random.default_rng(0).random((2, 12, 20))
    found = depth.condition(maps, 6, 9)
    assert found.shape == (2, 6, 9, 1) and found.dtype == np.float32
    np.testing.assert_array_equal(found.min((1, 2, 3)), -1)
    np.testing.assert_array_equal(found.max((1, 2, 3)), 1)
    np.testing.assert_allclose(depth.condition(1e4 * maps - 7, 6, 9), found, atol=1e-6)


def test_near_is_white():
    """A slope stays a slope, its near end 65535."""
    slope = np.broadcast_to(np.arange(8.0), (1, 6, 8))
    gray = depth.gray16(slope, 12, 16)
    assert gray.dtype == np.uint16 and gray.shape == (1, 12, 16)
    assert (np.diff(gray.astype(int), axis=2)[:, :, 2:-2] > 0).all()
    assert gray[0, 5].argmin() < 3 and gray[0, 5].argmax() > 12
    assert (gray.min(), gray.max()) == (0, 65535)


def test_same_size_is_untouched():
    maps = np.random.default_rng(0).random((1, 5, 6))
    maps[0, 0, :2] = 0, 1
    np.testing.assert_allclose(depth.resized(maps, 5, 6), maps, atol=1e-15)


def test_a_model_without_estimator(tiny_model):
    with pytest.raises(ValueError, match='no depth estimator'):
        depth.estimate(tiny_model('sd1'), np.zeros((1, 8, 8, 3), np.uint8))
