"""Random numbers: a key per image, so that an image never depends on its batch.

Threefry only: its bits are the same on every device and for every sharding.
"""

import jax
import jax.numpy as jnp
import numpy as np

INITIAL = np.uint32(2**32 - 1)  # the call number of the initial noise; real calls count from 0


def keys(seeds):
    """Seeds, whole numbers from 0 to 2^64 - 1 -> typed threefry keys [B].

    A seed below 2^32 gives `jax.random.key(seed)`; larger ones need no 64-bit mode.
    Raises ValueError for a seed out of range.
    """
    seeds = [_seed(seed) for seed in np.atleast_1d(np.asarray(seeds, dtype=object))]
    data = np.array([(seed >> 32, seed & 0xFFFFFFFF) for seed in seeds], np.uint32)
    return jax.random.wrap_key_data(data.reshape(-1, 2), impl='threefry2x32')


def _seed(seed):
    try:
        value = int(seed)
        if value == seed and 0 <= value < 2**64:
            return value
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f'seed {seed!r}: expected a whole number from 0 to 2^64 - 1 '
                     f'({2**64 - 1})')


def draw(keys, call, shape):
    """Standard normal noise of one call -> float32 [B, *shape].

    keys: [B]. call: [] or, where images differ, [B]. shape: of one image.
    """
    calls = jnp.broadcast_to(jnp.asarray(call, jnp.uint32), keys.shape)
    return jax.vmap(
        lambda key, call: jax.random.normal(jax.random.fold_in(key, call), shape, jnp.float32)
    )(keys, calls)


def initial(keys, shape):
    """The noise that an image starts from, standard normal -> float32 [B, *shape]."""
    return draw(keys, INITIAL, shape)
