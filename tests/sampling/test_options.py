"""Whatever is given as an option: a finite table, or one clear line."""

import inspect
import warnings

import jax
import numpy as np
import pytest

from jaxsd import sampling
from jaxsd.config import ScheduleConfig

CONFIG = ScheduleConfig()
SIGMAS = sampling.schedule('karras', 12, CONFIG)
VALUES = ['abc', None, [1, 2], {}, True, float('nan'), float('inf'), -1, 0, 1e9]
COMMON = ('final', 'discard_penultimate', 'denoise', 'convention', 'rescale_betas_zero_snr')


def made(function, option, value):
    """The result, or None after a ValueError of one line; warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        try:
            return function(**{option: value})
        except ValueError as error:
            assert '\n' not in str(error) and str(error)
            return None


@pytest.mark.parametrize('name', sampling.SAMPLERS)
def test_samplers(name):
    options = [*inspect.signature(sampling.SAMPLERS[name]).parameters][1:]
    for option in set(options) - {'config'}:
        for value in VALUES:
            rows = made(lambda **o: sampling.plan(name, SIGMAS, config=CONFIG, **o), option, value)
            assert rows is None or name == 'dpm_adaptive' or all(
                np.isfinite(field).all() for field in jax.tree.leaves(rows)), (option, value)
            meant = (option, value) in (('restart_list', {}), ('tau_timesteps', [1, 2]))
            taken = rows is not None and not meant
            assert not (taken and isinstance(value, str | list | dict)), (option, value)


@pytest.mark.parametrize('name', sampling.SCHEDULES)
def test_schedules(name):
    options = [*inspect.signature(sampling.SCHEDULES[name]).parameters][2:]
    for option in (*options, *COMMON):
        for value in VALUES:
            sigmas = made(lambda **o: sampling.schedule(name, 8, CONFIG, **o), option, value)
            assert sigmas is None or np.isfinite(sigmas).all(), (option, value)
            assert sigmas is None or not isinstance(value, str | list | dict), (option, value)
