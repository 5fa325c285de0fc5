"""Noise levels of training: what a model saw, and the timestep of each. numpy in float64.

A noise level sigma is the standard deviation of the noise in `x = x0 + sigma * noise` ("variance
exploding"): the convention of Karras et al. 2022 (https://arxiv.org/abs/2206.00364) and of
k-diffusion. The training convention `sqrt(abar) * x0 + sqrt(1 - abar) * noise` is the same thing
divided by `sqrt(1 + sigma^2)`.
"""

import functools
from typing import Any

import numpy as np

from jaxsd.config import ScheduleConfig

from .choice import unknown

SNR_FLOOR = 2.0**-24  # diffusers' clamp of the last alphas_cumprod at zero terminal SNR


def betas(config: ScheduleConfig) -> np.ndarray:
    """The forward variances of a ScheduleConfig -> float64 [T].

    linear: DDPM (https://arxiv.org/abs/2006.11239). scaled_linear: linear in sqrt(beta), latent
    diffusion. squaredcos_cap_v2: abar(t) = cos^2((t + 0.008) / 1.008 * pi / 2)
    (https://arxiv.org/abs/2102.09672), betas capped at 0.999 as in diffusers.
    """
    n, kind = config.num_train_timesteps, config.beta_schedule
    if config.edm:
        raise ValueError('an EDM model has noise levels from sigma_min to sigma_max, and no betas')
    if config.trained_betas is not None:
        beta = np.array(config.trained_betas)
    elif kind == 'linear':
        beta = np.linspace(config.beta_start, config.beta_end, n)
    elif kind == 'scaled_linear':
        beta = np.linspace(config.beta_start**0.5, config.beta_end**0.5, n) ** 2
    elif kind == 'squaredcos_cap_v2':
        abar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.minimum(1 - abar[1:] / abar[:-1], 0.999)
    else:
        raise unknown('beta schedule', kind, ('linear', 'scaled_linear', 'squaredcos_cap_v2'))
    return _zero_terminal_snr(beta) if config.rescale_betas_zero_snr else beta


def _zero_terminal_snr(beta):
    """Shift and scale sqrt(abar) so that it ends in 0: https://arxiv.org/abs/2305.08891, alg. 1."""
    root = np.sqrt(np.cumprod(1 - beta))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    abar = root**2
    return 1 - np.concatenate([abar[:1], abar[1:] / abar[:-1]])


def alphas_cumprod(config: ScheduleConfig) -> np.ndarray:
    """abar of every training timestep -> float64 [T]; never 0, so that every sigma is finite."""
    abar = np.cumprod(1 - betas(config))
    if config.rescale_betas_zero_snr:
        abar[-1] = SNR_FLOOR
    return abar


@functools.lru_cache(maxsize=16)
def model_sigmas(config: ScheduleConfig) -> np.ndarray:
    """The noise level of every training timestep, ascending -> float64 [T] (read-only).

    EDM models were trained on all levels between two: here T of them, even in log sigma (ComfyUI).
    """
    if config.edm:
        sigmas = np.geomspace(config.sigma_min, config.sigma_max, config.num_train_timesteps)
    else:
        abar = alphas_cumprod(config)
        sigmas = np.sqrt((1 - abar) / abar)
    sigmas.flags.writeable = False
    return sigmas


def sigma_to_t(sigma: float | np.ndarray, config: ScheduleConfig) -> Any:
    """Noise levels -> float timesteps in [0, T-1], linear in log sigma (k-diffusion), clamped."""
    table = np.log(model_sigmas(config))
    with np.errstate(divide='ignore'):  # sigma 0 is clamped to timestep 0
        return np.interp(np.log(sigma), table, np.arange(len(table)))


def t_to_sigma(t: float | np.ndarray, config: ScheduleConfig) -> Any:
    """Float timesteps -> noise levels, linear in log sigma (k-diffusion), clamped."""
    table = np.log(model_sigmas(config))
    return np.exp(np.interp(t, np.arange(len(table)), table))
