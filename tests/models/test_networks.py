"""What holds for the networks without a reference; their numbers are compared in tests/parity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

from jaxsd.config import UNetConfig, VAEConfig
from jaxsd.models import layers, shapes, spec, tiling, unet, vae


@pytest.mark.parametrize('name', TINY)
def test_init_has_the_shapes_of_the_spec(name):
    table = spec.spec(TINY[name])
    params = spec.init(0, TINY[name], jnp.bfloat16)
    assert sum(a.size for a in jax.tree.leaves(params)) == spec.count(table)
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_axis_orders_invert_each_other():
    rng = np.random.default_rng(0)
    for name, shape in (('a.weight', (2, 3)), ('conv.weight', (2, 3, 5, 7)), ('a.bias', (4,)),
                        ('token_embedding.weight', (2, 3))):
        array = rng.normal(size=shape)
        np.testing.assert_array_equal(spec.from_jax(name, spec.to_jax(name, array)), array)
    assert spec.to_jax('conv.weight', np.zeros((2, 3, 5, 7))).shape == (5, 7, 3, 2)
    assert spec.to_jax('token_embedding.weight', np.zeros((2, 3))).shape == (2, 3)


def tiny_vae():
    config = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    return config, spec.init_part(np.random.default_rng(0), shapes.vae(config))


@pytest.mark.slow
@pytest.mark.parametrize('shape', [(64, 64), (72, 64), (80, 100)])
def test_tiled_decode_is_seamless(shape):
    """Norms and attention see a tile each, so pixels differ a little; but no edge appears.

    At the default tile of 64 latents. Smaller ones have noisier statistics: with tiles of 16 the
    mean error on noise is 0.16 deviations.
    """
    config, params = tiny_vae()
    latent = np.random.default_rng(1).normal(size=(2, *shape, 4)).astype(np.float32)
    whole = jax.jit(lambda p, z: vae.decode(p, config, z))(params, latent)
    tiled = jax.jit(lambda p, z: tiling.tiled(
        lambda x: vae.decode(p, config, x), z, 64, 16))(params, latent)
    assert tiled.shape == whole.shape == (2, 2 * shape[0], 2 * shape[1], 3)
    error = np.abs(np.asarray(tiled - whole))
    if shape == (64, 64):
        assert error.max() < 1e-5  # one tile: the same numbers but for jit's rounding
    else:
        assert 0 < error.mean() < 0.05 * np.asarray(whole).std()
        for axis in (1, 2):
            step = [np.abs(np.diff(np.asarray(a), axis=axis)).max() for a in (tiled, whole)]
            assert step[0] < 1.05 * step[1]


@pytest.mark.slow
@pytest.mark.parametrize('shape', [(64, 64), (80, 100)])
def test_tiled_encode_is_seamless(shape):
    """As of the decoder: latents of a noisy picture, of which no seam is larger than its steps."""
    config, params = tiny_vae()
    image = np.random.default_rng(1).uniform(-1, 1, (1, 2 * shape[0], 2 * shape[1], 3)).astype('f4')

    @jax.jit
    def both(p, x):
        def encode(x):
            return vae.encode(p, config, x)[0]

        return encode(x), tiling.tiled(encode, x, 64, 16, config.factor)

    whole, tiled = map(np.asarray, both(params, image))
    assert tiled.shape == whole.shape == (1, *shape, 4)
    if shape == (64, 64):
        np.testing.assert_allclose(tiled, whole, atol=1e-5)
    else:
        assert 0 < np.abs(tiled - whole).mean() < 0.05 * whole.std()
        for axis in (1, 2):
            step = [np.abs(np.diff(a, axis=axis)).max() for a in (tiled, whole)]
            assert step[0] < 1.05 * step[1]


def test_tiles_cover_everything_and_weights_never_vanish():
    for size in range(16, 70):
        starts = tiling._starts(size, 16, 4)
        covered = np.zeros(size, int)
        for start in starts:
            covered[start:start + 16] += 1
        assert covered.min() >= 1 and np.diff(starts).max(initial=0) <= 12
    assert tiling._ramp(16, 4).min() > 0


def test_a_wrong_overlap_is_refused():
    with pytest.raises(ValueError, match='overlap 16'):
        tiling.tiled(lambda x: x, jnp.zeros((1, 32, 32, 4)), tile=16, overlap=16)


def test_wide_convolutions_of_few_pixels_are_convolutions():
    """The matmul that stands for them on CPU, against XLA's own convolution."""
    rng = np.random.default_rng(0)
    p = {'weight': rng.normal(size=(3, 3, 512, 8)).astype(np.float32) / 68,
         'bias': rng.normal(size=8).astype(np.float32)}
    x = rng.normal(size=(2, 5, 7, 512)).astype(np.float32)
    expected = jax.lax.conv_general_dilated(
        x, p['weight'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')) + p['bias']
    np.testing.assert_allclose(layers.conv(p, x), expected, atol=1e-5)


def test_attention_by_blocks_equals_attention_at_once():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, 16)).astype(np.float32) for n in (300, 60, 60))
    assert q.shape[1] * k.shape[1] > 128 * 128
    expected = jax.nn.dot_product_attention(*(a.reshape(2, -1, 2, 8) for a in (q, k, v)))
    np.testing.assert_allclose(layers.attention(q, k, v, 2), expected.reshape(q.shape), atol=2e-6)


@pytest.mark.parametrize('given, missing', [('added', 'add_embedding'),
                                            ('class_labels', 'class_embedding')])
def test_conditions_the_network_lacks_are_refused(given, missing):
    config = TINY['sd1'].unet
    params = spec.init(0, TINY['sd1'])['unet']
    x = jnp.zeros((1, 8, 8, 4))
    with pytest.raises(ValueError, match=f'no {missing}'):
        unet.apply(params, config, x, jnp.zeros(1), jnp.zeros((1, 4, 32)),
                   **{given: jnp.zeros((1, 3), jnp.int32)})


def test_class_labels_change_the_picture():
    config = dataclasses.replace(TINY['sd1'].unet, num_class_embeds=5)
    params = spec.init_part(np.random.default_rng(0), shapes.unet(config))
    x = jnp.ones((2, 8, 8, 4))
    out = jax.jit(lambda p, labels: unet.apply(
        p, config, x, jnp.zeros(2), jnp.ones((2, 4, 32)), class_labels=labels))(
            params, jnp.array([1, 4]))
    assert np.abs(out[0] - out[1]).max() > 1e-4


def test_odd_sizes_come_back_in_their_size():
    params = spec.init(0, TINY['sd1'])['unet']
    x = jnp.zeros((1, 7, 9, 4))
    out = jax.eval_shape(lambda p: unet.apply(p, TINY['sd1'].unet, x, jnp.zeros(1),
                                              jnp.zeros((1, 4, 32))), params)
    assert out.shape == x.shape


def test_configs_hash_and_compare():
    assert hash(TINY['sd1']) == hash(dataclasses.replace(TINY['sd1']))
    assert dataclasses.replace(UNetConfig(), in_channels=9) != UNetConfig()


@pytest.mark.slow
@pytest.mark.parametrize('keys, causal, masked', [
    (32, False, False), (32, True, False), (32, True, True), (1024, False, False)])
def test_attention_in_float16_is_as_in_float32(keys, causal, masked):
    """Though a CPU has no float16 scores of its own; large values do not overflow on the way."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 16)) * scale, jnp.float16)
               for n, scale in ((32, 1), (keys, 1), (keys, 100)))
    keep = jnp.asarray(rng.random((2, keys)) > 0.3).at[:, 0].set(True) if masked else None
    half = layers.attention(q, k, v, 2, causal, keep)
    exact = layers.attention(*(a.astype(jnp.float32) for a in (q, k, v)), 2, causal, keep)
    assert half.dtype == jnp.float16
    np.testing.assert_allclose(half, exact, rtol=1e-3, atol=0.05)
