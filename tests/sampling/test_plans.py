"""Tables against theory: fixed points, exact answers, convergence orders, variances."""

import numpy as np
import pytest

from jaxsd import sampling
from jaxsd.config import ScheduleConfig

CONFIG = ScheduleConfig()
# Which have no table: test_adaptive.py; tests/parity has diffusers' pndm.
CUSTOM = {'dpm_adaptive', 'pndm'}
EVERY = sorted(set(sampling.SAMPLERS) - CUSTOM)
CALLS = {  # of n steps, where that is not n
    **dict.fromkeys(('heun', 'dpm_2', 'dpm_2_ancestral', 'dpmpp_sde', 'dpmpp_2s_ancestral',
                     'dpmpp_2s_ancestral_cfg_pp', 'seeds_2', 'restart'), lambda n: 2 * n - 1),
    'seeds_3': lambda n: 3 * n - 2, 'heunpp2': lambda n: max(1, 3 * n - 3),
    'plms': lambda n: n + (n > 1)}
# Those that reverse the diffusion: not lcm and tcd, which need a model distilled for them.
STOCHASTIC = [
    *((name, {}) for name in (
        'euler_ancestral', 'dpm_2_ancestral', 'ddpm', 'dpmpp_2m_sde', 'dpmpp_sde', 'seeds_2',
        'dpmpp_2s_ancestral', 'dpmpp_3m_sde', 'seeds_3', 'restart', 'euler_ancestral_cfg_pp',
        'er_sde', 'sa_solver', 'dpmpp_2s_ancestral_cfg_pp', 'res_multistep_ancestral',
        'res_multistep_ancestral_cfg_pp')),
    ('ddim', {'eta': 1.0}), ('dpm_fast', {'eta': 1.0})]


def sample(rows, denoise, x, fresh=None):
    """The definition of a table, in a float64 numpy loop that shares nothing with scan.py."""
    y, history = 0 * x, [0 * x] * sampling.HISTORY
    for sigma, push, mix in zip(rows.sigma, rows.push, rows.mix):
        denoised = denoise(x, sigma) if sigma > 0 else x
        history = [push[0] * x + push[1] * denoised] + history[:-1]
        noise = fresh() if fresh is not None and mix[0, 2] else 0 * x
        x, y = (np.tensordot(w, np.stack([x, y, noise, *history, denoised]), 1) for w in mix)
    return x


@pytest.mark.parametrize('name', EVERY)
def test_calls_per_step(name):
    for steps in (1, 2, 5, 19):
        sigmas = sampling.schedule('karras', steps, CONFIG)
        rows = sampling.plan(name, sigmas, config=CONFIG)
        expected = CALLS.get(name, lambda n: n)(steps)
        assert sampling.calls(rows) == len(rows.sigma) == expected
        assert rows.push.shape == (expected, 2) and rows.mix.shape == (expected, 2, 8)
        assert rows.path.shape == (expected, 2)
        assert {field.dtype for field in rows} == {np.dtype('float64')}
        assert np.isfinite(np.concatenate([field.ravel() for field in rows])).all()
        noisy = rows.mix[:, 0, 2] != 0
        assert not noisy[-1], 'noise that no call takes away'


@pytest.mark.parametrize('schedule', ['karras', 'normal', 'simple'])
@pytest.mark.parametrize('name', EVERY)
def test_constant_denoiser_is_the_answer(name, schedule):
    """If the model always says c, every sampler ends in c, and from x = c it never leaves it."""
    sigmas = sampling.schedule(schedule, 10, CONFIG)
    rows = sampling.plan(name, sigmas, config=CONFIG)
    start = np.array([-14.0, 0.3, 9.0])
    end = sample(rows, lambda x, sigma: np.full_like(x, 0.3), start)
    left = sigmas[-2] / sigmas[0] if name == 'dpm_fast' else 0  # it makes no step to 0
    np.testing.assert_allclose(end, 0.3 + left * (start - 0.3), rtol=0, atol=1e-12)
    quiet = sampling.plan(name, sigmas[:-1], config=CONFIG)
    stay = sample(quiet, lambda x, sigma: np.full_like(x, 0.3), np.array([0.3]))
    np.testing.assert_allclose(stay, 0.3, rtol=0, atol=1e-12)


MULTISTEP = {f.__name__ for f in sampling.multistep.SAMPLERS}
ORDERS = [  # where it is not the published order, docs/samplers.md says why
    ('euler', {}, 1), ('ddim', {}, 1), ('euler_ancestral', {'eta': 0}, 1), ('tcd', {'gamma': 0}, 1),
    ('euler_cfg_pp', {}, 1), ('euler_ancestral_cfg_pp', {'eta': 0}, 1),
    ('heun', {}, 2), ('heunpp2', {}, 1), ('dpm_2', {}, 2), ('dpm_2_ancestral', {'eta': 0}, 2),
    ('restart', {'restart_list': {}}, 2), ('dpm_fast', {}, 2),
    ('dpm_solver_singlestep', {'order': 1}, 1), ('dpm_solver_singlestep', {'order': 2}, 2),
    ('dpm_solver_singlestep', {'order': 3}, 3),
    ('dpm_solver_singlestep', {'order': 3, 'algorithm': 'dpmsolver'}, 3),
    ('dpmpp_2s_ancestral', {'eta': 0}, 2), ('dpmpp_2s_ancestral_cfg_pp', {'eta': 0}, 2),
    ('dpmpp_sde', {'eta': 0}, 2), ('seeds_2', {'eta': 0}, 2), ('seeds_3', {'eta': 0}, 3),
    ('dpmpp_2m', {}, 2), ('dpmpp_2m_sde', {'eta': 0}, 2), ('dpmpp_3m_sde', {'eta': 0}, 2),
    ('dpmpp_2m_cfg_pp', {}, 2), ('dpm_solver_multistep', {'order': 1}, 1),
    ('dpm_solver_multistep', {'order': 2}, 2), ('dpm_solver_multistep', {'order': 3}, 2),
    ('dpm_solver_multistep', {'order': 2, 'algorithm': 'dpmsolver'}, 2),
    ('lms', {'order': 1}, 1), ('lms', {'order': 2}, 2), ('lms', {'order': 3}, 3),
    ('lms', {'order': 4}, 4), ('plms', {}, 2), ('ipndm', {'order': 1}, 1), ('ipndm', {}, 2),
    ('ipndm_v', {'order': 1}, 1), ('ipndm_v', {'order': 2}, 2),
    ('deis', {'order': 1}, 1), ('deis', {'order': 2}, 2), ('deis', {'order': 3}, 3),
    ('gradient_estimation', {}, 1), ('gradient_estimation', {'ge_gamma': 1.5}, 2),
    ('gradient_estimation_cfg_pp', {}, 1), ('res_multistep', {}, 2),
    ('res_multistep_cfg_pp', {}, 2), ('res_multistep_ancestral', {'eta': 0}, 2),
    ('res_multistep_ancestral_cfg_pp', {'eta': 0}, 2),
    ('unipc', {'order': 1}, 2), ('unipc', {'order': 2}, 3),
    ('unipc', {'order': 2, 'variant': 'bh1'}, 3), ('unipc', {'order': 3}, 4),
    *(('sa_solver', {'tau': 0, 'predictor_order': p, 'corrector_order': 0}, p)
      for p in (1, 2, 3, 4)),
    ('sa_solver', {'tau': 0}, 4),
]


def test_every_sampler_has_an_order():
    """But those that cannot be made deterministic, or jump."""
    without = {*CUSTOM, 'lcm', 'ddpm', 'er_sde'}
    assert {name for name, *_ in ORDERS} == set(sampling.SAMPLERS) - without


@pytest.mark.parametrize('name, options, order', ORDERS)
def test_convergence_order(name, options, order):
    """Data N(0, s^2) have the solution x(sigma) = x0 sqrt((s^2 + sigma^2) / (s^2 + sigma0^2)).

    Warm-up steps of a lower order are part of the error, so the multistep methods start their
    history with small steps, and end with some, since some lower their order there.
    """
    s2 = 0.5**2

    def error(steps):
        fine = 12 if name in MULTISTEP else 0
        sigmas = np.geomspace(5.0, 0.2, steps + 1)
        if fine:  # the grid's ends shrink geometrically, so that low-order steps are tiny
            h = sigmas[0] - sigmas[1]
            ramp = h * 0.5 ** np.arange(1, fine * 2)[::-1]
            head = sigmas[0] - np.append(0.0, ramp)
            h = sigmas[-2] - sigmas[-1]
            tail = sigmas[-1] + np.append(h * 0.5 ** np.arange(1, fine * 2), 0.0)
            sigmas = np.concatenate([head, sigmas[1:-1], tail])
        rows = sampling.plan(name, sigmas, config=CONFIG, **options)
        end = sample(rows, lambda x, sigma: x * s2 / (s2 + sigma**2), np.array([1.0]))
        return abs(end[0] - np.sqrt((s2 + sigmas[-1] ** 2) / (s2 + sigmas[0] ** 2)))

    measured = np.log2(error(168) / error(336))  # steps that 2 and 3 divide
    assert abs(measured - order) < 0.2, measured


@pytest.mark.parametrize('name, options', STOCHASTIC)
def test_variance_on_gaussian_data(name, options):
    """Data N(0, 0.5^2) must come out with that variance; it is computed, not sampled.

    All is linear, so the end is a weighted sum of the initial and the fresh noises; pushing unit
    vectors through the table gives the weights, and their squares sum to the variance.
    """
    s2 = 0.5**2
    sigmas = np.append(np.geomspace(80, 0.002, 400), 0)
    rows = sampling.plan(name, sigmas, **options)
    count = int((rows.mix[:, 0, 2] != 0).sum())
    basis = iter(np.eye(count + 1)[1:])
    start = np.eye(count + 1)[0] * np.sqrt(s2 + sigmas[0] ** 2)
    weights = sample(rows, lambda x, sigma: x * s2 / (s2 + sigma**2), start, lambda: next(basis))
    assert abs((weights**2).sum() / s2 - 1) < 0.04
    assert (weights[1:] ** 2).sum() > 0.9 * s2  # it is the fresh noise that makes the picture


def test_names_for_one_table():
    """DDIM is Euler in sigma, with eta ancestral Euler; DDPM is that with eta = 1."""
    sigmas = sampling.schedule('normal', 12, CONFIG)
    pairs = [(('ddim', {}), ('euler', {})), (('ddpm', {}), ('euler_ancestral', {})),
             (('ddim', {'eta': 0.3}), ('euler_ancestral', {'eta': 0.3})),
             (('lms', {'order': 1}), ('euler', {}))]
    for (a, a_options), (b, b_options) in pairs:
        x = np.array([14.0, -3.0])
        ends = [sample(sampling.plan(n, sigmas, **o), lambda x, s: np.tanh(x / (1 + s)), x,
                     lambda: np.array([0.5, -0.5])) for n, o in ((a, a_options), (b, b_options))]
        np.testing.assert_allclose(*ends, rtol=1e-13)


def test_churn_before_the_first_step_is_a_row_without_a_call():
    sigmas = sampling.schedule('karras', 10, CONFIG)
    rows = sampling.plan('euler', sigmas, s_churn=2.0)
    assert len(rows.sigma) == 11 and sampling.calls(rows) == 10 and rows.sigma[0] == 0
    np.testing.assert_allclose(rows.sigma[1:], sigmas[:-1] * 1.2)


@pytest.mark.parametrize('name, sigmas, options, match', [
    ('dpmp_2m', [1, 0], {}, "unknown sampler 'dpmp_2m': did you mean 'dpmpp_2m'.*Known: euler, "),
    ('euler', [1, 0], {'eta': 1}, "'euler' has no option 'eta'; it takes: s_churn, s_tmin"),
    ('euler', [1, 2, 0], {}, 'strictly decreasing'),
    ('euler', [1, 1, 0], {}, 'strictly decreasing'),
    ('euler', [np.inf, 1], {}, 'finite'),
    ('euler', [1, -1], {}, 'none below 0'),
    ('euler', [1], {}, 'at least 2'),
    ('ddim', [1, 0], {'eta': -1}, 'eta=-1: expected a finite number'),
    ('lms', [1, 0], {'order': 5}, 'order=5: expected a whole number from 1 to 4'),
    ('unipc', [1, 0], {'order': 0}, 'order=0: expected a whole number from 1 to 3'),
    ('unipc', [1, 0], {'variant': 'bh3'}, "unknown variant 'bh3'"),
    ('dpmpp_2m_sde', [1, 0], {'solver_type': 'euler'}, 'unknown solver_type'),
    ('dpmpp_sde', [1, 0], {'r': 0}, 'r=0'),
])
def test_bad_input(name, sigmas, options, match):
    with pytest.raises(ValueError, match=match) as error:
        sampling.plan(name, sigmas, **options)
    assert '\n' not in str(error.value)
