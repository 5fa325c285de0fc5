"""The ControlNet's loss: the U-Net's own at first, less of it as the ControlNet learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conftest import TINY

from jaxsd import sampling
from jaxsd.config import ControlNetConfig
from jaxsd.models import controlnet, spec
from jaxsd.train import losses

CONFIG = TINY['sd2']
NET = ControlNetConfig(**dataclasses.asdict(CONFIG.unet),
                       conditioning_embedding_out_channels=(8, 8, 16, 16))
ABAR = jnp.asarray(sampling.alphas_cumprod(CONFIG.schedule), jnp.float32)


@functools.cache
def setting():
    """(ControlNet, batch): pictures whose hint says which of two latents they have."""
    model = spec.init(0, CONFIG)
    kind = np.arange(8) % 2
    latents, hints = np.random.default_rng(0).normal(size=(2, 8, 8, 4)), np.uint8([0, 255])
    batch = {'latent': latents[kind].astype(np.float32), 'empty': np.zeros(16, int),
             'tokens': np.random.default_rng(1).integers(0, 500, (8, 16)),
             'hint': hints[kind][:, None, None, None] * np.ones((8, 64, 64, 3), np.uint8),
             'model': {part: model[part] for part in ('text_encoder', 'unet')}}
    return controlnet.init_from_unet(model['unet'], NET, np.random.default_rng(2)), batch


TX = optax.adam(1e-2)


@jax.jit
def step(params, state, batch, key):
    value, grads = jax.value_and_grad(
        lambda p: losses.control(p, CONFIG, NET, batch, key, ABAR)[0])(params)
    updates, state = TX.update(grads, state)
    return optax.apply_updates(params, updates), state, value


def test_a_fresh_controlnet_has_the_models_own_loss():
    params, batch = setting()
    key = jax.random.key(3)
    own = jax.jit(lambda b: losses.diffusion(b['model'], CONFIG, b, key, ABAR, 0.5, 0.0)[0])(batch)
    np.testing.assert_allclose(step(params, TX.init(params), batch, key)[2], own, rtol=1e-6)


def test_it_learns_what_the_hint_says():
    """Told that every picture is the other one, it is wrong: it reads the hint."""
    params, batch = setting()
    state = TX.init(params)
    for i in range(60):
        params, state, _ = step(params, state, batch, jax.random.key(i))
    other = batch | {'hint': batch['hint'][::-1]}
    told, lied = (step(params, state, b, jax.random.key(99))[2] for b in (batch, other))
    assert told < 0.8 * lied, (told, lied)
