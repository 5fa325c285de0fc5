"""From a network's raw prediction to `denoise(x, sigma, i)`, and guidance around it."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from .choice import unknown
from .schedules import model_sigmas

PREDICTIONS = ('epsilon', 'v_prediction', 'sample')


def denoiser(net, config):
    """Wrap a network as `denoise(x, sigma, i) -> denoised`, all [B,...], sigma [] or [B].

    net(x_in, t, i) -> prediction: x_in [B,...] has unit scale (the training convention), t [B] is
    the float timestep, i the row's index. config: ScheduleConfig, whose prediction_type says what
    the network predicts:
        epsilon:       x0 = x - sigma eps
        v_prediction:  x0 = x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) v
                       (https://arxiv.org/abs/2202.00512)
        sample:        x0 itself
    Raises ValueError for any other prediction type.
    """
    kind = config.prediction_type
    if kind not in PREDICTIONS:
        raise unknown('prediction type', kind, PREDICTIONS)

    def denoise(x, sigma, i=None):
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])
        t = timestep(sigma, config)
        sigma = sigma.reshape(-1, *(1,) * (x.ndim - 1))
        norm = jnp.hypot(sigma, 1)  # does not overflow where sigma^2 would
        x_in = x / norm
        out = net(x_in, t, i).astype(x.dtype)
        if kind == 'epsilon':
            return x - sigma * out
        if kind == 'v_prediction':
            return x_in / norm - sigma / norm * out
        return out

    return denoise


def timestep(sigma, config):
    """Noise levels -> float timesteps, linear in log sigma, clamped; traced, any shape.

    float32 leaves an error of about 1e-4 in t, so a sigma of the model's own table would miss
    its whole timestep by that much; within 1e-3 it is taken to be meant. Gradients pass.
    """
    logs = np.log(model_sigmas(config))
    t = jnp.interp(jnp.log(sigma), logs.astype(sigma.dtype),
                   np.arange(len(logs), dtype=sigma.dtype))
    gap = lax.stop_gradient(jnp.round(t) - t)
    return t + jnp.where(jnp.abs(gap) < 1e-3, gap, 0)


def pair(uncond, cond):
    """Two arrays [B,...] -> [2B,...] as uncond 0, cond 0, uncond 1, cond 1, ...

    Image after image, so that a batch sharded over devices stays where it is; concatenating all
    of uncond and all of cond would move it.
    """
    return jnp.stack([uncond, cond], axis=1).reshape(-1, *uncond.shape[1:])


def guided(denoise, guidance):
    """Classifier-free guidance (https://arxiv.org/abs/2207.12598): uncond + g (cond - uncond).

    denoise: takes 2B images in `pair`'s order. guidance: g, [] or [B], data.
    -> denoise(x, sigma, i) for B images, which gives (guided, uncond).
    """
    def guide(x, sigma, i=None):
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])
        both = denoise(pair(x, x), pair(sigma, sigma), i).reshape(-1, 2, *x.shape[1:])
        uncond, cond = both[:, 0], both[:, 1]
        g = jnp.asarray(guidance, both.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        return uncond + g * (cond - uncond), uncond

    return guide
