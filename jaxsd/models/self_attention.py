"""Self-attention over fewer tokens at once, for large pictures: HyperTile, and token merging.

Both take what a layer has made of its tokens, queries, keys and values: projections are linear, so
that they may be taken apart or averaged after them as well as before.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxsd.models.layers import attention


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Fewer:
    """What is done at self-attentions of the `depth` + 1 largest levels.

    tile: latents per side of a tile of HyperTile (https://github.com/tfernd/HyperTile), at least:
    each looks at itself alone; 0: off. ratio: of the tokens that are merged (Bolya and Hoffman
    2023, https://arxiv.org/abs/2303.17604); 0: none.
    """

    tile: int = 0
    ratio: float = 0.0
    depth: int = 0

    def __call__(self, q: Float[Array, 'B T C'], k: Float[Array, 'B T C'], v: Float[Array, 'B T C'],
               heads: int, height: int, width: int) -> Float[Array, 'B T C'] | None:
        """A self-attention's output, or None where it is as ever. height, width: of the latents."""
        level = round(math.log(height * width / q.shape[1], 4))
        if level > self.depth:
            return None
        for _ in range(level):
            height, width = -(-height // 2), -(-width // 2)
        if self.ratio:
            merge, unmerge = merging(k, height, width, self.ratio)
            return unmerge(attention(merge(q), merge(k), merge(v), heads))
        down, across = (_tiles(n, self.tile) for n in (height, width))
        if down * across == 1:
            return None

        def apart(x):
            x = x.reshape(len(x), down, height // down, across, width // across, -1)
            return x.swapaxes(2, 3).reshape(-1, height * width // (down * across), x.shape[-1])

        out = attention(apart(q), apart(k), apart(v), heads)
        out = out.reshape(-1, down, across, height // down, width // across, q.shape[-1])
        return out.swapaxes(2, 3).reshape(q.shape)


def _tiles(n, tile):
    """How many tiles of at least `tile` make n, of one size."""
    return next(n // size for size in range(min(tile, n), n + 1) if n % size == 0)


Change = Callable[[Array], Array]


def merging(metric: Float[Array, 'B T C'], height: int, width: int,
            ratio: float) -> tuple[Change, Change]:
    """-> merge [B,T,C] -> [B,T-r,C], r = int(T ratio), and unmerge, its way back.

    Of each 2x2 tokens the first stays. Of the others those that are most like one that stays, by
    the cosine of metric, become one with it, their mean; unmerged, all have what that one has. As
    tomesd's bipartite_soft_matching_random2d without its randomness; the metric is the keys, as in
    the original ToMe (https://arxiv.org/abs/2210.09461).
    """
    T = height * width
    stays = np.zeros((height, width), bool)
    stays[:height // 2 * 2:2, :width // 2 * 2:2] = True
    others, kept = np.flatnonzero(~stays), np.flatnonzero(stays)
    r = min(len(others), int(T * ratio))
    f = metric.astype(jnp.float32)
    f = f / jnp.linalg.norm(f, axis=-1, keepdims=True)
    scores = f[:, others] @ f[:, kept].mT
    order = jnp.argsort(-scores.max(-1), axis=-1)
    nearest = jnp.take_along_axis(scores.argmax(-1), order, 1)[:, :r, None]  # of those that go
    apart, gone = (jnp.asarray(others)[part] for part in (order[:, r:], order[:, :r]))  # places
    rows = np.arange(len(metric))[:, None]

    def merge(x):
        count = jnp.ones((len(x), len(kept), 1), x.dtype)
        sums = x[:, kept].at[rows, nearest[..., 0]].add(x[rows, gone])
        count = count.at[rows, nearest[..., 0]].add(1)
        return jnp.concatenate([x[rows, apart], sums / count], 1)

    def unmerge(x):
        alone, merged = x[:, :T - r - len(kept)], x[:, T - r - len(kept):]
        out = jnp.zeros((len(x), T, x.shape[-1]), x.dtype)
        out = out.at[:, kept].set(merged).at[rows, apart].set(alone)
        return out.at[rows, gone].set(jnp.take_along_axis(merged, nearest, 1))

    return merge, unmerge
