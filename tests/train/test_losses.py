"""Forward diffusion, its targets and weights, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

from jaxsd import sampling
from jaxsd.config import ScheduleConfig
from jaxsd.models import spec
from jaxsd.train import losses

ABAR = jnp.asarray(sampling.alphas_cumprod(ScheduleConfig()), jnp.float32)
T = jnp.array([0, 400, 999])


def pair():
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.normal(size=(3, 4, 4, 2)), jnp.float32) for _ in range(2))


def test_noise_takes_over():
    x0, noise = pair()
    x = losses.add_noise(x0, noise, ABAR, T)
    assert np.abs(x[0] - x0[0]).max() < 0.12 < np.abs(x[0] - noise[0]).max()
    assert np.abs(x[2] - noise[2]).max() < 0.25 < np.abs(x[2] - x0[2]).max()


@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction', 'sample'])
def test_the_sampler_inverts_the_target(kind):
    """What the loss asks for, the sampler turns back into x0: one convention on both sides."""
    x0, noise = pair()
    target = losses.target(x0, noise, ABAR, T, kind)
    denoise = sampling.denoiser(lambda x, t, i: target, ScheduleConfig(prediction_type=kind))
    sigma = jnp.sqrt((1 - ABAR[T]) / ABAR[T])
    x = x0 + sigma[:, None, None, None] * noise
    np.testing.assert_allclose(denoise(x, sigma), x0, atol=3e-5)


@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction', 'sample'])
def test_min_snr_is_one_weight_for_x0(kind):
    """In terms of the error of x0, every prediction type gets min(SNR, 5)."""
    snr = ABAR[T] / (1 - ABAR[T])
    per_x0 = {'epsilon': snr, 'v_prediction': snr + 1, 'sample': 1.0}[kind]
    weight = losses.min_snr_weight(ABAR, T, kind, gamma=5.0)
    np.testing.assert_allclose(weight * per_x0, np.minimum(snr, 5.0), rtol=1e-5)


def test_dropped_captions_do_not_matter():
    """At a dropout of 1 the caption has no influence, at 0 it has."""
    config = TINY['sd1']
    params = spec.init(0, config)
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(4, 8, 8, 4)).astype(np.float32)
    tokens = rng.integers(0, 500, (2, 4, 16))
    grad = jax.jit(lambda tokens, dropout: losses.diffusion(
        params, config, {'latent': latent, 'tokens': tokens, 'empty': jnp.zeros(16, int)},
        jax.random.key(0), ABAR, dropout)[0])
    assert grad(tokens[0], 1.0) == grad(tokens[1], 1.0)
    assert grad(tokens[0], 0.0) != grad(tokens[1], 0.0)
