"""Samplers as data: `schedule` gives noise levels, `plan` a table, `sample` runs any table."""

from .denoise import Reuse, denoiser, easycache, guided, inpainted, pair, timestep
from .levels import alphas_cumprod, betas, model_sigmas, sigma_to_t, t_to_sigma
from .noise import draw, fresh, initial, keys, of_row
from .noise_schedule import (
    CONVENTIONS,
    DISCARD_PENULTIMATE,
    called_at,
    known_schedule,
    schedule,
    schedule_file,
)
from .plans import SAMPLERS, calls, plan
from .scan import (
    Call,
    State,
    advance,
    bucket,
    free,
    going,
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
from .sources import BROWNIAN, brownian, randn, rounded, varied
from .tables import HISTORY, NOISE, Custom, Row, Rows, mix, pairs, row, slope

__all__ = [
    'BROWNIAN', 'CONVENTIONS', 'Call', 'Custom', 'DISCARD_PENULTIMATE', 'HISTORY', 'NOISE', 'Reuse',
    'Row', 'Rows', 'SAMPLERS', 'SCHEDULES', 'State', 'advance', 'alphas_cumprod', 'betas',
    'brownian', 'bucket', 'called_at', 'calls', 'denoiser', 'draw', 'easycache', 'free', 'fresh',
    'going', 'guided', 'idle', 'init', 'initial', 'inpainted', 'keys', 'known_schedule',
    'log_probability', 'mix', 'model_sigmas', 'of_row', 'pad', 'pair', 'pairs', 'plan', 'randn',
    'rounded', 'row', 'sample', 'schedule', 'schedule_file', 'sigma_to_t', 'slope', 'stack', 'step',
    't_to_sigma', 'timestep', 'varied', 'write_schedule',
]
