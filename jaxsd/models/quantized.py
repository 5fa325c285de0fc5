"""Weights kept in 8 bits or fewer: a layer has them in the place of its `weight`, under the name of
their kind, and widens them when it runs.

Kinds: float8_e4m3fn and float8_e5m2, cast; float8_e4m3fn_scaled and int8, with a scale for each
output; GGUF's q8_0, q5_1, q5_0, q4_1 and q4_0, whose blocks of 32 numbers lie as they do in its
files (ggml-common.h of https://github.com/ggml-org/ggml).
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from jaxsd.typing import Params

# GGUF's kinds: bits of a number, and whether they have a minimum; else they are around 0.
BLOCKS = {'q8_0': (8, False), 'q5_1': (5, True), 'q5_0': (5, False), 'q4_1': (4, True),
          'q4_0': (4, False)}
ROWS = {'int8': np.int8, 'float8_e4m3fn': ml_dtypes.float8_e4m3fn,
        'float8_e4m3fn_scaled': ml_dtypes.float8_e4m3fn, 'float8_e5m2': ml_dtypes.float8_e5m2}
KINDS = (*ROWS, *BLOCKS)
# The layers that are worth it, and that read their weights by `kernel`.
_LAYERS = {'unet': re.compile(r'(down_blocks|mid_block|up_blocks)\..*(?<!norm)(?<!norm.)\.weight'),
           'text_encoder': re.compile(r'text_model\.encoder\.layers\..*(proj|fc.)\.weight')}
_LAYERS['text_encoder_2'] = _LAYERS['text_encoder']


def check(kind: str | None) -> None:
    """ValueError for a kind that is not one of KINDS or None, ImportError for one of GGUF's without
    its package."""
    if kind is not None and kind not in KINDS:
        raise ValueError(f'quantize={kind!r}: expected one of {", ".join(KINDS)}, or None')
    if kind in BLOCKS:
        try:
            import gguf  # noqa: F401
        except ImportError:
            raise ImportError(f"quantize={kind!r} needs the gguf package: pip install "
                              "'jaxsd[gguf]'") from None


def quantize(part: str, name: str, array: np.ndarray, kind: str | None
             ) -> dict[str, np.ndarray] | None:
    """A component's tensor, in torch's order, by its dotted name -> {dotted name: array} for its
    layer; None for one that stays as it is."""
    rows = array.reshape(len(array), -1) if array.ndim > 1 else array
    pattern = _LAYERS.get(part)
    if kind is None or pattern is None or array.ndim < 2 or not pattern.fullmatch(name) or (
            kind in BLOCKS and rows.shape[1] % 32):
        return None
    layer = name.removesuffix('weight')
    rows = rows.astype(np.float32)
    if kind in BLOCKS:
        import gguf
        found = gguf.quants.quantize(rows, getattr(gguf.GGMLQuantizationType, kind.upper()))
        return {layer + kind: found.reshape(len(rows), rows.shape[1] // 32, -1)}
    dtype = ROWS[kind]
    most = float(np.iinfo(dtype).max if kind == 'int8' else ml_dtypes.finfo(dtype).max)
    found = {}
    if kind in ('int8', 'float8_e4m3fn_scaled'):
        scale = np.abs(rows).max(1, keepdims=True) / np.float32(most)
        found[layer + 'scale'] = np.where(scale > 0, scale, 1)
        rows = rows / found[layer + 'scale']
    rows = np.clip(np.rint(rows) if kind == 'int8' else rows, -most, most)
    return {layer + kind: rows.astype(dtype)} | found


def kernel(p: Params, x: Array) -> Array:
    """A layer's weight for its input x [...,I]: `weight`, else [K,K,I,O] widened to x's dtype."""
    if 'weight' in p:
        return p['weight']
    w = matrix({name: a if name == 'scale' else _after(x, a)
                for name, a in p.items() if name in (*KINDS, 'scale')}, x.dtype)
    size = math.isqrt(w.shape[1] // x.shape[-1])
    return w.reshape(len(w), x.shape[-1], size, size).transpose(2, 3, 1, 0)


def _after(x, array):
    """An array of bytes as it is, but computed from x: else XLA widens all layers' at once, before
    a loop (and on CPU in one, past lax.optimization_barrier)."""
    changed = jnp.isnan(x.reshape(-1)[0]).astype(jnp.uint8)  # then all that follows is NaN anyway
    bits = lax.bitcast_convert_type(array, jnp.uint8) ^ changed
    return lax.bitcast_convert_type(bits, array.dtype)


def matrix(p: Params, dtype: DTypeLike = jnp.float32) -> Float[Array, 'O N']:
    """A layer's quantized weight, computed in float32 -> its rows in torch's order, in a dtype."""
    kind = next(kind for kind in KINDS if kind in p)
    rows = _numbers(p[kind], *BLOCKS[kind]) if kind in BLOCKS else p[kind].astype(jnp.float32)
    return (rows * p['scale'] if 'scale' in p else rows).astype(dtype)


def _numbers(blocks, bits, minimum):
    """Blocks uint8 [O,M,bytes] -> float32 [O,32 M]. A block: the scale in float16, and maybe a
    minimum; of 5 bits 4 bytes with the fifth one of each number; then the numbers, those of 4 bits
    two to a byte, the first 16 in the lower halves."""
    def half(at):
        return lax.bitcast_convert_type(blocks[..., at:at + 2], jnp.float16)[
            ..., None].astype(jnp.float32)

    scale, at = half(0), 2 + 2 * minimum
    if bits == 8:
        q = lax.bitcast_convert_type(blocks[..., at:], jnp.int8).astype(jnp.float32)
    else:
        fifth, at = blocks[..., at:at + 4], at + 4 * (bits == 5)
        packed = blocks[..., at:]
        q = jnp.concatenate([packed & 15, packed >> 4], -1)
        if bits == 5:
            shift = np.arange(8, dtype=np.uint8)
            high = ((fifth[..., None] >> shift) & 1).reshape(*fifth.shape[:-1], 32)
            q = q | high << 4
        q = q.astype(jnp.float32) - (0 if minimum else 2 ** (bits - 1))
    numbers = q * scale + half(2) if minimum else q * scale
    return numbers.reshape(len(blocks), -1)


def is_quantized(params: Any) -> bool:
    """Whether some layer of nested dicts of arrays is."""
    return isinstance(params, dict) and (any(kind in params for kind in KINDS)
                                         or any(map(is_quantized, params.values())))


def refuse(params: Params, what: str) -> None:
    """ValueError where a layer is quantized, for what needs the weights themselves."""
    if is_quantized(params):
        raise ValueError(f'{what}: expected weights as they are in the file, found quantized ones; '
                         'load the model without quantize')


def compute_dtype(params: Params) -> Any:
    """The dtype in which a component computes: of its biases, which are never quantized."""
    return next(leaf.dtype for name, leaf in jax.tree_util.tree_leaves_with_path(params)
                if getattr(name[-1], 'key', '') == 'bias')
