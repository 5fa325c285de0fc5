"""Samplers of first order, one call a step: Euler and its stochastic relatives."""

from collections.abc import Iterator

import numpy as np

from jaxsd.config import ScheduleConfig

from .choice import one_of
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
def ddim(sigmas: np.ndarray, eta: float = 0.0, s_noise: float = 1.0, ratio: int = 0,
         config: ScheduleConfig | None = None) -> Iterator[Row]:
    """DDIM, eq. 12 of https://arxiv.org/abs/2010.02502: in terms of sigma, ancestral Euler.

    ratio: diffusers' DDIMScheduler steps so many timesteps down, T // steps, wherever the next step
    begins, at unit variance; 0: to where it begins. config: the model's ScheduleConfig, for that.
    """
    for a, b in pairs(sigmas):
        below, scale = b, 1.0
        if ratio:
            config = known(config)
            t = np.round(sigma_to_t(a, config)) - ratio
            below = t_to_sigma(t, config) if t >= 0 else sigmas[-1]
            scale = np.hypot(1, b) / np.hypot(1, below)
        down, up = ancestral(a, below, eta)
        yield row(a, scale * mix(x=down / a, noise=s_noise * up, e=[1 - down / a]), path=(a, b))


@table
def ddpm(sigmas: np.ndarray, s_noise: float = 1.0, variance: str = 'fixed_small',
         config: ScheduleConfig | None = None) -> Iterator[Row]:
    """DDPM's posterior with the small variance (eq. 7 of https://arxiv.org/abs/2006.11239).

    Mean and variance for a step over any number of timesteps equal ancestral Euler at eta = 1.
    variance: 'fixed_large' is the forward one, beta, in its place, as of diffusers' DDPMScheduler,
    which adds it before level 0 too, but not from timestep 0. config: the model's ScheduleConfig,
    for that.
    """
    large = one_of('variance', variance, ('fixed_small', 'fixed_small_log', 'fixed_large'))
    for a, b in pairs(sigmas):
        down, up = ancestral(a, b, 1.0)
        if large == 'fixed_large':
            first = sigma_to_t(a, known(config)) < 0.5
            up = 0.0 if first else np.sqrt((a**2 - b**2) * (1 + b**2) / (1 + a**2))
        yield row(a, mix(x=(b / a)**2, noise=s_noise * up, e=[1 - (b / a)**2]), path=(a, b))


@table
def lcm(sigmas: np.ndarray, s_noise: float = 1.0, timestep_scaling: float = 0.0,
        config: ScheduleConfig | None = None) -> Iterator[Row]:
    """Jump to the denoised picture and noise it anew, for models distilled to jump.

    https://arxiv.org/abs/2310.04378, algorithm 3; ComfyUI sample_lcm, diffusers LCMScheduler.
    timestep_scaling: of its c_skip and c_out, 10 in diffusers, which keep the picture as it is at
    timestep 0; 0: they are taken to be in the model. config: the model's ScheduleConfig, for that.
    """
    for a, b in pairs(sigmas):
        skip, out = 0.0, 1.0
        if timestep_scaling:
            t = timestep_scaling * sigma_to_t(a, known(config))
            skip, out = 0.25 / (t**2 + 0.25) / np.hypot(1, a), t / np.sqrt(t**2 + 0.25)
        yield row(a, mix(x=skip, noise=s_noise * b, e=[out]))


@table
def tcd(sigmas: np.ndarray, config: ScheduleConfig | None = None, gamma: float = 0.3,
        s_noise: float = 1.0) -> Iterator[Row]:
    """Jump below the next level and noise up to it: https://arxiv.org/abs/2402.19159, algorithm 4.

    The jump ends at training timestep (1 - gamma) t', rounded down, t' being that of the next
    sigma: gamma 0 is Euler, 1 is close to lcm. config: the model's ScheduleConfig, required.
    diffusers TCDScheduler, which calls gamma eta and ends as final='sigma_min' does.
    """
    config = known(config)
    if not 0 <= gamma <= 1:
        raise ValueError(f'gamma={gamma}: expected a number from 0 to 1')
    for a, b in pairs(sigmas):
        t = sigma_to_t(b, config)
        t = np.round(t) if abs(t - np.round(t)) < 1e-3 else t  # what a rounding puts beside it
        down = np.floor((1 - gamma) * t + 1e-6)
        low = t_to_sigma(down, config) if gamma > 0 and down < t else b
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


def known(config: ScheduleConfig | None) -> ScheduleConfig:
    """The config, or a ValueError where there is none."""
    if config is None:
        raise ValueError('config=None: expected the ScheduleConfig of the model; pass config=')
    return config


SAMPLERS = (euler, euler_ancestral, ddim, ddpm, lcm, tcd, euler_ancestral_cfg_pp, euler_cfg_pp)
