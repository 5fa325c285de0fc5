"""DPM-Solver with adaptive steps: every image has its own step size, and its own end.

A sampler with a step of its own, see `tables.Custom`: its rows are all alike, its options, and the
state of each image says where the model is called next.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .tables import Custom, Rule, within

END = 1e-5  # an image this near to its end in log sigma is there: k-diffusion


class State(NamedTuple):
    """What an image keeps beside x, its last point. A step makes `order` calls; `stage` counts."""

    low: jax.Array  # the less exact solution there
    e0: jax.Array  # the noise predicted in this step's first call
    e1: jax.Array  # and in its second
    s: jax.Array  # -log sigma of x
    h: jax.Array  # the size of this step
    inverse: jax.Array  # [2] 1 / error of the last steps accepted; 0 before the first try
    stage: jax.Array
    accepted: jax.Array  # steps taken
    rejected: jax.Array  # steps tried with too large an error


def dpm_adaptive(sigmas: np.ndarray, order: int = 3, rtol: float = 0.05, atol: float = 0.0078,
                 h_init: float = 0.05, pcoeff: float = 0.0, icoeff: float = 1.0,
                 dcoeff: float = 0.0, accept_safety: float = 0.81, eta: float = 0.0,
                 s_noise: float = 1.0, max_calls: int = 1000) -> Custom:
    """DPM-Solver-12 or -23 (https://arxiv.org/abs/2206.00927, app. C) -> Custom of max_calls rows.

    Of the sigmas only the first and the last above 0 count; there the steps end, without a step to
    0, or where max_calls are made. The options are k-diffusion's sample_dpm_adaptive's, whose error
    is taken over the batch. What is not finite ends an image, as not finite. Noise is drawn
    independently. Raises ValueError for options that no step size can meet.
    """
    within('order', order, 2, 3)
    within('max_calls', max_calls, 1, 10_000)
    _check(0, ' above 0', rtol=rtol, atol=atol, h_init=h_init, accept_safety=accept_safety)
    _check(-np.inf, '', pcoeff=pcoeff, icoeff=icoeff, dcoeff=dcoeff)
    positive = sigmas[sigmas > 0]
    if len(positive) < 2:
        raise ValueError(f'sigmas {sigmas}: dpm_adaptive goes from the first to the last above 0; '
                         'it needs two of them, so use more steps')
    start, end = -np.log(positive[[0, -1]])
    return Custom(RULE, {name: np.full(max_calls, value, np.float64) for name, value in dict(
        sigma=positive[0], noisy=eta > 0, start=start, end=end, order=order, rtol=rtol, atol=atol,
        h_init=h_init, pcoeff=pcoeff, icoeff=icoeff, dcoeff=dcoeff, accept_safety=accept_safety,
        eta=eta, s_noise=s_noise).items()})


def _check(low, limits, **options):
    for name, value in options.items():
        if not low < value < np.inf:
            raise ValueError(f'{name}={value}: expected a finite number{limits}')


def _init(x, row):
    zero, count = 0 * x, jnp.int32(0)
    return State(x, zero, zero, row.start, row.h_init, jnp.zeros(2, x.dtype), count, count, count)


def _target(state, row):
    """Where the step ends in -log sigma: as k-diffusion, (time, time without noise, noise)."""
    t = jnp.minimum(row.end, state.s + state.h)
    a, b = jnp.exp(-state.s), jnp.exp(-t)
    up = jnp.minimum(b, row.eta * b * jnp.sqrt(1 - (b / a) ** 2))
    down = jnp.minimum(row.end, -jnp.log(jnp.sqrt(b**2 - up**2)))
    down = jnp.where(row.eta > 0, down, t)
    return t, down, jnp.sqrt(jnp.maximum(b**2 - jnp.exp(-2 * down), 0))


def _first_node(row):
    return jnp.where(row.order == 2, 1 / 2, 1 / 3)


def _point(x, state, row):
    """Where the model is called next -> (x, sigma); sigma 0 at the end."""
    _, t, _ = _target(state, row)
    first = _first_node(row)
    r = jnp.select([state.stage == 0, state.stage == 1], [0.0, first], 2 / 3)
    h = r * (t - state.s)
    sigma = jnp.exp(-(state.s + h))
    x = x - sigma * jnp.expm1(h) * state.e0
    curve = sigma * r / first * (jnp.expm1(h) / h - 1)
    return (jnp.where(state.stage == 2, x - curve * (state.e1 - state.e0), x),
            jnp.where(state.s < row.end - END, sigma, 0))


def _step(x, state, row, denoised, noise, point, sigma):
    """Take in a model call; after the last of a step accept or reject the step."""
    new = (point - denoised) / sigma
    e0 = jnp.where(state.stage == 0, new, state.e0)
    e1 = jnp.where(state.stage == 1, new, state.e1)
    t, down, up = _target(state, row)
    h, sigma = down - state.s, jnp.exp(-down)
    euler = x - sigma * jnp.expm1(h) * e0
    second = euler - sigma * jnp.expm1(h) / (2 * _first_node(row)) * (e1 - e0)
    third = euler - sigma * (3 / 2) * (jnp.expm1(h) / h - 1) * (new - e0)
    low = jnp.where(row.order == 2, euler, second)
    high = jnp.where(row.order == 2, second, third)
    factor, inverse, past = _control(state, row, low, high)
    last = state.stage + 1 == row.order
    accept = last & ~(factor < row.accept_safety)  # so what is not a number ends the loop
    taken = jnp.where(accept, jnp.stack([inverse, past[0]]), past)
    return jnp.where(accept, high + up * row.s_noise * noise, x), State(
        low=jnp.where(accept, low, state.low), e0=e0, e1=e1,
        s=jnp.where(accept, t, state.s), h=jnp.where(last, state.h * factor, state.h),
        inverse=jnp.where(last, taken, state.inverse), stage=jnp.where(last, 0, state.stage + 1),
        accepted=state.accepted + accept, rejected=state.rejected + (last & ~accept))


def _control(state, row, low, high):
    """k-diffusion's PIDStepSizeController -> (factor of the step size, 1 / error, those before)."""
    allowed = jnp.maximum(row.atol, row.rtol * jnp.maximum(abs(low), abs(state.low)))
    error = jnp.sqrt(jnp.mean(jnp.square((high - low) / allowed)))
    inverse = 1 / (error + 1e-8)
    past = jnp.where(state.inverse == 0, inverse, state.inverse)
    p, i, d = row.pcoeff, row.icoeff, row.dcoeff
    powers = jnp.stack([p + i + d, -(p + 2 * d), d])
    powers = powers / jnp.where(row.eta > 0, 1.5, row.order)
    factor = jnp.prod(jnp.append(inverse, past) ** powers)
    return 1 + jnp.arctan(factor - 1), inverse, past


RULE = Rule('dpm_adaptive', _step, _init, _point)
