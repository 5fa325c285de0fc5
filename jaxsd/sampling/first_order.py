"""Samplers of first order, one call a step: Euler and its stochastic relatives."""

import numpy as np

from .tables import ancestral, churn, mix, noise_row, pairs, row, table


@table
def euler(sigmas, s_churn=0.0, s_tmin=0.0, s_tmax=np.inf, s_noise=1.0):
    """Euler on dx/dsigma = (x - denoised) / sigma; k-diffusion sample_euler. DDIM at eta = 0."""
    hats, kicks = churn(sigmas, s_churn, s_tmin, s_tmax, s_noise)
    yield from noise_row(kicks[0])
    for a, b, kick in zip(hats, sigmas[1:], kicks[1:]):
        yield row(a, mix(x=b / a, noise=kick, e=[1 - b / a]))


@table
def euler_ancestral(sigmas, eta=1.0, s_noise=1.0):
    """Euler down to `down`, then noise up to the next sigma; k-diffusion."""
    for a, b in pairs(sigmas):
        down, up = ancestral(a, b, eta)
        yield row(a, mix(x=down / a, noise=s_noise * up, e=[1 - down / a]), path=(a, b))


@table
def ddim(sigmas, eta=0.0, s_noise=1.0):
    """DDIM, eq. 12 of https://arxiv.org/abs/2010.02502: in terms of sigma, ancestral Euler."""
    yield from zip(*euler_ancestral(sigmas, eta=eta, s_noise=s_noise))


@table
def ddpm(sigmas, s_noise=1.0):
    """DDPM's posterior with the small variance (eq. 7 of https://arxiv.org/abs/2006.11239).

    Mean and variance for a step over any number of timesteps equal ancestral Euler at eta = 1.
    """
    yield from zip(*euler_ancestral(sigmas, eta=1.0, s_noise=s_noise))


SAMPLERS = (euler, euler_ancestral, ddim, ddpm)
