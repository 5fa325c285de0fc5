"""Schedules against diffusers' schedulers and pipelines, and beta quantiles against scipy's.

tests/parity/test_sampling.py holds those schedules that a sampler's scheduler has by default.
"""

import types

import diffusers
import numpy as np
import pytest
import scipy.stats
from diffusers.schedulers.scheduling_utils import AysSchedules

from jaxsd import sampling
from jaxsd.config import ScheduleConfig
from jaxsd.sampling.schedules import beta_quantile

pytestmark = pytest.mark.parity

CONFIG = ScheduleConfig()
SD = {'beta_start': 0.00085, 'beta_end': 0.012, 'beta_schedule': 'scaled_linear'}


def make(name, steps=None, config=None, **arguments):
    scheduler = getattr(diffusers, f'{name}Scheduler')(**{**SD, **(config or {})})
    scheduler.set_timesteps(steps, **arguments)
    return scheduler


# (ours, our options, diffusers' class, its config)
SIGMAS = [
    ('linspace', {}, 'EulerDiscrete', {'timestep_spacing': 'linspace'}),
    ('karras', {}, 'EulerDiscrete', {'use_karras_sigmas': True}),
    ('karras', {'sigma_min': 0.1, 'sigma_max': 9.0}, 'EDMEuler',
     {'sigma_min': 0.1, 'sigma_max': 9.0, 'sigma_schedule': 'karras'}),
    ('exponential', {'sigma_min': 0.1, 'sigma_max': 9.0}, 'EDMEuler',
     {'sigma_min': 0.1, 'sigma_max': 9.0, 'sigma_schedule': 'exponential'}),
    ('exponential', {}, 'DPMSolverMultistep', {'use_exponential_sigmas': True}),
    ('lambda_uniform', {}, 'DPMSolverMultistep', {'use_lu_lambdas': True}),
    ('beta', {'space': 'sigma'}, 'EulerDiscrete', {'use_beta_sigmas': True}),
    ('beta', {'space': 'sigma'}, 'UniPCMultistep', {'use_beta_sigmas': True}),
]


@pytest.mark.parametrize('steps', [2, 7, 20, 50, 99])
@pytest.mark.parametrize('name, options, reference, config', SIGMAS)
def test_sigmas(name, options, reference, config, steps):
    if reference == 'EDMEuler':
        scheduler = diffusers.EDMEulerScheduler(**config)
        scheduler.set_timesteps(steps)
    else:
        scheduler = make(reference, steps, config)
    got = sampling.schedule(name, steps, CONFIG, **options)
    # diffusers' float32 `1 - abar` puts the smallest sigma 3.4e-7 off
    np.testing.assert_allclose(got, scheduler.sigmas.numpy(), rtol=1e-5, atol=5e-7)


@pytest.mark.parametrize('alpha, beta', [
    (0.6, 0.6), (0.5, 0.5), (1, 1), (0.1, 0.3), (0.3, 4), (2, 5), (50, 50), (50, 0.2), (7.3, 30)])
def test_beta_quantile(alpha, beta):
    share = np.linspace(0, 1, 1001)
    expected = scipy.stats.beta.ppf(share, alpha, beta)
    np.testing.assert_allclose(beta_quantile(share, alpha, beta), expected, rtol=0, atol=1e-13)
    tails = np.array([1e-12, 1e-6, 1 - 1e-6])
    expected = scipy.stats.beta.ppf(tails, alpha, beta)
    np.testing.assert_allclose(beta_quantile(tails, alpha, beta), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('alpha, beta', [(0.6, 0.6), (0.9, 0.5)])
@pytest.mark.parametrize('steps', range(1, 101))
def test_beta_of_comfyui(alpha, beta, steps):
    """comfy/samplers.py beta_scheduler; it skips timesteps that come twice, and so makes fewer."""
    t = np.rint(scipy.stats.beta.ppf(1 - np.linspace(0, 1, steps, endpoint=False), alpha, beta)
                * 999).astype(int)
    got = sampling.schedule('beta', steps, CONFIG, alpha=alpha, beta=beta)[:-1]
    if len(np.unique(t)) == steps:
        np.testing.assert_allclose(got, sampling.model_sigmas(CONFIG)[t], rtol=1e-12)
    else:
        assert np.abs(sampling.sigma_to_t(got, CONFIG) - t).max() <= 0.5 + 1e-9


@pytest.mark.parametrize('steps', [1, 2, 4, 7, 8, 25, 33, 50])
@pytest.mark.parametrize('reference', ['LCM', 'TCD'])
def test_distilled_timesteps(reference, steps):
    def t(**options):
        return sampling.sigma_to_t(sampling.schedule('lcm', steps, CONFIG, **options)[:-1], CONFIG)

    np.testing.assert_allclose(t(), make(reference, steps).timesteps.numpy(), atol=1e-8)
    for original in (50, 100):
        seen = make(reference, steps, original_inference_steps=original).timesteps.numpy()
        ours = original if reference == 'LCM' else 1000
        np.testing.assert_allclose(t(original_inference_steps=ours), seen, atol=1e-8)


@pytest.mark.parametrize('table, name', [
    ('sd15', 'StableDiffusion'), ('sdxl', 'StableDiffusionXL')])
def test_align_your_steps(table, name):
    np.testing.assert_array_equal(
        sampling.schedule('ays', 10, CONFIG, table=table), AysSchedules[f'{name}Sigmas'])
    # the same as timesteps; three digits of a sigma of 0.11 are no more than this
    np.testing.assert_allclose(
        sampling.sigma_to_t(sampling.schedule('ays', 10, CONFIG, table=table)[:-1], CONFIG),
        AysSchedules[f'{name}Timesteps'], atol=0.7)


@pytest.mark.parametrize('strength', [0.05, 0.3, 0.6, 0.75, 0.999, 1.0])
@pytest.mark.parametrize('steps', [1, 9, 20, 50])
def test_part_of_the_way(steps, strength):
    """Timesteps left by diffusers' own img2img pipeline, of first order and of second."""
    for name in ('EulerDiscrete', 'HeunDiscrete'):
        scheduler = make(name, steps)
        pipeline = types.SimpleNamespace(scheduler=scheduler)
        timesteps, kept = diffusers.StableDiffusionImg2ImgPipeline.get_timesteps(
            pipeline, steps, strength, 'cpu')
        if kept == 0:
            with pytest.raises(ValueError, match=f'are 0 of {steps} steps'):
                sampling.schedule('linspace', steps, CONFIG, denoise=strength,
                                  convention='diffusers')
            continue
        sigmas = sampling.schedule('linspace', steps, CONFIG, denoise=strength,
                                   convention='diffusers')
        assert len(sigmas) == kept + 1
        if steps == 1:  # whose only timestep is 0 in diffusers
            continue
        np.testing.assert_allclose(  # float32, and log-linear between whole timesteps
            sampling.sigma_to_t(sigmas[0], CONFIG), timesteps[0], atol=0.01)


def test_final_sigma():
    scheduler = make('EulerDiscrete', 20, {'final_sigmas_type': 'sigma_min',
                                           'timestep_spacing': 'trailing'})
    got = sampling.schedule('simple', 20, CONFIG, final='sigma_min')
    np.testing.assert_allclose(got, scheduler.sigmas.numpy(), rtol=1e-5, atol=5e-7)


@pytest.mark.parametrize('name, config', [
    ('karras', {'use_karras_sigmas': True}), ('linspace', {}), ('beta', {'use_beta_sigmas': True})])
def test_zero_terminal_snr(name, config):
    scheduler = make('EulerDiscrete', 20, {**config, 'rescale_betas_zero_snr': True})
    options = {'space': 'sigma'} if name == 'beta' else {}
    got = sampling.schedule(name, 20, CONFIG, rescale_betas_zero_snr=True, **options)
    np.testing.assert_allclose(  # the smallest sigma is off by 1.3e-5, see test_sigmas
        got, scheduler.sigmas.numpy(), rtol=2e-5)
