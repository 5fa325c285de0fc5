"""A network over a large picture in overlapping tiles, for the memory of one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float


def tiled(apply: Callable[[Array], Array], x: Float[Array, 'B H W C'], tile: int, overlap: int,
          down: int = 1) -> Float[Array, 'B h w O']:
    """apply(x), in float32, from overlapping tiles of x that are cross-faded; of equal size, and
    apply is traced once. What is no larger than a tile is computed in one piece.

    tile, overlap: in squares of down x down pixels of x, of which apply makes whole pixels, one or
    more along each side. Raises ValueError for an overlap that is not smaller than the tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f'overlap {overlap}: expected 0 <= overlap < tile, which is {tile}')
    B, H, W, C = x.shape
    if max(H, W) <= tile * down:
        return apply(x)
    H, W = H // down, W // down
    h, w = min(tile, H), min(tile, W)
    out = jax.eval_shape(apply, jax.ShapeDtypeStruct((B, h * down, w * down, C), x.dtype))
    f = out.shape[1] // h
    starts = np.array([(y, x) for y in _starts(H, h, overlap) for x in _starts(W, w, overlap)])
    window = np.outer(_ramp(h * f, overlap * f), _ramp(w * f, overlap * f))[None, :, :, None]
    window = window.astype(np.float32)

    def add(carry, start):
        image, weight = carry
        row, column = start
        part = apply(lax.dynamic_slice(x, (0, row * down, column * down, 0),
                                       (B, h * down, w * down, C)))
        at = (0, row * f, column * f, 0)
        old = lax.dynamic_slice(image, at, part.shape)
        image = lax.dynamic_update_slice(image, old + part * window, at)
        old = lax.dynamic_slice(weight, at, window.shape)
        return (image, lax.dynamic_update_slice(weight, old + window, at)), None

    empty = (jnp.zeros((B, H * f, W * f, out.shape[-1])), jnp.zeros((1, H * f, W * f, 1)))
    (image, weight), _ = lax.scan(add, empty, starts)
    return image / weight


def _starts(size, tile, overlap):
    """First positions of the fewest equally spaced tiles that cover `size`."""
    count = 1 + -(-(size - tile) // max(1, tile - overlap))  # one tile may be all of a short side
    return np.linspace(0, size - tile, count).round().astype(int)


def _ramp(size, overlap):
    """Weights [size] that fall off towards both ends over `overlap`, never to zero."""
    edge = (np.arange(size) + 1) / (overlap + 1)
    return np.minimum(1, np.minimum(edge, edge[::-1]))
