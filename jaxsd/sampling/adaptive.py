"""DPM-Solver with adaptive steps: a while loop in which every image has its own step size.

No table can hold it, since its steps depend on the picture: `plan` gives an `Adaptive`, numbers
that are data like a table, and `scan.sample` runs `solve` on it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .tables import within

END = 1e-5  # an image this near to its end in log sigma is there: k-diffusion


class Adaptive(NamedTuple):
    """The options of one image, float64 numbers; arrays [B] when one for each (`stack`)."""

    start: np.ndarray  # -log sigma, where x begins
    end: np.ndarray  # -log sigma, where it ends
    order: np.ndarray  # 2 or 3, also the model calls of a step
    rtol: np.ndarray
    atol: np.ndarray
    h_init: np.ndarray  # the first step in log sigma
    pcoeff: np.ndarray  # the PID controller of the step size
    icoeff: np.ndarray
    dcoeff: np.ndarray
    accept_safety: np.ndarray  # a step is taken if its size would then change by this or more
    eta: np.ndarray
    s_noise: np.ndarray
    max_calls: np.ndarray  # an image stops there, wherever it is

    @property
    def path(self):
        """For `noise.fresh`: no step is known beforehand, so all noise is drawn independently."""
        return np.zeros((1, 2))


class Steps(NamedTuple):
    """What adaptive steps took, per image [B]: what `info` of `sample` is called with."""

    calls: jax.Array  # model calls
    accepted: jax.Array  # steps taken
    rejected: jax.Array  # steps tried with too large an error
    sigma: jax.Array  # the noise level reached: above the last one only if max_calls ran out


class State(NamedTuple):
    """One image in the loop, [B] of each. A step makes `order` calls; `stage` counts them."""

    x: jax.Array  # the last point accepted
    low: jax.Array  # the less exact solution there
    e0: jax.Array  # the noise predicted in this step's first call
    e1: jax.Array  # and in its second
    s: jax.Array  # -log sigma of x
    h: jax.Array  # the size of this step
    inverse: jax.Array  # [2] 1 / error of the last steps accepted; 0 before the first try
    stage: jax.Array
    calls: jax.Array
    accepted: jax.Array
    rejected: jax.Array
    denoised: jax.Array  # the last model output
    memory: Any = None  # of the batch: what guidance with momentum remembers


def dpm_adaptive(sigmas, order=3, rtol=0.05, atol=0.0078, h_init=0.05, pcoeff=0.0, icoeff=1.0,
                 dcoeff=0.0, accept_safety=0.81, eta=0.0, s_noise=1.0, max_calls=1000):
    """DPM-Solver-12 or -23 (https://arxiv.org/abs/2206.00927, app. C) -> Adaptive.

    Of the sigmas only the first and the last above 0 count; there the steps end, without a step to
    0. The options are k-diffusion's sample_dpm_adaptive's, whose error is taken over the batch.
    Raises ValueError for options that no step size can meet.
    """
    within('order', order, 2, 3)
    within('max_calls', max_calls, 1, 10**9)
    for name, value in (('rtol', rtol), ('atol', atol), ('h_init', h_init),
                        ('accept_safety', accept_safety)):
        if not 0 < value < np.inf:
            raise ValueError(f'{name}={value}: expected a finite number above 0')
    for name, value in (('pcoeff', pcoeff), ('icoeff', icoeff), ('dcoeff', dcoeff)):
        if not np.isfinite(value):
            raise ValueError(f'{name}={value}: expected a finite number')
    positive = sigmas[sigmas > 0]
    if len(positive) < 2:
        raise ValueError(f'sigmas {sigmas}: dpm_adaptive goes from the first to the last above 0; '
                         'it needs two of them, so use more steps')
    return Adaptive(*np.array([*-np.log(positive[[0, -1]]), order, rtol, atol, h_init, pcoeff,
                               icoeff, dcoeff, accept_safety, eta, s_noise, max_calls]))


def init(x, options, memory=None):
    """The state before the first call -> State. x [B,...]; its dtype is used throughout. options:
    Adaptive, shared or per image."""
    options = _each(options, x)
    zero = jnp.zeros(x.shape[:1], x.dtype)
    count = jnp.zeros(x.shape[:1], jnp.int32)
    return State(x, x, 0 * x, 0 * x, options.start, options.h_init,
                 jnp.stack([zero, zero], axis=-1), count, count, count, count, 0 * x, memory)


def advance(model, state, options, noise, along=None, calls=None):
    """Run until every image is at its end, or for so many `calls` -> State.

    model(x, sigma, i, memory) -> (denoised, _, memory), sigma [B]. noise(i): as for `sample`; drawn
    in every call if any image has eta above 0, used where a step is accepted. i: the number of the
    call, or along(numbers [B] of the images' calls).
    An image that is done stays as it is. What is not finite ends an image, as not finite.
    There is one call in the loop's body, and images may be at different stages of their steps. No
    gradient in reverse mode: the number of calls is not known.
    """
    options = _each(options, state.x)
    noisy = jnp.any(options.eta > 0)

    def going(carry):
        state, i = carry
        some = jnp.any(active(state, options))
        return some if calls is None else some & (i < calls)

    def body(carry):
        state, i = carry
        point, sigma = jax.vmap(_point)(state._replace(memory=None), options)
        live = active(state, options)
        step = i if along is None else along(state.calls)
        denoised, _, memory = model(point, jnp.where(live, sigma, 0), step, state.memory)
        fresh = lax.cond(noisy, lambda: jnp.asarray(noise(step), state.x.dtype),
                         lambda: jnp.zeros_like(state.x))
        before = state._replace(memory=None)
        after = jax.vmap(_take)(before, options, point, sigma, denoised, fresh)
        kept = jax.vmap(lambda live, new, old: jax.tree.map(
            lambda new, old: jnp.where(live, new, old), new, old))(live, after, before)
        return kept._replace(memory=memory), i + 1

    return lax.while_loop(going, body, (state, jnp.int32(0)))[0]


def steps(state):
    """State -> Steps."""
    return Steps(state.calls, state.accepted, state.rejected, jnp.exp(-state.s))


def _each(options, x):
    return Adaptive(*(jnp.broadcast_to(jnp.asarray(field, x.dtype), x.shape[:1])
                      for field in options))


def active(state, options):
    """Which images are not at their end, bool [B]."""
    return (state.s < options.end - END) & (state.calls < options.max_calls)


def _target(state, options):
    """Where the step ends in -log sigma: as k-diffusion, (time, time without noise, noise)."""
    t = jnp.minimum(options.end, state.s + state.h)
    a, b = jnp.exp(-state.s), jnp.exp(-t)
    up = jnp.minimum(b, options.eta * b * jnp.sqrt(1 - (b / a) ** 2))
    down = jnp.minimum(options.end, -jnp.log(jnp.sqrt(b**2 - up**2)))
    down = jnp.where(options.eta > 0, down, t)
    return t, down, jnp.sqrt(jnp.maximum(b**2 - jnp.exp(-2 * down), 0))


def _first_node(options):
    return jnp.where(options.order == 2, 1 / 2, 1 / 3)


def _point(state, options):
    """Where the model is called next, of one image -> (x, sigma)."""
    _, t, _ = _target(state, options)
    first = _first_node(options)
    r = jnp.select([state.stage == 0, state.stage == 1], [0.0, first], 2 / 3)
    h = r * (t - state.s)
    sigma = jnp.exp(-(state.s + h))
    x = state.x - sigma * jnp.expm1(h) * state.e0
    curve = sigma * r / first * (jnp.expm1(h) / h - 1)
    return jnp.where(state.stage == 2, x - curve * (state.e1 - state.e0), x), sigma


def _take(state, options, point, sigma, denoised, fresh):
    """Take in a model call of one image; after the last of a step accept or reject the step."""
    new = (point - denoised) / sigma
    e0 = jnp.where(state.stage == 0, new, state.e0)
    e1 = jnp.where(state.stage == 1, new, state.e1)
    t, down, up = _target(state, options)
    h, sigma = down - state.s, jnp.exp(-down)
    euler = state.x - sigma * jnp.expm1(h) * e0
    second = euler - sigma * jnp.expm1(h) / (2 * _first_node(options)) * (e1 - e0)
    third = euler - sigma * (3 / 2) * (jnp.expm1(h) / h - 1) * (new - e0)
    low = jnp.where(options.order == 2, euler, second)
    high = jnp.where(options.order == 2, second, third)
    factor, inverse, past = _control(state, options, low, high)
    last = state.stage + 1 == options.order
    accept = last & ~(factor < options.accept_safety)  # so what is not a number ends the loop
    taken = jnp.where(accept, jnp.stack([inverse, past[0]]), past)
    return State(
        x=jnp.where(accept, high + up * options.s_noise * fresh, state.x),
        low=jnp.where(accept, low, state.low), e0=e0, e1=e1,
        s=jnp.where(accept, t, state.s), h=jnp.where(last, state.h * factor, state.h),
        inverse=jnp.where(last, taken, state.inverse), stage=jnp.where(last, 0, state.stage + 1),
        calls=state.calls + 1, accepted=state.accepted + accept,
        rejected=state.rejected + (last & ~accept), denoised=denoised)


def _control(state, options, low, high):
    """k-diffusion's PIDStepSizeController -> (factor of the step size, 1 / error, those before)."""
    allowed = jnp.maximum(options.atol, options.rtol * jnp.maximum(abs(low), abs(state.low)))
    error = jnp.sqrt(jnp.mean(jnp.square((high - low) / allowed)))
    inverse = 1 / (error + 1e-8)
    past = jnp.where(state.inverse == 0, inverse, state.inverse)
    p, i, d = options.pcoeff, options.icoeff, options.dcoeff
    powers = jnp.stack([p + i + d, -(p + 2 * d), d])
    powers = powers / jnp.where(options.eta > 0, 1.5, options.order)
    factor = jnp.prod(jnp.append(inverse, past) ** powers)
    return 1 + jnp.arctan(factor - 1), inverse, past
