"""All samplers by name: `plan(name, sigmas)` gives the table."""

import inspect
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxsd.config import ScheduleConfig

from . import adaptive, first_order, multistep, singlestep
from .choice import call, choose, number
from .tables import Table

SAMPLERS = {f.__name__: f for f in (
    *first_order.SAMPLERS, *singlestep.SAMPLERS, *multistep.SAMPLERS, adaptive.dpm_adaptive)}


def plan(name: str, sigmas: Sequence[float] | np.ndarray, config: ScheduleConfig | None = None,
         **options: Any) -> Table:
    """The table of a sampler -> Rows of float64 numpy arrays, one row per model call; Custom of
    samplers with a step of their own, as dpm_adaptive.

    name: a key of SAMPLERS. sigmas: [steps + 1], strictly decreasing, usually ending in 0.
    config: ScheduleConfig, for the samplers that need to know the timesteps (tcd).
    options: those of the sampler function (eta, s_noise, order, ...).
    Raises ValueError for an unknown name or option and for sigmas that do not decrease.
    """
    function = choose('sampler', name, SAMPLERS)
    sigmas = np.asarray(sigmas, np.float64)
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f'sigmas of shape {sigmas.shape}: expected [steps + 1], at least 2')
    if not np.isfinite(sigmas).all() or np.any(np.diff(sigmas) >= 0) or sigmas[-1] < 0:
        raise ValueError(f'sigmas {sigmas}: expected finite, strictly decreasing, none below 0')
    for key in ('eta', 's_noise', 's_churn', 'tau', 'timestep_scaling', 'ratio'):
        if not 0 <= number(key, options.get(key, 0)) < np.inf:
            raise ValueError(f'{key}={options[key]}: expected a finite number, 0 or greater')
    if 'config' in inspect.signature(function).parameters:
        options['config'] = config
    with np.errstate(all='ignore'):  # what is not finite has an error of its own
        rows: Any = call('sampler', name, function, sigmas, **options)
    if not all(np.isfinite(field).all() for field in jax.tree.leaves(rows)):
        raise ValueError(f'sampler {name!r} with {options}: its table is not finite; use options '
                         'nearer to the defaults')
    return rows


def calls(rows: Any) -> np.ndarray:
    """Number of model calls -> int, or int [B] when per image."""
    return (np.asarray(rows.sigma) > 0).sum(axis=0)
