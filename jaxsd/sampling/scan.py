"""Run any table of rows: one `lax.scan`, one model call in its body."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .plans import Row

NOISE = 2  # the column of Row.mix that weighs fresh noise


class State(NamedTuple):
    """What a sampler remembers; float32, whatever the model computes in."""

    x: jax.Array  # [B,...]  the point at which the model is called next
    y: jax.Array  # [B,...]  a saved point
    e: tuple  # K x [B,...]  history, newest first


def init(x, rows):
    """The state before the first row. Low precision is lifted to float32, float64 stays."""
    x = jnp.asarray(x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    zero = jnp.zeros_like(x)
    return State(x, zero, (zero,) * (rows.mix.shape[-1] - 3))


def step(state, row, denoised, noise):
    """One row: push the model's output into the history, then mix. -> State."""
    e0 = _weigh(row.push, (state.x, denoised))
    e = (e0, *state.e[:-1])
    terms = (state.x, state.y, noise, *e)
    return State(_weigh(row.mix[..., 0, :], terms), _weigh(row.mix[..., 1, :], terms), e)


def sample(denoise, x, rows, noise, on_call=None):
    """Walk x down the noise levels of a table -> x at the last one, float32.

    denoise(x, sigma, i) -> denoised, both [B,...]; sigma is [] for shared rows and [B] for rows
    per image, i the index of the row. Traced once, whatever the table holds.
    x: [B,...] at the table's first sigma (pure noise times that sigma, or x0 + sigma * noise).
    rows: from `plan`, shared by all images, or from `stack`, one table per image.
    noise(i) -> array like x, standard normal; drawn only where a row asks for it.
    on_call(i): optional host function, called after the model call of row i (jax.debug.callback).

    A row where no image has sigma > 0 costs no model call. An image that is finished before the
    others of its batch stays as it is, bit for bit.
    """
    state = init(x, rows)
    dtype = state.x.dtype
    rows = Row(*(jnp.asarray(field, dtype) for field in rows))
    # Both are reduced over images here, once, so that a sharded batch does so outside the loop.
    images = tuple(range(1, rows.sigma.ndim))
    active = jnp.any(rows.sigma > 0, axis=images)
    noisy = jnp.any(rows.mix[..., NOISE] != 0, axis=(*images, -1))

    def body(state, xs):
        i, row, active, noisy = xs

        def model():
            # An idle image gets a sigma at which any denoiser is finite; its weights are 0.
            out = denoise(state.x, jnp.where(row.sigma > 0, row.sigma, 1), i)
            if on_call is not None:
                out, done = lax.optimization_barrier((out, i))  # not before the model is through
                jax.debug.callback(on_call, done)
            return jnp.asarray(out, dtype)

        denoised = lax.cond(active, model, lambda: state.x)
        fresh = lax.cond(noisy, lambda: jnp.asarray(noise(i), dtype),
                         lambda: jnp.zeros_like(state.x))
        return step(state, row, denoised, fresh), None

    state, _ = lax.scan(body, state, (jnp.arange(len(rows.sigma)), rows, active, noisy))
    return state.x


def bucket(count):
    """The padded length that tables of `count` rows share: 64, or the next power of two."""
    return max(64, 1 << (int(count) - 1).bit_length())


def pad(rows, length):
    """Append rows that do nothing, up to `length` rows. numpy in, numpy out."""
    extra = length - len(rows.sigma)
    if extra < 0:
        raise ValueError(f'{len(rows.sigma)} rows do not fit a length of {length}')
    idle = np.zeros((extra, *rows.mix.shape[1:]))
    idle[..., 0, 0] = idle[..., 1, 1] = 1
    tails = Row(np.zeros((extra, *rows.sigma.shape[1:])),
                np.zeros((extra, *rows.push.shape[1:])), idle)
    return Row(*(np.concatenate(pair) for pair in zip(rows, tails)))


def stack(tables, length=None):
    """One table per image -> Rows [length, B, ...], padded; length: `bucket` of the longest."""
    length = length or bucket(max(len(rows.sigma) for rows in tables))
    return Row(*(np.stack(fields, axis=1) for fields in zip(*(pad(t, length) for t in tables))))


def _weigh(weights, terms):
    """Sum of terms [B,...] with weights [n] or [B,n]. Elementwise: a matmul may round to TF32."""
    shape = weights.shape[:-1] + (1,) * (terms[0].ndim - (weights.ndim - 1))
    return sum(weights[..., k].reshape(shape) * term for k, term in enumerate(terms))


