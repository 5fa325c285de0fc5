"""Schedules and samplers as scheduler_config.json files of diffusers say them: its very noise
levels and timesteps, and what its whole loops come to, on an analytic network."""

import functools
import importlib
import sys
from unittest import mock

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from analytic import SD

from jaxsd import sampling
from jaxsd.config import ScheduleConfig
from jaxsd.run import Request, resolve
from jaxsd.run.inputs import _table

pytestmark = pytest.mark.parity
CONFIG = ScheduleConfig()
NONE = {'clip_sample': False}
SPACINGS = [{'timestep_spacing': name} for name in ('linspace', 'leading', 'trailing')]
OFFSET = {'timestep_spacing': 'leading', 'steps_offset': 1}
MIN = {'final_sigmas_type': 'sigma_min'}
EXPONENTIAL = {'sigma_schedule': 'exponential'}
COSXL = {'prediction_type': 'v_prediction', 'sigma_data': 1.0, 'sigma_max': 120.0}
HIGH, EULER = {'solver_order': 3, 'lower_order_final': False}, {'euler_at_final': True}
DATA, NOISE = 'data_prediction', 'noise_prediction'
CURVES = [{f'use_{name}_sigmas': True} for name in ('karras', 'exponential', 'beta')]
FAMILIES = ('EulerDiscrete', 'EulerAncestralDiscrete', 'HeunDiscrete', 'LMSDiscrete',
            'KDPM2Discrete', 'KDPM2AncestralDiscrete', 'DPMSolverSDE')
CURVED = ('EulerDiscrete', 'HeunDiscrete', 'LMSDiscrete', 'KDPM2Discrete', 'DPMSolverSDE',
          'DPMSolverMultistep', 'DPMSolverSinglestep', 'UniPCMultistep', 'SASolver')

# (diffusers' class, its settings)
CASES = [
    *((name, spacing) for name in (*FAMILIES, 'DPMSolverMultistep', 'UniPCMultistep',
                                   'DEISMultistep', 'SASolver') for spacing in (*SPACINGS, OFFSET)),
    *((name, {**NONE, **spacing}) for name in ('DDIM', 'DDPM') for spacing in (*SPACINGS, OFFSET)),
    *((name, curve) for name in CURVED for curve in CURVES),
    ('EulerDiscrete', {**CURVES[0], **OFFSET}),
    ('EulerDiscrete', {**CURVES[0], 'sigma_min': 0.1, 'sigma_max': 9.0}),
    ('EulerDiscrete', {**MIN, 'timestep_spacing': 'trailing'}),
    ('DPMSolverMultistep', {'use_lu_lambdas': True}),
    ('DPMSolverMultistep', {**CURVES[0], **MIN}),  # as SDXL's folders are often told to
    ('DPMSolverMultistep', {'lambda_min_clipped': -2.0}),
    ('DPMSolverMultistep', {**MIN, 'solver_order': 3, 'timestep_spacing': 'trailing'}),
    ('DPMSolverMultistep', {'algorithm_type': 'sde-dpmsolver++', **CURVES[0]}),
    *(('DPMSolverMultistep', {**MIN, 'algorithm_type': 'sde-dpmsolver', 'solver_order': order,
                              'solver_type': kind})
      for order, kind in ((1, 'midpoint'), (2, 'midpoint'), (2, 'heun'))),
    ('DPMSolverSinglestep', {}), ('DPMSolverSinglestep', MIN),
    ('UniPCMultistep', {'solver_order': 3, **MIN, 'timestep_spacing': 'trailing'}),
    ('UniPCMultistep', {'solver_type': 'bh1', **MIN}),
    ('DEISMultistep', {'solver_order': 3, 'timestep_spacing': 'trailing'}),
    *(('DEISMultistep', curve) for curve in CURVES), ('UniPCMultistep', {**CURVES[0], **MIN}),
    ('DDIM', {**NONE, **OFFSET, 'set_alpha_to_one': False}),
    *(('DDIM', {**NONE, **spacing, 'set_alpha_to_one': False}) for spacing in SPACINGS),
    ('DDPM', {**NONE, **OFFSET, 'variance_type': 'fixed_large'}),
    ('DDPM', {**NONE, 'timestep_spacing': 'trailing', 'variance_type': 'fixed_large'}),
    ('PNDM', {'skip_prk_steps': True, **OFFSET}),  # 1.5's own
    ('PNDM', {'skip_prk_steps': True, 'set_alpha_to_one': True}),
    *(('PNDM', more) for more in ({}, OFFSET)),  # with its Runge-Kutta steps
    ('LCM', NONE), ('LCM', {**NONE, 'original_inference_steps': 100, 'timestep_scaling': 5.0}),
    ('TCD', NONE), ('DDIMParallel', {**NONE, **OFFSET}), ('DDPMParallel', NONE),
    *((name, {**HIGH, **more}) for name in ('DPMSolverMultistep', 'DEISMultistep')
      for more in ({}, CURVES[0])),
    ('DPMSolverMultistep', {**MIN, **EULER, 'solver_type': 'heun'}),
    ('DPMSolverMultistep', {**MIN, **EULER, **HIGH}),
    ('SASolver', {'lower_order_final': False, 'predictor_order': 3}),
    ('SASolver', {'lambda_min_clipped': -2.0}),
    *(('SASolver', {'predictor_order': p, 'corrector_order': c, 'algorithm_type': kind})
      for p, c, kind in ((1, 1, DATA), (1, 2, DATA), (3, 4, DATA), (4, 3, DATA), (1, 1, NOISE),
                         (2, 2, NOISE), (3, 4, NOISE), (4, 3, NOISE))),
]
EDM = [
    *(('EDMEuler', more) for more in ({}, COSXL, {'rho': 5.0}, EXPONENTIAL, MIN)),
    *(('EDMDPMSolverMultistep', {**more, **kind}) for more in ({}, EXPONENTIAL) for kind in (
        {}, MIN, {'solver_order': 1}, {'solver_order': 3}, {'solver_type': 'heun'})),
    ('EDMDPMSolverMultistep', HIGH), ('EDMDPMSolverMultistep', {**MIN, **EULER, **HIGH}),
    *(('EDMDPMSolverMultistep', {'algorithm_type': 'sde-dpmsolver++', 'solver_type': kind})
      for kind in ('midpoint', 'heun')),
]


SCALE = 400  # of EDM's timesteps, log(sigma) / 4, for `net`


def named(case):
    return f'{case[0]}-' + ','.join(str(value) for value in case[1].values())


@functools.cache
def scheduler_class(name):
    if name != 'DPMSolverSDE':
        return getattr(diffusers, f'{name}Scheduler')
    # It draws from torchsde's tree, and here from the test's: the import alone is needed.
    with mock.patch.dict(sys.modules, torchsde=mock.Mock()):
        return importlib.import_module(
            'diffusers.schedulers.scheduling_dpmsolver_sde').DPMSolverSDEScheduler


def net(x, t, lib):
    """A prediction of noise that tells timesteps apart."""
    return lib.tanh(x * (0.5 + t / 1000)) + 0.2 * lib.sin(t / 40)


def theirs(scheduler, x, pool, monkeypatch):
    """A scheduler's whole loop from noise x, with pool[i] for the noise of call i."""
    module = sys.modules.get(type(scheduler).__module__)
    sample = torch.from_numpy(x) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        if hasattr(scheduler, 'noise_sampler'):
            scheduler.noise_sampler = lambda *_, i=i: torch.from_numpy(pool[i])
        if hasattr(module, 'randn_tensor'):
            monkeypatch.setattr(module, 'randn_tensor',
                                lambda *_, i=i, **__: torch.from_numpy(pool[i]))
        out = net(scheduler.scale_model_input(sample, t), SCALE * t if hasattr(
            scheduler, 'precondition_noise') else t, torch)
        sample = scheduler.step(out, t, sample).prev_sample
    return sample.numpy()


@functools.partial(jax.jit, static_argnames='config')
def _ours(x, rows, pool, timesteps, config):
    def denoise(x, sigma, i):
        t = jnp.where(timesteps[i] >= 0, timesteps[i], sampling.timestep(sigma, config))
        return x - sigma * net(x / jnp.hypot(sigma, 1), t, jnp)

    if config.edm:
        denoise = sampling.denoiser(
            lambda x, t, i: net(x, SCALE * t[:, None, None, None], jnp), config)
    return sampling.sample(denoise, x, rows, lambda i: pool[i])


def ours(request, x, pool, config=CONFIG):
    """The same by a request's table, from noise x."""
    _, start, rows, timesteps = _table(request, config)
    given = np.full(64, -1, np.float32)
    if timesteps is not None:
        given[:len(timesteps)] = timesteps
    return np.asarray(_ours((x * start).astype(np.float32), sampling.pad(rows, 64),
                            pool.astype(np.float32), given, config)), rows


def compare(scheduler, config, folder, steps, monkeypatch):
    """Our loop from the file alone against a scheduler's."""
    scheduler.save_pretrained(folder)
    scheduler.set_timesteps(steps)
    request, = resolve([Request(schedule=f'diffusers:{folder}', steps=steps, seed=0)], config)
    random = np.random.default_rng(0)
    x, pool = random.standard_normal((2, 3, 4, 4)), random.standard_normal((64, 2, 3, 4, 4))
    if request.sampler == 'dpm_2_ancestral':
        pool[:] = pool[0]  # of two calls the first one draws there, and the second one here
    found, rows = ours(request, x, pool, config.schedule)
    assert sampling.calls(rows) == len(scheduler.timesteps)
    if type(scheduler).__name__ in ('DEISMultistepScheduler', 'SASolverScheduler'):
        scheduler.sigmas = scheduler.sigmas.double()  # as its sums cancel, to 8e-5 of float32
    expected = theirs(scheduler, x, pool, monkeypatch)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error <= 1e-5, error


@pytest.mark.parametrize('steps', [8, 30])
@pytest.mark.parametrize('case', CASES, ids=named)
def test_loop(case, steps, monkeypatch, tmp_path, tiny_model):
    """From the file alone: levels, timesteps, start, sampler and end."""
    name, settings = case
    compare(scheduler_class(name)(**{**SD, **settings}),
            tiny_model('sd1').config, tmp_path, steps, monkeypatch)


@pytest.mark.parametrize('steps', [1, 8, 30])
@pytest.mark.parametrize('case', EDM, ids=named)
def test_loop_of_edm_models(case, steps, monkeypatch, tmp_path, tiny_model):
    """The ends of the levels are the file's, not the model's."""
    name, settings = case
    scheduler = scheduler_class(name)(**settings)
    compare(scheduler, tiny_model('sd1').config.replace(schedule=ScheduleConfig(
        edm=True, prediction_type=scheduler.config.prediction_type,
        sigma_data=scheduler.config.sigma_data, sigma_max=50.0)), tmp_path, steps, monkeypatch)


@pytest.mark.parametrize('curve', ({}, OFFSET, {'timestep_spacing': 'trailing'}, *CURVES), ids=str)
def test_stochastic_steps(curve):
    """Of SA-Solver: those from timesteps 200 to 800, both among them."""
    scheduler, bounds = diffusers.SASolverScheduler(**SD, **curve), set()
    settings = dict(scheduler.config) | {'_class_name': 'SASolver'}
    name, options = sampling.schedulers.sampler_of(settings)
    levels = sampling.schedulers.level_options(settings)
    for steps in (1, 2, 3, 4, 5, 9, 10, 20, 49, 50, 99, 100, 199):
        scheduler.set_timesteps(steps)
        rows = sampling.plan(name, sampling.schedule('diffusers', steps, CONFIG, **levels),
                             config=CONFIG, **options)
        expected = [scheduler.tau_func(t) == 1 for t in scheduler.timesteps]
        np.testing.assert_array_equal(rows.noisy, expected)
        bounds |= {200, 800} & set(scheduler.timesteps.tolist())
    assert curve not in ({}, OFFSET) or bounds, 'no timestep at a bound'


@pytest.mark.parametrize('steps', [1, 4, 20, 33])
@pytest.mark.parametrize('case', CASES, ids=named)
def test_timesteps(case, steps):
    """Every timestep as diffusers has it, and every noise level but for the last digit."""
    name, settings = case
    scheduler = scheduler_class(name)(**{**SD, **settings})
    try:
        scheduler.set_timesteps(steps)
    except ValueError:
        assert name == 'PNDM' and steps < 4  # Runge-Kutta's own
        return
    expected = np.asarray(scheduler.timesteps, np.float64)
    if len(expected) != steps:  # two calls a step
        return
    try:
        got = sampling.called_at('diffusers', steps, CONFIG, **sampling.schedulers.level_options(
            dict(scheduler.config) | {'_class_name': name}))
    except ValueError:
        assert name == 'PNDM' or min(expected) < 0
        return
    if hasattr(scheduler, 'sigmas') and len(scheduler.sigmas) == steps + 1:
        np.testing.assert_allclose(got.sigmas, scheduler.sigmas, rtol=3e-7)  # some roundings
    whole = np.all(expected == np.round(expected))
    np.testing.assert_allclose(got.timesteps, expected, rtol=0, atol=1e-9 if whole else 2e-3)
