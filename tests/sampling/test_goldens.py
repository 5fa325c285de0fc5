"""Every sampler of k-diffusion against its own code: same numbers, same count of model calls."""

import pathlib

import numpy as np
import pytest
from golden_cases import CASES, start
from reference import SCHEDULES, compare

from jaxsd import sampling

GOLDENS = np.load(pathlib.Path(__file__).parents[1] / 'goldens' / 'sampling.npz')


@pytest.mark.parametrize('case', CASES)
def test_equals_k_diffusion(case):
    name, options = CASES[case]
    x, noises = start()
    for (schedule, steps), sigmas in SCHEDULES.items():
        rows = sampling.plan(name, sigmas, **options)
        assert sampling.calls(rows) == GOLDENS[f'{case}/{schedule}/{steps}/calls']
        compare(rows, x * sigmas[0], noises, GOLDENS[f'{case}/{schedule}/{steps}/x'])
