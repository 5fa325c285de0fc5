"""Samplers as data: `schedule` gives noise levels, `plan` a table, `sample` runs any table."""

from .denoise import denoiser, guided, pair, timestep
from .noise import draw, fresh, initial, keys
from .plans import SAMPLERS, calls, plan
from .scan import Call, State, bucket, init, log_probability, pad, sample, stack, step
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
from .tables import HISTORY, Row, Rows

__all__ = [
    'Call', 'DISCARD_PENULTIMATE', 'HISTORY', 'Row', 'Rows', 'SAMPLERS', 'SCHEDULES', 'State',
    'alphas_cumprod', 'betas', 'bucket', 'calls', 'denoiser', 'draw', 'fresh', 'guided', 'init',
    'initial', 'keys', 'log_probability', 'model_sigmas', 'pad', 'pair', 'plan', 'sample',
    'schedule', 'sigma_to_t', 'stack', 'step', 't_to_sigma', 'timestep',
]
