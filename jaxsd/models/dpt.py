"""The depth of a picture: MiDaS' hybrid DPT (Ranftl et al. 2021, Vision Transformers for Dense
Prediction; parameter names of transformers' DPTForDepthEstimation with a BiT backbone), and Depth
Anything (Yang et al. 2024, https://arxiv.org/abs/2406.09414; DepthAnythingForDepthEstimation)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxsd.config import DepthAnythingConfig, DPTConfig
from jaxsd.images.fitting import cubic_weights
from jaxsd.models import shapes
from jaxsd.models.layers import (
    attention,
    children,
    conv,
    corners,
    group_norm,
    layer_norm,
    linear,
    pointwise,
)
from jaxsd.typing import Params, Shapes

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
    """Bilinear x2, see `corners`."""
    return corners(x, 2 * x.shape[1], 2 * x.shape[2])


def depth_anything(params: Params, cfg: DepthAnythingConfig,
                   pixels: Float[Array, 'B H W 3']) -> Float[Array, 'B H W']:
    """Depth Anything: pixels, by ImageNet's mean and deviation -> inverse depth in float32.

    Sides are multiples of cfg.patch_size; where they are not cfg.image_size, the position
    embeddings are interpolated. Raises ValueError for other sides.
    """
    (_, H, W, _), size = pixels.shape, cfg.patch_size
    if H % size or W % size:
        raise ValueError(f'pixels of {W}x{H}: expected sides that are multiples of {size}')
    p, neck = params['backbone']['embeddings'], params['neck']
    w = p['patch_embeddings']['projection']
    x = pixels.astype(w['weight'].dtype)
    x = conv(w, x, size, 0)  # [B,h,w,D]
    grid = x.shape
    table = p['position_embeddings']
    x = x.reshape(grid[0], -1, grid[-1]) + _cubic_positions(table[:, 1:], grid[1:3])
    first = p['cls_token'] + table[:, :1]
    x, maps = jnp.concatenate([jnp.broadcast_to(first, (grid[0], *first.shape[1:])), x], 1), []
    for i, layer in enumerate(children(params['backbone']['encoder']['layer']), 1):
        x = _dinov2(layer, cfg, x)
        if i in cfg.out_indices:
            part = neck['reassemble_stage']['layers'][str(len(maps))]
            y = layer_norm(params['backbone']['layernorm'], x, 1e-6)[:, 1:].reshape(grid)
            y = pointwise(part['projection'], y)
            if len(maps) == 3:
                y = conv(part['resize'], y, 2)
            elif 'resize' in part:
                y = _blown_up(part['resize'], y)
            maps.append(y)

    maps = [conv(c, y) for c, y in zip(children(neck['convs']), maps)]
    fused: Any = None  # from the coarsest map to twice the finest
    for i, layer in enumerate(children(neck['fusion_stage']['layers'])):
        y = maps[-1 - i]
        fused = y if fused is None else fused + residual(layer['residual_layer1'], y)
        shape = maps[-2 - i].shape[1:3] if i < 3 else (2 * y.shape[1], 2 * y.shape[2])
        fused = corners(pointwise(layer['projection'], residual(layer['residual_layer2'], fused)),
                        *shape)
    head = params['head']
    x = jax.nn.relu(conv(head['conv2'], corners(conv(head['conv1'], fused), H, W)))
    return jax.nn.relu(pointwise(head['conv3'], x))[..., 0].astype(jnp.float32)


def _dinov2(p, cfg, x):
    """A layer of DINOv2's transformer (Oquab et al. 2023): x [B,1+T,D]."""
    attn = p['attention']
    y = layer_norm(p['norm1'], x, 1e-6)
    q, k, v = (linear(attn['attention'][name], y) for name in ('query', 'key', 'value'))
    y = linear(attn['output']['dense'], attention(q, k, v, cfg.num_attention_heads))
    x = x + y * p['layer_scale1']['lambda1']
    y = gelu(linear(p['mlp']['fc1'], layer_norm(p['norm2'], x, 1e-6)))
    return x + linear(p['mlp']['fc2'], y) * p['layer_scale2']['lambda1']


def _cubic_positions(table, grid):
    """As `positions`, by cubic convolution."""
    side = int(table.shape[1] ** 0.5)
    square = table.reshape(side, side, -1).transpose(2, 0, 1)
    if grid != (side, side):
        down, across = (jnp.asarray(cubic_weights(side, n), table.dtype) for n in grid)
        square = down @ square @ across.T
    return square.transpose(1, 2, 0).reshape(1, -1, table.shape[-1])


def _blown_up(p, x):
    """torch's ConvTranspose2d whose stride is its kernel's size; weight [K,K,O,I]."""
    (B, H, W, _), (K, _, O, _) = x.shape, p['weight'].shape
    y = jnp.einsum('bhwi,kloi->bhkwlo', x, p['weight'])
    return y.reshape(B, K * H, K * W, O) + p['bias']


def depth_anything_names(c: DepthAnythingConfig) -> Shapes:
    """Names and shapes of DepthAnythingForDepthEstimation's parameters, see shapes.py."""
    d, at = c.hidden_size, 'backbone.embeddings'
    table: Shapes = {f'{at}.cls_token': (1, 1, d), f'{at}.position_embeddings': (
        1, (c.image_size // c.patch_size) ** 2 + 1, d)}
    table |= shapes.conv(f'{at}.patch_embeddings.projection', 3, d, c.patch_size)
    for i in range(c.num_hidden_layers):
        at = f'backbone.encoder.layer.{i}'
        for name in ('attention.query', 'attention.key', 'attention.value', 'output.dense'):
            table |= shapes.linear(f'{at}.attention.{name}', d, d)
        table |= shapes.affine(f'{at}.norm1', d) | shapes.affine(f'{at}.norm2', d)
        table |= shapes.linear(f'{at}.mlp.fc1', d, c.intermediate_size)
        table |= shapes.linear(f'{at}.mlp.fc2', c.intermediate_size, d)
        table |= {f'{at}.layer_scale{n}.lambda1': (d,) for n in (1, 2)}
    table |= shapes.affine('backbone.layernorm', d)
    f = c.fusion_hidden_size
    for i, width in enumerate(c.neck_hidden_sizes):
        layer = f'neck.reassemble_stage.layers.{i}'
        table |= shapes.conv(f'{layer}.projection', d, width, 1)
        if k := (4, 2, 0, 3)[i]:
            table |= shapes.conv(f'{layer}.resize', width, width, k)
        table |= shapes.conv(f'neck.convs.{i}', width, f, bias=False)
        layer = f'neck.fusion_stage.layers.{i}'
        table |= shapes.conv(f'{layer}.projection', f, f, 1)
        for unit in ('residual_layer1', 'residual_layer2'):
            for n in (1, 2):
                table |= shapes.conv(f'{layer}.{unit}.convolution{n}', f, f)
    return (table | shapes.conv('head.conv1', f, f // 2) | shapes.conv(
        'head.conv2', f // 2, c.head_hidden_size) | shapes.conv(
            'head.conv3', c.head_hidden_size, 1, 1))
