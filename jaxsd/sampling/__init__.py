"""Samplers as data: `schedule` gives noise levels, `plan` a table, `sample` runs any table."""

from .adaptive import Adaptive, Steps
from .denoise import denoiser, guided, inpainted, pair, timestep
from .levels import alphas_cumprod, betas, model_sigmas, sigma_to_t, t_to_sigma
from .noise import draw, fresh, initial, keys, of_row
from .noise_schedule import CONVENTIONS, DISCARD_PENULTIMATE, known_schedule, schedule
from .plans import SAMPLERS, calls, plan
from .scan import (
    Call,
    State,
    advance,
    bucket,
    idle,
    init,
    log_probability,
    pad,
    sample,
    stack,
    step,
)
from .schedule_tables import write_schedule
from .schedules import SCHEDULES
from .sources import randn
from .tables import HISTORY, NOISE, Row, Rows

__all__ = [
    'Adaptive', 'CONVENTIONS', 'Call', 'DISCARD_PENULTIMATE', 'HISTORY', 'NOISE', 'Row', 'Rows',
    'SAMPLERS', 'SCHEDULES', 'State', 'Steps', 'advance', 'alphas_cumprod', 'betas', 'bucket',
    'calls', 'denoiser', 'draw', 'fresh', 'guided', 'idle', 'init', 'initial', 'inpainted',
    'keys', 'known_schedule', 'log_probability', 'model_sigmas', 'of_row', 'pad', 'pair',
    'plan', 'randn', 'sample', 'schedule', 'sigma_to_t', 'stack', 'step', 't_to_sigma',
    'timestep', 'write_schedule',
]
