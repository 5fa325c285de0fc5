"""Parts of the depth estimator that have an answer known beforehand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsd.config import DPTConfig
from jaxsd.models import dpt, layers, shapes, spec


def test_parameters_of_the_released_network():
    assert spec.count(shapes.dpt(DPTConfig())) == 122_377_985


def test_sides_are_multiples_of_32():
    with pytest.raises(ValueError, match='40x64: expected sides that are multiples of 32'):
        dpt.apply({}, DPTConfig(), np.zeros((1, 64, 40, 3), np.float32))


@pytest.mark.parametrize('stride', [1, 2])
def test_standardized_weights(stride):
    """Scale and mean of the weights are of no effect; 'same' padding gives side / stride."""
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(3, 3, 5, 7)), rng.normal(size=(2, 8, 6, 5)).astype(np.float32)
    found = dpt.standardized({'weight': jnp.float32(w)}, x, stride)
    assert found.shape == (2, 8 // stride, 6 // stride, 7)
    scaled = dpt.standardized({'weight': jnp.float32(9 * w + 3)}, x, stride)
    np.testing.assert_allclose(found, scaled, atol=1e-4)
    # An odd pixel of padding goes to the end, as in TensorFlow, where these weights come from.
    w = (w - w.mean((0, 1, 2))) / w.std((0, 1, 2))
    expected = jax.lax.conv_general_dilated(x, jnp.float32(w), (stride, stride), 'SAME',
                                            dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize('shape', [(1, 4), (3, 5)])
def test_doubling_keeps_corners(shape):
    """A plane stays a plane from corner to corner; one pixel stays one value."""
    h, w = shape
    plane = np.linspace(0, 1, h)[:, None] + np.linspace(0, 3, w)
    expected = np.linspace(0, 1, 2 * h)[:, None] * (h > 1) + np.linspace(0, 3, 2 * w)
    found = dpt.double(jnp.float32(plane)[None, :, :, None])[0, ..., 0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_positions_of_the_grid_trained_on():
    table = np.random.default_rng(0).normal(size=(1, 16, 3)).astype(np.float32)
    np.testing.assert_array_equal(dpt.positions(table, (4, 4)), table)


def test_convolution_without_bias():
    w = np.random.default_rng(0).normal(size=(3, 3, 2, 4)).astype(np.float32)
    x = np.ones((1, 4, 4, 2), np.float32)
    np.testing.assert_array_equal(layers.conv({'weight': w}, x),
                                  layers.conv({'weight': w, 'bias': np.zeros(4, 'f4')}, x))
