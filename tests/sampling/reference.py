"""Hold a sampler to a reference written as a loop in float64: same numbers, same model calls.

A reference is `loop(model, x, sigmas, noise, **options) -> x`: model(x, sigma) -> denoised, or
model(x, sigma, both=True) -> (denoised, uncond), and noise() -> the next standard normal array.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from golden_cases import denoise, start

from jaxsd import sampling
from jaxsd.config import ScheduleConfig

CONFIG = ScheduleConfig()
SCHEDULES = {(name, steps): sampling.schedule(name, steps, CONFIG)
         for name, steps in itertools.product(('karras', 'normal', 'exponential'), (5, 10, 20, 30))}


def unguided(x, sigma, lib):
    """Another denoiser, for the samplers that use the unguided output too."""
    return 0.7 * denoise(x, sigma, lib) - 0.05 * lib.sin(x / (1 + sigma))


# As for users: without LLVM's optimisations float32 is rounded twice where it multiplies and adds.
@functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': '3'})
def _sample(x, rows, dealt):
    def model(x, sigma, i):
        return denoise(x, sigma, jnp), unguided(x, sigma, jnp)

    return sampling.sample(model, x, rows, lambda i: dealt[i])


def run(rows, x, noises):
    """Sample with the pool of noises dealt in order to the rows that ask for one."""
    rows = sampling.pad(rows, sampling.bucket(len(rows.sigma)))  # few programs for all cases
    asks = (rows.mix[..., 2] != 0).any(-1)
    dealt = noises[np.maximum(np.cumsum(asks) - 1, 0)].astype(x.dtype)
    return np.asarray(_sample(x, rows, dealt))


def compare(rows, x, noises, expected):
    """Within 1e-12 of the reference in float64, 3e-6 in float32, relative to its largest value."""
    with jax.enable_x64(True):
        exact = run(rows, x, noises)
    assert exact.dtype == np.float64
    single = run(rows, x.astype(np.float32), noises)
    assert single.dtype == np.float32
    scale = np.abs(expected).max()
    assert np.abs(exact - expected).max() <= 1e-12 * scale, 'float64'
    assert np.abs(single - expected).max() <= 3e-6 * scale, 'float32'


def check(name, loop, schedules=SCHEDULES, **options):
    """A sampler equals its reference on all schedules, with the same number of model calls."""
    noise_start, noises = start()
    for sigmas in schedules.values():
        calls, pool = 0, iter(noises)

        def model(x, sigma, both=False):
            nonlocal calls
            calls += 1
            out = denoise(x, sigma, np)
            return (out, unguided(x, sigma, np)) if both else out

        x = noise_start * sigmas[0]
        expected = loop(model, x, sigmas, lambda: next(pool), **options)  # noqa: B023
        rows = sampling.plan(name, sigmas, **options)
        assert sampling.calls(rows) == calls, (name, options, len(sigmas) - 1)
        compare(rows, x, noises, expected)
