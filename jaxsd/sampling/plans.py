"""Samplers as tables: numpy functions `sigmas -> Rows`, in float64, without a model.

Once `denoise(x, sigma)` is fixed, every fixed-step sampler is linear in the current point `x`, a
saved point `y`, fresh noise and the last few model outputs `e0, e1, ...` (newest first), with
coefficients that depend on the sigmas alone: Butcher's general linear methods. A sampler here
yields one `row` per model call; `scan.sample` runs any table.

A new sampler is one function that yields rows and one entry in SAMPLERS. Its formulas read like
the paper's: a and b are the sigmas before and after a step, `e` lists weights of e0, e1, ...
"""

import functools
from typing import NamedTuple

import numpy as np

from .choice import call, choose, unknown

HISTORY = 4  # model outputs that a row can reach back to; one number, so that all tables stack


class Row(NamedTuple):
    """One model call. Rows are Row with a leading axis [calls], or [calls, B] when per image.

    A row with sigma 0 calls no model: it only mixes. Padding is such rows with an identity mix.
    """

    sigma: np.ndarray  # []       noise level at which the model is called
    push: np.ndarray  # [2]      history entry e0 = push . (x, denoised)
    mix: np.ndarray  # [2,3+K]  (x, y) <- mix @ (x, y, noise, e0 .. eK-1)


Rows = Row
DENOISED = (0.0, 1.0)  # push: e0 is the denoised picture


def slope(sigma):
    """The push that makes e0 the ODE's derivative, d = (x - denoised) / sigma."""
    return (1 / sigma, -1 / sigma)


def mix(x=0.0, y=0.0, noise=0.0, e=()):
    """One row of a mix: the weights of x, y, noise, e0, e1, ... -> [3+K]."""
    return np.array([x, y, noise, *e] + [0.0] * (HISTORY - len(e)))


def row(sigma, to, save=None, push=DENOISED):
    """A model call at sigma: `to` makes the new x, `save` the new y (None: y stays)."""
    save = mix(y=1) if save is None else save
    return Row(np.float64(sigma), np.array(push), np.stack([to, save]))


def table(sampler):
    """Make a generator of rows a function `(sigmas, **options) -> Rows`."""
    @functools.wraps(sampler)
    def rows(sigmas, **options):
        return Row(*map(np.stack, zip(*sampler(sigmas, **options))))
    return rows


def plan(name, sigmas, **options):
    """The table of a sampler -> Rows of float64 numpy arrays, one row per model call.

    name: a key of SAMPLERS. sigmas: [steps + 1], strictly decreasing, usually ending in 0.
    options: those of the sampler function (eta, s_noise, order, ...).
    Raises ValueError for an unknown name or option and for sigmas that do not decrease.
    """
    function = choose('sampler', name, SAMPLERS)
    sigmas = np.asarray(sigmas, np.float64)
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f'sigmas of shape {sigmas.shape}: expected [steps + 1], at least 2')
    if not np.isfinite(sigmas).all() or np.any(np.diff(sigmas) >= 0) or sigmas[-1] < 0:
        raise ValueError(f'sigmas {sigmas}: expected finite, strictly decreasing, none below 0')
    for key in ('eta', 's_noise', 's_churn'):
        if not 0 <= options.get(key, 0) < np.inf:
            raise ValueError(f'{key}={options[key]}: expected a finite number, 0 or greater')
    return call('sampler', name, function, sigmas, **options)


def calls(rows):
    """Number of model calls -> int, or int [B] when per image.

    Two-call samplers make their last step in one call, so that after `done` calls exactly
    `done * steps // calls(rows)` steps are finished: what a progress bar needs.
    """
    return (np.asarray(rows.sigma) > 0).sum(axis=0)


def _pairs(sigmas):
    return zip(sigmas[:-1], sigmas[1:])


def _ancestral(a, b, eta):
    """Split a step a -> b into a deterministic part to `down` and fresh noise `up`.

    up^2 + down^2 = b^2; eta = 1 is DDPM's posterior variance, b^2 (a^2 - b^2) / a^2.
    """
    up = min(b, eta * b * np.sqrt(1 - (b / a) ** 2))
    return np.sqrt(b**2 - up**2), up


def _churn(sigmas, s_churn, s_tmin, s_tmax, s_noise):
    """Karras et al. 2022, algorithm 2: levels to call at, and the noise that leads to each.

    -> hats [steps], kicks [steps + 1]: kicks[i] is added before step i, so the step before it
    carries it; before the first step a row without a model call does.
    """
    a = sigmas[:-1]
    gamma = min(s_churn / len(a), np.sqrt(2) - 1) * ((s_tmin <= a) & (a <= s_tmax))
    return a * (1 + gamma), np.append(s_noise * a * np.sqrt((1 + gamma) ** 2 - 1), 0.0)


def _kick(kick):
    if kick > 0:
        yield row(0, mix(x=1, noise=kick), push=(0, 0))


@table
def euler(sigmas, s_churn=0.0, s_tmin=0.0, s_tmax=np.inf, s_noise=1.0):
    """Euler on dx/dsigma = (x - denoised) / sigma; k-diffusion sample_euler. DDIM at eta = 0."""
    hats, kicks = _churn(sigmas, s_churn, s_tmin, s_tmax, s_noise)
    yield from _kick(kicks[0])
    for a, b, kick in zip(hats, sigmas[1:], kicks[1:]):
        yield row(a, mix(x=b / a, noise=kick, e=[1 - b / a]))


@table
def heun(sigmas, s_churn=0.0, s_tmin=0.0, s_tmax=np.inf, s_noise=1.0):
    """Karras et al. 2022, algorithm 2: Euler, then the mean of both slopes; two calls a step."""
    hats, kicks = _churn(sigmas, s_churn, s_tmin, s_tmax, s_noise)
    yield from _kick(kicks[0])
    for a, b, kick in zip(hats, sigmas[1:], kicks[1:]):
        if b == 0:
            yield row(a, mix(e=[1]))
            continue
        h = b - a
        yield row(a, mix(x=1, e=[h]), save=mix(x=1), push=slope(a))
        yield row(b, mix(y=1, noise=kick, e=[h / 2, h / 2]), push=slope(b))


@table
def dpm_2(sigmas, s_churn=0.0, s_tmin=0.0, s_tmax=np.inf, s_noise=1.0):
    """The midpoint rule, the midpoint taken in log sigma; k-diffusion sample_dpm_2."""
    hats, kicks = _churn(sigmas, s_churn, s_tmin, s_tmax, s_noise)
    yield from _kick(kicks[0])
    for a, b, kick in zip(hats, sigmas[1:], kicks[1:]):
        yield from _midpoint(a, b, kick)


@table
def dpm_2_ancestral(sigmas, eta=1.0, s_noise=1.0):
    """dpm_2 down to `down`, then noise up to the next sigma; k-diffusion."""
    for a, b in _pairs(sigmas):
        down, up = _ancestral(a, b, eta)
        yield from _midpoint(a, down, s_noise * up)


def _midpoint(a, b, noise):
    if b == 0:
        yield row(a, mix(noise=noise, e=[1]))
        return
    mid = np.sqrt(a * b)
    yield row(a, mix(x=1, e=[mid - a]), save=mix(x=1), push=slope(a))
    yield row(mid, mix(y=1, noise=noise, e=[b - a]), push=slope(mid))


@table
def euler_ancestral(sigmas, eta=1.0, s_noise=1.0):
    """Euler down to `down`, then noise up to the next sigma; k-diffusion."""
    for a, b in _pairs(sigmas):
        down, up = _ancestral(a, b, eta)
        yield row(a, mix(x=down / a, noise=s_noise * up, e=[1 - down / a]))


@table
def ddim(sigmas, eta=0.0, s_noise=1.0):
    """DDIM, eq. 12 of https://arxiv.org/abs/2010.02502: in terms of sigma, ancestral Euler."""
    yield from zip(*euler_ancestral(sigmas, eta=eta, s_noise=s_noise))


@table
def ddpm(sigmas, s_noise=1.0):
    """DDPM's posterior with the small variance (eq. 7 of https://arxiv.org/abs/2006.11239).

    Mean and variance for a step over any number of timesteps equal ancestral Euler at eta = 1.
    """
    yield from zip(*euler_ancestral(sigmas, eta=1.0, s_noise=s_noise))


@table
def lms(sigmas, order=4):
    """Linear multistep (Adams-Bashforth on uneven sigmas); k-diffusion sample_lms."""
    _within('order', order, 1, HISTORY)
    nodes, weights = np.polynomial.legendre.leggauss(HISTORY)  # exact for these polynomials
    for i, (a, b) in enumerate(_pairs(sigmas)):
        past = sigmas[i::-1][:order]
        at = (a + b) / 2 + (b - a) / 2 * nodes
        e = [(b - a) / 2 * weights @ _lagrange(at, past, j) for j in range(len(past))]
        yield row(a, mix(x=1, e=e), push=slope(a))


def _lagrange(at, knots, j):
    """The polynomial that is 1 at knots[j] and 0 at the others, at the points `at`."""
    others = np.delete(knots, j)
    return np.prod((at[:, None] - others) / (knots[j] - others), axis=1)


@table
def dpmpp_2m(sigmas):
    """DPM-Solver++(2M), algorithm 2 of https://arxiv.org/abs/2211.01095; first order to sigma 0."""
    last = None
    for a, b in _pairs(sigmas):
        c = 0.0
        if last is not None and b > 0:
            c = np.log(a / b) / np.log(last / a) / 2
        yield row(a, mix(x=b / a, e=[(1 - b / a) * (1 + c), -(1 - b / a) * c]))
        last = a


@table
def dpmpp_2m_sde(sigmas, eta=1.0, s_noise=1.0, solver_type='midpoint'):
    """DPM-Solver++(2M) for the SDE, 'midpoint' or 'heun'; k-diffusion sample_dpmpp_2m_sde."""
    if solver_type not in ('midpoint', 'heun'):
        raise unknown('solver_type', solver_type, ('midpoint', 'heun'))
    last = None
    for a, b in _pairs(sigmas):
        if b == 0:
            yield row(a, mix(e=[1]))
            continue
        h = np.log(a / b)
        gain = -np.expm1(-(1 + eta) * h)
        c = 0.0
        if last is not None:
            half = gain / 2 if solver_type == 'midpoint' else 1 - gain / ((1 + eta) * h)
            c = half * h / np.log(last / a)
        yield row(a, mix(x=(b / a) ** (1 + eta), noise=_sde_noise(b, h, eta, s_noise),
                         e=[gain + c, -c]))
        last = a


@table
def dpmpp_3m_sde(sigmas, eta=1.0, s_noise=1.0):
    """DPM-Solver++(3M) for the SDE; k-diffusion sample_dpmpp_3m_sde."""
    for i, (a, b) in enumerate(_pairs(sigmas)):
        if b == 0:
            yield row(a, mix(e=[1]))
            continue
        h = np.log(a / b)
        z = (1 + eta) * h
        e = np.array([-np.expm1(-z), 0.0, 0.0])
        phi2 = np.expm1(-z) / z + 1
        if i > 0:
            r0 = np.log(sigmas[i - 1] / a) / h
            d0 = np.array([1, -1, 0]) / r0
            slope1, slope2 = d0, 0.0
            if i > 1:
                r1 = np.log(sigmas[i - 2] / sigmas[i - 1]) / h
                slope2 = (d0 - np.array([0, 1, -1]) / r1) / (r0 + r1)
                slope1 = d0 + slope2 * r0
            e = e + phi2 * slope1 - (phi2 / z - 0.5) * slope2
        yield row(a, mix(x=np.exp(-z), noise=_sde_noise(b, h, eta, s_noise), e=e))


def _sde_noise(b, h, eta, s_noise):
    return s_noise * b * np.sqrt(-np.expm1(-2 * eta * h))


@table
def dpmpp_2s_ancestral(sigmas, eta=1.0, s_noise=1.0):
    """DPM-Solver++(2S), ancestral, r = 1/2; k-diffusion sample_dpmpp_2s_ancestral."""
    for a, b in _pairs(sigmas):
        down, up = _ancestral(a, b, eta)
        noise = s_noise * up
        if down == 0:
            yield row(a, mix(noise=noise, e=[1]))
            continue
        mid = np.sqrt(a * down)
        yield row(a, mix(x=mid / a, e=[1 - mid / a]), save=mix(x=1))
        yield row(mid, mix(y=down / a, noise=noise, e=[1 - down / a]))


@table
def dpmpp_sde(sigmas, eta=1.0, s_noise=1.0, r=0.5):
    """DPM-Solver++ for the SDE, two calls a step, r the place of the second; k-diffusion."""
    if not 0 < r < 1:
        raise ValueError(f'r={r}: expected a number between 0 and 1')
    for a, b in _pairs(sigmas):
        if b == 0:
            yield row(a, mix(e=[1]))
            continue
        mid, c = a ** (1 - r) * b**r, 1 / (2 * r)
        down, up = _ancestral(a, mid, eta)
        yield row(a, mix(x=down / a, noise=s_noise * up, e=[1 - down / a]), save=mix(x=1))
        down, up = _ancestral(a, b, eta)
        gain = 1 - down / a
        yield row(mid, mix(y=down / a, noise=s_noise * up, e=[gain * c, gain * (1 - c)]))


@table
def unipc(sigmas, order=2, variant='bh2'):
    """UniPC (https://arxiv.org/abs/2302.04867) on x0, 'bh1' or 'bh2', orders 1 to 3.

    Predictor and corrector share one call: y keeps the corrected point, from which the newest
    output first corrects this step and then predicts the next. Orders rise at the start and
    fall at the end, as in diffusers (lower_order_final) and ComfyUI; diffusers' defaults here.
    """
    _within('order', order, 1, 3)
    if variant not in ('bh1', 'bh2'):
        raise unknown('variant', variant, ('bh1', 'bh2'))
    steps, before = len(sigmas) - 1, 0
    for i, (a, b) in enumerate(_pairs(sigmas)):
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


def _within(option, value, low, high):
    if value not in range(low, high + 1):
        raise ValueError(f'{option}={value}: expected a whole number from {low} to {high}')


SAMPLERS = {f.__name__: f for f in (
    euler, euler_ancestral, heun, dpm_2, dpm_2_ancestral, lms, ddim, ddpm, dpmpp_2m, dpmpp_2m_sde,
    dpmpp_sde, dpmpp_2s_ancestral, dpmpp_3m_sde, unipc)}
