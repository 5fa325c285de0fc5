"""The noise levels of the steps: any schedule, whole or part-way."""

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxsd.config import ScheduleConfig
from jaxsd.typing import Path

from . import schedulers
from .choice import call, choose, flag, number
from .levels import model_sigmas
from .schedule_tables import check_levels, read_schedule, tabled
from .schedules import SCHEDULES, fit

# Samplers whose front ends drop the last sigma before 0 (they then ask for one step more).
# A1111: modules/sd_samplers_kdiffusion.py (the option `discard_next_to_last_sigma`).
# ComfyUI: comfy/samplers.py (DISCARD_PENULTIMATE_SIGMA_SAMPLERS).
DISCARD_PENULTIMATE = {
    'a1111': ('dpm_2', 'dpm_2_ancestral', 'dpmpp_3m_sde'),
    'comfyui': ('dpm_2', 'dpm_2_ancestral', 'unipc'),
}

# How denoising starts part-way (image to image):
# (steps, denoise) -> steps of the whole schedule, and how many of its last ones are made.
# ComfyUI: KSampler and BasicScheduler. diffusers: StableDiffusionImg2ImgPipeline.get_timesteps.
# A1111: modules/sd_samplers_common.py (setup_img2img_steps), always one more than diffusers, so
# that one is left at 0.
CONVENTIONS = {
    'comfyui': lambda steps, denoise: (int(steps / denoise), steps) if denoise else (steps, 0),
    'diffusers': lambda steps, denoise: (steps, int(steps * denoise)),
    'a1111': lambda steps, denoise: (steps, int(steps * min(denoise, 0.999)) + 1),
}
MAX_TOTAL = 10_000  # steps of the whole schedule under ComfyUI's convention: its widgets' most


LEVELS = list(inspect.signature(schedulers.diffusers).parameters)[2:]  # its options
ScheduleLike = Path | Sequence[float] | np.ndarray  # a name, a file of levels, or the levels


def known_schedule(name: ScheduleLike) -> Callable[..., np.ndarray]:
    """The function `(steps, config, **options) -> levels` that a name stands for; opens no file.

    name: a key of SCHEDULES; the path of a schedule file, ending in .json; 'diffusers:PATH', of a
    scheduler_config.json, of its folder or of a model's; or the levels themselves, a list of
    numbers or text such as '14.6,7.3,1,0'.
    Raises ValueError for anything else.
    """
    name = os.fspath(name) if isinstance(name, os.PathLike) else name
    if isinstance(name, str) and name.startswith(schedulers.PREFIX):
        return functools.partial(schedulers.from_file, name.removeprefix(schedulers.PREFIX))
    if not isinstance(name, str) or ',' in name:
        return functools.partial(_listed, check_levels(f'schedule {_title(name)!r}', name))
    if name.endswith('.json'):
        return functools.partial(_from_file, name)
    return choose('schedule', name, SCHEDULES)


def schedule_file(name: ScheduleLike | None) -> str | None:
    """The path of the file that a schedule's name names, or None."""
    text = os.fspath(name) if isinstance(name, (str, os.PathLike)) else ''
    if text.startswith(schedulers.PREFIX):
        return str(schedulers.scheduler_file(text.removeprefix(schedulers.PREFIX)))
    return text if text.endswith('.json') and ',' not in text else None


def called_at(name: ScheduleLike, steps: int, config: ScheduleConfig, denoise: float = 1.0,
              convention: str = 'comfyui', discard_penultimate: bool = False,
              rescale_betas_zero_snr: bool | None = None,
              **options: Any) -> schedulers.Spaced | None:
    """Of a schedule of diffusers, at which noise levels and timesteps its scheduler calls the
    model; None for others. Arguments as of `schedule`."""
    settings = schedulers.of_schedule(name, config)
    if settings is None:
        return None
    if rescale_betas_zero_snr is not None:
        config = dataclasses.replace(config, rescale_betas_zero_snr=rescale_betas_zero_snr)
    own = (schedulers.level_options(settings) if settings else {}) | {
        key: value for key, value in options.items() if key in LEVELS}
    total, _ = _part(steps, config.num_train_timesteps, denoise, convention)
    found = schedulers.spaced(total + discard_penultimate, config, **own)
    return found if denoise == 1 else found._replace(start=None)


def schedule(name: ScheduleLike, steps: int, config: ScheduleConfig, final: str | None = None,
             discard_penultimate: bool = False, denoise: float = 1.0, convention: str = 'comfyui',
             rescale_betas_zero_snr: bool | None = None, **options: Any) -> np.ndarray:
    """The noise levels of a schedule -> float64 [steps + 1], strictly decreasing, ending in 0.

    name: as for `known_schedule`. config: ScheduleConfig.
    final: 'zero', or 'sigma_min' to end at the model's smallest sigma (diffusers'
    final_sigmas_type='sigma_min', DDIM's set_alpha_to_one=False); None: 0, and a list of levels
    ends as it says.
    discard_penultimate: make one step more and drop the last sigma before the final one
    (see DISCARD_PENULTIMATE for who does so when).
    denoise: the part of the noise to remove, up to 1, from a picture with noise of sigmas[0] added.
    Under convention 'comfyui' the last `steps` of int(steps / denoise) steps, 10,000 at most; under
    'diffusers' the last int(steps * denoise) of `steps`, so that fewer come back; 'a1111' one more.
    rescale_betas_zero_snr: replaces config's. options: those of the schedule's function.
    Raises ValueError for an unknown name or option, or steps that the model cannot give.
    """
    function = known_schedule(name)
    flag('discard_penultimate', discard_penultimate)
    if rescale_betas_zero_snr is not None:
        config = dataclasses.replace(config, rescale_betas_zero_snr=flag(
            'rescale_betas_zero_snr', rescale_betas_zero_snr))
    total, kept = _part(steps, config.num_train_timesteps, denoise, convention)
    total += discard_penultimate
    with np.errstate(all='ignore'):  # what is not finite has an error of its own
        levels = call('schedule', _title(name), function, total, config, **options)
    sigmas = np.append(levels, 0.0)[:total + 1]
    if final is not None:
        sigmas[-1] = choose('final', final, {'zero': 0.0, 'sigma_min': model_sigmas(config)[0]})
    if discard_penultimate:
        sigmas = np.delete(sigmas, -2)
    if not np.isfinite(sigmas).all() or np.any(np.diff(sigmas) >= 0):
        raise ValueError(f'schedule {_title(name)!r} with steps={steps}, final={final!r} and '
                         f'{options}: the sigmas do not strictly decrease; use fewer steps or '
                         'other options')
    return sigmas[-kept - 1:]


def _title(name):
    """What errors call it: an array would be printed over many lines."""
    return name if isinstance(name, str) else 'a list'


def _part(steps, count, denoise, convention):
    """Check them -> steps of the whole schedule, and how many of its last ones are kept."""
    if not 1 <= number('steps', steps) <= count or steps != int(steps):
        raise ValueError(f'steps={steps}: expected a whole number from 1 to {count}')
    if not 0 <= number('denoise', denoise) <= 1:
        raise ValueError(f'denoise={denoise}: expected a number from 0 to 1')
    total, kept = choose('convention', convention, CONVENTIONS)(int(steps), float(denoise))
    if total > max(count, MAX_TOTAL) or kept < 1:
        raise ValueError(
            f'steps={steps} at denoise={denoise} (the strength) are {kept} of {total} steps by the '
            f'convention {convention!r}: expected at least 1, and {MAX_TOTAL} at most; change '
            "steps or strength, or take the convention 'a1111', which makes 1 at least")
    return total, kept


def _listed(levels, steps, config, sigma_min=None, sigma_max=None):
    if len(levels) != steps + 1:
        raise ValueError(f'steps={steps}: the list of sigmas has {len(levels) - 1} steps; '
                         'ask for these, or write a list of another length')
    return np.append(fit(levels[:-1], sigma_min, sigma_max), levels[-1])


def _from_file(path, steps, config, sigma_min=None, sigma_max=None):
    levels = tabled(read_schedule(path, config), steps)
    return np.append(fit(levels[:steps], sigma_min, sigma_max), levels[steps:])
