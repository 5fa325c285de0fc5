"""Multistep samplers against diffusers' schedulers, on an analytic denoiser.

diffusers keeps its tables in float32, hence 1e-5 here; test_multistep.py compares in float64.
"""

import diffusers
import numpy as np
import pytest
import torch
from analytic import LEADING, SD, denoise, ours
from diffusers.schedulers import scheduling_sasolver

from jaxsd import sampling

pytestmark = pytest.mark.parity

NOISE = {'algorithm_type': 'dpmsolver', 'final_sigmas_type': 'sigma_min'}
PLUS = {'algorithm_type': 'dpmsolver++'}
HEUN = {'solver_type': 'heun'}

# (ours, our options, diffusers' class, its options)
SAMPLERS = [
    ('plms', {}, 'PNDM', {'skip_prk_steps': True, 'set_alpha_to_one': True, **LEADING}),
    ('plms', {}, 'PNDM', {'skip_prk_steps': True, 'set_alpha_to_one': False, **LEADING}),
    *(('deis', {'order': n}, 'DEISMultistep', {'solver_order': n}) for n in (1, 2, 3)),
    ('deis', {}, 'DEISMultistep', {'solver_order': 3, 'timestep_spacing': 'trailing'}),
    *(('dpm_solver_multistep', {'order': n}, 'DPMSolverMultistep', {'solver_order': n, **PLUS})
      for n in (1, 2, 3)),
    *(('dpm_solver_multistep', {'order': n, 'algorithm': 'dpmsolver'}, 'DPMSolverMultistep',
       {'solver_order': n, **NOISE}) for n in (1, 2, 3)),
    ('dpm_solver_multistep', HEUN, 'DPMSolverMultistep', {**PLUS, **HEUN}),
    ('dpm_solver_multistep', {**HEUN, 'order': 3, 'algorithm': 'dpmsolver'}, 'DPMSolverMultistep',
     {'solver_order': 3, **NOISE, **HEUN}),
]


def levels(scheduler):
    """The noise levels of a scheduler, once each, descending."""
    if hasattr(scheduler, 'sigmas'):
        return np.unique(scheduler.sigmas.numpy().astype(np.float64))[::-1]
    abar = scheduler.alphas_cumprod.numpy().astype(np.float64)
    t = np.unique(scheduler.timesteps.numpy())[::-1]
    abar = np.append(abar[t], float(scheduler.final_alpha_cumprod))
    return np.sqrt((1 - abar) / abar)


def theirs(scheduler, x, at, last):
    """The end of a scheduler's walk, x in the units of noise added to the picture.

    at: the noise level of every call. last: of the end.
    """
    sample = torch.from_numpy(x * at[0] / np.hypot(at[0], 1))
    for t, sigma in zip(scheduler.timesteps, at):
        point = sample.numpy() * np.hypot(sigma, 1)
        eps = torch.from_numpy((point - denoise(point, sigma, np)) / sigma)
        sample = scheduler.step(eps, t, sample).prev_sample
    return sample.numpy() * np.hypot(last, 1)


def agree(rows, x, pool, expected):
    got = ours(x.astype(np.float32) * np.float32(rows.sigma[0]), sampling.pad(rows, 64),
               pool.astype(np.float32))
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def start():
    random = np.random.default_rng(0)
    return random.standard_normal((2, 3, 4, 4)), random.standard_normal((64, 2, 3, 4, 4))


@pytest.mark.parametrize('steps', [5, 20])
@pytest.mark.parametrize('name, options, reference, settings', SAMPLERS)
def test_sampler(name, options, reference, settings, steps):
    scheduler = getattr(diffusers, f'{reference}Scheduler')(**{**SD, **settings})
    scheduler.set_timesteps(steps)
    sigmas = levels(scheduler)
    rows = sampling.plan(name, sigmas, **options)
    assert len(scheduler.timesteps) == sampling.calls(rows)
    x, pool = start()
    agree(rows, x, pool, theirs(scheduler, x, rows.sigma, sigmas[-1]))


@pytest.mark.parametrize('tau', [0, 1, 0.6])
@pytest.mark.parametrize('predictor, corrector', [(1, 1), (1, 2), (2, 2), (3, 3), (3, 4)])
def test_sa_solver(predictor, corrector, tau, monkeypatch):
    """All but the last steps of 20: diffusers lowers the order there, ComfyUI before sigma 0."""
    scheduler = diffusers.SASolverScheduler(
        **SD, predictor_order=predictor, corrector_order=corrector,
        tau_func=lambda t: torch.tensor(float(tau)))
    scheduler.set_timesteps(20)
    sigmas = levels(scheduler)[:17]
    x, pool = start()
    noises = iter(pool)
    monkeypatch.setattr(scheduling_sasolver, 'randn_tensor',
                        lambda *_, **__: torch.from_numpy(next(noises)))
    rows = sampling.plan('sa_solver', sigmas, predictor_order=predictor, corrector_order=corrector,
                         tau=tau, s_tmin=0, s_tmax=np.inf, simple_order_2=True)
    agree(rows, x, pool, theirs(scheduler, x, rows.sigma, sigmas[-1]))
