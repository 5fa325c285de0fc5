"""Samplers as data: `schedule` gives noise levels, `plan` a table, `sample` runs any table."""

from .denoise import denoiser, guided, pair, timestep
from .noise import draw, initial, keys
from .plans import SAMPLERS, Row, Rows, calls, plan
from .scan import State, bucket, init, pad, sample, stack, step
from .schedules import (
    DISCARD_PENULTIMATE,
    SCHEDULES,
    alphas_cumprod,
    betas,
    model_sigmas,
    schedule,
    sigma_to_t,
    t_to_sigma,
)

__all__ = [
    'DISCARD_PENULTIMATE', 'SAMPLERS', 'SCHEDULES', 'Row', 'Rows', 'State', 'alphas_cumprod',
    'betas', 'bucket', 'calls', 'denoiser', 'draw', 'guided', 'init', 'initial', 'keys',
    'model_sigmas', 'pad', 'pair', 'plan', 'sample', 'schedule', 'sigma_to_t', 'stack', 'step',
    't_to_sigma', 'timestep',
]
