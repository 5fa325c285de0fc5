"""Formats of adapters: from the tensors that a file holds for one layer to what they change.

LoRA (Hu et al. 2021), LoHa (Hyeon-Woo et al. 2021), LoCon, LoKr and the Tucker forms (LyCORIS, Yeh
et al. 2023), DoRA (Liu et al. 2024), IA3 (Liu et al. 2022), GLoRA (Chavan et al. 2023), OFT (Qiu et
al. 2023). Here a weight is a matrix [O,N] in torch's order: N is I, or I K K of a convolution.
"""

import math
from collections.abc import Callable, Mapping, Set
from typing import NamedTuple

import jax
import numpy as np

from jaxsd.models.spec import to_jax


class Delta(NamedTuple):
    """What an adapter of weight 1 adds to a parameter W: W * scale + down @ up + dense, float32.

    In our order of axes: scale [O], down [I,R] or [K,K,I,R], up [R,O], dense as W; None: nothing.
    """

    scale: np.ndarray | None = None
    down: np.ndarray | None = None
    up: np.ndarray | None = None
    dense: np.ndarray | None = None

    def of(self, weight: np.ndarray) -> np.ndarray:
        """All of it, for a parameter of float32."""
        found = np.zeros_like(weight) if self.dense is None else self.dense
        if self.scale is not None:
            found = found + weight * self.scale
        return found if self.down is None else found + self.down @ self.up


class Format(NamedTuple):
    """One kind of adapter.

    needs: what it is made of, 'part' or, where there is a choice, 'part|part part';
    size(shapes): the O and N of its weight (N None: any), by {part: shape};
    build(parts, W): its Delta with the matrices of torch, scale [O], down [R,N], up [O,R], dense
    [O,N], from {part: array}; W() gives the model's own weight.
    """

    needs: tuple
    size: Callable
    build: Callable

    def lacks(self, parts: Set[str]) -> str | None:
        """A part that is missing beside these, or None."""
        for need in self.needs:
            choices = [set(choice.split()) for choice in need.split('|')]
            if not any(choice <= parts for choice in choices):
                return min(max(choices, key=lambda c: len(c & parts)) - parts)
        return None


def kind(parts: Set[str]) -> Format | None:
    """The Format that these parts belong to, or None."""
    return next((f for f in FORMATS for need in f.needs
                 if parts & set(need.replace('|', ' ').split())), None)


def weight_delta(form: Format, parts: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...],
                 get: Callable[[], np.ndarray]) -> Delta:
    """The Delta of a weight; parts {part: float32}, shape: torch's, get() the weight [O,N]."""
    for part in ('alpha', 'scalar'):
        if np.size(parts.get(part, 1)) != 1:
            raise ValueError(f'{part} is no single number')
    delta = form.build(parts, get)
    _check(delta, shape)
    if 'magnitude' in parts or 'dora_scale' in parts:
        delta = _decomposed(delta, parts, get())
    if delta.down is not None:
        rank, order = len(delta.down), min(shape[0], math.prod(shape[1:]))
        if rank >= order or delta.dense is not None:
            dense = delta.up @ delta.down
            dense = dense if delta.dense is None else dense + delta.dense
            delta = delta._replace(dense=dense, up=None, down=None)
        else:
            down = to_jax(name, delta.down.reshape(rank, *shape[1:]))
            delta = delta._replace(down=down, up=delta.up.T)
    if delta.dense is not None:
        delta = delta._replace(dense=to_jax(name, delta.dense.reshape(shape)))
    return Delta(*(None if a is None else _float32(a) for a in delta))


def _float32(array):
    if isinstance(array, jax.Array):
        return array.astype(np.float32)
    return np.ascontiguousarray(array, np.float32)


def _like(*arrays):
    """numpy, or jax.numpy where one of the arrays is JAX's."""
    return jax.numpy if any(isinstance(a, jax.Array) for a in arrays) else np


def _check(delta, shape):
    """ValueError unless a Delta, in torch's order, is one of a weight of this shape."""
    O, N = shape[0], math.prod(shape[1:])
    rank = None if delta.down is None else len(delta.down)
    for what, array, expected in (('scale', delta.scale, (O,)), ('up', delta.up, (O, rank)),
                                  ('down', delta.down, (rank, N)), ('change', delta.dense, (O, N))):
        if array is not None and np.shape(array) != expected:
            raise ValueError(f'{what} of shape {list(np.shape(array))}, expected {list(expected)}')
    if rank == 0:
        raise ValueError('rank 0')


def _matrix(array):
    return array.reshape(len(array), -1)


def _rate(parts, rank):
    return parts.get('alpha', rank) / rank * parts.get('scalar', 1)


def _lora(parts, W):
    up, down = _pair(parts['up'], parts['down'], parts.get('mid'), upright=True)
    return Delta(up=up * _rate(parts, len(down)), down=down)


def _pair(a, b, core=None, upright=False):
    """Factors [O,R] and [R,N] of one product; core [R,R,K,K]: a Tucker decomposition's, which
    LyCORIS keeps with an `a` of [R,O] except beside a LoRA (upright)."""
    if core is None:
        return _matrix(a), _matrix(b)
    a = _matrix(a) if upright else _matrix(a).T
    return a, _matrix(_like(core).einsum('ij...,jr->ir...', core, _matrix(b)))


def _pair_size(a, b, core=None, upright=False):
    """The O and N of `_pair`, from shapes."""
    if core is None:
        return a[0], math.prod(b[1:])
    return a[0 if upright else 1], b[1] * math.prod(core[2:])


def _loha(parts, W):
    """(a1 b1) * (a2 b2), itself of rank R1 R2: rows of both, multiplied pair by pair."""
    (a1, b1), (a2, b2) = (_pair(parts[f'hada_w{i}_a'], parts[f'hada_w{i}_b'],
                                parts.get(f'hada_t{i}')) for i in (1, 2))
    rate = _rate(parts, len(b1))
    if len(b1) * len(b2) >= min(len(a1), b1.shape[1]):
        return Delta(dense=(a1 @ b1) * (a2 @ b2) * rate)
    einsum = _like(a1).einsum
    up = einsum('op,oq->opq', a1, a2).reshape(len(a1), -1)
    return Delta(up=up * rate, down=einsum('pn,qn->pqn', b1, b2).reshape(up.shape[1], -1))


def _loha_size(shapes):
    return _pair_size(shapes['hada_w1_a'], shapes['hada_w1_b'], shapes.get('hada_t1'))


def _lokr(parts, W):
    """The Kronecker product of two matrices, each whole or a product: rank R1 R2."""
    pairs, ranks = [], []
    for i in (1, 2):
        if f'lokr_w{i}' in parts:
            w = _matrix(parts[f'lokr_w{i}'])
            pairs.append((w, np.eye(w.shape[1], dtype=w.dtype)) if w.shape[0] > w.shape[1]
                         else (np.eye(len(w), dtype=w.dtype), w))
        else:
            pairs.append(_pair(parts[f'lokr_w{i}_a'], parts[f'lokr_w{i}_b'],
                               parts.get('lokr_t2') if i == 2 else None))
            ranks.append(len(pairs[-1][1]))
    rate = _rate(parts, ranks[-1]) if ranks else parts.get('scalar', 1)
    (a1, b1), (a2, b2) = pairs
    kron = _like(a1, b1, a2, b2).kron
    if len(b1) * len(b2) >= min(len(a1) * len(a2), b1.shape[1] * b2.shape[1]):
        return Delta(dense=kron(a1 @ b1, a2 @ b2) * rate)
    return Delta(up=kron(a1, a2) * rate, down=kron(b1, b2))


def _lokr_size(shapes):
    (o1, i1), (o2, n2) = (
        (shapes[f'lokr_w{i}'][0], math.prod(shapes[f'lokr_w{i}'][1:])) if f'lokr_w{i}' in shapes
        else _pair_size(shapes[f'lokr_w{i}_a'], shapes[f'lokr_w{i}_b'],
                        shapes.get('lokr_t2') if i == 2 else None) for i in (1, 2))
    return o1 * o2, i1 * n2


def _glora(parts, W):
    """W a1 a2 + b1 b2; the first LyCORIS that had it wrote W a2 a1 + b2 b1."""
    a1, a2, b1, b2 = (_matrix(parts[name]) for name in ('a1', 'a2', 'b1', 'b2'))
    W = W()
    if len(b1) != len(W):
        a1, a2, b1, b2 = a2, a1, b2, b1
    rate = _rate(parts, len(a2))
    pixels = W.shape[1] // len(a1)
    if pixels == 1:
        return Delta(up=np.concatenate([b1, W @ a1], 1) * rate, down=np.concatenate([b2, a2]))
    changed = np.einsum('oik,ir,rj->ojk', W.reshape(len(W), -1, pixels), a1, a2, optimize=True)
    return Delta(up=b1 * rate, down=b2, dense=_matrix(changed) * rate)


def _ia3(parts, W):
    factor = parts['weight'].reshape(-1)
    if parts['on_input']:
        W = W()
        return Delta(dense=W * factor.repeat(W.shape[1] // len(factor)))
    return Delta(scale=factor)


def _oft(parts, W):
    """Blocks of output channels turned by Cayley's (I + Q) (I - Q)^-1; alpha bounds Q's norm."""
    W, blocks = W(), parts['oft_blocks']
    skew = blocks - blocks.swapaxes(1, 2)
    bound, norm = parts.get('alpha', 0) * len(W), np.linalg.norm(skew)
    if 0 < bound < norm:
        skew = skew * (bound / norm)
    one = np.eye(blocks.shape[1])
    turn = (one + skew) @ np.linalg.inv(one - skew)
    turned = np.einsum('knm,kni->kmi', turn, W.reshape(*blocks.shape[:2], -1)).reshape(W.shape)
    return Delta(dense=turned * parts.get('rescale', np.ones(1)).reshape(-1, 1) - W)


def _decomposed(delta, parts, W):
    """DoRA: the changed weight scaled to the norm that was learned, of each output or input.

    For a gradient the weight's own norm is a constant (Liu et al. 2024, section 4.3)."""
    whole = W + (W * delta.scale[:, None] if delta.scale is not None else 0)
    whole = whole + (delta.up @ delta.down if delta.up is not None else 0)
    whole = whole + (delta.dense if delta.dense is not None else 0)
    norm = parts.get('magnitude', parts.get('dora_scale'))
    if 'magnitude' not in parts and len(norm) == 1 < len(W):
        columns = whole.reshape(len(W), norm.size, -1)
        gain = norm.reshape(-1) / _norm(columns, (0, 2))
        return Delta(dense=_matrix(columns * gain[:, None]) - W)
    gain = norm.reshape(-1) / _norm(whole, 1)
    scale = gain - 1 if delta.scale is None else gain * (1 + delta.scale) - 1
    up, dense = (None if a is None else a * gain[:, None] for a in (delta.up, delta.dense))
    return Delta(scale, delta.down, up, dense)


def _norm(array, axis):
    found = _like(array).sqrt((array * array).sum(axis))
    if isinstance(array, jax.Array):
        found = jax.lax.stop_gradient(found)
    return found.clip(np.finfo(np.float32).eps)


FORMATS = (
    Format(('down', 'up'),
           lambda s: _pair_size(s['up'], s['down'], s.get('mid'), upright=True), _lora),
    Format(('hada_w1_a', 'hada_w1_b', 'hada_w2_a', 'hada_w2_b'), _loha_size, _loha),
    Format(('lokr_w1|lokr_w1_a lokr_w1_b', 'lokr_w2|lokr_w2_a lokr_w2_b'), _lokr_size, _lokr),
    Format(('a1', 'a2', 'b1', 'b2'),
           lambda s: (max(s['b1'][0], s['b2'][0]), None), _glora),
    Format(('oft_blocks',), lambda s: (s['oft_blocks'][0] * s['oft_blocks'][1], None), _oft),
    Format(('diff',), lambda s: _pair_size(s['diff'], s['diff']),
           lambda p, W: Delta(dense=_matrix(p['diff']))),
    Format(('set_weight',), lambda s: _pair_size(s['set_weight'], s['set_weight']),
           lambda p, W: Delta(dense=_matrix(p['set_weight']) - W())),
    Format(('weight', 'on_input'), lambda s: (None, None), _ia3),
)
