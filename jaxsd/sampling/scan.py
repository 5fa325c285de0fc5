"""Run any table of rows: one `lax.scan`, one model call in its body (Adaptive: a while loop)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .adaptive import Adaptive, solve
from .tables import HISTORY, NOISE, Row


class State(NamedTuple):
    """What a sampler remembers; float32, whatever the model computes in."""

    x: jax.Array  # [B,...]  the point at which the model is called next
    y: jax.Array  # [B,...]  a saved point
    e: tuple  # K x [B,...]  history, newest first


class Call(NamedTuple):
    """One row as `info` of `sample` sees it: what went in and what came out."""

    i: jax.Array  # []       index of the row
    row: Row
    x: jax.Array  # [B,...]  the point at which the model was called
    denoised: jax.Array  # [B,...]  x itself in a row without a model call
    uncond: jax.Array  # [B,...]  denoised without guidance
    noise: jax.Array  # [B,...]  zero where no image of the batch asks for any
    after: State

    @property
    def sigma(self):
        """The noise level of the call, [] or [B]."""
        return self.row.sigma

    @property
    def eps(self):
        """The predicted noise, (x - denoised) / sigma; 0 in a row without a model call."""
        sigma = spread(self.sigma, self.x.ndim)
        return (self.x - self.denoised) / jnp.where(sigma > 0, sigma, 1)


def init(x, rows):
    """The state before the first row, see `lift`."""
    x = lift(x)
    zero = jnp.zeros_like(x)
    return State(x, zero, (zero,) * (rows.mix.shape[-1] - 4))


def lift(x):
    """Low precision becomes float32, float64 stays."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def step(state, row, denoised, noise, uncond=None):
    """One row: push the model's output into the history, then mix. -> State."""
    e = (_weigh(row.push, (state.x, denoised)), *state.e[:-1])
    terms = (state.x, state.y, noise, *e, denoised if uncond is None else uncond)
    return State(_weigh(row.mix[..., 0, :], terms), _weigh(row.mix[..., 1, :], terms), e)


def sample(denoise, x, rows, noise, on_call=None, info=None, memory=None):
    """Walk x down the noise levels of a table -> x at the last one, float32.

    denoise(x, sigma, i) -> denoised, both [B,...], or (denoised, uncond) with the unguided output
    that CFG++ samplers use; sigma is [] for shared rows and [B] for rows per image, i the index of
    the row. Traced once, whatever the table holds.
    x: [B,...] at the table's first sigma (pure noise times that sigma, or x0 + sigma * noise).
    rows: from `plan`, shared by all images, or from `stack`, one table per image; or Adaptive.
    noise(i) -> array like x, standard normal; drawn only where a row asks for it.
    on_call(i): optional host function, called after the model call of row i (jax.debug.callback).
    info(Call): optional; whatever it returns is stacked on a leading axis of rows, and the result
    is (x, stacked). Of an Adaptive walk it is called once, at the end, with adaptive.Steps.
    memory: optional; a pytree that denoise takes as a fourth argument and returns, changed, beside
    its output: guidance with momentum.

    A row where no image has sigma > 0 costs no model call. An image that is finished before the
    others of its batch stays as it is, bit for bit. Gradients through the walk recompute each row
    (jax.checkpoint): memory grows with the rows by one state each, not by the model's activations.
    """
    x = lift(x)
    dtype = x.dtype

    def model(x, sigma, i, memory):
        # An idle image gets a sigma at which any denoiser is finite; its weights are 0.
        sigma = jnp.where(sigma > 0, sigma, 1)
        if memory is None:
            out = denoise(x, sigma, i)
        else:
            out, memory = denoise(x, sigma, i, memory)
        if on_call is not None:
            out, done = lax.optimization_barrier((out, i))  # not before the model is through
            jax.debug.callback(on_call, done)
        denoised, uncond = out if isinstance(out, tuple) else (out, out)
        return jnp.asarray(denoised, dtype), jnp.asarray(uncond, dtype), memory

    if isinstance(rows, Adaptive):
        x, steps = solve(model, x, rows, noise, memory)
        return x if info is None else (x, info(steps))
    state = init(x, rows)
    rows = Row(*(jnp.asarray(field, dtype) for field in rows))
    # Both are reduced over images here, once, so that a sharded batch does so outside the loop.
    images = tuple(range(1, rows.sigma.ndim))
    active = jnp.any(rows.sigma > 0, axis=images)
    noisy = jnp.any(rows.mix[..., NOISE] != 0, axis=(*images, -1))

    def body(carry, xs):
        state, memory = carry
        i, row, active, noisy = xs
        denoised, uncond, memory = lax.cond(
            active, lambda memory: model(state.x, row.sigma, i, memory),
            lambda memory: (state.x, state.x, memory), memory)
        fresh = lax.cond(noisy, lambda: jnp.asarray(noise(i), dtype),
                         lambda: jnp.zeros_like(state.x))
        after = step(state, row, denoised, fresh, uncond)
        if info is not None:
            return (after, memory), info(Call(i, row, state.x, denoised, uncond, fresh, after))
        return (after, memory), None

    xs = (jnp.arange(len(rows.sigma)), rows, active, noisy)
    (state, _), stacked = lax.scan(jax.checkpoint(body, prevent_cse=False), (state, memory), xs)
    return state.x if info is None else (state.x, stacked)


def log_probability(call):
    """Log density of a stochastic row's outcome given its start, in nats -> [B], for `info`.

    log N(x'; mean, w^2) with x' = mean + w noise, w the row's weight of fresh noise; 0 where a row
    adds none. x' counts as given (stop_gradient), so that the gradient is that of the policy in
    Black et al. 2023, https://arxiv.org/abs/2305.13301, eq. 5.
    """
    x = call.after.x
    w = jnp.broadcast_to(call.row.mix[..., 0, NOISE], x.shape[:1])
    safe = spread(jnp.where(w > 0, w, 1), x.ndim)
    z = (lax.stop_gradient(x) - (x - spread(w, x.ndim) * call.noise)) / safe
    axes = tuple(range(1, x.ndim))
    density = -0.5 * jnp.square(z).sum(axes) - np.prod(x.shape[1:]) * (
        jnp.log(safe.reshape(-1)) + 0.5 * np.log(2 * np.pi))
    return jnp.where(w > 0, density, 0)


def bucket(count):
    """The padded length that tables of `count` rows share: 64, or the next power of two."""
    return max(64, 1 << (int(count) - 1).bit_length())


def idle():
    """A table without rows: the walk is where it starts."""
    return Row(np.zeros(0), np.zeros((0, 2)), np.zeros((0, 2, HISTORY + 4)), np.zeros((0, 2)))


def pad(rows, length):
    """Append rows that do nothing, up to `length` rows. numpy in, numpy out."""
    extra = length - len(rows.sigma)
    if extra < 0:
        raise ValueError(f'{len(rows.sigma)} rows do not fit a length of {length}')
    tail = Row(*(np.zeros((extra, *field.shape[1:])) for field in rows))
    tail.mix[..., 0, 0] = tail.mix[..., 1, 1] = 1
    return Row(*(np.concatenate(both) for both in zip(rows, tail)))


def stack(tables, length=None):
    """One table per image -> Rows [length, B, ...], padded; length: `bucket` of the longest.

    Several Adaptive give an Adaptive [B]; with tables they do not mix: ValueError.
    """
    adaptive = [isinstance(rows, Adaptive) for rows in tables]
    if all(adaptive):
        return Adaptive(*map(np.stack, zip(*tables)))
    if any(adaptive):
        raise ValueError(f'{sum(adaptive)} of {len(tables)} images are dpm_adaptive, which has no '
                         'table: expected all or none; run them in batches of their own')
    length = length or bucket(max(len(rows.sigma) for rows in tables))
    return Row(*(np.stack(fields, axis=1) for fields in zip(*(pad(t, length) for t in tables))))


def spread(per_image, ndim):
    """[] or [B] -> [1 or B, 1, ...] of ndim axes, to scale [B,...]."""
    return jnp.reshape(per_image, (-1, *(1,) * (ndim - 1)))


def _weigh(weights, terms):
    """Sum of terms [B,...] with weights [n] or [B,n]. Elementwise: a matmul may round to TF32."""
    return sum(spread(weights[..., k], term.ndim) * term for k, term in enumerate(terms))
