"""TAESD without a reference: sizes, conventions, and its place behind the VAE's functions."""

import jax
import numpy as np

from jaxsd.config import TinyVAEConfig
from jaxsd.models import shapes, spec, tiling, vae

CFG = TinyVAEConfig(encoder_block_out_channels=(6, 6, 6), decoder_block_out_channels=(5, 5, 5),
                    num_encoder_blocks=(1, 2, 1), num_decoder_blocks=(2, 1, 1))


def params(cfg=CFG):
    return spec.init_part(np.random.default_rng(0), shapes.tiny_vae(cfg))


def test_parameter_count():
    """The released one, taesd and taesdxl alike."""
    assert spec.count(shapes.tiny_vae(TinyVAEConfig())) == 2_445_063


def test_sizes_and_no_variance():
    p = params()
    image = np.random.default_rng(1).uniform(-1, 1, (2, 24, 16, 3)).astype(np.float32)
    mean, logvar = jax.jit(vae.encode, static_argnums=1)(p, CFG, image)
    assert mean.shape == logvar.shape == (2, 6, 4, 4) and CFG.factor == 4
    assert np.all(logvar == -30) and mean.dtype == np.float32
    assert vae.decode(p, CFG, mean).shape == image.shape


def test_decode_bounds_latents_and_pixels_start_at_minus_one():
    """Latents beyond 3 saturate; without any weights the picture is black, -1."""
    p = params()
    far = np.full((1, 3, 2, 4), 50, np.float32)
    np.testing.assert_allclose(vae.decode(p, CFG, far), vae.decode(p, CFG, 2 * far), atol=1e-6)
    assert not np.allclose(vae.decode(p, CFG, far), vae.decode(p, CFG, far / 50))
    black = vae.decode(jax.tree.map(np.zeros_like, p), CFG, far)
    assert np.array_equal(black, np.full((1, 12, 8, 3), -1))


def test_tiles():
    """Far from the seams a tile sees all that the whole picture's pixels see."""
    p = params()
    latent = np.random.default_rng(1).normal(size=(1, 12, 24, 4)).astype(np.float32)
    whole = vae.decode(p, CFG, latent)
    tiled = jax.jit(lambda z: tiling.tiled(lambda x: vae.decode(p, CFG, x), z, 20, 12))(latent)
    assert whole.shape == tiled.shape == (1, 48, 96, 3)
    np.testing.assert_allclose(tiled[:, :, :8], whole[:, :, :8], atol=1e-6)
    assert np.abs(tiled - whole).mean() < 0.02 * np.abs(whole).mean()
