"""Multistep samplers against the loops of their papers, ComfyUI and diffusers, in float64 numpy.

k-diffusion's own (lms, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde) are compared in test_goldens.py.
"""

import jax
import numpy as np
import pytest
from numpy.polynomial import Polynomial
from reference import check

from jaxsd import sampling

ADAMS = ([1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])


def adams(slopes):
    """The newest four of a list of slopes, oldest first, weighed as Adams and Bashforth do."""
    slopes = slopes[:-5:-1]
    return sum(c * d for c, d in zip(ADAMS[len(slopes) - 1], slopes))


def plms(model, x, sigmas, noise):
    """diffusers PNDMScheduler.step_plms, with a counter."""
    if len(sigmas) > 2:  # the second noise level is visited twice
        sigmas = np.insert(sigmas, 1, sigmas[1])
    slopes, first = [], x
    for counter in range(len(sigmas) - 1):
        a, b = sigmas[counter:counter + 2]
        d = (x - model(x, a)) / a
        if counter != 1:
            slopes.append(d)
            if counter == 0:
                b = sigmas[min(2, len(sigmas) - 1)]
            x = x + (b - a) * adams(slopes)
        else:
            x = first + (a - sigmas[0]) * (slopes[0] + d) / 2
    return x


def ipndm(model, x, sigmas, noise, order=4):
    slopes = []
    for a, b in zip(sigmas, sigmas[1:]):
        denoised = model(x, a)
        slopes = [*slopes, (x - denoised) / a][-order:]
        x = denoised if b == 0 else x + (b - a) * adams(slopes)
    return x


def ipndm_v(model, x, sigmas, noise, order=4):
    """ComfyUI sample_ipndm_v: the slopes' differences, each with the factor used there."""
    d, t = [], sigmas
    for i, (a, b) in enumerate(zip(sigmas, sigmas[1:])):
        denoised = model(x, a)
        d = [(x - denoised) / a, *d]
        n = min(order, i + 1)
        if b == 0:
            return denoised
        h = b - a
        step = d[0]
        if n > 1:
            h1 = t[i] - t[i - 1]
            step = step + h / h1 / 2 * (d[0] - d[1])
        if n > 2:
            h2 = t[i - 1] - t[i - 2]
            temp = (1 - h / (3 * (h + h1)) * (h * (h + h1)) / (h1 * (h1 + h2))) / 2
            step = step + temp * (d[0] - (1 + h1 / h2) * d[1] + h1 / h2 * d[2])
        if n > 3:
            h3 = t[i - 2] - t[i - 3]
            temp = ((1 - h / (3 * (h + h1))) / 2
                    + (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2)))
            temp *= (h * (h + h1) * (h + h1 + h2)) / (h1 * (h1 + h2) * (h1 + h2 + h3))
            ratio = h1 * (h1 + h2) / (h2 * (h2 + h3))
            step = step + temp * (d[0] - (1 + h1 / h2 + ratio) * d[1]
                                  + (h1 / h2 + ratio * (1 + h2 / h3)) * d[2]
                                  - ratio * h1 / h2 * d[3])
        x = x + h * step
    return x


def order_at(i, order, steps):
    """diffusers: rises at the start, falls at the end of fewer than 15 steps."""
    return min(order, i + 1, steps - i if steps < 15 else order)


def deis(model, x, sigmas, noise, order=3):
    """Lagrange polynomials in log sigma, multiplied out and integrated in closed form.

    The integral of u^k e^u is e^u (u^k - k u^(k-1) + k (k-1) u^(k-2) ...), u = log(sigma / a).
    """
    slopes = []
    for i, (a, b) in enumerate(zip(sigmas, sigmas[1:])):
        denoised = model(x, a)
        slopes = [(x - denoised) / a, *slopes]
        if b == 0:
            return denoised
        knots = np.log(sigmas[i::-1] / a)[:order_at(i, order, len(sigmas) - 1)]
        for j, knot in enumerate(knots):
            lagrange = Polynomial([1.0])
            for other in np.delete(knots, j):
                lagrange *= Polynomial([-other, 1]) / (knot - other)
            antiderivative = lagrange - lagrange.deriv() + lagrange.deriv(2)
            x = x + slopes[j] * (b * antiderivative(np.log(b / a)) - a * antiderivative(0))
    return x


def gradient_estimation(model, x, sigmas, noise, ge_gamma=2.0, cfg_pp=False):
    last = None
    for a, b in zip(sigmas, sigmas[1:]):
        denoised, uncond = model(x, a, both=True)
        d = (x - (uncond if cfg_pp else denoised)) / a
        if b == 0:
            return denoised
        x = denoised + d * b if cfg_pp else x + d * (b - a)
        if last is not None:
            x = x + (ge_gamma - 1) * (d - last) * (b - a)
        last = d
    return x


def dpm_solver_multistep(model, x, sigmas, noise, order=2, algorithm='dpmsolver++',
                         solver_type='midpoint'):
    """diffusers DPMSolverMultistepScheduler where it works: alpha^2 (1 + sigma^2) = 1."""
    alphas = 1 / np.sqrt(1 + sigmas**2)
    stds = sigmas * alphas
    x, m, expm1 = x * alphas[0], [], np.expm1
    for i in range(len(sigmas) - 1):
        denoised = model(x / alphas[i], sigmas[i])
        plus = algorithm == 'dpmsolver++'
        m = [denoised if plus else (x - alphas[i] * denoised) / stds[i], *m]
        if sigmas[i + 1] == 0:
            return denoised
        lam = np.log(alphas[i + 1::-1] / stds[i + 1::-1])
        (h, *before), n = -np.diff(lam), order_at(i, order, len(sigmas) - 1)
        r = np.array(before) / h
        d1 = d2 = 0
        if n == 2:
            d1 = (m[0] - m[1]) / r[0]
        if n == 3:
            d10, d11 = (m[0] - m[1]) / r[0], (m[1] - m[2]) / r[1]
            d1 = d10 + r[0] / (r[0] + r[1]) * (d10 - d11)
            d2 = (d10 - d11) / (r[0] + r[1])
        half = n == 2 and solver_type == 'midpoint'
        if plus:
            scale = alphas[i + 1]
            x = stds[i + 1] / stds[i] * x - scale * expm1(-h) * m[0]
            x = x + (-scale * expm1(-h) / 2 if half else scale * (expm1(-h) / h + 1)) * d1
            x = x - scale * ((expm1(-h) + h) / h**2 - 0.5) * d2
        else:
            scale = stds[i + 1]
            x = alphas[i + 1] / alphas[i] * x - scale * expm1(h) * m[0]
            x = x - (scale * expm1(h) / 2 if half else scale * (expm1(h) / h - 1)) * d1
            x = x - scale * ((expm1(h) - h) / h**2 - 0.5) * d2
    return x / alphas[-1]


def ancestral(a, b, eta):
    up = min(b, eta * (b**2 * (a**2 - b**2) / a**2) ** 0.5)
    return (b**2 - up**2) ** 0.5, up


def res_multistep(model, x, sigmas, noise, eta=0.0, s_noise=1.0, cfg_pp=False):
    old, arrived = None, None
    for i, (a, b) in enumerate(zip(sigmas, sigmas[1:])):
        denoised, uncond = model(x, a, both=True)
        down, up = ancestral(a, b, eta)
        used = uncond if cfg_pp else denoised
        if down == 0 or old is None:
            d = (x - used) / a
            x = denoised + d * down if cfg_pp else x + d * (down - a)
        else:
            h = np.log(a / down)
            c2 = (np.log(arrived) - np.log(sigmas[i - 1])) / h
            phi1 = np.expm1(-h) / -h
            phi2 = (phi1 - 1) / -h
            x = x + (denoised - uncond) * cfg_pp
            x = np.exp(-h) * x + h * ((phi1 - phi2 / c2) * used + phi2 / c2 * old)
        if up > 0:
            x = x + s_noise * up * noise()
        old, arrived = used, down
    return x


def dpmpp_2m_cfg_pp(model, x, sigmas, noise):
    old = None
    for i, (a, b) in enumerate(zip(sigmas, sigmas[1:])):
        denoised, uncond = model(x, a, both=True)
        if old is None or b == 0:
            extra = -b / a * uncond
        else:
            h, r = np.log(a / b), np.log(sigmas[i - 1] / a) / np.log(a / b)
            extra = -np.exp(-h) * uncond - np.expm1(-h) / (2 * r) * (denoised - old)
        x = denoised + extra + b / a * x
        old = uncond
    return x


def er_sde(model, x, sigmas, noise, order=3, s_noise=1.0):
    def scale(s):
        return s * (np.exp(s**0.3) + 10)

    old = old_slope = None
    for i, (a, b) in enumerate(zip(sigmas, sigmas[1:])):
        denoised = model(x, a)
        if b == 0:
            return denoised
        r, dt = scale(b) / scale(a), b - a
        x = r * x + (1 - r) * denoised
        points = b - np.arange(200) * dt / 200
        if min(order, i + 1) >= 2:
            slope = (denoised - old) / (a - sigmas[i - 1])
            x = x + (dt + np.sum(1 / scale(points)) * -dt / 200 * scale(b)) * slope
            if min(order, i + 1) >= 3:
                curve = (slope - old_slope) / ((a - sigmas[i - 2]) / 2)
                s_u = np.sum((points - a) / scale(points)) * -dt / 200
                x = x + (dt**2 / 2 + s_u * scale(b)) * curve
            old_slope = slope
        x = x + s_noise * np.sqrt(b**2 - a**2 * r**2) * noise()
        old = denoised
    return x


def adams_coefficients(lambdas, s, t, tau, simple, corrector):
    """Eqs. 15 and 18 of SA-Solver by repeated integration by parts; lambdas newest first."""
    k = 1 + tau**2
    h = t - s
    if simple and len(lambdas) == 2:
        if corrector:
            b = [k * h / 2, -np.expm1(-k * h) - k * h / 2]
        else:
            older = k * h**2 / 2 / (lambdas[1] - s)
            b = [-np.expm1(-k * h) - older, older]
        return np.array(b)
    out = []
    for j, knot in enumerate(lambdas):
        lagrange = Polynomial([1.0])  # of lambda - t
        for other in np.delete(lambdas, j):
            lagrange *= Polynomial([t - other, 1]) / (knot - other)
        antiderivative = sum(lagrange.deriv(p) * (-1 / k) ** p for p in range(len(lambdas)))
        out.append(antiderivative(0) - np.exp(-k * h) * antiderivative(-h))
    return np.array(out)


def sa_solver(model, x, sigmas, noise, predictor_order=3, corrector_order=4, tau=1.0,
              s_tmin=0.5712, s_tmax=5.0924, s_noise=1.0, simple_order_2=False):
    """ComfyUI sample_sa_solver: the corrected point, the predicted one and the noise kept apart."""
    with np.errstate(divide='ignore'):
        lam = -np.log(sigmas)
    predicted, outputs, kept, last_tau = x, [], 0, 0
    for i in range(len(sigmas) - 1):
        outputs = [model(predicted, sigmas[i]), *outputs]
        if sigmas[i + 1] == 0:
            return outputs[0]
        p, c = min(predictor_order, i + 1), min(corrector_order, i + 1)
        if sigmas[-1] == 0:
            p, c = min(p, len(sigmas) - 2 - i), min(c, len(sigmas) - 1 - i)
        if i == 0 or c == 0:
            x = predicted
        else:
            b = adams_coefficients(lam[i::-1][:c], lam[i - 1], lam[i], last_tau, simple_order_2,
                                   True)
            decay = np.exp(-last_tau**2 * (lam[i] - lam[i - 1]))
            x = sigmas[i] / sigmas[i - 1] * decay * x + np.tensordot(b, outputs[:c], 1) + kept
        last_tau = tau if s_tmin <= sigmas[i + 1] <= s_tmax else 0
        h = lam[i + 1] - lam[i]
        b = adams_coefficients(lam[i::-1][:p], lam[i], lam[i + 1], last_tau, simple_order_2, False)
        kept = 0
        if last_tau > 0:
            kept = sigmas[i + 1] * np.sqrt(-np.expm1(-2 * last_tau**2 * h)) * s_noise * noise()
        predicted = (sigmas[i + 1] / sigmas[i] * np.exp(-last_tau**2 * h) * x
                     + np.tensordot(b, outputs[:p], 1) + kept)
    return predicted


CASES = [
    (plms, {}), (ipndm, {}), *((ipndm, {'order': n}) for n in (1, 2, 3)),
    (ipndm_v, {}), *((ipndm_v, {'order': n}) for n in (1, 2, 3)),
    *((deis, {'order': n}) for n in (1, 2, 3)), (gradient_estimation, {}),
    (gradient_estimation, {'ge_gamma': 1.6}),
    *((dpm_solver_multistep, {'order': n, 'algorithm': algorithm, 'solver_type': solver})
      for n in (1, 2, 3) for algorithm in ('dpmsolver', 'dpmsolver++')
      for solver in ('midpoint', 'heun')),
    (res_multistep, {}), (dpmpp_2m_cfg_pp, {}),
    *((er_sde, {'order': n}) for n in (1, 2, 3)), (er_sde, {'s_noise': 0.9}),
    (sa_solver, {}), (sa_solver, {'tau': 0.0}), (sa_solver, {'tau': 0.6, 's_noise': 1.1}),
    (sa_solver, {'s_tmin': 0.0, 's_tmax': np.inf}), (sa_solver, {'corrector_order': 0}),
    *((sa_solver, {'predictor_order': p, 'corrector_order': c, 'simple_order_2': True})
      for p, c in ((2, 2), (2, 1), (4, 3))),
]


@pytest.mark.slow
@pytest.mark.parametrize('loop, options', CASES)
def test_equals_the_loop(loop, options):
    check(loop.__name__, loop, **options)


@pytest.mark.parametrize('name, loop, fixed, options', [
    ('res_multistep_ancestral', res_multistep, {}, {'eta': 1.0}),
    ('res_multistep_ancestral', res_multistep, {}, {'eta': 0.6, 's_noise': 1.1}),
    ('res_multistep_cfg_pp', res_multistep, {'cfg_pp': True}, {}),
    ('res_multistep_ancestral_cfg_pp', res_multistep, {'cfg_pp': True}, {'eta': 1.0}),
    ('gradient_estimation_cfg_pp', gradient_estimation, {'cfg_pp': True}, {'ge_gamma': 2.0}),
])
def test_variants_of_one_loop(name, loop, fixed, options):
    check(name, lambda *args, **rest: loop(*args, **fixed, **rest), **options)


def test_walks_that_end_above_zero():
    schedules = {'above': np.geomspace(14.6, 0.1, 9), 'one step': np.array([3.0, 1.0]),
             'to zero at once': np.array([3.0, 0.0])}
    for loop, options in ((plms, {}), (ipndm, {}), (ipndm_v, {}), (deis, {}), (er_sde, {}),
                          (dpm_solver_multistep, {'order': 3}), (res_multistep, {}),
                          (sa_solver, {}), (dpmpp_2m_cfg_pp, {})):
        check(loop.__name__, loop, schedules, **options)


@pytest.mark.parametrize('name, options', [
    ('lms', {}), ('plms', {}), ('ipndm', {}), ('deis', {}), ('gradient_estimation', {}),
    ('dpm_solver_multistep', {'order': 3, 'algorithm': 'dpmsolver'})])
def test_constant_slope_is_followed_exactly(name, options):
    """If the predicted noise never changes, the trajectory is a line, whatever the steps."""
    sigmas = np.array([9.0, 7.0, 4.0, 3.5, 2.0, 0.3, 0.1, 0.0])
    with jax.enable_x64(True):
        end = sampling.sample(lambda x, sigma, i: x - 0.7 * sigma, np.array([[2.0]]),
                              sampling.plan(name, sigmas, **options), lambda i: np.zeros((1, 1)))
    np.testing.assert_allclose(end, 2 - 9 * 0.7, rtol=1e-12)


@pytest.mark.parametrize('name, options, match', [
    ('ipndm', {'order': 5}, 'order=5: expected a whole number from 1 to 4'),
    ('ipndm_v', {'order': 0}, 'order=0'),
    ('deis', {'order': 4}, 'order=4: expected a whole number from 1 to 3'),
    ('dpm_solver_multistep', {'order': 0}, 'order=0'),
    ('dpm_solver_multistep', {'algorithm': 'dpmsolver+'}, "did you mean 'dpmsolver"),
    ('dpm_solver_multistep', {'solver_type': 'mid'}, "unknown solver_type 'mid'.*'midpoint'"),
    ('er_sde', {'order': 4}, 'order=4'), ('er_sde', {'s_noise': -1}, 's_noise=-1'),
    ('sa_solver', {'predictor_order': 5}, 'predictor_order=5'),
    ('sa_solver', {'corrector_order': -1}, 'corrector_order=-1: expected .* from 0 to 4'),
    ('sa_solver', {'tau': -1}, 'tau=-1: expected a finite number, 0 or greater'),
    ('sa_solver', {'tau_timesteps': 5}, 'tau_timesteps=5: expected the first and the last'),
    ('sa_solver', {'tau_timesteps': [200, 800]}, 'config=None: expected the ScheduleConfig'),
    ('sa_solver', {'algorithm': 'data'}, "did you mean 'data_prediction'"),
    ('res_multistep_ancestral', {'eta': np.inf}, 'eta=inf'),
    ('plms', {'order': 2}, "no option 'order'; it takes: none"),
])
def test_bad_options(name, options, match):
    with pytest.raises(ValueError, match=match) as error:
        sampling.plan(name, [3.0, 1.0, 0.0], **options)
    assert '\n' not in str(error.value)
