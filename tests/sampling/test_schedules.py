"""Betas, sigmas, timesteps and the six schedules."""

import dataclasses

import numpy as np
import pytest

from jaxsd import sampling
from jaxsd.config import ScheduleConfig

CONFIG = ScheduleConfig()
EVERY = sorted(sampling.SCHEDULES)


def test_sigmas_of_stable_diffusion():
    """Both ends; 14.6146 is what every front end of SD 1.x and SDXL quotes."""
    sigmas = sampling.model_sigmas(CONFIG)
    assert sigmas.shape == (1000,)
    np.testing.assert_allclose(sigmas[0], np.sqrt(0.00085 / (1 - 0.00085)), rtol=1e-12)
    np.testing.assert_allclose(sigmas[-1], 14.6146, rtol=1e-5)
    assert np.all(np.diff(sigmas) > 0)


@pytest.mark.parametrize('kind', ['linear', 'scaled_linear', 'squaredcos_cap_v2'])
def test_betas_rise_within_bounds(kind):
    config = ScheduleConfig(beta_schedule=kind)
    beta = sampling.betas(config)
    assert beta.shape == (1000,) and beta.dtype == np.float64
    assert np.all(np.diff(beta) >= 0) and beta[0] > 0 and beta[-1] <= 0.999
    if kind != 'squaredcos_cap_v2':
        np.testing.assert_allclose(beta[[0, -1]], [0.00085, 0.012])


def test_zero_terminal_snr_is_clamped_and_keeps_the_clean_end():
    zero = ScheduleConfig(rescale_betas_zero_snr=True)
    sigmas = sampling.model_sigmas(zero)
    assert np.isfinite(sigmas).all()
    np.testing.assert_allclose(sigmas[-1], np.sqrt(2.0**24 - 1))
    np.testing.assert_allclose(sigmas[0], sampling.model_sigmas(CONFIG)[0])
    for name in EVERY:
        assert np.isfinite(sampling.plan('dpmpp_2m', sampling.schedule(name, 20, zero)).mix).all()


def test_timesteps_and_sigmas_are_inverse():
    t = np.linspace(0, 999, 3331)
    np.testing.assert_allclose(
        sampling.sigma_to_t(sampling.t_to_sigma(t, CONFIG), CONFIG), t, atol=1e-9)
    np.testing.assert_allclose(
        sampling.t_to_sigma(np.arange(1000), CONFIG), sampling.model_sigmas(CONFIG), rtol=1e-13)
    assert sampling.sigma_to_t(np.array([0.0, 1e9]), CONFIG).tolist() == [0, 999]


@pytest.mark.parametrize('steps', [1, 2, 7, 20, 30, 100])
@pytest.mark.parametrize('name', EVERY)
def test_schedules_fall_to_zero(name, steps):
    sigmas = sampling.schedule(name, steps, CONFIG)
    assert sigmas.shape == (steps + 1,) and sigmas.dtype == np.float64
    assert sigmas[-1] == 0 and np.all(np.diff(sigmas) < 0)
    assert sigmas[0] <= sampling.model_sigmas(CONFIG)[-1] * (1 + 1e-12)


def test_karras_and_exponential_by_hand():
    ends = {'sigma_min': 0.1, 'sigma_max': 10.0}
    got = sampling.schedule('karras', 3, CONFIG, rho=2.0, **ends)
    np.testing.assert_allclose(got, [10, ((10**0.5 + 0.1**0.5) / 2) ** 2, 0.1, 0])
    got = sampling.schedule('exponential', 3, CONFIG, **ends)
    np.testing.assert_allclose(got, [10, 1, 0.1, 0])


def test_timesteps_of_the_discrete_schedules():
    def t(name, steps):
        return sampling.sigma_to_t(sampling.schedule(name, steps, CONFIG)[:-1], CONFIG)
    np.testing.assert_allclose(t('normal', 4), [999, 666, 333, 0], atol=1e-8)
    np.testing.assert_allclose(t('sgm_uniform', 4), [999, 749.25, 499.5, 249.75], atol=1e-8)
    np.testing.assert_allclose(t('simple', 4), [999, 749, 499, 249], atol=1e-8)
    np.testing.assert_allclose(t('ddim_uniform', 4), [751, 501, 251, 1], atol=1e-8)


def test_final_and_penultimate():
    smallest = sampling.model_sigmas(CONFIG)[0]
    got = sampling.schedule('ddim_uniform', 10, CONFIG, final='sigma_min')
    assert got[-1] == smallest
    whole = sampling.schedule('karras', 11, CONFIG)
    dropped = sampling.schedule('karras', 10, CONFIG, discard_penultimate=True)
    np.testing.assert_array_equal(dropped, np.delete(whole, -2))
    for names in sampling.DISCARD_PENULTIMATE.values():
        assert set(names) <= set(sampling.SAMPLERS)


@pytest.mark.parametrize('arguments, options, match', [
    (('karas', 10), {}, "unknown schedule 'karas': did you mean 'karras'.*sgm_uniform"),
    (('karras', 0), {}, 'steps=0: expected a whole number from 1 to 1000'),
    (('karras', 2.5), {}, 'steps=2.5'),
    (('karras', 10), {'sigma': 3}, "no option 'sigma'; it takes: sigma_min, sigma_max, rho"),
    (('karras', 10), {'sigma_min': 20.0}, 'expected 0 < sigma_min <= sigma_max'),
    (('normal', 10), {'final': 'one'}, "unknown final 'one'"),
    (('normal', 10), {'final': 'sigma_min'}, 'do not strictly decrease'),
])
def test_bad_input(arguments, options, match):
    with pytest.raises(ValueError, match=match) as error:
        sampling.schedule(*arguments, CONFIG, **options)
    assert '\n' not in str(error.value)


def test_unknown_beta_schedule():
    with pytest.raises(ValueError, match='unknown beta schedule'):
        sampling.betas(dataclasses.replace(CONFIG, beta_schedule='sqrt'))
