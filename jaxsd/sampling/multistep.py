"""Multistep samplers: one call a step, and the outputs of steps before (Adams and relatives)."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.config import ScheduleConfig

from .choice import one_of, unknown
from .first_order import known
from .levels import sigma_to_t, t_to_sigma
from .tables import (
    DENOISED,
    HISTORY,
    Custom,
    Row,
    Rule,
    ancestral,
    custom,
    mix,
    pairs,
    row,
    sde_noise,
    slope,
    table,
    within,
)

NODES, WEIGHTS = np.polynomial.legendre.leggauss(32)  # exact here to float64's last digits


@table
def lms(sigmas: np.ndarray, order: int = 4) -> Iterator[Row]:
    """Linear multistep (Adams-Bashforth on uneven sigmas); k-diffusion sample_lms."""
    within('order', order, 1, HISTORY)
    for i, (a, b) in enumerate(pairs(sigmas)):
        yield row(a, mix(x=1, e=_adams(sigmas[i::-1][:order], a, b)), push=slope(a))


@table
def deis(sigmas: np.ndarray, order: int = 3, lower_order_final: bool = True) -> Iterator[Row]:
    """DEIS (https://arxiv.org/abs/2204.13902), the noise a polynomial in log sigma, orders 1 to 3.

    diffusers DEISMultistepScheduler, which lowers the order at the end of fewer than 15 steps with
    lower_order_final.
    """
    within('order', order, 1, 3)
    orders = _falling(order, len(sigmas) - 1, lower_order_final)
    for i, ((a, b), n) in enumerate(zip(pairs(sigmas), orders)):
        if b == 0:
            yield row(a, mix(e=[1]))
            continue
        past, ends = np.log(sigmas[i::-1][:n]), np.log([a, b])
        yield row(a, mix(x=1, e=_adams(past, ends[0], ends[1], np.exp)), push=slope(a))


def _adams(knots, start, end, weight=np.ones_like):
    """Integrals of weight(t) from start to end, times the polynomial that is 1 at one knot only."""
    t = (start + end) / 2 + (end - start) / 2 * NODES
    w = (end - start) / 2 * WEIGHTS * weight(t)
    others = [np.delete(knots, j) for j in range(len(knots))]
    return np.array([w @ np.prod((t[:, None] - other) / (knot - other), axis=1)
                     for knot, other in zip(knots, others)])


def _falling(order, steps, lower_order_final=True):
    """The order of every step, falling to 1 at the end of fewer than 15 steps: diffusers."""
    orders, left = np.full(steps, int(order)), np.arange(steps, 0, -1)
    return np.minimum(orders, left) if lower_order_final and steps < 15 else orders


@table
def plms(sigmas: np.ndarray) -> Iterator[Row]:
    """Pseudo linear multistep (https://arxiv.org/abs/2202.09778); steps + 1 calls.

    diffusers PNDMScheduler with skip_prk_steps. The first step is Heun's, whose second slope the
    multistep formula leaves out: y keeps the first point, then the first slope.
    """
    for i, (a, b) in enumerate(pairs(sigmas)):
        new, *past = (b - a) * _even(min(i + 1, HISTORY))
        if i == 0:
            yield row(a, mix(x=1, e=[new]), save=mix(x=1), push=slope(a))
            if len(sigmas) > 2:
                yield row(b, mix(y=1, e=[new / 2, new / 2]), save=mix(e=[0, 1]), push=slope(b))
        elif i < HISTORY:
            yield row(a, mix(x=1, y=past[-1], e=[new, *past[:-1]]), push=slope(a))
        else:
            yield row(a, mix(x=1, e=[new, *past]), push=slope(a))


class Slopes(NamedTuple):
    """What an image of pndm keeps: where its step began, a sum of slopes, those of steps before."""

    begun: jax.Array
    total: jax.Array
    past: tuple


def _pndm_init(x):
    return Slopes(x, 0 * x, (0 * x,) * 3)


def _pndm_step(x, state, row, denoised):
    slope = (x - denoised) / row.sigma
    begun = jnp.where(row.first > 0, x, state.begun)
    along = row.own * slope + row.sum * state.total + sum(
        weight * e for weight, e in zip(row.past, state.past))
    past = tuple(jnp.where(row.first > 0, new, old)
                 for new, old in zip((slope, *state.past), state.past))
    total = state.total * (1 - row.first) + row.share * slope
    return row.scale * (begun + row.length * along), Slopes(begun, total, past)


PNDM = Rule('pndm', _pndm_step, _pndm_init)


def pndm(sigmas: np.ndarray, ratio: int = 0, config: ScheduleConfig | None = None) -> Custom:
    """PNDM (https://arxiv.org/abs/2202.09778): three Runge-Kutta steps of four calls each, then
    pseudo linear multistep; diffusers PNDMScheduler without skip_prk_steps.

    ratio: timesteps of a step, T // steps, of which half is rounded as there; 0: the middle of each
    step. config: the model's ScheduleConfig. Raises ValueError for fewer than 4 steps.
    """
    if len(sigmas) < 5:
        raise ValueError(f'pndm: expected at least 4 steps, found {len(sigmas) - 1}')
    config, rows = known(config), []
    ends = sigma_to_t(sigmas[:4], config)
    for i, (a, b) in enumerate(pairs(sigmas)):
        new, *past = _even(4)
        calls = [(a, b, 1, new, 0, 0, past)]
        if i < 3:
            start, end = np.round(ends[i:i + 2]) if ratio else ends[i:i + 2]
            half = ratio // 2 or (start - end) / 2
            middle, first = t_to_sigma(end + half, config), t_to_sigma(start - half, config)
            calls = [(a, first, 1, 1, 0, 1 / 6, 0), (middle, middle, 0, 1, 0, 1 / 3, 0),
                     (middle, b, 0, 1, 0, 1 / 3, 0), (b, b, 0, 1 / 6, 1, 0, 0)]
        for sigma, to, first, own, total, share, weights in calls:
            rows.append(dict(sigma=sigma, to=to, length=to - a, first=first, own=own, sum=total,
                             share=share, past=np.zeros(3) + weights, scale=1.0))
    for before, after in zip(rows, rows[1:]):  # at unit variance, as there
        before['scale'] = np.hypot(1, after['sigma']) / np.hypot(1, before['to'])
    return custom(PNDM, rows)


@table
def ipndm(sigmas: np.ndarray, order: int = 4) -> Iterator[Row]:
    """Adams-Bashforth as if all steps were equal, the last to 0 first order; ComfyUI sample_ipndm.

    order: at most, 1 to 4 (ComfyUI's max_order). https://arxiv.org/abs/2204.13902, appendix.
    """
    within('order', order, 1, HISTORY)
    for i, (a, b) in enumerate(pairs(sigmas)):
        yield _eps_step(a, b, _even(min(i + 1, order)))


@table
def ipndm_v(sigmas: np.ndarray, order: int = 4) -> Iterator[Row]:
    """ipndm for uneven steps, as ComfyUI's sample_ipndm_v and its ancestor diff-sampler compute it.

    Theirs are not the second and third differences of Adams-Bashforth on uneven sigmas (`lms` has
    those): it is of second order on smooth schedules; with order=4, first where steps jump.
    order: at most, 1 to 4 (ComfyUI's max_order).
    """
    within('order', order, 1, HISTORY)
    for i, (a, b) in enumerate(pairs(sigmas)):
        n = min(i + 1, order)
        h, h1, h2, h3 = np.pad(np.diff(sigmas)[i::-1][:n], (0, 4 - n), 'edge')
        third = (1 - h**2 / (3 * h1 * (h1 + h2))) / 2
        fourth = (((1 - h / (3 * (h + h1))) / 2 + (1 - h / (2 * (h + h1))) * h
                   / (6 * (h + h1 + h2))) * h * (h + h1) * (h + h1 + h2)
                  / (h1 * (h1 + h2) * (h1 + h2 + h3)))
        r, q = h1 / h2, h1 * (h1 + h2) / (h2 * (h2 + h3))
        e = [np.array([1, 0, 0, 0]), h / h1 / 2 * np.array([1, -1, 0, 0]),
             third * np.array([1, -1 - r, r, 0]),
             fourth * np.array([1, -1 - r - q, r + q * (1 + h2 / h3), -q * r])]
        yield _eps_step(a, b, sum(e[:n]))


@table
def gradient_estimation(sigmas: np.ndarray, ge_gamma: float = 2.0) -> Iterator[Row]:
    """Euler along the slope extrapolated by ge_gamma; ComfyUI sample_gradient_estimation.

    https://openreview.net/pdf?id=o2ND9v0CeK
    """
    for i, (a, b) in enumerate(pairs(sigmas)):
        yield _eps_step(a, b, [1] if i == 0 else [ge_gamma, 1 - ge_gamma])


def _even(n):
    """Adams-Bashforth of n equal steps of length 1: 1; 3/2, -1/2; 23/12, -16/12, 5/12; ..."""
    return _adams(-np.arange(float(n)), 0, 1)


def _eps_step(a, b, weights):
    """A step from a to b along weighted slopes, newest first; to 0 it is first order."""
    if b == 0:
        return row(a, mix(e=[1]))
    return row(a, mix(x=1, e=(b - a) * np.asarray(weights)), push=slope(a))


@table
def dpmpp_2m(sigmas: np.ndarray) -> Iterator[Row]:
    """DPM-Solver++(2M), algorithm 2 of https://arxiv.org/abs/2211.01095; first order to sigma 0."""
    yield from _dpm_steps(sigmas, [2] * len(sigmas))


@table
def dpmpp_2m_sde(sigmas: np.ndarray, eta: float = 1.0, s_noise: float = 1.0,
                 solver_type: str = 'midpoint') -> Iterator[Row]:
    """DPM-Solver++(2M) for the SDE, 'midpoint' or 'heun'; k-diffusion sample_dpmpp_2m_sde."""
    yield from _dpm_steps(sigmas, [2] * len(sigmas), solver_type, eta, s_noise)


@table
def dpmpp_3m_sde(sigmas: np.ndarray, eta: float = 1.0, s_noise: float = 1.0) -> Iterator[Row]:
    """DPM-Solver++(3M) for the SDE; k-diffusion sample_dpmpp_3m_sde."""
    yield from _dpm_steps(sigmas, [3] * len(sigmas), 'heun', eta, s_noise)


@table
def dpm_solver_multistep(sigmas: np.ndarray, order: int = 2, algorithm: str = 'dpmsolver++',
                         solver_type: str = 'midpoint', lower_order_final: bool = True,
                         euler_at_final: bool = False) -> Iterator[Row]:
    """Multistep DPM-Solver ('dpmsolver', on the noise) or DPM-Solver++ (on the picture), or with
    'sde-' before it for the SDE, up to order 2.

    Orders 1 to 3; solver_type 'midpoint' or 'heun' says how steps of order 2 are made.
    diffusers DPMSolverMultistepScheduler (algorithm_type), which lowers the order at the end of
    fewer than 15 steps with lower_order_final, and that of the last step with euler_at_final.
    https://arxiv.org/abs/2206.00927, https://arxiv.org/abs/2211.01095
    """
    within('order', order, 1, 3)
    one_of('algorithm', algorithm, (
        'dpmsolver', 'dpmsolver++', 'sde-dpmsolver', 'sde-dpmsolver++'))
    sde = algorithm.startswith('sde-')
    if sde:
        within(f'order of {algorithm}', order, 1, 2)
    orders = _falling(order, len(sigmas) - 1, lower_order_final)
    orders[-1] = 1 if euler_at_final else orders[-1]
    yield from _dpm_steps(sigmas, orders, solver_type, float(sde),
                          predict_noise=not algorithm.endswith('++'))


def _dpm_steps(sigmas, orders, solver_type='midpoint', eta=0.0, s_noise=1.0, predict_noise=False):
    """The rows of multistep DPM-Solver, an order for each step; first order to sigma 0."""
    if solver_type not in ('midpoint', 'heun'):
        raise unknown('solver_type', solver_type, ('midpoint', 'heun'))
    for i, ((a, b), order) in enumerate(zip(pairs(sigmas), orders)):
        if b == 0:
            yield row(a, mix(e=[1]))
            continue
        h = np.log(a / b)
        ages = np.log(sigmas[i::-1][1:order] / a) / h
        if predict_noise:
            e = b * _dpm(-h, ages, solver_type) * (1 + eta)
            yield row(a, mix(x=1, noise=np.sqrt(eta * (a**2 - b**2)), e=e), push=slope(a),
                      path=(a, b))
            continue
        yield row(a, mix(x=(b / a) ** (1 + eta), noise=sde_noise(a, b, eta, s_noise),
                         e=_dpm((1 + eta) * h, ages, solver_type)), path=(a, b))


def _dpm(z, ages, solver_type='heun'):
    """Weights of the outputs in one step of DPM-Solver, the newest first.

    z: the step's length in the exponent: (1 + eta) log(a / b) for the picture, log(b / a) for the
    noise. ages: of the outputs before the newest, in steps. The second divided difference has the
    published weight, half of what third order would need.
    """
    gain = -np.expm1(-z)
    phi2 = 1 - gain / z  # gain times the mean of s, the time since the step began in steps
    slopes = np.diff(np.eye(3), axis=0)[:len(ages)] / -np.diff(ages, prepend=0)[:, None]
    e = gain * np.eye(3)[0]
    if len(ages) == 1:
        e = e + (gain / 2 if solver_type == 'midpoint' else phi2) * slopes[0]
    if len(ages) == 2:
        curve = (slopes[0] - slopes[1]) / ages[1]
        e = e + phi2 * (slopes[0] + curve * ages[0]) - (phi2 / z - 0.5) * curve
    return e


@table
def res_multistep(sigmas: np.ndarray) -> Iterator[Row]:
    """Exponential multistep of order 2 (https://arxiv.org/abs/2308.02157); ComfyUI."""
    yield from _res(sigmas, 0.0, 1.0)


@table
def res_multistep_ancestral(sigmas: np.ndarray, eta: float = 1.0,
                            s_noise: float = 1.0) -> Iterator[Row]:
    """res_multistep down to `down`, then noise up to the next sigma; ComfyUI."""
    yield from _res(sigmas, eta, s_noise)


def _res(sigmas, eta, s_noise, cfg_pp=False):
    """The rows of res_multistep; CFG++ steps with the unguided outputs, y being the last one.

    An output's age counts from the sigma that the step before went down to.
    """
    arrived = 0
    for i, (a, b) in enumerate(pairs(sigmas)):
        down, up = ancestral(a, b, eta)
        r, noise = down / a, s_noise * up
        second = down > 0 and arrived > 0
        h = np.log(a / down) if down > 0 else np.inf
        e = _dpm(h, np.log(sigmas[i - 1:i] / arrived) / h if second else ())
        to, save = mix(x=r, noise=noise, e=e), None
        if cfg_pp:
            guided = r if second else 1  # ComfyUI's
            to = mix(x=r, y=e[1], noise=noise, e=[guided], uncond=e[0] - guided)
            save = mix(uncond=1)
        yield row(a, to, save=save, path=(a, b))
        arrived = down


@table
def unipc(sigmas: np.ndarray, order: int = 2, variant: str = 'bh2') -> Iterator[Row]:
    """UniPC (https://arxiv.org/abs/2302.04867) on x0, 'bh1' or 'bh2', orders 1 to 3.

    Predictor and corrector share one call: y keeps the corrected point, from which the newest
    output first corrects this step and then predicts the next. Orders rise at the start and
    fall at the end, as in diffusers (lower_order_final) and ComfyUI; diffusers' defaults here.
    """
    within('order', order, 1, 3)
    if variant not in ('bh1', 'bh2'):
        raise unknown('variant', variant, ('bh1', 'bh2'))
    steps, before = len(sigmas) - 1, 0
    for i, (a, b) in enumerate(pairs(sigmas)):
        corrected = mix(x=1)
        if i > 0:  # from sigmas[i-1] to a, knowing the output at a
            corrected = mix(y=a / sigmas[i - 1], e=_bh(sigmas[i::-1], before, variant, True))
        before = min(order, i + 1, steps - i)
        weights = _bh(np.append(b, sigmas[i::-1]), before, variant, False)
        yield row(a, b / a * corrected + mix(e=weights), save=corrected)


def _bh(sigmas, order, variant, corrector):
    """Weights of the outputs in one UniPC step from sigmas[1] to sigmas[0]; the past follows.

    -> outputs at sigmas[0] (corrector only), sigmas[1], ... sigmas[order].
    """
    target, start, *past = sigmas
    weights = np.zeros(order + 1)  # of the outputs at target, start, past...
    weights[1] = 1 - target / start
    if order == 1 and not corrector:
        return weights[1:]  # also the only one that reaches sigma 0, where h is infinite
    h = np.log(start / target)
    scale = -h if variant == 'bh1' else np.expm1(-h)
    r = np.append([-np.log(s / start) / h for s in past[:order - 1]], 1.0)
    phi, factorial, moments = np.expm1(-h) / -h - 1, 1.0, []
    for k in range(1, order + 1):
        moments.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    n = order if corrector else order - 1
    if (order, corrector) in ((1, True), (2, False)):
        rho = np.array([0.5])  # the paper's closed form, accurate to the same order
    else:
        rho = np.linalg.solve(r[:n] ** np.arange(n)[:, None], moments[:n])
    rho = -scale * rho / r[:n]  # of (output - output at start)
    places = [*range(2, order + 1), 0][:n]
    weights[places] += rho
    weights[1] -= rho.sum()
    return weights if corrector else weights[1:]


@table
def er_sde(sigmas: np.ndarray, order: int = 3, s_noise: float = 1.0) -> Iterator[Row]:
    """ER-SDE solver (https://arxiv.org/abs/2309.06169), orders 1 to 3; ComfyUI sample_er_sde.

    order: ComfyUI's max_stage. The noise scaler and the integrals' 200 points are its defaults.
    """
    within('order', order, 1, 3)
    e0, e1, e2 = np.eye(3)
    for i, (a, b) in enumerate(pairs(sigmas)):
        if b == 0:
            yield row(a, mix(e=[1]))
            continue
        r, h = _er_scale(b) / _er_scale(a), (a - b) / 200
        at = b + h * np.arange(200)
        density = h * _er_scale(b) / _er_scale(at)
        e = (1 - r) * e0
        if min(i, order - 1) > 0:
            first = (e0 - e1) / (a - sigmas[i - 1])
            e = e + (b - a + density.sum()) * first
        if min(i, order - 1) > 1:
            before = (e1 - e2) / (sigmas[i - 1] - sigmas[i - 2])
            second = 2 * (first - before) / (a - sigmas[i - 2])
            e = e + ((b - a) ** 2 / 2 + density @ (at - a)) * second
        yield row(a, mix(x=r, noise=s_noise * np.sqrt(b**2 - (a * r) ** 2), e=e), path=(a, b))


def _er_scale(sigma):
    """phi of the paper: how much noise the reverse SDE adds; ComfyUI's and the authors' default."""
    return sigma * (np.exp(sigma**0.3) + 10)


@table
def sa_solver(sigmas: np.ndarray, predictor_order: int = 3, corrector_order: int = 4,
              tau: float = 1.0, s_tmin: float = 0.5712, s_tmax: float = 5.0924,
              s_noise: float = 1.0, simple_order_2: bool = False,
              algorithm: str = 'data_prediction', lower_order_final: bool = False,
              tau_timesteps: Sequence[float] | None = None,
              config: ScheduleConfig | None = None) -> Iterator[Row]:
    """SA-Solver (https://arxiv.org/abs/2309.05019), one call a step; ComfyUI sample_sa_solver.

    tau: stochasticity of the steps that end at s_tmin to s_tmax, 0 elsewhere (there ComfyUI's
    default, 0.2 to 0.8 of Stable Diffusion's timesteps). corrector_order 0 corrects nothing.
    y is the step before without its outputs, noise included, so that the corrector makes it again
    with the newest one. diffusers SASolverScheduler with simple_order_2: its formula at order 2;
    algorithm: 'data_prediction' or 'noise_prediction', of which polynomials are made;
    lower_order_final: orders fall before a last level above 0 too; tau_timesteps: the first and the
    last timestep where a stochastic step begins, in the place of s_tmin and s_tmax, of the model's
    config.
    """
    within('predictor_order', predictor_order, 1, HISTORY)
    within('corrector_order', corrector_order, 0, HISTORY)
    kind = one_of('algorithm', algorithm, ('data_prediction', 'noise_prediction'))
    how = kind == 'data_prediction', simple_order_2
    falls = 2 - (sigmas[-1] > 0) if lower_order_final or sigmas[-1] == 0 else -np.inf
    ks = 1 + tau**2 * _stochastic(sigmas, s_tmin, s_tmax, tau_timesteps, config)
    for i, ((a, b), k) in enumerate(zip(pairs(sigmas), ks)):
        if b == 0:
            yield row(a, mix(e=[1]))
            continue
        left, past, corrected = len(sigmas) - falls - i, sigmas[i::-1], mix(x=1)
        n = min(corrector_order, i + 1, left + 3 - falls)
        if i > 0 and n > 0:
            corrected = mix(y=1, e=_sa(past[:n], past[1], a, ks[i - 1], *how))
        noise = sde_noise(a, b, k - 1, 1) if how[0] else np.sqrt((k - 1) * (a**2 - b**2))
        base = (b / a if how[0] else 1) ** k * corrected + mix(noise=s_noise * noise)
        e = _sa(past[:min(predictor_order, left)], a, b, k, *how)
        push = DENOISED if how[0] else slope(a)
        yield row(a, base + mix(e=e), save=base, push=push, path=(a, b))


def _stochastic(sigmas, s_tmin, s_tmax, tau_timesteps, config):
    """Which steps of SA-Solver have noise -> bool [steps]."""
    if tau_timesteps is None:
        return (s_tmin <= sigmas[1:]) & (sigmas[1:] <= s_tmax)
    try:
        low, high = map(float, tau_timesteps)
    except (TypeError, ValueError):
        raise ValueError(f'tau_timesteps={tau_timesteps!r:.100}: expected the first and the last '
                         'timestep, such as (200, 800)') from None
    t = sigma_to_t(sigmas[:-1], known(config))
    return (low <= t) & (t <= high)


def _sa(knots, a, b, k, of_data, simple):
    """Weights of the outputs at the knots in a step of SA-Solver from a to b, eqs. 15 and 18; or of
    noises."""
    if of_data and simple and len(knots) == 2:
        start = np.array([knots[0] == a, knots[1] == a]) * 1.0
        other = k * np.log(a / b) ** 2 / 2 / np.log(a / knots[start == 0])
        return (1 - (b / a) ** k) * start + other * (1 - 2 * start)

    def weight(u):  # of log sigma
        return -k * np.exp(k * (np.log(b) - u)) if of_data else k * np.exp(u)
    return _adams(np.log(knots), np.log(a), np.log(b), weight)


# CFG++ (https://arxiv.org/abs/2406.08070): steps along the unguided slope to the guided picture.


@table
def dpmpp_2m_cfg_pp(sigmas: np.ndarray) -> Iterator[Row]:
    """dpmpp_2m with CFG++; y is the last unguided output; ComfyUI sample_dpmpp_2m_cfg_pp."""
    last = None
    for a, b in pairs(sigmas):
        r, c = b / a, 0.0
        if last is not None and b > 0:
            c = (1 - r) * np.log(a / b) / np.log(last / a) / 2
        yield row(a, mix(x=r, y=-c, e=[1 + c], uncond=-r), save=mix(uncond=1))
        last = a


@table
def res_multistep_cfg_pp(sigmas: np.ndarray) -> Iterator[Row]:
    """res_multistep with CFG++; ComfyUI sample_res_multistep_cfg_pp."""
    yield from _res(sigmas, 0.0, 1.0, cfg_pp=True)


@table
def res_multistep_ancestral_cfg_pp(sigmas: np.ndarray, eta: float = 1.0,
                                   s_noise: float = 1.0) -> Iterator[Row]:
    """res_multistep_ancestral with CFG++; ComfyUI sample_res_multistep_ancestral_cfg_pp."""
    yield from _res(sigmas, eta, s_noise, cfg_pp=True)


@table
def gradient_estimation_cfg_pp(sigmas: np.ndarray, ge_gamma: float = 2.0) -> Iterator[Row]:
    """gradient_estimation with CFG++; y is the last unguided slope; ComfyUI."""
    for i, (a, b) in enumerate(pairs(sigmas)):
        extra = (ge_gamma - 1) * (b - a) if i > 0 and b > 0 else 0.0
        along = (b + extra) / a
        yield row(a, mix(x=along, y=-extra, e=[1], uncond=-along),
                  save=mix(x=1 / a, uncond=-1 / a))


SAMPLERS = (
    lms, plms, pndm, ipndm, ipndm_v, deis, gradient_estimation, dpmpp_2m, dpmpp_2m_sde,
    dpmpp_3m_sde, dpm_solver_multistep, unipc, res_multistep, res_multistep_ancestral, er_sde,
    sa_solver, dpmpp_2m_cfg_pp, res_multistep_cfg_pp, res_multistep_ancestral_cfg_pp,
    gradient_estimation_cfg_pp)
