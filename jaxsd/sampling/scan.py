"""Run any table of rows: one `lax.scan`, one model call in its body (Adaptive: a while loop)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import adaptive
from .adaptive import Adaptive
from .tables import HISTORY, NOISE, Row


class State(NamedTuple):
    """What a sampler remembers; float32, whatever the model computes in."""

    x: jax.Array  # [B,...]  the point at which the model is called next
    y: jax.Array  # [B,...]  a saved point
    e: tuple  # K x [B,...]  history, newest first
    denoised: jax.Array  # [B,...]  the last model output
    memory: Any = None  # what guidance with momentum remembers


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


def init(x, rows, memory=None):
    """The state before the first row: a State, see `lift`, or adaptive.State. x [B,...]; memory: as
    of `sample`."""
    x = lift(x)
    if isinstance(rows, Adaptive):
        return adaptive.init(x, rows, memory)
    zero = jnp.zeros_like(x)
    return State(x, zero, (zero,) * (rows.mix.shape[-1] - 4), zero, memory)


def lift(x):
    """Low precision becomes float32, float64 stays."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def step(state, row, denoised, noise, uncond=None):
    """One row: push the model's output into the history, then mix. -> State."""
    e = (_weigh(row.push, (state.x, denoised)), *state.e[:-1])
    terms = (state.x, state.y, noise, *e, denoised if uncond is None else uncond)
    return state._replace(x=_weigh(row.mix[..., 0, :], terms), y=_weigh(row.mix[..., 1, :], terms),
                          e=e)


def sample(denoise, x, rows, noise, info=None, memory=None, along=None):
    """Walk x down the noise levels of a table -> x at the last one, float32.

    denoise(x, sigma, i) -> denoised, both [B,...], or (denoised, uncond) with the unguided output
    that CFG++ samplers use; sigma is [] for shared rows and [B] for rows per image, i the index of
    the row. Traced once, whatever the table holds.
    x: [B,...] at the table's first sigma (pure noise times that sigma, or x0 + sigma * noise).
    rows: from `plan`, shared by all images, or from `stack`, one table per image; or Adaptive.
    noise(i) -> array like x, standard normal; drawn only where a row asks for it.
    info(Call): optional; whatever it returns is stacked on a leading axis of rows, and the result
    is (x, stacked). Of Adaptive steps it is called once, at the end, with adaptive.Steps.
    memory: optional; a pytree that denoise takes as a fourth argument and returns, changed, beside
    its output: guidance with momentum.
    along: see `advance`.

    A row where no image has sigma > 0 costs no model call. An image that is finished before the
    others of its batch stays as it is, bit for bit. Gradients through the loop recompute each row
    (jax.checkpoint): memory grows with the rows by one state each, not by the model's activations.
    """
    state, stacked = advance(denoise, init(x, rows, memory), rows, noise, info, along)
    return state.x if info is None else (state.x, stacked)


def advance(denoise, state, rows, noise, info=None, along=None, count=None):
    """Go on from a state of `init` over the next rows -> (State, what info gave or None).

    denoise, noise, info: as of `sample`. along: what denoise and noise are given in place of the
    row's index: a pytree with a leading axis of rows; of Adaptive a function of the numbers [B] of
    the images' calls. count: so many rows, or calls of Adaptive, and no more (without info, and
    without gradients); None: all.
    """
    dtype = state.x.dtype

    def model(x, sigma, i, memory):
        # An idle image gets a sigma at which any denoiser is finite; its weights are 0.
        sigma = jnp.where(sigma > 0, sigma, 1)
        if memory is None:
            out = denoise(x, sigma, i)
        else:
            out, memory = denoise(x, sigma, i, memory)
        denoised, uncond = out if isinstance(out, tuple) else (out, out)
        return jnp.asarray(denoised, dtype), jnp.asarray(uncond, dtype), memory

    if isinstance(rows, Adaptive):
        state = adaptive.advance(model, state, rows, noise, along, count)
        return state, None if info is None else info(adaptive.steps(state))
    rows = Row(*(jnp.asarray(field, dtype) for field in rows))
    along = jnp.arange(len(rows.sigma)) if along is None else along
    # Both are reduced over images here, once, so that a sharded batch does so outside the loop.
    images = tuple(range(1, rows.sigma.ndim))
    active = jnp.any(rows.sigma > 0, axis=images)
    noisy = jnp.any(rows.mix[..., NOISE] != 0, axis=(*images, -1))

    def body(state, xs):
        i, row, along, active, noisy = xs
        denoised, uncond, memory = lax.cond(
            active, lambda memory: model(state.x, row.sigma, along, memory),
            lambda memory: (state.x, state.x, memory), state.memory)
        fresh = lax.cond(noisy, lambda: jnp.asarray(noise(along), dtype),
                         lambda: jnp.zeros_like(state.x))
        called = spread(row.sigma > 0, state.x.ndim)
        after = step(state, row, denoised, fresh, uncond)._replace(
            denoised=jnp.where(called, denoised, state.denoised), memory=memory)
        return after, None if info is None else info(
            Call(i, row, state.x, denoised, uncond, fresh, after))

    xs = (jnp.arange(len(rows.sigma)), rows, along, active, noisy)
    if count is not None:
        return lax.fori_loop(0, count, lambda i, state: body(
            state, jax.tree.map(lambda a: a[i], xs))[0], state), None
    return lax.scan(jax.checkpoint(body, prevent_cse=False), state, xs)


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
    """A table of one row that does nothing: the loop ends where it starts."""
    return pad(Row(np.zeros(0), np.zeros((0, 2)), np.zeros((0, 2, HISTORY + 4)), np.zeros((0, 2))),
               1)


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
    if length is None:
        length = bucket(max(len(rows.sigma) for rows in tables))
    return Row(*(np.stack(fields, axis=1) for fields in zip(*(pad(t, length) for t in tables))))


def spread(per_image, ndim):
    """[] or [B] -> [1 or B, 1, ...] of ndim axes, to scale [B,...]."""
    return jnp.reshape(per_image, (-1, *(1,) * (ndim - 1)))


def _weigh(weights, terms):
    """Sum of terms [B,...] with weights [n] or [B,n]. Elementwise: a matmul may round to TF32."""
    return sum(spread(weights[..., k], term.ndim) * term for k, term in enumerate(terms))
