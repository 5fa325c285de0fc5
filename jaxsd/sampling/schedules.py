"""Noise levels: what a model was trained on, and in which steps to walk down them.

Everything here is numpy in float64 on the host. A noise level sigma is the standard deviation of
the noise in `x = x0 + sigma * noise` ("variance exploding"): the convention of Karras et al. 2022
(https://arxiv.org/abs/2206.00364) and of k-diffusion. The training convention
`sqrt(abar) * x0 + sqrt(1 - abar) * noise` is the same thing divided by `sqrt(1 + sigma^2)`.
"""

import functools

import numpy as np

from .choice import call, choose, unknown

SNR_FLOOR = 2.0**-24  # diffusers' clamp of the last alphas_cumprod at zero terminal SNR

# Samplers whose front ends drop the last sigma before 0 (they then ask for one step more).
# A1111: modules/sd_samplers_kdiffusion.py (the option `discard_next_to_last_sigma`).
# ComfyUI: comfy/samplers.py (DISCARD_PENULTIMATE_SIGMA_SAMPLERS).
DISCARD_PENULTIMATE = {
    'a1111': ('dpm_2', 'dpm_2_ancestral', 'dpmpp_3m_sde'),
    'comfyui': ('dpm_2', 'dpm_2_ancestral', 'unipc'),
}


def betas(config):
    """The forward variances of a ScheduleConfig -> float64 [T].

    linear: DDPM (https://arxiv.org/abs/2006.11239). scaled_linear: linear in sqrt(beta), latent
    diffusion. squaredcos_cap_v2: abar(t) = cos^2((t + 0.008) / 1.008 * pi / 2)
    (https://arxiv.org/abs/2102.09672), betas capped at 0.999 as in diffusers.
    """
    n, kind = config.num_train_timesteps, config.beta_schedule
    if kind == 'linear':
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


def alphas_cumprod(config):
    """abar of every training timestep -> float64 [T]; never 0, so that every sigma is finite."""
    abar = np.cumprod(1 - betas(config))
    if config.rescale_betas_zero_snr:
        abar[-1] = SNR_FLOOR
    return abar


@functools.lru_cache(maxsize=16)
def model_sigmas(config):
    """The noise level of every training timestep, ascending -> float64 [T] (read-only)."""
    abar = alphas_cumprod(config)
    sigmas = np.sqrt((1 - abar) / abar)
    sigmas.flags.writeable = False
    return sigmas


def sigma_to_t(sigma, config):
    """Noise levels -> float timesteps in [0, T-1], linear in log sigma (k-diffusion), clamped."""
    table = np.log(model_sigmas(config))
    with np.errstate(divide='ignore'):  # sigma 0 is clamped to timestep 0
        return np.interp(np.log(sigma), table, np.arange(len(table)))


def t_to_sigma(t, config):
    """Float timesteps -> noise levels, linear in log sigma (k-diffusion), clamped."""
    table = np.log(model_sigmas(config))
    return np.exp(np.interp(t, np.arange(len(table)), table))


# Schedules: (steps, config, **options) -> [steps] sigmas, descending, the final one left out.


def normal(steps, config, sigma_min=None, sigma_max=None):
    """Timesteps evenly spaced, both ends included.

    k-diffusion DiscreteSchedule.get_sigmas; ComfyUI 'normal'; diffusers Euler with
    timestep_spacing='linspace' (which interpolates sigma, not log sigma, between timesteps).
    """
    first, last = sigma_to_t(_ends(config, sigma_min, sigma_max), config)
    return t_to_sigma(np.linspace(first, last, steps), config)


def sgm_uniform(steps, config, sigma_min=None, sigma_max=None):
    """Timesteps evenly spaced, the last one left out: sgm's and ComfyUI's 'sgm_uniform'.

    Rounded to whole timesteps it is diffusers DPMSolverMultistep with 'linspace'.
    """
    first, last = sigma_to_t(_ends(config, sigma_min, sigma_max), config)
    return t_to_sigma(np.linspace(first, last, steps + 1)[:-1], config)


def karras(steps, config, sigma_min=None, sigma_max=None, rho=7.0):
    """Evenly spaced in sigma^(1/rho): Karras et al. 2022, eq. 5; k-diffusion get_sigmas_karras."""
    first, last = _ends(config, sigma_min, sigma_max)
    return np.linspace(first ** (1 / rho), last ** (1 / rho), steps) ** rho


def exponential(steps, config, sigma_min=None, sigma_max=None):
    """Evenly spaced in log sigma: k-diffusion get_sigmas_exponential."""
    first, last = _ends(config, sigma_min, sigma_max)
    return np.exp(np.linspace(np.log(first), np.log(last), steps))


def simple(steps, config):
    """Every (T/steps)-th training timestep from the noisy end: ComfyUI 'simple'.

    Equals diffusers' timestep_spacing='trailing' when steps divides T.
    """
    table = model_sigmas(config)
    back = (np.arange(steps) * (len(table) / steps)).astype(int)
    return table[len(table) - 1 - back]


def ddim_uniform(steps, config):
    """Timesteps 1, 1 + T//steps, ...: diffusers' 'leading' with steps_offset=1.

    ComfyUI and A1111 take the same timesteps up to T, which is more than `steps` of them when
    `steps` does not divide T; this keeps exactly `steps`, as diffusers does.
    """
    table = model_sigmas(config)
    t = 1 + np.arange(steps)[::-1] * (len(table) // steps)
    return table[np.minimum(t, len(table) - 1)]


SCHEDULES = {f.__name__: f for f in (
    normal, karras, exponential, sgm_uniform, simple, ddim_uniform)}


def schedule(name, steps, config, final='zero', discard_penultimate=False, **options):
    """The noise levels of a schedule -> float64 [steps + 1], strictly decreasing, ending in 0.

    config: ScheduleConfig. final: 'zero', or 'sigma_min' to end at the model's smallest sigma
    (diffusers' final_sigmas_type='sigma_min', DDIM's set_alpha_to_one=False).
    discard_penultimate: make one step more and drop the last sigma before the final one
    (see DISCARD_PENULTIMATE for who does so when). options: those of the schedule function.
    Raises ValueError for an unknown name or option, or steps that the model cannot give.
    """
    function = choose('schedule', name, SCHEDULES)
    count = config.num_train_timesteps
    if not 1 <= steps <= count or steps != int(steps):
        raise ValueError(f'steps={steps}: expected a whole number from 1 to {count}')
    last = choose('final', final, {'zero': 0.0, 'sigma_min': model_sigmas(config)[0]})
    body = call('schedule', name, function, int(steps) + bool(discard_penultimate), config,
                **options)
    sigmas = np.append(body[:-1] if discard_penultimate else body, last)
    if not np.isfinite(sigmas).all() or np.any(np.diff(sigmas) >= 0):
        raise ValueError(f'schedule {name!r} with steps={steps}, final={final!r} and {options}: '
                         'the sigmas do not strictly decrease; use fewer steps or other options')
    return sigmas


def _ends(config, sigma_min, sigma_max):
    """The first and last sigma: the options where given, else the model's own."""
    table = model_sigmas(config)
    first = float(table[-1] if sigma_max is None else sigma_max)
    last = float(table[0] if sigma_min is None else sigma_min)
    if not 0 < last <= first < np.inf:
        raise ValueError(f'sigma_min={last}, sigma_max={first}: expected 0 < sigma_min <= '
                         'sigma_max, both finite')
    return np.array([first, last])
