"""Latents and features at another size, as torch interpolates them: two small matrices."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float


def weights(kind: str, old: int, new: int, length: float | None = None) -> np.ndarray:
    """How much each of `old` cells counts for each of `new` ones -> float32 [new,old].

    kind: 'bilinear', 'bicubic', 'bicubic_antialiased', 'nearest' (torch's 'nearest-exact') or
    'nearest_floor' (its 'nearest'). The new cells lie over the `length` old ones in the middle,
    None: over all.
    """
    length = old if length is None else length
    place = (old - length) / 2 + (np.arange(new) + 0.5) * length / new - 0.5
    if kind.startswith('nearest'):
        cells = np.floor(place + 0.5 - (kind == 'nearest_floor') * 0.5 * length / new + 1e-9)
        return (np.clip(cells, 0, old - 1)[:, None] == np.arange(old)).astype(np.float32)
    sharp = -0.5 if kind == 'bicubic_antialiased' else -0.75
    found, below = np.zeros((new, old)), np.floor(place)
    for step in range(-1, 3):
        cell = below + step
        weight = _cubic(np.abs(place - cell), sharp) if 'bicubic' in kind else (
            np.maximum(0, 1 - np.abs(place - cell)))
        if kind == 'bicubic_antialiased':  # what lies outside does not count
            weight = weight * ((cell >= 0) & (cell < old))
        np.add.at(found, (np.arange(new), np.clip(cell, 0, old - 1).astype(int)), weight)
    return (found / found.sum(1, keepdims=True)).astype(np.float32)


def resize(x: Float[Array, 'B h w C'], height: int, width: int,
           kind: str) -> Float[Array, 'B height width C']:
    """Features at another size; kind: as of `weights`."""
    down, across = weights(kind, x.shape[1], height), weights(kind, x.shape[2], width)
    out = jnp.einsum('yh,xw,bhwc->byxc', down, across, x.astype(jnp.float32), precision='highest')
    return out.astype(x.dtype)


def _cubic(x, a):
    """Keys' kernel at distances x."""
    return np.where(x < 1, (a + 2) * x ** 3 - (a + 3) * x ** 2 + 1, np.where(
        x < 2, a * (x ** 3 - 5 * x ** 2 + 8 * x - 4), 0))
