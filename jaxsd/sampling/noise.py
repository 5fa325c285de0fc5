"""Random numbers: a key per image, so that an image never depends on its batch.

Threefry only: its bits are the same on every device and for every sharding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from .tables import Table

INITIAL = np.uint32(2**32 - 1)  # the call number of the initial noise; real calls count from 0


def keys(seeds: Sequence[int] | np.ndarray) -> Array:
    """Seeds, whole numbers from 0 to 2^64 - 1 -> typed threefry keys [B].

    A seed below 2^32 gives `jax.random.key(seed)`; larger ones need no 64-bit mode.
    Raises ValueError for a seed out of range.
    """
    seeds = [_seed(seed) for seed in np.atleast_1d(np.asarray(seeds, dtype=object))]
    data = np.array([(seed >> 32, seed & 0xFFFFFFFF) for seed in seeds], np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(data.reshape(-1, 2)), impl='threefry2x32')


def _seed(seed):
    try:
        value = int(seed)
        if value == seed and 0 <= value < 2**64:
            return value
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f'seed {seed!r}: expected a whole number from 0 to 2^64 - 1 '
                     f'({2**64 - 1})')


def draw(keys: Array, call: ArrayLike, shape: tuple[int, ...]) -> Array:
    """Standard normal noise of one call -> float32 [B, *shape].

    keys: [B]. call: [] or, where images differ, [B]. shape: of one image.
    """
    calls = jnp.broadcast_to(jnp.asarray(call, jnp.uint32), keys.shape)
    return jax.vmap(
        lambda key, call: jax.random.normal(jax.random.fold_in(key, call), shape, jnp.float32)
    )(keys, calls)


def initial(keys: Array, shape: tuple[int, ...]) -> Array:
    """The noise that an image starts from, standard normal -> float32 [B, *shape]."""
    return draw(keys, INITIAL, shape)


# The Brownian path of an image runs over log sigma from -SPAN to SPAN, in 2^DEPTH equal pieces;
# 7e-5 each, so that even 10,000 steps find different ends. Noise levels beyond are clamped.
SPAN, DEPTH = 10.0, 18


def fresh(keys: Array, rows: Table, shape: tuple[int, ...]) -> Callable[[Any], Array]:
    """The noise of the denoise loop: `noise(i)` for `sample`, standard normal, float32
    [B, *shape]; see `of_row`. keys: [B]. rows: the table, shared or per image."""
    path = jnp.asarray(rows.path, jnp.float32)
    return lambda i: of_row(keys, i, path[i], shape)


def of_row(keys: Array, call: ArrayLike, path: ArrayLike, shape: tuple[int, ...]) -> Array:
    """The noise of a row, standard normal -> float32 [B, *shape].

    keys: [B]. call: the row's number, [] or [B]. path: Row.path, [2] or [B,2]. Where it names two
    levels, the noise is the increment of the image's Brownian path in log sigma between them, so
    that a seed gives one path whatever the steps, and the picture converges as they grow. Elsewhere
    it is drawn by `draw` from the key and the call.
    """
    path = jnp.broadcast_to(path, (*keys.shape, 2))
    leaf = jnp.clip((jnp.log(path) / SPAN + 1) / 2, 0, 1) * 2**DEPTH
    leaf = jnp.round(leaf).astype(jnp.int32)
    apart = leaf[:, 0] != leaf[:, 1]
    alone = draw(keys, call, shape)

    def increment():
        start, end = (jax.vmap(_brownian, (0, 0, None))(keys, leaf[:, k], shape) for k in (0, 1))
        gap = jnp.abs(leaf[:, 1] - leaf[:, 0]).reshape(-1, *(1,) * len(shape))
        there = apart.reshape(gap.shape)
        return jnp.where(there, (end - start) * lax.rsqrt(jnp.maximum(gap, 1) * 1.0), alone)

    return lax.cond(apart.any(), increment, lambda: alone)


def _brownian(key, leaf, shape):
    """The path of one image at a leaf, 0 .. 2^DEPTH, in units where a leaf has variance 1.

    Levy's construction: halve the interval around the leaf DEPTH times; each midpoint is the mean
    of its ends plus noise that the midpoint's place in the tree determines.
    """
    def normal(node):  # nodes count down from INITIAL, far from the numbers of calls
        return jax.random.normal(jax.random.fold_in(key, INITIAL - node), shape, jnp.float32)

    def halve(k, carry):
        low, high, node = carry  # values at the ends, and the place of the midpoint
        middle = (low + high) / 2 + jnp.exp2((DEPTH - k) / 2 - 1) * normal(node)
        right = (leaf >> (DEPTH - 1 - k)) & 1 == 1
        return (jnp.where(right, middle, low), jnp.where(right, high, middle),
                2 * node + right.astype(jnp.uint32))

    zero = jnp.zeros(shape, jnp.float32)
    whole = 2 ** (DEPTH / 2) * normal(jnp.uint32(2**DEPTH))
    low, high, _ = lax.fori_loop(0, DEPTH, halve, (zero, whole, jnp.uint32(1)))
    return jnp.where(leaf == 2**DEPTH, whole, low)
