"""What the comparisons with diffusers' schedulers share: a denoiser, and our walk with it."""

import jax
import jax.numpy as jnp

from jaxsd import sampling

SD = {'beta_start': 0.00085, 'beta_end': 0.012, 'beta_schedule': 'scaled_linear'}
LEADING = {'timestep_spacing': 'leading', 'steps_offset': 1}


def denoise(x, sigma, lib):
    """The posterior mean of x0 in {-0.8, 0.8} + 0.3 N(0, 1)."""
    total = sigma**2 + 0.3**2
    return (0.3**2 * x + sigma**2 * 0.8 * lib.tanh(0.8 * x / total)) / total


@jax.jit
def ours(x, rows, pool):
    return sampling.sample(
        lambda x, sigma, i: denoise(x, sigma, jnp), x, rows, lambda i: pool[i])
