"""Betas, sigmas, timesteps, and every schedule under every modifier."""

import dataclasses
import functools
import math

import numpy as np
import pytest

from jaxsd import sampling
from jaxsd.config import ScheduleConfig

CONFIG = ScheduleConfig()
ZERO = ScheduleConfig(rescale_betas_zero_snr=True)
EVERY = sorted({*sampling.SCHEDULES} - {'diffusers'})  # of which tests/parity has all
LONGEST = {'turbo': 10, 'lcm': 50}  # the timesteps that these models were distilled at
FROM_ELSEWHERE = {'ays': 14.615, 'vp': 152.16697}  # first sigmas that are not the model's largest


def most(name):
    return LONGEST.get(name, 100)


@functools.cache
def plain(name, steps):
    return sampling.schedule(name, steps, CONFIG)


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
    sigmas = sampling.model_sigmas(ZERO)
    assert np.isfinite(sigmas).all()
    np.testing.assert_allclose(sigmas[-1], np.sqrt(2.0**24 - 1))
    np.testing.assert_allclose(sigmas[0], sampling.model_sigmas(CONFIG)[0])
    for name in EVERY:
        steps = min(20, most(name))
        sigmas = sampling.schedule(name, steps, ZERO)
        assert np.isfinite(sampling.plan('dpmpp_2m', sigmas).mix).all()
        np.testing.assert_array_equal(
            sampling.schedule(name, steps, CONFIG, rescale_betas_zero_snr=True), sigmas)
        np.testing.assert_array_equal(
            sampling.schedule(name, steps, ZERO, rescale_betas_zero_snr=False),
            sampling.schedule(name, steps, CONFIG))


def test_timesteps_and_sigmas_are_inverse():
    t = np.linspace(0, 999, 3331)
    np.testing.assert_allclose(
        sampling.sigma_to_t(sampling.t_to_sigma(t, CONFIG), CONFIG), t, atol=1e-9)
    np.testing.assert_allclose(
        sampling.t_to_sigma(np.arange(1000), CONFIG), sampling.model_sigmas(CONFIG), rtol=1e-13)
    assert sampling.sigma_to_t(np.array([0.0, 1e9]), CONFIG).tolist() == [0, 999]


# All schedules, all modifiers


def check_sigmas(sigmas, steps):
    assert sigmas.shape == (steps + 1,) and sigmas.dtype == np.float64
    assert sigmas[-1] == 0 and np.all(np.diff(sigmas) < 0) and np.isfinite(sigmas).all()


@pytest.mark.parametrize('config', [CONFIG, ZERO], ids=['usual', 'zero_snr'])
@pytest.mark.parametrize('name', EVERY)
def test_from_the_largest_sigma_to_zero(name, config):
    first = FROM_ELSEWHERE.get(name, sampling.model_sigmas(config)[-1])
    first = min(first, 1e-5**-0.5) if name == 'laplace' else first  # its own end is at sigma 316
    for steps in range(1, most(name) + 1):
        sigmas = sampling.schedule(name, steps, config)
        check_sigmas(sigmas, steps)
        if name != 'ddim_uniform':  # begins at timestep 1 + (steps - 1) (T // steps)
            np.testing.assert_allclose(sigmas[0], first, rtol=1e-7)
        assert sigmas[0] <= first * (1 + 1e-7)


@pytest.mark.parametrize('ends', [
    {'sigma_max': 9.5}, {'sigma_min': 0.05}, {'sigma_min': 0.05, 'sigma_max': 20.0}])
@pytest.mark.parametrize('name', EVERY)
def test_sigma_min_and_sigma_max(name, ends):
    if name in ('normal', 'sgm_uniform', 'linspace') and ends.get('sigma_max') == 20.0:
        ends = {**ends, 'sigma_max': 14.0}  # they have no timestep above the model's largest sigma
    for steps in range(1, most(name) + 1):
        sigmas = sampling.schedule(name, steps, CONFIG, **ends)
        check_sigmas(sigmas, steps)
        first = ends.get('sigma_max', plain(name, steps)[0])
        np.testing.assert_allclose(sigmas[0], first, rtol=1e-12)
        if steps > 1 and 'sigma_min' in ends and name != 'sgm_uniform':  # it leaves that end out
            np.testing.assert_allclose(sigmas[-2], ends['sigma_min'], rtol=1e-12)


def test_ends_of_a_given_list_are_stretched_in_log_sigma():
    got = sampling.schedule([8, 4, 1, 0], 3, CONFIG, sigma_max=16.0, sigma_min=1.0)
    np.testing.assert_allclose(got, [16, 16 ** (2 / 3), 1, 0])
    got = sampling.schedule([8, 4, 1, 0.5], 3, CONFIG, sigma_min=2.0)
    np.testing.assert_allclose(got, [8, 2 * 4 ** (2 / 3), 2, 0.5])


@pytest.mark.parametrize('name', EVERY)
def test_discard_and_final(name):
    for steps in range(1, most(name)):
        whole = plain(name, steps + 1)
        dropped = sampling.schedule(name, steps, CONFIG, discard_penultimate=True)
        np.testing.assert_array_equal(dropped, np.delete(whole, -2))
        smallest = sampling.model_sigmas(CONFIG)[0]
        if dropped[-2] > smallest:
            ended = sampling.schedule(name, steps, CONFIG, 'sigma_min', discard_penultimate=True)
            np.testing.assert_array_equal(ended, np.append(dropped[:-1], smallest))
        np.testing.assert_array_equal(sampling.schedule(name, steps, CONFIG, final='zero'),
                                      plain(name, steps))


@pytest.mark.slow
@pytest.mark.parametrize('part', [1.0, 0.75, 0.6, 0.3, 0.11])
@pytest.mark.parametrize('name', EVERY)
def test_part_of_the_way(name, part):
    """ComfyUI makes as many steps of a finer schedule, diffusers fewer of the same one."""
    for steps in range(1, most(name) + 1):
        total = int(steps / part)
        if total <= most(name):
            sigmas = sampling.schedule(name, steps, CONFIG, denoise=part)
            np.testing.assert_array_equal(
                sigmas, plain(name, total)[total - steps:])
        whole = plain(name, steps)
        kept = int(steps * part)
        for convention, count in (('diffusers', kept), ('a1111', int(steps * min(part, .999)) + 1)):
            if count > 0:
                sigmas = sampling.schedule(name, steps, CONFIG, denoise=part, convention=convention)
                np.testing.assert_array_equal(sigmas, whole[steps - count:])


@pytest.mark.parametrize('name', ['normal', 'karras', 'exponential', 'sgm_uniform', 'kl_optimal'])
def test_more_steps_than_timesteps(name):
    """ComfyUI makes 200 steps at denoise 0.05: the last 200 of 4000 (comfy/samplers.py)."""
    sigmas = sampling.schedule(name, 200, CONFIG, denoise=0.05)
    expected = np.append(sampling.SCHEDULES[name](4000, CONFIG), 0)[-201:]
    np.testing.assert_array_equal(sigmas, expected)
    assert len(sigmas) == 201 and sigmas[0] < 1


def test_conventions_by_hand():
    assert {name: rule(20, 0.6) for name, rule in sampling.CONVENTIONS.items()} == {
        'comfyui': (33, 20), 'diffusers': (20, 12), 'a1111': (20, 13)}
    assert {name: rule(20, 0.01) for name, rule in sampling.CONVENTIONS.items()} == {
        'comfyui': (2000, 20), 'diffusers': (20, 0), 'a1111': (20, 1)}
    assert {name: rule(20, 0.0)[1] for name, rule in sampling.CONVENTIONS.items()} == {
        'comfyui': 0, 'diffusers': 0, 'a1111': 1}
    assert {name: rule(20, 1.0) for name, rule in sampling.CONVENTIONS.items()} == dict.fromkeys(
        sampling.CONVENTIONS, (20, 20))


@pytest.mark.parametrize('sampler', ['euler', 'heun', 'lms', 'dpmpp_2m', 'dpmpp_3m_sde', 'unipc'])
def test_samplers_take_every_schedule(sampler):
    for name in EVERY:
        for steps in (1, 2, 3, 10):
            for options in ({}, {'denoise': 0.9, 'convention': 'a1111'}, {'sigma_max': 10.0}):
                sigmas = sampling.schedule(name, steps, CONFIG, **options)
                rows = sampling.plan(sampler, sigmas)
                assert sampling.calls(rows) >= len(sigmas) - 1
                assert all(np.isfinite(field).all() for field in rows)


# The formulas, each written out here as its source has it


def curve(name, steps, **options):
    return sampling.schedule(name, steps, CONFIG, **options)[:-1]


FIRST, LAST = sampling.model_sigmas(CONFIG)[[-1, 0]]


@pytest.mark.parametrize('steps', [2, 3, 10, 21, 50])
def test_curves_of_k_diffusion_and_comfyui(steps):
    """Sigma by sigma from the formulas of k_diffusion/sampling.py and comfy/samplers.py."""
    def each(formula):
        return [formula(i / (steps - 1)) for i in range(steps)]

    low, high = math.log(LAST), math.log(FIRST)
    expected = {
        ('karras', 7): each(
            lambda x: (FIRST ** (1 / 7) + x * (LAST ** (1 / 7) - FIRST ** (1 / 7))) ** 7),
        ('karras', 3): each(
            lambda x: (FIRST ** (1 / 3) + x * (LAST ** (1 / 3) - FIRST ** (1 / 3))) ** 3),
        ('exponential', None): each(lambda x: math.exp(high + x * (low - high))),
        ('lambda_uniform', None): each(lambda x: math.exp(high + x * (low - high))),
        ('polyexponential', 1): each(lambda x: math.exp(high + x * (low - high))),
        ('polyexponential', 1.7): each(
            lambda x: math.exp((1 - x) ** 1.7 * (high - low) + low)),
        ('kl_optimal', None): each(
            lambda x: math.tan(x * math.atan(LAST) + (1 - x) * math.atan(FIRST))),
        ('vp', None): each(lambda x: math.sqrt(math.exp(
            19.9 * (1 - x * 0.999) ** 2 / 2 + 0.1 * (1 - x * 0.999)) - 1)),
        ('laplace', None): each(lambda x: min(max(math.exp(
            -0.5 * np.sign(0.5 - x) * math.log(1 - 2 * abs(0.5 - x) + 1e-5)), LAST), FIRST)),
    }
    for (name, rho), sigmas in expected.items():
        got = curve(name, steps, **({} if rho is None else {'rho': rho}))
        np.testing.assert_allclose(got, sigmas, rtol=1e-9, err_msg=name)


@pytest.mark.parametrize('options', [{}, {'threshold_noise': 0.1, 'linear_steps': 3}])
@pytest.mark.parametrize('steps', [4, 5, 10, 31])
def test_linear_quadratic(steps, options):
    """comfy/samplers.py linear_quadratic_schedule, in its own coefficients."""
    noise = options.get('threshold_noise', 0.025)
    linear = options.get('linear_steps', steps // 2)
    quadratic = steps - linear
    difference = linear - noise * steps
    a = difference / (linear * quadratic**2)
    b = noise / linear - 2 * difference / quadratic**2
    done = [i * noise / linear for i in range(linear)]
    done += [a * i**2 + b * i + a * linear**2 for i in range(linear, steps)]
    got = curve('linear_quadratic', steps, **options)
    np.testing.assert_allclose(got, FIRST * (1 - np.array(done)), rtol=1e-12)


def test_laplace_keeps_its_tails_apart():
    """Where ComfyUI's clamp makes levels equal, they lie between the end and the first within."""
    ends = {'sigma_min': 0.5, 'sigma_max': 2.0}
    x = np.linspace(0, 1, 9)
    raw = np.exp(-0.5 * np.sign(0.5 - x) * np.log(1 - 2 * np.abs(0.5 - x) + 1e-5))
    assert (raw > 2).sum() == 1 and (raw < 0.5).sum() == 1
    np.testing.assert_allclose(curve('laplace', 9, **ends), np.clip(raw, 0.5, 2))
    ends = {'sigma_min': 0.8, 'sigma_max': 1.2}
    got = curve('laplace', 9, **ends)
    assert ((raw > 1.2).sum(), (raw < 0.8).sum()) == (3, 3)
    np.testing.assert_allclose(got[[0, 3, 4, 5, 8]], [1.2, raw[3], 1, raw[5], 0.8])
    np.testing.assert_allclose(np.diff(np.log(got[:4])), math.log(raw[3] / 1.2) / 3)


def steps_of(name, steps, **options):
    """The timesteps of a schedule, for those that are made of timesteps."""
    return sampling.sigma_to_t(curve(name, steps, **options), CONFIG)


@pytest.mark.parametrize('name, steps, options, expected', [
    ('normal', 4, {}, [999, 666, 333, 0]),
    ('linspace', 4, {}, [999, 666, 333, 0]),
    ('sgm_uniform', 4, {}, [999, 749.25, 499.5, 249.75]),
    ('simple', 4, {}, [999, 749, 499, 249]),
    ('ddim_uniform', 4, {}, [751, 501, 251, 1]),
    ('turbo', 4, {}, [999, 899, 799, 699]),
    ('turbo', 2, {'start': 5}, [499, 399]),
    ('lcm', 4, {}, [999, 759, 499, 259]),
    ('lcm', 8, {}, [999, 879, 759, 639, 499, 379, 259, 139]),
    ('lcm', 3, {'original_inference_steps': 1000}, [999, 666, 333]),
    ('smoothstep', 5, {}, [999, 895, 647, 352, 104]),
])
def test_timesteps(name, steps, options, expected):
    np.testing.assert_allclose(steps_of(name, steps, **options), expected, atol=1e-8)


def test_linspace_is_linear_in_sigma_between_timesteps():
    table = sampling.model_sigmas(CONFIG)
    got = curve('linspace', 3)
    np.testing.assert_allclose(got, [table[999], (table[499] + table[500]) / 2, table[0]])
    np.testing.assert_allclose(got[1] / curve('normal', 3)[1], 1, rtol=1e-5)
    assert got[1] > curve('normal', 3)[1]


def test_beta_where_its_quantile_has_a_closed_form():
    """Beta(a, 1) is x^a, Beta(1, b) is 1 - (1 - x)^b, and Beta(1/2, 1/2) the arcsine law."""
    y = np.linspace(1, 0, 12)
    for (a, b), x in {(2, 1): y**0.5, (0.3, 1): y ** (1 / 0.3), (1, 1): y,
                      (1, 3): 1 - (1 - y) ** (1 / 3), (0.5, 0.5): np.sin(y * np.pi / 2) ** 2,
                      }.items():
        got = curve('beta', 12, alpha=a, beta=b, space='sigma')
        np.testing.assert_allclose(got, LAST + x * (FIRST - LAST), rtol=1e-11, err_msg=(a, b))
    t = np.rint(999 * np.sin(np.pi / 2 * (1 - np.arange(9) / 9)) ** 2)
    np.testing.assert_allclose(steps_of('beta', 9, alpha=0.5, beta=0.5), t, atol=1e-8)


def test_whole_timesteps_as_long_as_they_differ():
    for name in ('beta', 'smoothstep'):
        few, many = steps_of(name, 20), steps_of(name, 300)
        np.testing.assert_allclose(few, np.rint(few), atol=1e-8)
        assert np.abs(many - np.rint(many)).max() > 0.1 and np.all(np.diff(many) < 0)


PUBLISHED = {  # https://research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html
    'sd15': '14.615 6.475 3.861 2.697 1.886 1.396 0.963 0.652 0.399 0.152 0.029',
    'sdxl': '14.615 6.315 3.771 2.181 1.342 0.862 0.555 0.380 0.234 0.113 0.029',
}


def log_linear(levels, count):
    """As https://research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html interpolates."""
    x = np.linspace(0, 1, len(levels))
    return np.exp(np.interp(np.linspace(0, 1, count), x, np.log(levels[::-1])))[::-1]


@pytest.mark.parametrize('table', PUBLISHED)
def test_align_your_steps(table):
    levels = np.array(PUBLISHED[table].split(), float)
    np.testing.assert_array_equal(curve('ays', 10, table=table), levels[:-1])
    for steps in (1, 4, 20, 33):
        expected = log_linear(levels, steps + 1)[:-1]
        np.testing.assert_allclose(curve('ays', steps, table=table), expected, rtol=1e-12)


def test_gits():
    """Some of comfy_extras/nodes_gits.py, coefficient 1.20; its numbers were made in float32."""
    published = {
        2: [14.61464119, 0.803307],
        6: [14.61464119, 5.85520077, 2.05039096, 0.95350921, 0.45573691, 0.17026083],
        10: [14.61464119, 5.85520077, 2.84484982, 1.67050016, 1.08895338, 0.74807048, 0.50118381,
             0.32104823, 0.19894916, 0.09824532],
        15: [14.61464119, 7.49001646, 4.65472794, 3.07277966, 2.12350607, 1.51179266, 1.08895338,
             0.83188516, 0.64427125, 0.50118381, 0.38853383, 0.29807833, 0.22545385, 0.17026083,
             0.09824532],
        20: [14.61464119, 7.49001646, 4.65472794, 3.07277966, 2.19988537, 1.61558151, 1.24153244,
             0.95350921, 0.74807048, 0.59516323, 0.50118381, 0.41087446, 0.34370604, 0.29807833,
             0.25053367, 0.22545385, 0.19894916, 0.17026083, 0.13792117, 0.09824532],
    }
    for steps, sigmas in published.items():
        np.testing.assert_allclose(curve('gits', steps), sigmas, rtol=3e-5)
    expected = log_linear(np.array([*published[20], 0.02916753]), 41)[:-1]
    np.testing.assert_allclose(curve('gits', 40), expected, rtol=3e-5)


@pytest.mark.parametrize('arguments, options, match', [
    (('karas', 10), {}, "unknown schedule 'karas': did you mean 'karras'.*sgm_uniform"),
    (('karras', 0), {}, 'steps=0: expected a whole number from 1 to 1000'),
    (('karras', 1001), {}, 'steps=1001: expected a whole number from 1 to 1000'),
    (('karras', 2.5), {}, 'steps=2.5'),
    (('karras', 10), {'sigma': 3}, "no option 'sigma'; it takes: sigma_min, sigma_max, rho"),
    (('simple', 10), {'sigma': 3}, "no option 'sigma'; it takes: sigma_min, sigma_max"),
    (('karras', 10), {'sigma_min': 20.0}, 'expected 0 < sigma_min <= sigma_max'),
    (('simple', 10), {'sigma_min': 20.0}, 'expected 0 < sigma_min <= sigma_max'),
    (('simple', 10), {'sigma_max': math.inf}, 'both finite'),
    (('karras', 10), {'sigma_min': 3.0, 'sigma_max': 3.0}, 'do not strictly decrease'),
    (('karras', 10), {'rho': 0}, 'rho=0: expected a finite number above 0'),
    (('beta', 10), {'alpha': -1}, 'alpha=-1: expected'),
    (('beta', 10), {'space': 'log'}, "unknown space 'log'"),
    (('laplace', 10), {'beta': 0}, 'beta=0: expected'),
    (('linear_quadratic', 10), {'linear_steps': 10}, 'linear_steps=10: expected'),
    (('linear_quadratic', 10), {'threshold_noise': 1.2}, 'do not strictly decrease'),
    (('ays', 10), {'table': 'sd3'}, "unknown table 'sd3': did you mean 'sdxl'"),
    (('turbo', 11), {}, 'turbo has 10 timesteps.*steps=11, start=0'),
    (('turbo', 6), {'start': 5}, 'steps=6, start=5'),
    (('lcm', 51), {}, 'original_inference_steps=50: expected a whole number from steps=51'),
    (('lcm', 4), {'original_inference_steps': 2000}, 'from steps=4 to 1000'),
    (('normal', 10), {'final': 'one'}, "unknown final 'one'"),
    (('normal', 10), {'final': 'sigma_min'}, 'do not strictly decrease'),
    (('normal', 10), {'denoise': 0}, r'steps=10 at denoise=0 \(the strength\) are 0 of 10'),
    (('normal', 10), {'denoise': 1.5}, 'denoise=1.5'),
    (('normal', 10), {'denoise': math.nan}, 'denoise=nan'),
    (('normal', 10), {'denoise': 0.5, 'convention': 'comfy'}, "convention 'comfy'.*'comfyui'"),
    (('normal', 10), {'denoise': 0.05, 'convention': 'diffusers'}, 'are 0 of 10 steps'),
    (('normal', 10), {'denoise': 0.0005}, 'are 10 of 20000 steps'),
    (('normal', 10), {'denoise': 1e-300}, 'expected at least 1, and 10000 at most; change'),
    (('simple', 200), {'denoise': 0.05}, 'do not strictly decrease'),  # repeated in ComfyUI
    (('9,3,0', 3), {}, 'steps=3: the list of sigmas has 2 steps'),
    (('9,3,3', 2), {}, "schedule '9,3,3': the sigmas must be finite and strictly decrease"),
    (('9,x', 1), {}, "schedule '9,x': expected sigmas"),
    ((np.zeros(50), 49), {}, "schedule 'a list': the sigmas must"),
])
def test_bad_input(arguments, options, match):
    with pytest.raises(ValueError, match=match) as error:
        sampling.schedule(*arguments, CONFIG, **options)
    assert '\n' not in str(error.value)


def test_unknown_beta_schedule():
    with pytest.raises(ValueError, match="beta_schedule='sqrt' is not implemented; expected one"):
        sampling.betas(dataclasses.replace(CONFIG, beta_schedule='sqrt'))
