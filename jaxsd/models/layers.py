"""Layers shared by all networks: `layer(params, x, ...)`, NHWC, norms and softmax in float32."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from jaxsd.models.quantized import KINDS, kernel
from jaxsd.typing import Params


def linear(p: Params, x: Array) -> Array:
    """x [..., I] -> [..., O]; p: weight [I,O], or a quantized one, and maybe bias [O]."""
    w = kernel(p, x)
    y = adapted(p, x, x @ w.reshape(w.shape[-2:]), jnp.matmul)
    return y + p['bias'] if 'bias' in p else y


def conv(p: Params, x: Array, stride: int = 1, padding: int | tuple[int, int] = 1) -> Array:
    """x [B,H,W,I] -> [B,H/stride,W/stride,O]; p: weight [K,K,I,O], or a
    quantized one, and maybe bias [O].

    padding: pixels on each side, or a pair (before, after) for both axes. On CPU, wide 3x3
    convolutions of few pixels are one matmul over the nine shifted pictures: 1.5 times (16x16) to
    3 times (8x8) as fast there as XLA's convolution; `prepared` ones are faster still.
    Of `seamless` parameters a whole padding is what lies at the other edge.
    """
    if 'wrap' in p and isinstance(padding, int) and padding:
        x, padding = _wrapped(x, p['wrap'], padding), 0

    def convolve(x, w):
        return _convolve(x, w, stride, padding)

    even = x.shape[1] % 2 == x.shape[2] % 2 == 0
    if 'tiles' in p and stride == padding == 1 and even and _few(x):
        y = _winograd(x, p['tiles'])
    else:
        y = convolve(x, kernel(p, x))
    return adapted(p, x, y, convolve) + p.get('bias', 0)


def seamless(p: Params, axes: str) -> Params:
    """A network's parameters, whose convolutions see its pictures as tiles: at an edge what lies at
    the other one, as torch's padding_mode='circular'. axes: 'x' for the left and right edges, 'y',
    or both; '': as it is. Traceable."""
    if not axes:
        return p
    below = {name: seamless(p[name], axes) for name, part in dict.items(p)
             if isinstance(part, dict)}
    weight = dict.get(p, 'weight')  # of one that is spread over devices, a part
    if any(kind in p for kind in KINDS) or (
            weight is not None and weight.ndim == 4 and max(weight.shape[:2]) > 1):
        below['wrap'] = {axis: jnp.zeros(0) for axis in axes}  # their names are what counts
    return p | below


def _wrapped(x, axes, size):
    """x [B,H,W,C] with `size` more pixels at each side: of the other edge along these axes, else
    zeros."""
    for axis, name in ((1, 'y'), (2, 'x')):
        pads = [(size, size) if i == axis else (0, 0) for i in range(4)]
        x = jnp.pad(x, pads, mode='wrap' if name in axes else 'constant')
    return x


def _convolve(x, w, stride, padding):
    if jax.default_backend() == 'cpu' and stride == padding == 1 and w.shape[:2] == (3, 3):
        B, H, W, C = x.shape
        if C >= 512 and H * W <= 256:
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            shifted = [x[:, i:i + H, j:j + W] for i in range(3) for j in range(3)]
            y = jnp.concatenate(shifted, -1).reshape(-1, 9 * C) @ w.reshape(9 * C, -1)
            return y.reshape(B, H, W, -1)
        if C < 128 and w.shape[3] <= 4:
            # Products first, then shifts: XLA's convolution of 16 channels to 3 rounds otherwise on
            # other numbers of threads, and takes twice as long.
            y = (x.reshape(-1, C) @ w.transpose(2, 0, 1, 3).reshape(C, -1)).reshape(B, H, W, 9, -1)
            y = jnp.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0)))
            return sum(y[:, k // 3:k // 3 + H, k % 3:k % 3 + W, k] for k in range(9))
    pad = (padding, padding) if isinstance(padding, int) else padding
    return lax.conv_general_dilated(x, w, (stride, stride), [pad, pad],
                                    dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


# Winograd's convolution F(2x2, 3x3) (Lavin and Gray 2015, https://arxiv.org/abs/1509.09308) along
# one axis: what four pixels and three weights become, and the two pixels that their products make.
# In a doubled picture the pixels in the middle of four are one, and the last product is 0.
TILE = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, 1, 0, -1], [0, -1, 1, 0]], np.float32)
DOUBLED = np.array([[1, -1, 0], [0, 2, 0], [0, 1, -1]], np.float32)
KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0, 0, 1], [0.5, -0.5, 0.5]], np.float32)
PIXELS = np.array([[1, 1, 0, 1], [0, 1, -1, -1]], np.float32)


def prepared(p: Params, doubled: bool = False) -> Params:
    """A network's parameters, to be used many times: on CPU with `tiles` for `_winograd` beside the
    weights of 3x3 convolutions. Few channels gain nothing, the most would take too much memory."""
    if jax.default_backend() != 'cpu' or type(p) is not dict or 'tiles' in p:  # or spread, or done
        return p
    p = {name: prepared(part, doubled or name == 'upsamplers') if isinstance(part, dict) else part
         for name, part in p.items()}
    w = p.get('weight')
    if (w is not None and w.shape[:2] == (3, 3) and w.dtype == jnp.float32
            and w.shape[2] >= (32 if doubled else 64) and w.shape[2] * w.shape[3] <= 2**20):
        rows = KERNEL[:3] if doubled else KERNEL
        tiles = (np.kron(rows, rows) @ w.reshape(9, -1)).reshape(-1, *w.shape[2:])
        p['tiles'] = jnp.split(tiles, len(rows))  # 4 of [4,I,O]
    return p


def _few(x):
    """Whether x [B,H,W,C] has so few pixels that four times as many arrays do no harm."""
    return x.shape[1] * x.shape[2] <= 64 * 64


@jax.jit  # so that equal ones are traced once
def _winograd(x, tiles):
    """A padded 3x3 convolution of x [B,H,W,I] by 16 products for 2x2 pixels instead of 36; where
    there are tiles [3,3,I,O] alone, of x doubled in height and width, by 9."""
    K = len(tiles)

    def mixed(x, axis, table=DOUBLED if K == 3 else TILE):  # -> K arrays like x, half as long
        n = x.shape[axis] - 2
        parts = [lax.slice_in_dim(x, k, k + n, axis=axis) if K == 3 else
                 lax.slice_in_dim(x, k, k + n - 1, 2, axis) for k in range(K)]
        return [sum(c * part for c, part in zip(row, parts) if c) for row in table]

    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    products = []
    for row, weights in zip(mixed(x, 1), tiles):
        row = jnp.stack(mixed(row, 2))
        _, B, H, W, _ = row.shape
        y = row.reshape(K, B * H * W, -1) @ weights
        products.append(y.reshape(K, B, H, W, 1, -1))
    # Stacking, unlike sums, is nothing that XLA would do again for each use of what it gives.
    rows = [sum(PIXELS[row, j] * PIXELS[:, i, None] * products[j][i]
                for j in range(K) for i in range(K) if PIXELS[row, j])
            for row in range(2)]  # each [B,H/2,W/2,2,O]
    return jnp.stack(rows, 2).reshape(B, 2 * H, 2 * W, -1)


def pointwise(p: Params, x: Array) -> Array:
    """A 1x1 convolution or the linear layer that stands for it: [..., I] -> [..., O]."""
    def mix(x, w):
        return x @ w.reshape(w.shape[-2:])

    return adapted(p, x, mix(x, kernel(p, x)), mix) + p['bias']


def adapted(p: Params, x: Array, y: Array, apply: Callable[[Array, Array], Array]) -> Array:
    """A layer's output y, without its bias, and what adapters add to it (weights.adapters.attach).

    x: the layer's input; apply(x, w): the layer with other weights. Each image has its own weight
    of each adapter, but for one that is trained, which has no gate:
    y + (apply(x, down) * gate) @ up + y * scale + bias (Hu et al. 2021).
    """
    path, out = p.get('adapter', {}), y
    if 'scale' in path:
        out = out + y * per_image(path['scale'], y)
    if 'down' in path:
        low = apply(x, path['down'])
        out = out + (low * per_image(path['gate'], y) if 'gate' in path else low) @ path['up']
    return out + per_image(path['bias'], y) if 'bias' in path else out


def per_image(a: Array, x: Array) -> Array:
    """a [B,C] -> [B*n,1,...,C], to go with x [B*n,...,C], n rows of each image side by side."""
    a = jnp.repeat(a, len(x) // len(a), 0)
    return a.reshape(len(a), *(1,) * (x.ndim - 2), -1)


def affine(p: Params, x: Array) -> tuple[Array, Array]:
    """A norm's weight and bias: [C], or [B,1,...,C] where adapters change them."""
    path = p.get('adapter', {})
    return tuple(p[name] + per_image(path[name], x) if name in path else p[name]
                 for name in ('weight', 'bias'))


def layer_norm(p: Params, x: Array, eps: float = 1e-5) -> Array:
    """Normalise the last axis of x [..., C] (Ba et al. 2016)."""
    f = x.astype(jnp.float32)
    f = f - f.mean(-1, keepdims=True)
    f = f * lax.rsqrt(jnp.square(f).mean(-1, keepdims=True) + eps)
    weight, bias = affine(p, x)
    return (f * weight + bias).astype(x.dtype)


def group_norm(p: Params, x: Array, groups: int, eps: float) -> Array:
    """Normalise groups of channels over H, W of x [B,H,W,C] (Wu and He 2018).

    The sums go over the pixels of each channel first, then over the few channels of a group: that
    keeps the big reduction contiguous in NHWC. Mean and scale become one multiply-add.
    """
    f = x.astype(jnp.float32)

    def mean(y):  # [B,H,W,C] -> [B,1,1,C], equal within a group
        m = y.mean((1, 2)).reshape(x.shape[0], groups, -1).mean(-1, keepdims=True)
        return jnp.broadcast_to(m, (*m.shape[:2], x.shape[-1] // groups)).reshape(
            x.shape[0], 1, 1, -1)

    centre = mean(f)
    weight, bias = affine(p, x)
    scale = lax.rsqrt(mean(jnp.square(f - centre)) + eps) * weight
    return (f * scale + (bias - centre * scale)).astype(x.dtype)


def attention(q: Float[Array, 'B T C'], k: Float[Array, 'B S C'], v: Float[Array, 'B S C'],
              heads: int, causal: bool = False,
              keep: Bool[Array, 'B S'] | None = None) -> Float[Array, 'B T C']:
    """Multi-head attention (Vaswani et al. 2017).

    keep: the keys to be seen beside `causal`; None: all. GPU in 16 bits without keep:
    cuDNN's fused kernel. CPU in float16: in float32, as XLA lacks its scores there (it widens
    other products itself). Else all scores at once where they are few (128 x 128 on CPU, 1 GiB
    elsewhere); many are computed a head and a block of queries at a time (lax.map): a score matrix
    that stays in the cache is several times faster on CPU, and bounds the memory.
    """
    B, T, C = q.shape
    S, D = k.shape[1], C // heads
    cpu = jax.default_backend() == 'cpu'
    if cpu and q.dtype == jnp.float16:
        dtype, (q, k, v) = q.dtype, (a.astype(jnp.float32) for a in (q, k, v))
        return attention(q, k, v, heads, causal, keep).astype(dtype)
    q, k, v = (a.reshape(B, -1, heads, D) for a in (q, k, v))  # [B,T,N,D]
    fused = (jax.default_backend() == 'gpu' and q.dtype in (jnp.float16, jnp.bfloat16)
             and keep is None and D % 8 == 0 and D <= 256)
    few = T * S <= 128 * 128 if cpu else B * heads * T * S <= 2**28
    if fused or keep is not None or few and (causal or not cpu):
        return jax.nn.dot_product_attention(
            q, k, v, mask=None if keep is None else keep[:, None, None], is_causal=causal,
            implementation='cudnn' if fused else 'xla').reshape(B, T, C)
    if causal:
        raise ValueError(f'causal attention over {T} tokens: expected at most 128 x 128 scores')
    q, k, v = (a.swapaxes(1, 2) for a in (q / math.sqrt(D), k, v))  # [B,N,T,D]

    def head(q, k, v):  # [...,T,D]; scores stand upright, so that sums over S are contiguous
        scores = (k @ q.mT).astype(jnp.float32)  # [...,S,T]
        weights = jnp.exp(scores - lax.stop_gradient(scores.max(-2, keepdims=True)))
        out = (v.mT @ weights.astype(v.dtype)) / weights.sum(-2, keepdims=True)
        return out.mT.astype(v.dtype)

    if few:
        out = head(q, k, v)
    else:
        block = next(b for b in range(min(T, 1024), 0, -1) if T % b == 0)

        def blocks(qkv):
            q, k, v = qkv  # [T,D], [S,D], [S,D]
            # A gradient computes the scores again: all of them together are what blocks avoid.
            return lax.map(jax.checkpoint(lambda q: head(q, k, v)),
                           q.reshape(-1, block, D)).reshape(T, D)

        q, k, v = (a.reshape(B * heads, -1, D) for a in (q, k, v))
        out = lax.map(blocks, (q, k, v)).reshape(B, heads, T, D)
    return out.swapaxes(1, 2).reshape(B, T, C)


def attention_received(q: Float[Array, 'B T C'], k: Float[Array, 'B S C'],
                       heads: int) -> Float[Array, 'B S']:
    """What each position receives: scores summed over queries, mean over heads, in float32."""
    q, k = (a.reshape(*a.shape[:2], heads, -1).astype(jnp.float32) for a in (q, k))
    scores = jnp.einsum('btnd,bsnd->bnts', q, k) / math.sqrt(q.shape[-1])
    return jax.nn.softmax(scores).sum(2).mean(1)


def gelu(x: Array) -> Array:
    """x times the normal distribution function of x, in float32. By erf: jax.nn's exact gelu takes
    erfc, for relative accuracy where the result is almost 0, at many times the cost on CPU."""
    half = 0.5 * x.astype(jnp.float32)
    return (half + half * lax.erf(math.sqrt(2) * half)).astype(x.dtype)


def timestep_embedding(t: ArrayLike, dim: int, period: float = 10000.0) -> Array:
    """Sinusoids of t [...] -> [..., dim] float32, cosines first (Ho et al. 2020; diffusers'
    flip_sin_to_cos=True, freq_shift=0)."""
    frequency = jnp.exp(-math.log(period) * jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))
    angle = jnp.asarray(t, jnp.float32)[..., None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


def resnet(p: Params, x: Array, groups: int, eps: float, time: Array | None = None) -> Array:
    """The residual block of the U-Net and the VAE: x [B,H,W,I] -> [B,H,W,O]; time [B,D]."""
    h = conv(p['conv1'], jax.nn.silu(group_norm(p['norm1'], x, groups, eps)))
    if time is not None:
        h = h + linear(p['time_emb_proj'], jax.nn.silu(time))[:, None, None]
    h = conv(p['conv2'], jax.nn.silu(group_norm(p['norm2'], h, groups, eps)))
    return h + (pointwise(p['conv_shortcut'], x) if 'conv_shortcut' in p else x)


def upsample(p: Params, x: Array, shape: tuple[int, ...] | None = None) -> Array:
    """Nearest neighbour x2, cropped to shape (H, W) if given, then a 3x3 convolution."""
    p, small, whole = p['conv'], x, (2 * x.shape[1], 2 * x.shape[2])
    H, W = shape or whole
    x = x.repeat(2, 1).repeat(2, 2)[:, :H, :W]

    padding = 1
    if 'wrap' in p:
        x, padding = _wrapped(x, p['wrap'], 1), 0

    def convolve(x, w):
        return _convolve(x, w, 1, padding)

    if 'tiles' in p and padding and (H, W) == whole and _few(small):
        y = _winograd(small, p['tiles'])
    else:
        y = convolve(x, kernel(p, x))
    return adapted(p, x, y, convolve) + p.get('bias', 0)


def corners(x: Array, height: int, width: int) -> Array:
    """Bilinear, where the corners stay corners (torch's align_corners): [B,H,W,C] -> [B,h,w,C]."""
    for axis, m in ((1, height), (2, width)):
        n = x.shape[axis]
        if n == m:
            continue
        at = np.linspace(0, n - 1, m)
        low = np.minimum(at.astype(int), max(n - 2, 0))
        shape = [1] * x.ndim
        shape[axis] = m
        high_part = jnp.asarray((at - low).reshape(shape), x.dtype)
        below, above = (jnp.take(x, np.minimum(i, n - 1), axis) for i in (low, low + 1))
        x = below + high_part * (above - below)
    return x


def children(p: Params) -> list[Params]:
    """The values of a dict keyed by numbers, in their order."""
    return [p[key] for key in sorted(p, key=int)]
