"""Multistep samplers: one call a step, and the outputs of steps before (Adams and relatives)."""

import numpy as np

from .choice import unknown
from .tables import HISTORY, mix, pairs, row, sde_noise, slope, table, within


@table
def lms(sigmas, order=4):
    """Linear multistep (Adams-Bashforth on uneven sigmas); k-diffusion sample_lms."""
    within('order', order, 1, HISTORY)
    nodes, weights = np.polynomial.legendre.leggauss(HISTORY)  # exact for these polynomials
    for i, (a, b) in enumerate(pairs(sigmas)):
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
    for a, b in pairs(sigmas):
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
    for a, b in pairs(sigmas):
        if b == 0:
            yield row(a, mix(e=[1]))
            continue
        h = np.log(a / b)
        gain = -np.expm1(-(1 + eta) * h)
        c = 0.0
        if last is not None:
            half = gain / 2 if solver_type == 'midpoint' else 1 - gain / ((1 + eta) * h)
            c = half * h / np.log(last / a)
        yield row(a, mix(x=(b / a) ** (1 + eta), noise=sde_noise(a, b, eta, s_noise),
                         e=[gain + c, -c]), path=(a, b))
        last = a


@table
def dpmpp_3m_sde(sigmas, eta=1.0, s_noise=1.0):
    """DPM-Solver++(3M) for the SDE; k-diffusion sample_dpmpp_3m_sde."""
    for i, (a, b) in enumerate(pairs(sigmas)):
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
        yield row(a, mix(x=np.exp(-z), noise=sde_noise(a, b, eta, s_noise), e=e), path=(a, b))


@table
def unipc(sigmas, order=2, variant='bh2'):
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


SAMPLERS = (lms, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, unipc)
