"""Singlestep and first-order samplers against their authors' loops; orders and variances.

The loops are those of k-diffusion, ComfyUI and A1111, written for numpy in float64.
"""

import jax
import numpy as np
import pytest
from reference import CONFIG, check

from jaxsd import sampling


def ancestral_step(a, b, eta):
    if not eta:
        return b, 0.0
    up = min(b, eta * (b**2 * (a**2 - b**2) / a**2) ** 0.5)
    return (b**2 - up**2) ** 0.5, up


def heun_step(model, x, a, b):
    d = (x - model(x, a)) / a
    if b == 0:
        return x + d * (b - a)
    x_2 = x + d * (b - a)
    return x + (d + (x_2 - model(x_2, b)) / b) / 2 * (b - a)


def heunpp2(model, x, sigmas, noise, s_churn=0.0, s_tmin=0.0, s_tmax=np.inf, s_noise=1.0):
    end = sigmas[-1]
    for i in range(len(sigmas) - 1):
        gamma = 0.0
        if s_tmin <= sigmas[i] <= s_tmax:
            gamma = min(s_churn / (len(sigmas) - 1), 2**0.5 - 1)
        hat = sigmas[i] * (gamma + 1)
        if gamma > 0:
            x = x + noise() * s_noise * (hat**2 - sigmas[i] ** 2) ** 0.5
        d = (x - model(x, hat)) / hat
        dt = sigmas[i + 1] - hat
        if sigmas[i + 1] != end:
            x_2 = x + d * dt
            d_2 = (x_2 - model(x_2, sigmas[i + 1])) / sigmas[i + 1]
            if sigmas[i + 2] == end:
                w2 = sigmas[i + 1] / (2 * sigmas[0])
                d = d * (1 - w2) + d_2 * w2
            else:
                x_3 = x_2 + d_2 * (sigmas[i + 2] - sigmas[i + 1])
                d_3 = (x_3 - model(x_3, sigmas[i + 2])) / sigmas[i + 2]
                w2, w3 = sigmas[i + 1:i + 3] / (3 * sigmas[0])
                d = (1 - w2 - w3) * d + w2 * d_2 + w3 * d_3
        x = x + d * dt
    return x


def dpm_fast(model, x, sigmas, noise, eta=0.0, s_noise=1.0):
    """k-diffusion's DPMSolver in t = -log sigma."""
    n, sigma = len(sigmas) - 1, lambda t: np.exp(-t)
    end = -np.log(sigmas[-2])
    m = n // 3 + 1
    ts = np.linspace(-np.log(sigmas[0]), end, m + 1)
    orders = [3] * (m - 2) + [2, 1] if n % 3 == 0 else [3] * (m - 1) + [n % 3]
    for t, t_next, order in zip(ts[:-1], ts[1:], orders):
        down, up = t_next, 0.0
        if eta:
            down = min(end, -np.log(ancestral_step(sigma(t), sigma(t_next), eta)[0]))
            up = max(sigma(t_next) ** 2 - sigma(down) ** 2, 0) ** 0.5

        def eps(x, t):
            return (x - model(x, sigma(t))) / sigma(t)

        h, e = down - t, eps(x, t)
        if order == 1:
            end_x = x - sigma(down) * np.expm1(h) * e
        elif order == 2:
            s = t + h / 2
            u = x - sigma(s) * np.expm1(h / 2) * e
            end_x = x - sigma(down) * np.expm1(h) * e - sigma(down) * np.expm1(h) * (eps(u, s) - e)
        else:
            r1, r2 = 1 / 3, 2 / 3
            s1, s2 = t + r1 * h, t + r2 * h
            u1 = x - sigma(s1) * np.expm1(r1 * h) * e
            e1 = eps(u1, s1)
            u2 = (x - sigma(s2) * np.expm1(r2 * h) * e
                  - sigma(s2) * (r2 / r1) * (np.expm1(r2 * h) / (r2 * h) - 1) * (e1 - e))
            end_x = (x - sigma(down) * np.expm1(h) * e
                     - sigma(down) / r2 * (np.expm1(h) / h - 1) * (eps(u2, s2) - e))
        x = end_x + up * s_noise * noise() if up > 1e-9 else end_x
    return x


def dpm_solver_singlestep(model, x, sigmas, noise, order=2, algorithm='dpmsolver++'):
    """diffusers, in its alpha and lambda, x being alpha times ours."""
    n = len(sigmas) - 1
    orders = ([1, 2, 3][:order] * n)[:n - 1] + [1]
    alpha = 1 / np.sqrt(1 + sigmas**2)
    std = sigmas * alpha
    with np.errstate(divide='ignore'):
        lam = np.log(alpha) - np.log(std)
    outputs, x = [], x * alpha[0]
    for i, k in enumerate(orders):
        x0 = model(x / alpha[i], sigmas[i])
        outputs.append(x0 if algorithm == 'dpmsolver++' else (x - alpha[i] * x0) / std[i])
        if k == 1:
            start = x
        s, (m0, *m) = i + 1 - k, outputs[::-1]
        if i == n - 1:
            return x0
        h = lam[i + 1] - lam[s]
        if algorithm == 'dpmsolver++':
            x = std[i + 1] / std[s] * start
            scale, sign = alpha[i + 1], -1
        else:
            x = alpha[i + 1] / alpha[s] * start
            scale, sign = std[i + 1], 1
        first = m[k - 2] if k > 1 else m0
        x = x - scale * (np.exp(sign * h) - 1) * first
        r0 = (lam[i] - lam[s]) / h
        if k == 2:
            x = x - 0.5 * scale * (np.exp(sign * h) - 1) * (m0 - first) / r0
        if k == 3:
            bend = (np.exp(sign * h) - 1) / h - sign
            x = x - sign * scale * bend * (m0 - first) / r0


def restart(model, x, sigmas, noise, s_noise=1.0, restart_list=None):
    """A1111, but that the ends of a karras schedule are exact (its rounding would add noise)."""
    def karras(n, low, high):
        ramp = np.linspace(0, 1, n)
        out = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        out[0], out[-1] = high, low
        return np.append(out, 0.0)

    steps = len(sigmas) - 1
    if restart_list is None:
        restart_list = {}
        if steps >= 20:
            restart_steps, restart_times = 9, 1
            if steps >= 36:
                restart_steps, restart_times = steps // 4, 2
            sigmas = karras(steps - restart_steps * restart_times, sigmas[-2], sigmas[0])
            restart_list = {0.1: [restart_steps + 1, restart_times, 2]}
    restart_list = {int(np.argmin(abs(sigmas - k))): v for k, v in restart_list.items()}
    step_list = []
    for i in range(len(sigmas) - 1):
        step_list.append((sigmas[i], sigmas[i + 1]))
        if i + 1 in restart_list:
            restart_steps, restart_times, restart_max = restart_list[i + 1]
            top = int(np.argmin(abs(sigmas - restart_max)))
            if top < i + 1:
                again = karras(restart_steps, sigmas[i + 1], sigmas[top])[:-1]
                step_list.extend(restart_times * list(zip(again[:-1], again[1:])))
    last = step_list[0][0]
    for old, new in step_list:
        if last < old:
            x = x + noise() * s_noise * (old**2 - last**2) ** 0.5
        x, last = heun_step(model, x, old, new), new
    return x


def seeds_2(model, x, sigmas, noise, eta=1.0, s_noise=1.0, r=0.5, solver_type='phi_1'):
    for a, b in zip(sigmas[:-1], sigmas[1:]):
        denoised = model(x, a)
        if b == 0:
            return denoised
        h = np.log(a) - np.log(b)
        h_eta = h * (eta + 1)
        s_1 = np.exp(np.log(a) - r * h)
        x_2 = s_1 / a * np.exp(-r * h * eta) * x - np.expm1(-r * h_eta) * denoised
        sde_noise = 0.0
        if eta:
            sde_noise = np.sqrt(-np.expm1(-2 * r * h * eta)) * noise()
        denoised_2 = model(x_2 + sde_noise * s_1 * s_noise, s_1)
        x = b / a * np.exp(-h * eta) * x
        if solver_type == 'phi_1':
            x = x - np.expm1(-h_eta) * (denoised + (denoised_2 - denoised) / (2 * r))
        else:
            b2 = (np.expm1(-h_eta) + h_eta) / -h_eta / r
            x = x - (np.expm1(-h_eta) - b2) * denoised - b2 * denoised_2
        if eta:
            segment = (r - 1) * h * eta
            sde_noise = sde_noise * np.exp(segment)
            if r < 1:
                sde_noise = sde_noise + np.sqrt(-np.expm1(2 * segment)) * noise()
            x = x + sde_noise * b * s_noise
    return x


def seeds_3(model, x, sigmas, noise, eta=1.0, s_noise=1.0, r_1=1 / 3, r_2=2 / 3):
    def phi_2(h):
        return (np.expm1(h) - h) / h

    for a, b in zip(sigmas[:-1], sigmas[1:]):
        denoised = model(x, a)
        if b == 0:
            return denoised
        h = np.log(a) - np.log(b)
        h_eta = h * (eta + 1)
        s_1, s_2 = np.exp(np.log(a) - r_1 * h), np.exp(np.log(a) - r_2 * h)
        sde_noise, fresh = 0.0, noise if eta else lambda: 0.0

        def grown(sde_noise, segment, new):
            return sde_noise * np.exp(segment) + np.sqrt(-np.expm1(2 * segment)) * new

        x_2 = s_1 / a * np.exp(-r_1 * h * eta) * x - np.expm1(-r_1 * h_eta) * denoised
        sde_noise = grown(sde_noise, -r_1 * h * eta, fresh())
        denoised_2 = model(x_2 + sde_noise * s_1 * s_noise, s_1)
        a3_2 = r_2 / r_1 * phi_2(-r_2 * h_eta)
        a3_1 = np.expm1(-r_2 * h_eta) - a3_2
        x_3 = s_2 / a * np.exp(-r_2 * h * eta) * x - a3_1 * denoised - a3_2 * denoised_2
        sde_noise = grown(sde_noise, (r_1 - r_2) * h * eta, fresh())
        denoised_3 = model(x_3 + sde_noise * s_2 * s_noise, s_2)
        b3 = phi_2(-h_eta) / r_2
        b1 = np.expm1(-h_eta) - b3
        x = b / a * np.exp(-h * eta) * x - b1 * denoised - b3 * denoised_3
        sde_noise = grown(sde_noise, (r_2 - 1) * h * eta, fresh())
        x = x + sde_noise * b * s_noise
    return x


def lcm(model, x, sigmas, noise, s_noise=1.0):
    for a, b in zip(sigmas[:-1], sigmas[1:]):
        x = model(x, a)
        if b > 0:
            x = x + b * s_noise * noise()
    return x


def tcd(model, x, sigmas, noise, config, gamma=0.3, s_noise=1.0):
    """The paper's strategic stochastic sampling, in alpha and the forward process from s to t."""
    table = np.log(sampling.model_sigmas(config))
    for a, b in zip(sigmas[:-1], sigmas[1:]):
        x0 = model(x, a)
        if b == 0:
            return x0
        eps, low = (x - x0) / a, b
        if gamma > 0:
            t = np.interp(np.log(b), table, np.arange(len(table)))
            t = round(t) if abs(round(t) - t) < 1e-9 else t
            s = int(np.floor(round((1 - gamma) * t, 9)))
            low = np.exp(table[s]) if s < t else b
        abar, abar_low = 1 / (1 + b**2), 1 / (1 + low**2)
        x = np.sqrt(abar_low) * x0 + np.sqrt(1 - abar_low) * eps
        x = np.sqrt(abar / abar_low) * x
        if low < b:
            x = x + np.sqrt(1 - abar / abar_low) * s_noise * noise()
        x = x / np.sqrt(abar)
    return x


def euler_ancestral_cfg_pp(model, x, sigmas, noise, eta=1.0, s_noise=1.0):
    for a, b in zip(sigmas[:-1], sigmas[1:]):
        denoised, uncond = model(x, a, both=True)
        if b == 0:
            return denoised
        down, up = ancestral_step(a, b, eta)
        x = denoised + down * (x - uncond) / a
        if eta > 0:
            x = x + noise() * s_noise * up
    return x


def euler_cfg_pp(model, x, sigmas, noise):
    return euler_ancestral_cfg_pp(model, x, sigmas, noise, eta=0.0)


def dpmpp_2s_ancestral_cfg_pp(model, x, sigmas, noise, eta=1.0, s_noise=1.0):
    for a, b in zip(sigmas[:-1], sigmas[1:]):
        denoised, uncond = model(x, a, both=True)
        guidance = denoised - uncond
        down, up = ancestral_step(a, b, eta)
        if down == 0:
            x = x + (x - uncond) / a * (down - a)
        else:
            h = np.log(a) - np.log(down)
            s = np.exp(np.log(a) - h / 2)
            x_2 = s / a * x - np.expm1(-h / 2) * uncond
            _, uncond = model(x_2, s, both=True)
            x = down / a * x - np.expm1(-h) * uncond
        if up > 0:
            x = x + noise() * s_noise * up
        x = x + guidance
    return x


CASES = [
    (heunpp2, {}), (heunpp2, {'s_churn': 4.0, 's_tmin': 0.5, 's_noise': 1.003}),
    (dpm_fast, {}), (dpm_fast, {'eta': 1.0}), (dpm_fast, {'eta': 0.5, 's_noise': 1.1}),
    *((dpm_solver_singlestep, {'order': order, 'algorithm': algorithm})
      for order in (1, 2, 3) for algorithm in ('dpmsolver', 'dpmsolver++')),
    (restart, {}), (restart, {'restart_list': {0.1: [4, 3, 2.0], 1.0: [3, 1, 8.0]}}),
    (restart, {'restart_list': {0.06: [3, 2, 0.3]}, 's_noise': 0.9}),
    (seeds_2, {}), (seeds_2, {'eta': 0.0}), (seeds_2, {'eta': 0.6, 's_noise': 1.1, 'r': 0.3}),
    (seeds_2, {'solver_type': 'phi_2'}), (seeds_2, {'solver_type': 'phi_2', 'r': 1.0}),
    (seeds_3, {}), (seeds_3, {'eta': 0.0}),
    (seeds_3, {'eta': 0.6, 's_noise': 1.1, 'r_1': 0.4, 'r_2': 0.8}),
    (lcm, {}), (lcm, {'s_noise': 0.8}),
    *((tcd, {'config': CONFIG, 'gamma': gamma}) for gamma in (0.0, 0.3, 1.0)),
    (euler_cfg_pp, {}), (euler_ancestral_cfg_pp, {}),
    (euler_ancestral_cfg_pp, {'eta': 0.5, 's_noise': 0.9}),
    (dpmpp_2s_ancestral_cfg_pp, {}), (dpmpp_2s_ancestral_cfg_pp, {'eta': 0.0}),
]


@pytest.mark.parametrize('loop, options', CASES)
def test_equals_the_loop(loop, options):
    check(loop.__name__, loop, **options)


@pytest.mark.parametrize('loop', [heunpp2, restart, seeds_2, lcm, tcd, euler_cfg_pp])
def test_equals_the_loop_where_the_last_level_is_not_zero(loop):
    options = {'config': CONFIG} if loop is tcd else {}
    check(loop.__name__, loop, {1: sampling.schedule('karras', 7, CONFIG)[:-1]}, **options)


def test_long_restart():
    """From 36 steps on there are two restarts; in all cases the calls are those of heun."""
    check('restart', restart, {1: sampling.schedule('exponential', 36, CONFIG)})
    for steps in (1, 19, 20, 35, 36, 50):
        rows = sampling.plan('restart', sampling.schedule('karras', steps, CONFIG))
        assert sampling.calls(rows) == 2 * steps - 1
        assert (rows.mix[:, 0, 2] != 0).sum() == (steps >= 20) + (steps >= 36)


def test_dpm_fast_ends_at_the_last_positive_level():
    """A model that always says c keeps the noise, scaled to that level; but for a single step."""
    for steps in (1, 2, 3, 4, 12):
        sigmas = sampling.schedule('karras', steps, CONFIG)
        rows = sampling.plan('dpm_fast', sigmas)
        assert sampling.calls(rows) == steps
        with jax.enable_x64(True):
            end = sampling.sample(lambda x, sigma, i: 0 * x + 0.3, sigmas[:1] * 0.5 + 0.3, rows,
                                  lambda i: np.ones(1))
        last = sigmas[-2] if steps > 1 else 0
        np.testing.assert_allclose(end, last * 0.5 + 0.3, rtol=1e-12)


@pytest.mark.parametrize('name', ['seeds_2', 'seeds_3'])
def test_noise_of_seeds_is_one_path_without_gaps(name):
    sigmas = sampling.schedule('karras', 6, CONFIG)
    path = sampling.plan(name, sigmas).path[:-1]
    assert path[0, 0] == sigmas[0] and path[-1, 1] == sigmas[-2]
    np.testing.assert_array_equal(path[1:, 0], path[:-1, 1])


@pytest.mark.parametrize('name, options, match', [
    ('dpm_solver_singlestep', {'order': 4}, 'order=4: expected a whole number from 1 to 3'),
    ('dpm_solver_singlestep', {'algorithm': 'dpm'}, "unknown algorithm 'dpm'.*'dpmsolver'"),
    ('seeds_2', {'r': 0}, 'r=0: expected'),
    ('seeds_2', {'solver_type': 'phi'}, "unknown solver_type 'phi'"),
    ('seeds_3', {'r_1': 0.7}, 'r_1=0.7, r_2=0.66.*expected 0 < r_1 < r_2 <= 1'),
    ('tcd', {}, 'config=None: expected the ScheduleConfig of the model'),
    ('tcd', {'config': CONFIG, 'gamma': 1.5}, 'gamma=1.5: expected a number from 0 to 1'),
    ('restart', {'restart_list': {2.0: (4, 1, 1.0)}}, 'expected .*sigma_min < sigma_max'),
    ('restart', {'restart_list': {0.1: (10**9, 1, 2.0)}}, 'at most 10000 levels times times'),
    ('restart', {'restart_list': {0.1: (101, 100, 2.0)}}, 'at most 10000 levels times times'),
    ('restart', {'restart_list': {0.1: (np.inf, 1, 2.0)}}, 'expected .*sigma_min < sigma_max'),
    ('restart', {'restart_list': {0.1: (1, 1, 2.0)}}, 'levels > 1'),
    ('restart', {'restart_list': {0.1: 3}}, r'expected {sigma_min: \(levels, times, sigma_max\)}'),
])
def test_bad_input(name, options, match):
    with pytest.raises(ValueError, match=match) as error:
        sampling.plan(name, [3, 2, 1, 0], **options)
    assert '\n' not in str(error.value)
