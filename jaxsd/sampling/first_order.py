"""Samplers of first order, one call a step: Euler and its stochastic relatives."""

from collections.abc import Iterator

import numpy as np

from jaxsd.config import ScheduleConfig

from .schedules import sigma_to_t, t_to_sigma
from .tables import Row, ancestral, churn, mix, noise_row, pairs, row, table


@table
def euler(sigmas: np.ndarray, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = np.inf,
          s_noise: float = 1.0) -> Iterator[Row]:
    """Euler on dx/dsigma = (x - denoised) / sigma; k-diffusion sample_euler. DDIM at eta = 0."""
    hats, kicks = churn(sigmas, s_churn, s_tmin, s_tmax, s_noise)
    yield from noise_row(kicks[0])
    for a, b, kick in zip(hats, sigmas[1:], kicks[1:]):
        yield row(a, mix(x=b / a, noise=kick, e=[1 - b / a]))


@table
def euler_ancestral(sigmas: np.ndarray, eta: float = 1.0, s_noise: float = 1.0) -> Iterator[Row]:
    """Euler down to `down`, then noise up to the next sigma; k-diffusion."""
    for a, b in pairs(sigmas):
        down, up = ancestral(a, b, eta)
        yield row(a, mix(x=down / a, noise=s_noise * up, e=[1 - down / a]), path=(a, b))


@table
def ddim(sigmas: np.ndarray, eta: float = 0.0, s_noise: float = 1.0) -> Iterator[Row]:
    """DDIM, eq. 12 of https://arxiv.org/abs/2010.02502: in terms of sigma, ancestral Euler."""
    yield from zip(*euler_ancestral(sigmas, eta=eta, s_noise=s_noise))


@table
def ddpm(sigmas: np.ndarray, s_noise: float = 1.0) -> Iterator[Row]:
    """DDPM's posterior with the small variance (eq. 7 of https://arxiv.org/abs/2006.11239).

    Mean and variance for a step over any number of timesteps equal ancestral Euler at eta = 1.
    """
    yield from zip(*euler_ancestral(sigmas, eta=1.0, s_noise=s_noise))


@table
def lcm(sigmas: np.ndarray, s_noise: float = 1.0) -> Iterator[Row]:
    """Jump to the denoised picture and noise it anew, for models distilled to jump.

    https://arxiv.org/abs/2310.04378, algorithm 3, whose c_skip and c_out are taken to be in the
    model; ComfyUI sample_lcm, diffusers LCMScheduler.
    """
    for a, b in pairs(sigmas):
        yield row(a, mix(noise=s_noise * b, e=[1]))


@table
def tcd(sigmas: np.ndarray, config: ScheduleConfig | None = None, gamma: float = 0.3,
        s_noise: float = 1.0) -> Iterator[Row]:
    """Jump below the next level and noise up to it: https://arxiv.org/abs/2402.19159, algorithm 4.

    The jump ends at training timestep (1 - gamma) t', rounded down, t' being that of the next
    sigma: gamma 0 is Euler, 1 is close to lcm. config: the model's ScheduleConfig, required.
    diffusers TCDScheduler, which calls gamma eta and ends as final='sigma_min' does.
    """
    if config is None:
        raise ValueError('config=None: expected the ScheduleConfig of the model; pass config=')
    if not 0 <= gamma <= 1:
        raise ValueError(f'gamma={gamma}: expected a number from 0 to 1')
    for a, b in pairs(sigmas):
        t = sigma_to_t(b, config) + 1e-6  # float64 may put a whole timestep a little below
        down = np.floor((1 - gamma) * t)
        low = t_to_sigma(down, config) if gamma > 0 and down < t - 2e-6 else b
        noise = s_noise * np.sqrt(b**2 - low**2)
        yield row(a, mix(x=low / a, noise=noise, e=[1 - low / a]))


@table
def euler_ancestral_cfg_pp(sigmas: np.ndarray, eta: float = 1.0,
                           s_noise: float = 1.0) -> Iterator[Row]:
    """Ancestral Euler from the denoised picture along the unguided noise (CFG++); ComfyUI.

    https://arxiv.org/abs/2406.08070
    """
    for a, b in pairs(sigmas):
        down, up = ancestral(a, b, eta)
        yield row(a, mix(x=down / a, noise=s_noise * up, e=[1], uncond=-down / a), path=(a, b))


@table
def euler_cfg_pp(sigmas: np.ndarray) -> Iterator[Row]:
    """Euler from the denoised picture along the unguided noise (CFG++); ComfyUI."""
    yield from zip(*euler_ancestral_cfg_pp(sigmas, eta=0.0))


SAMPLERS = (euler, euler_ancestral, ddim, ddpm, lcm, tcd, euler_ancestral_cfg_pp, euler_cfg_pp)
