"""Singlestep samplers: several calls a step, no memory from step to step (Runge-Kutta)."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from .choice import unknown
from .tables import (
    Row,
    ancestral,
    churn,
    mix,
    noise_row,
    pairs,
    row,
    sde_noise,
    slope,
    table,
    within,
)

MAX_LEVELS = 10_000  # of one of restart's rules, all times together; beyond is a slip


@table
def heun(sigmas: np.ndarray, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = np.inf,
         s_noise: float = 1.0) -> Iterator[Row]:
    """Karras et al. 2022, algorithm 2: Euler, then the mean of both slopes; two calls a step."""
    yield from _churned(_heun, sigmas, s_churn, s_tmin, s_tmax, s_noise)


def _churned(step, sigmas, *options):
    """The rows of `step`, each step from a level that churn has raised."""
    hats, kicks = churn(sigmas, *options)
    yield from noise_row(kicks[0])
    for a, b, kick in zip(hats, sigmas[1:], kicks[1:]):
        yield from step(a, b, kick)


def _heun(a, b, noise):
    if b == 0:
        yield row(a, mix(noise=noise, e=[1]))
        return
    h = b - a
    yield row(a, mix(x=1, e=[h]), save=mix(x=1), push=slope(a))
    yield row(b, mix(y=1, noise=noise, e=[h / 2, h / 2]), push=slope(b))


@table
def heunpp2(sigmas: np.ndarray, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = np.inf,
            s_noise: float = 1.0) -> Iterator[Row]:
    """Heun++: slopes at up to three levels, weighted by how noisy they are; ComfyUI heunpp2.

    Three calls a step, two in the last but one and one in the last. Of first order.
    """
    hats, kicks = churn(sigmas, s_churn, s_tmin, s_tmax, s_noise)
    yield from noise_row(kicks[0])
    for i, (a, b, kick) in enumerate(zip(hats, sigmas[1:], kicks[1:])):
        ahead = sigmas[i + 1:-1][:2]  # the next levels, but for the final one
        levels = [a, *ahead]
        save = mix(x=1)
        for s, t in pairs(levels):
            yield row(s, mix(x=1, e=[t - s]), save=save, push=slope(s))
            save = None
        share = ahead / (len(levels) * sigmas[0])
        e = (b - a) * np.append(share[::-1], 1 - share.sum())
        yield row(levels[-1], mix(x=len(levels) == 1, y=len(levels) > 1, noise=kick, e=e),
                  push=slope(levels[-1]))


@table
def restart(sigmas: np.ndarray, s_noise: float = 1.0, restart_list: Any = None) -> Iterator[Row]:
    """Heun, and now and then noise back up and down again: https://arxiv.org/abs/2306.14878.

    restart_list: {sigma_min: (levels, times, sigma_max)}: at the level nearest to sigma_min, noise
    up to that nearest to sigma_max and go down `levels` karras levels, `times` times. None: from
    20 steps on, restarts from 0.1 to 2 that take their steps from a shorter karras schedule, so
    that the number of calls stays heun's. A1111 restart_sampler.
    """
    sigmas, again = _restarts(sigmas, restart_list)
    path = []
    for i, step in enumerate(pairs(sigmas), 1):
        levels, times, high = again.get(i, (0, 0, 0.0))
        down = _karras(sigmas[_nearest(sigmas, high)], sigmas[i], levels)
        path += [step] + times * [*pairs(down)]
    starts = [a for a, _ in path[1:]] + [sigmas[-1]]
    for (a, b), start in zip(path, starts):
        yield from _heun(a, b, s_noise * np.sqrt(max(start**2 - b**2, 0)))


def _restarts(sigmas, restart_list):
    """The schedule, and its restarts as {index of the level: (levels, times, sigma_max)}."""
    steps = len(sigmas) - 1
    if restart_list is None and steps >= 20:
        count, times = (9, 1) if steps < 36 else (steps // 4, 2)
        shorter = _karras(sigmas[0], sigmas[-2], steps - times * count)
        return _restarts(np.append(shorter, sigmas[-1]), {0.1: (count + 1, times, 2.0)})
    try:
        rules = [(float(low), int(levels), int(times), float(high))
                 for low, (levels, times, high) in dict(restart_list or {}).items()]
    except (TypeError, ValueError, OverflowError):
        rules = [(0, 0, 0, 0)]
    if not all(0 <= low < high and levels > 1 and times > 0 and levels * times <= MAX_LEVELS
               for low, levels, times, high in rules):
        raise ValueError(f'restart_list={restart_list}: expected {{sigma_min: (levels, times, '
                         'sigma_max)} with sigma_min < sigma_max, levels > 1, times > 0, and at '
                         f'most {MAX_LEVELS} levels times times')
    again = {_nearest(sigmas, low): rule for low, *rule in rules}
    return sigmas, {i: rule for i, rule in again.items() if _nearest(sigmas, rule[2]) < i}


def _nearest(sigmas, level):
    return int(np.argmin(np.abs(sigmas - level)))


def _karras(high, low, count):
    """Karras et al.'s levels with rho = 7, the ends exactly as given."""
    return np.concatenate([[high], np.linspace(high ** (1 / 7), low ** (1 / 7), count)[1:-1] ** 7,
                           [low]])


@table
def dpm_2(sigmas: np.ndarray, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = np.inf,
          s_noise: float = 1.0) -> Iterator[Row]:
    """The midpoint rule, the midpoint taken in log sigma; k-diffusion sample_dpm_2."""
    yield from _churned(_midpoint, sigmas, s_churn, s_tmin, s_tmax, s_noise)


@table
def dpm_2_ancestral(sigmas: np.ndarray, eta: float = 1.0, s_noise: float = 1.0) -> Iterator[Row]:
    """dpm_2 down to `down`, then noise up to the next sigma; k-diffusion."""
    for a, b in pairs(sigmas):
        down, up = ancestral(a, b, eta)
        yield from _midpoint(a, down, s_noise * up, path=(a, b))


def _midpoint(a, b, noise, path=(0, 0)):
    if b == 0:
        yield row(a, mix(noise=noise, e=[1]), path=path)
        return
    mid = np.sqrt(a * b)
    yield row(a, mix(x=1, e=[mid - a]), save=mix(x=1), push=slope(a))
    yield row(mid, mix(y=1, noise=noise, e=[b - a]), push=slope(mid), path=path)


@table
def dpm_fast(sigmas: np.ndarray, eta: float = 0.0, s_noise: float = 1.0) -> Iterator[Row]:
    """DPM-Solver-fast: steps of orders 3, ..., 2, 1, as many calls as `sigmas` has steps.

    Of sigmas only the number of steps, the first and the last positive level are used: it goes
    evenly in log sigma and ends at that last level, not at 0; a single step is Euler's.
    k-diffusion sample_dpm_fast; https://arxiv.org/abs/2206.00927, section 3.4.
    """
    steps, last = len(sigmas) - 1, sigmas[sigmas > 0][-1]
    if steps == 1:  # k-diffusion would stay at the first level where the second is 0
        yield row(sigmas[0], mix(x=sigmas[1] / sigmas[0], e=[1 - sigmas[1] / sigmas[0]]))
        return
    orders = [3] * (steps // 3) + [steps % 3]
    if steps % 3 == 0:
        orders[-2:] = [2, 1]
    levels = np.geomspace(sigmas[0], last, len(orders) + 1)
    for (a, b), order in zip(pairs(levels), orders):
        down = max(ancestral(a, b, eta)[0], last)
        stages = np.geomspace(a, down, order + 1)
        yield from _stages(stages, _dpm(stages, 'dpmsolver', midpoint=order == 2),
                           s_noise * np.sqrt(b**2 - down**2), path=(a, b))


@table
def dpm_solver_singlestep(sigmas: np.ndarray, order: int = 2,
                          algorithm: str = 'dpmsolver++') -> Iterator[Row]:
    """DPM-Solver ('dpmsolver') or DPM-Solver++: one call a level, orders 1, ..., `order`, 1, ...

    A call of higher order goes on from where the last one of order 1 started. Third order needs
    levels even in log sigma. diffusers DPMSolverSinglestepScheduler; papers
    https://arxiv.org/abs/2206.00927 and https://arxiv.org/abs/2211.01095.
    """
    within('order', order, 1, 3)
    if algorithm not in ('dpmsolver', 'dpmsolver++'):
        raise unknown('algorithm', algorithm, ('dpmsolver', 'dpmsolver++'))
    levels = sigmas[sigmas > 0]
    for i in range(0, len(levels) - 1, order):
        stages = levels[i:i + order + 1]
        yield from _stages(stages, _dpm(stages, algorithm))
    if sigmas[-1] == 0:
        yield row(levels[-1], mix(e=[1]))


def _stages(levels, points, noise=0.0, path=(0.0, 0.0)):
    """Rows to each of `points`, all from the start; noise after the last."""
    start = mix(x=1)
    for k, (level, point) in enumerate(zip(levels, points), 1):
        last = k == len(levels) - 1
        yield row(level, point[0] * start + mix(noise=noise * last, e=point[k:0:-1]), save=start,
                  path=path if last else (0.0, 0.0))
        start = mix(y=1)


def _dpm(levels, algorithm, midpoint=True):
    """The points of a DPM-Solver step: weights of the start and the denoised, oldest first.

    Each point is exact for outputs linear in log sigma through the first and the newest call; with
    midpoint, the second point is so only for small steps, by the paper's simpler weights.
    """
    weights = np.zeros((len(levels) - 1, len(levels)))
    for k, (s, t) in enumerate(pairs(levels)):
        keep, whole, tilt = (_of_noise if algorithm == 'dpmsolver' else _of_data)(levels[0], t)
        weights[k, :2] = keep, whole
        if k > 0:
            tilt = whole / 2 if midpoint and k == 1 else tilt
            change = tilt * np.log(levels[0] / t) / np.log(levels[0] / s)
            weights[k, [1, k + 1]] += -change, change
    return _from_noise(levels, weights) if algorithm == 'dpmsolver' else weights


def _from_noise(levels, weights):
    """Weights of noises (x - denoised) / sigma as weights of denoised: float32 cancels less."""
    basis = np.eye(len(levels))
    point = basis[0].copy()
    for k, weight in enumerate(weights):
        basis[k + 1] = (point - basis[k + 1]) / levels[k]
        point = weight @ basis
        yield point


@table
def dpmpp_2s_ancestral(sigmas: np.ndarray, eta: float = 1.0, s_noise: float = 1.0) -> Iterator[Row]:
    """DPM-Solver++(2S), ancestral, r = 1/2; k-diffusion sample_dpmpp_2s_ancestral."""
    yield from _two_stages(sigmas, eta, s_noise)


@table
def dpmpp_2s_ancestral_cfg_pp(sigmas: np.ndarray, eta: float = 1.0,
                              s_noise: float = 1.0) -> Iterator[Row]:
    """dpmpp_2s_ancestral on the unguided output, the step's guidance added at its end (CFG++).

    ComfyUI sample_dpmpp_2s_ancestral_cfg_pp; https://arxiv.org/abs/2406.08070
    """
    yield from _two_stages(sigmas, eta, s_noise, cfg_pp=True)


def _two_stages(sigmas, eta, s_noise, cfg_pp=False):
    """The rows of dpmpp_2s_ancestral; y, times down / a, adds CFG++'s guidance at the end."""
    for a, b in pairs(sigmas):
        down, up = ancestral(a, b, eta)
        noise = s_noise * up
        if down == 0:
            yield row(a, mix(noise=noise, e=[1]), path=(a, b))
            continue
        mid = np.sqrt(a * down)
        first, last = ({'uncond': w} if cfg_pp else {'e': [w]} for w in (1 - mid / a, 1 - down / a))
        save = mix(x=1, e=[a / down], uncond=-a / down) if cfg_pp else mix(x=1)
        yield row(a, mix(x=mid / a, **first), save=save)
        yield row(mid, mix(y=down / a, noise=noise, **last), path=(a, b))


@table
def dpmpp_sde(sigmas: np.ndarray, eta: float = 1.0, s_noise: float = 1.0,
              r: float = 0.5) -> Iterator[Row]:
    """DPM-Solver++ for the SDE, two calls a step, r the place of the second; k-diffusion."""
    if not 0 < r < 1:
        raise ValueError(f'r={r}: expected a number between 0 and 1')
    for a, b in pairs(sigmas):
        if b == 0:
            yield row(a, mix(e=[1]))
            continue
        mid, c = a ** (1 - r) * b**r, 1 / (2 * r)
        down, up = ancestral(a, mid, eta)
        yield row(a, mix(x=down / a, noise=s_noise * up, e=[1 - down / a]), save=mix(x=1),
                  path=(a, mid))
        down, up = ancestral(a, b, eta)
        gain = 1 - down / a
        yield row(mid, mix(y=down / a, noise=s_noise * up, e=[gain * c, gain * (1 - c)]),
                  path=(a, b))


# Exponential integrators: a step a -> b is exact where the model's output is linear in log sigma.
# -> the weights of x, of the output at a, and of its change over the step.


def _of_noise(a, b):
    """Where the output is the noise, (x - denoised) / sigma."""
    return 1.0, b - a, b - (a - b) / np.log(a / b)


def _of_data(a, b, eta=0.0):
    """Where it is the denoised picture; eta: the noise that the reverse SDE adds."""
    z = (1 + eta) * np.log(a / b)
    return np.exp(-z), -np.expm1(-z), 1 + np.expm1(-z) / z


@table
def seeds_2(sigmas: np.ndarray, eta: float = 1.0, s_noise: float = 1.0, r: float = 0.5,
            solver_type: str = 'phi_1') -> Iterator[Row]:
    """SEEDS-2 on the denoised picture, r the place of the second call: ComfyUI sample_seeds_2.

    solver_type: 'phi_1' or 'phi_2', how the step weighs the two calls.
    https://arxiv.org/abs/2305.14267
    """
    if solver_type not in ('phi_1', 'phi_2'):
        raise unknown('solver_type', solver_type, ('phi_1', 'phi_2'))
    if not 0 < r <= 1:
        raise ValueError(f'r={r}: expected a number above 0, at most 1')
    for a, b in pairs(sigmas):
        if b == 0:
            yield row(a, mix(e=[1]))
            continue
        mid = a ** (1 - r) * b**r
        (_, first, _), (_, whole, tilt) = (_of_data(a, to, eta) for to in (mid, b))
        c = whole / (2 * r) if solver_type == 'phi_1' else tilt / r
        yield from _seeds([a, mid, b], [[first], [c, whole - c]], eta, s_noise)


@table
def seeds_3(sigmas: np.ndarray, eta: float = 1.0, s_noise: float = 1.0, r_1: float = 1 / 3,
            r_2: float = 2 / 3) -> Iterator[Row]:
    """SEEDS-3 on the denoised picture, r_1 and r_2 the places of two calls: ComfyUI sample_seeds_3.

    https://arxiv.org/abs/2305.14267
    """
    if not 0 < r_1 < r_2 <= 1:
        raise ValueError(f'r_1={r_1}, r_2={r_2}: expected 0 < r_1 < r_2 <= 1')
    for a, b in pairs(sigmas):
        if b == 0:
            yield row(a, mix(e=[1]))
            continue
        levels = [a, a ** (1 - r_1) * b**r_1, a ** (1 - r_2) * b**r_2, b]
        (_, first, _), (_, second, bend), (_, whole, tilt) = (
            _of_data(a, to, eta) for to in levels[1:])
        c, d = bend * r_2 / r_1, tilt / r_2
        yield from _seeds(levels, [[first], [c, second - c], [d, 0, whole - d]], eta, s_noise)


def _seeds(levels, weights, eta, s_noise):
    """A step down `levels`, each stage from the start, with the noise of the stages before.

    Noise decays over a stage as the start does, so y keeps the start plus the noise so far.
    """
    start = mix(x=1)
    for s, t, e in zip(levels[:-1], levels[1:], weights):
        decay, noise = (t / levels[0]) ** (1 + eta), sde_noise(s, t, eta, s_noise)
        yield row(s, decay * start + mix(noise=noise, e=e),
                  save=start + mix(noise=noise / decay), path=(s, t))
        start = mix(y=1)


SAMPLERS = (heun, heunpp2, dpm_2, dpm_2_ancestral, restart, dpm_fast, dpm_solver_singlestep,
            dpmpp_2s_ancestral, dpmpp_sde, seeds_2, seeds_3, dpmpp_2s_ancestral_cfg_pp)
