"""Every sampler against k-diffusion's own code: same numbers, same count of model calls."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import CASES, GRIDS, denoise, start

from jaxsd import sampling

GOLDENS = np.load(pathlib.Path(__file__).parents[1] / 'goldens' / 'sampling.npz')


@jax.jit
def sample(x, rows, dealt):
    return sampling.sample(lambda x, sigma, i: denoise(x, sigma, jnp), x, rows, lambda i: dealt[i])


def run(rows, x, noises):
    """Sample with the pool of noises dealt in order to the rows that ask for one."""
    rows = sampling.pad(rows, 64)  # two programs for all cases, float32 and float64
    asks = rows.mix[:, 0, 2] != 0
    dealt = noises[np.maximum(np.cumsum(asks) - 1, 0)].astype(x.dtype)
    return np.asarray(sample(x, rows, dealt))


@pytest.mark.parametrize('case', CASES)
def test_equals_k_diffusion(case):
    name, options = CASES[case]
    x, noises = start()
    for grid, sigmas in GRIDS.items():
        golden = GOLDENS[f'{case}/{grid}/x']
        rows = sampling.plan(name, sigmas, **options)
        assert sampling.calls(rows) == GOLDENS[f'{case}/{grid}/calls']
        with jax.enable_x64(True):
            exact = run(rows, x * sigmas[0], noises)
        assert exact.dtype == np.float64
        single = run(rows, (x * sigmas[0]).astype(np.float32), noises)
        assert single.dtype == np.float32
        scale = np.abs(golden).max()
        assert np.abs(exact - golden).max() <= 1e-12 * scale, (grid, 'float64')
        assert np.abs(single - golden).max() <= 3e-6 * scale, (grid, 'float32')


def test_every_sampler_of_k_diffusion_has_a_golden():
    elsewhere = {'ddim', 'ddpm', 'unipc'}  # not in k-diffusion: see tests/parity
    assert {name for name, _ in CASES.values()} == set(sampling.SAMPLERS) - elsewhere
