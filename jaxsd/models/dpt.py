"""MiDaS' hybrid DPT: the depth of a picture (Ranftl et al. 2021, Vision Transformers for Dense
Prediction; parameter names of transformers' DPTForDepthEstimation with a BiT backbone)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from jaxsd.config import DPTConfig
from jaxsd.models.layers import attention, children, conv, group_norm, layer_norm, linear, pointwise
from jaxsd.typing import Params

gelu = functools.partial(jax.nn.gelu, approximate=False)


def apply(params: Params, cfg: DPTConfig, pixels: Float[Array, 'B H W 3']) -> Float[Array, 'B H W']:
    """pixels, (rgb - 0.5) / 0.5 -> inverse depth in float32, near is large.

    Sides are multiples of 32; where they are not cfg.image_size, the position embeddings are
    interpolated as in MiDaS. Raises ValueError for other sides.
    """
    _, H, W, _ = pixels.shape
    if H % 32 or W % 32:
        raise ValueError(f'pixels of {W}x{H}: expected sides that are multiples of 32')
    p = params['dpt']['embeddings']
    x = pixels.astype(p['projection']['weight'].dtype)
    *maps, x = stem(p['backbone']['bit'], cfg, x)
    x = pointwise(p['projection'], x)  # [B,H/16,W/16,D]
    grid = x.shape
    x = x.reshape(grid[0], -1, grid[-1]) + positions(p['position_embeddings'][:, 1:], grid[1:3])
    first = p['cls_token'] + p['position_embeddings'][:, :1]
    x = jnp.concatenate([jnp.broadcast_to(first, (grid[0], *first.shape[1:])), x], 1)

    neck = params['neck']['reassemble_stage']
    for i, layer in enumerate(children(params['dpt']['encoder']['layer'])):
        x = transformer(layer, cfg, x)
        if i in cfg.backbone_out_indices[2:]:
            at = str(len(maps))
            readout = jnp.broadcast_to(x[:, :1], x[:, 1:].shape)
            y = gelu(linear(neck['readout_projects'][at]['0'],
                            jnp.concatenate([x[:, 1:], readout], -1)))
            y = pointwise(neck['layers'][at]['projection'], y.reshape(grid))
            if 'resize' in neck['layers'][at]:
                y = conv(neck['layers'][at]['resize'], y, stride=2)
            maps.append(y)

    maps = [conv(c, y) for c, y in zip(children(params['neck']['convs']), maps)]
    fused: Any = None  # from the coarsest map [B,H/32,W/32,F] to [B,H/2,W/2,F]
    for layer, y in zip(children(params['neck']['fusion_stage']['layers']), reversed(maps)):
        fused = y if fused is None else fused + residual(layer['residual_layer1'], y)
        fused = pointwise(layer['projection'], double(residual(layer['residual_layer2'], fused)))
    head = params['head']['head']
    x = double(conv(head['0'], fused))
    x = jax.nn.relu(conv(head['2'], x))
    return jax.nn.relu(pointwise(head['4'], x))[..., 0].astype(jnp.float32)


def stem(p: Params, cfg: DPTConfig, x: Array) -> list[Array]:
    """The ResNetV2 of BiT, post-activation: x [B,H,W,3] -> maps of its stages, strides 4, 8, 16."""
    norm = functools.partial(group_norm, groups=cfg.num_groups, eps=1e-5)

    def bottleneck(p, x, stride):
        y = jax.nn.relu(norm(p['norm1'], standardized(p['conv1'], x)))
        y = jax.nn.relu(norm(p['norm2'], standardized(p['conv2'], y, stride)))
        y = norm(p['norm3'], standardized(p['conv3'], y))
        if 'downsample' in p:
            x = norm(p['downsample']['norm'], standardized(p['downsample']['conv'], x, stride))
        return jax.nn.relu(x + y)

    x = jax.nn.relu(norm(p['embedder']['norm'], standardized(p['embedder']['convolution'], x, 2)))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), 'SAME')
    maps = []
    for i, stage in enumerate(children(p['encoder']['stages'])):
        for j, block in enumerate(children(stage['layers'])):
            x = bottleneck(block, x, stride=2 if i > 0 and j == 0 else 1)
        maps.append(x)
    return maps


def standardized(p: Params, x: Array, stride: int = 1) -> Array:
    """A convolution whose weights have mean 0 and variance 1 per output channel, 'same' padding
    of sides that stride divides (Qiao et al. 2019)."""
    w = p['weight'].astype(jnp.float32)
    w = w - w.mean((0, 1, 2))
    w = w * lax.rsqrt(jnp.square(w).mean((0, 1, 2)) + 1e-8)
    total = max(w.shape[0] - stride, 0)
    return conv({'weight': w.astype(x.dtype)}, x, stride, (total // 2, total - total // 2))


def transformer(p: Params, cfg: DPTConfig, x: Array) -> Array:
    """One layer of the vision transformer: x [B,1+T,D] (Dosovitskiy et al. 2020)."""
    attn, eps = p['attention'], cfg.layer_norm_eps
    y = layer_norm(p['layernorm_before'], x, eps)
    q, k, v = (linear(attn['attention'][name], y) for name in ('query', 'key', 'value'))
    x = x + linear(attn['output']['dense'], attention(q, k, v, cfg.num_attention_heads))
    y = gelu(linear(p['intermediate']['dense'], layer_norm(p['layernorm_after'], x, eps)))
    return x + linear(p['output']['dense'], y)


def positions(table: Array, grid: tuple[int, ...]) -> Array:
    """Position embeddings [1,N*N,D] of a square -> [1,h*w,D] of a grid (h, w), bilinear."""
    side = int(table.shape[1] ** 0.5)
    square = table.reshape(1, side, side, -1)
    return jax.image.resize(square, (1, *grid, table.shape[-1]), 'linear',
                            antialias=False).reshape(1, -1, table.shape[-1])


def residual(p: Params, x: Array) -> Array:
    """A residual unit with activation first: x [B,H,W,C]."""
    y = conv(p['convolution1'], jax.nn.relu(x))
    return x + conv(p['convolution2'], jax.nn.relu(y))


def double(x: Array) -> Array:
    """Bilinear x2 in which the corners stay corners (torch's align_corners): [B,H,W,C]."""
    for axis in (1, 2):
        n = x.shape[axis]
        at = np.linspace(0, n - 1, 2 * n)
        low = np.minimum(at.astype(int), max(n - 2, 0))
        shape = [1] * x.ndim
        shape[axis] = 2 * n
        high_part = jnp.asarray((at - low).reshape(shape), x.dtype)
        below, above = (jnp.take(x, np.minimum(i, n - 1), axis) for i in (low, low + 1))
        x = below + high_part * (above - below)
    return x
