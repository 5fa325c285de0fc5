"""Run any table of rows: one `lax.scan`, one model call in its body."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from .tables import HISTORY, NOISE, Custom, Row, Rule, Table

Denoise = Callable[..., Any]  # denoise(x, sigma, i), see `sample`
Noise = Callable[[Any], jax.Array]


class State(NamedTuple):
    """What a sampler remembers; float32, whatever the model computes in."""

    x: jax.Array  # [B,...]  the point at which the model is called next
    y: Any  # [B,...]  a saved point; with Custom rows a pytree, what their step keeps
    e: tuple  # K x [B,...]  history, newest first; with Custom rows none
    denoised: jax.Array  # [B,...]  the last model output
    memory: Any = None  # what guidance with momentum remembers


class Call(NamedTuple):
    """One row as `info` of `sample` sees it: what went in and what came out."""

    i: jax.Array  # []       index of the row
    row: Row
    sigma: jax.Array  # [] or [B]  the noise level of the call, 0: none
    x: jax.Array  # [B,...]  the point at which the model was called
    denoised: jax.Array  # [B,...]  x itself in a row without a model call
    uncond: jax.Array  # [B,...]  denoised without guidance
    noise: jax.Array  # [B,...]  zero where no image of the batch asks for any
    after: State

    @property
    def eps(self) -> jax.Array:
        """The predicted noise, (x - denoised) / sigma; 0 in a row without a model call."""
        sigma = spread(self.sigma, self.x.ndim)
        return (self.x - self.denoised) / jnp.where(sigma > 0, sigma, 1)


def init(x: ArrayLike, rows: Table, memory: Any = None) -> State:
    """The state before the first of the rows, see `lift`. x [B,...]; memory: as of `sample`."""
    x = lift(x)
    zero = jnp.zeros_like(x)
    if isinstance(rows, Custom):
        first = jax.tree.map(lambda a: jnp.asarray(a[0], x.dtype), rows)
        kept = () if rows.rule.init is None else _each(rows.rule.init, first, x=x)
        return State(x, jax.tree.map(lambda a: jnp.array(a, a.dtype), kept), (), zero, memory)
    return State(x, zero, (zero,) * (rows.mix.shape[-1] - 4), zero, memory)


def lift(x: ArrayLike) -> jax.Array:
    """Low precision becomes float32, float64 stays."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _each(function, row, **given):
    """A function of one picture -> what it gives for all, from `given` [B,...] and a Custom row."""
    fields = {**row.fields, 'sigma': jnp.where(row.sigma > 0, row.sigma, 1)}
    shared = row.sigma.ndim == 0
    return jax.vmap(lambda fields, given: Rule.call(function, fields, **given),
                    (None if shared else 0, 0))(fields, given)


def _pair(row, what, found, x):
    """What a step or a point gave, checked: x and something else."""
    if not isinstance(found, tuple) or len(found) != 2 or jnp.shape(found[0]) != x.shape:
        raise ValueError(f'sampler {row.rule.name!r}: expected its {what} to give a pair, first '
                         f'an array like x, {_shapes(x)}; found {_shapes(found)}')
    return found


def _shapes(tree):
    """The shapes of one picture's arrays, as an error tells them."""
    return jax.tree.map(lambda a: jnp.shape(a)[1:], tree)


def point(state: State, row: Table) -> tuple[jax.Array, jax.Array]:
    """Where a row calls its model -> x [B,...] and sigma [] or [B], 0: nowhere."""
    if not isinstance(row, Custom) or not row.free:
        return state.x, row.sigma
    x, sigma = _pair(row, 'point', _each(row.rule.point, row, x=state.x, state=state.y), state.x)
    sigma = jnp.where(row.sigma > 0, sigma, 0)
    return jnp.where(spread(sigma > 0, x.ndim), x, state.x), sigma


def step(state: State, row: Table, denoised: jax.Array, noise: jax.Array,
         uncond: jax.Array | None = None) -> State:
    """One row: push the model's output into the history, then mix. -> State."""
    uncond = denoised if uncond is None else uncond
    if isinstance(row, Custom):
        at, sigma = point(state, row)
        sigma = jnp.broadcast_to(sigma, len(at))
        # What a step makes of an idle row is not used, but its gradient must be finite, which that
        # at a prediction of zero often is not.
        denoised = jnp.where(spread(sigma > 0, at.ndim), denoised, at + 1)
        x, y = _pair(row, 'step', _each(
            row.rule.step, row, x=state.x, state=state.y, denoised=denoised, noise=noise,
            uncond=uncond, point=at, sigma=jnp.where(sigma > 0, sigma, 1)), state.x)
        shapes = [jax.tree.flatten(jax.tree.map(jnp.shape, tree)) for tree in (y, state.y)]
        if shapes[0] != shapes[1]:
            raise ValueError(f'sampler {row.rule.name!r}: expected its step to give a state like '
                             f'the one that it took, {_shapes(state.y)}; found {_shapes(y)}')
        return jax.tree.map(
            lambda new, old: jnp.where(spread(sigma > 0, old.ndim), new, old).astype(old.dtype),
            state._replace(x=x, y=y), state)
    e = (_weigh(row.push, (state.x, denoised)), *state.e[:-1])
    terms = (state.x, state.y, noise, *e, uncond)
    return state._replace(x=_weigh(row.mix[..., 0, :], terms), y=_weigh(row.mix[..., 1, :], terms),
                          e=e)


def sample(denoise: Denoise, x: ArrayLike, rows: Table, noise: Noise,
           info: Callable[[Any], Any] | None = None, memory: Any = None, along: Any = None) -> Any:
    """Walk x down the noise levels of a table -> x at the last one, float32.

    denoise(x, sigma, i) -> denoised, both [B,...], or (denoised, uncond) with the unguided output
    that CFG++ samplers use; sigma is [] for shared rows and [B] for rows per image, i the index of
    the row. Traced once, whatever the table holds.
    x: [B,...] at the table's first sigma (pure noise times that sigma, or x0 + sigma * noise).
    rows: from `plan`, shared by all images, or from `stack`, one table per image.
    noise(i) -> array like x, standard normal; drawn only where a row asks for it.
    info(Call): optional; whatever it returns is stacked on a leading axis of rows, and the result
    is (x, stacked).
    memory: optional; a pytree that denoise takes as a fourth argument and returns, changed, beside
    its output: guidance with momentum.
    along: see `advance`.

    A row where no image has sigma > 0 costs no model call. An image that is finished before the
    others of its batch stays as it is, bit for bit. Gradients through the loop recompute each row
    (jax.checkpoint): memory grows with the rows by one state each, not by the model's activations.
    """
    state, stacked = advance(denoise, init(x, rows, memory), rows, noise, info, along)
    return state.x if info is None else (state.x, stacked)


def advance(denoise: Denoise, state: Any, rows: Table, noise: Noise,
            info: Callable[[Any], Any] | None = None, along: Any = None,
            count: int | jax.Array | None = None) -> tuple[Any, Any]:
    """Go on from a state of `init` over the next rows -> (State, what info gave or None).

    denoise, noise, info: as of `sample`. along: what denoise and noise are given in place of the
    row's index: a pytree with a leading axis of rows. count: so many rows and no more (without
    info, and without gradients); None: all.
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

    rows = jax.tree.map(lambda field: jnp.asarray(field, dtype), rows)
    along = jnp.arange(len(rows.sigma)) if along is None else along
    # Both are reduced over images here, once, so that a sharded batch does so outside the loop.
    images = tuple(range(1, rows.sigma.ndim))
    active = jnp.any(rows.sigma > 0, axis=images)
    noisy = jnp.any(rows.noisy, axis=images)

    def body(state, xs):
        i, row, along, active, noisy = xs
        x, sigma = point(state, row)
        if free(rows):
            active = jnp.any(sigma > 0)
            noisy &= active
        denoised, uncond, memory = lax.cond(
            active, lambda memory: model(x, sigma, along, memory),
            lambda memory: (x, x, memory), state.memory)
        fresh = lax.cond(noisy, lambda: jnp.asarray(noise(along), dtype),
                         lambda: jnp.zeros_like(x))
        called = spread(sigma > 0, x.ndim)
        after = step(state._replace(memory=None), row, denoised, fresh, uncond)._replace(
            denoised=jnp.where(called, denoised, state.denoised), memory=memory)
        return after, None if info is None else info(
            Call(i, row, sigma, x, denoised, uncond, fresh, after))

    xs = (jnp.arange(len(rows.sigma)), rows, along, active, noisy)
    if count is not None:
        return lax.fori_loop(0, count, lambda i, state: body(
            state, jax.tree.map(lambda a: a[i], xs))[0], state), None
    return lax.scan(jax.checkpoint(body, prevent_cse=False), state, xs)


def log_probability(call: Call) -> jax.Array:
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


def bucket(count: int) -> int:
    """The padded length that tables of `count` rows share: 64, or the next power of two."""
    return max(64, 1 << (int(count) - 1).bit_length())


def idle() -> Table:
    """A table of one row that does nothing: the loop ends where it starts."""
    return pad(Row(np.zeros(0), np.zeros((0, 2)), np.zeros((0, 2, HISTORY + 4)), np.zeros((0, 2))),
               1)


def pad(rows: Table, length: int) -> Table:
    """Append rows that do nothing, up to `length` rows. numpy in, numpy out."""
    extra = length - len(rows.sigma)
    if extra < 0:
        raise ValueError(f'{len(rows.sigma)} rows do not fit a length of {length}')
    return jax.tree.map(lambda *both: np.concatenate(both), rows, rows.idle(extra))


def stack(tables: Sequence[Table], length: int | None = None) -> Table:
    """One table per image -> Rows [length, B, ...], padded; length: `bucket` of the longest.

    Custom rows do not mix with those of others: ValueError.
    """
    own = [rows.rule for rows in tables if isinstance(rows, Custom)]
    if own and (len({*map(jax.tree.structure, tables)}) > 1):
        raise ValueError(f'{own.count(own[0])} of {len(tables)} images are {own[0].name}, which '
                         'has a step of its own: expected all or none; run them in batches of '
                         'their own')
    if length is None:
        length = bucket(max(len(rows.sigma) for rows in tables))
    return jax.tree.map(lambda *fields: np.stack(fields, axis=1),
                        *(pad(table, length) for table in tables))


def free(rows: Table) -> bool:
    """Whether the pictures decide where the model is called, and how often: no steps are known."""
    return isinstance(rows, Custom) and rows.free


def going(state: State, rows: Table) -> jax.Array:
    """Which images are not at their end, where that is theirs to say (`free`), bool [B]; rows: the
    next ones, of which the first counts."""
    return point(state, jax.tree.map(lambda a: a[0], rows))[1] > 0


def spread(per_image: ArrayLike, ndim: int) -> jax.Array:
    """[] or [B] -> [1 or B, 1, ...] of ndim axes, to scale [B,...]."""
    return jnp.reshape(per_image, (-1, *(1,) * (ndim - 1)))


def _weigh(weights, terms):
    """Sum of terms [B,...] with weights [n] or [B,n]. Elementwise: a matmul may round to TF32."""
    return sum(spread(weights[..., k], term.ndim) * term for k, term in enumerate(terms))
