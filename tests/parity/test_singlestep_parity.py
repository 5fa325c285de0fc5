"""DPM-Solver singlestep, LCM and TCD against diffusers' schedulers, on an analytic denoiser.

diffusers keeps its tables in float32, hence 1e-5 here; tests/sampling/test_singlestep.py holds the
same samplers to 1e-12 of their loops.
"""

import importlib

import diffusers
import numpy as np
import pytest
import torch
from analytic import SD, denoise, ours

from jaxsd import sampling
from jaxsd.config import ScheduleConfig

pytestmark = pytest.mark.parity

CONFIG = ScheduleConfig()
MIN = {'final_sigmas_type': 'sigma_min'}

# diffusers sets lower_order_final where the steps do not divide or the walk ends in 0; where a user
# sets it elsewhere, it lowers the last order, which ours does not.
# (ours, our options, diffusers' class, its options, arguments of its step)
SAMPLERS = [
    *(('dpm_solver_singlestep', {'order': order}, 'DPMSolverSinglestep',
       {'solver_order': order, **more}, {})
      for order in (1, 2, 3) for more in ({}, MIN, {'use_karras_sigmas': True})),
    *(('dpm_solver_singlestep', {'order': order, 'algorithm': 'dpmsolver'}, 'DPMSolverSinglestep',
       {'solver_order': order, 'algorithm_type': 'dpmsolver', **MIN}, {})
      for order in (1, 2, 3)),
    ('lcm', {}, 'LCM', {'clip_sample': False}, {}),
    *(('tcd', {'config': CONFIG, 'gamma': gamma}, 'TCD', {'clip_sample': False}, {'eta': gamma})
      for gamma in (0.0, 0.3, 0.7, 1.0)),
]


def sigmas_of(scheduler):
    """The noise levels that a scheduler walks through, the final one included."""
    if hasattr(scheduler, 'sigmas'):
        return scheduler.sigmas.numpy().astype(np.float64)
    table = sampling.model_sigmas(CONFIG)
    # TCD ends at timestep 0, LCM in the denoised picture
    last = table[0] if 'TCD' in type(scheduler).__name__ else 0.0
    return np.append(table[scheduler.timesteps.numpy()], last)


@pytest.mark.parametrize('steps', [4, 5, 9, 20])
@pytest.mark.parametrize('name, options, reference, settings, arguments', SAMPLERS)
def test_sampler(name, options, reference, settings, arguments, steps, monkeypatch):
    scheduler = getattr(diffusers, f'{reference}Scheduler')(**SD, **settings)
    scheduler.set_timesteps(steps)
    sigmas = sigmas_of(scheduler)
    rows = sampling.plan(name, sigmas, **options)
    assert len(scheduler.timesteps) == sampling.calls(rows) == steps
    random = np.random.default_rng(0)
    x, pool = random.standard_normal((2, 3, 4, 4)), random.standard_normal((64, 2, 3, 4, 4))
    if name == 'lcm':  # its c_skip and c_out belong to the model; taken out of the scheduler
        monkeypatch.setattr(
            scheduler, 'get_scalings_for_boundary_condition_discrete', lambda t: (0.0, 1.0))
    module = importlib.import_module(type(scheduler).__module__)
    sample = torch.from_numpy(x * sigmas[0] / np.hypot(1, sigmas[0]))
    for i, (t, sigma) in enumerate(zip(scheduler.timesteps, sigmas)):
        monkeypatch.setattr(module, 'randn_tensor',
                            lambda *_, i=i, **__: torch.from_numpy(pool[i]))
        point = sample.numpy() * np.hypot(1, sigma)
        eps = torch.from_numpy((point - denoise(point, sigma, np)) / sigma)
        sample = scheduler.step(eps, t, sample, **arguments).prev_sample
    end = sample.numpy() * np.hypot(1, sigmas[-1])
    got = np.asarray(ours((x * sigmas[0]).astype(np.float32), sampling.pad(rows, 64),
                          pool.astype(np.float32)))
    assert np.abs(got - end).max() <= 1e-5 * np.abs(end).max()
