"""CodeFormer: a transformer that names a face's parts from a codebook, between a VQGAN's halves.

Zhou et al. 2022 (https://arxiv.org/abs/2206.11253), Esser et al. 2020
(https://arxiv.org/abs/2012.09841). Parameter names are those of the files; a file's config is read
off its tensors.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxsd.config import CodeFormerConfig
from jaxsd.models import shapes
from jaxsd.models.layers import (
    attention,
    children,
    conv,
    gelu,
    group_norm,
    layer_norm,
    linear,
    pointwise,
    resnet,
    upsample,
)
from jaxsd.typing import Params, Shapes

GROUPS, EPS = 32, 1e-6  # of the norms
LAYERS = 2  # residual blocks of a size


def apply(params: Params, cfg: CodeFormerConfig, image: Float[Array, 'B S S 3'],
          weight: Any = 0.5) -> Float[Array, 'B S S 3']:
    """An aligned face in [-1,1], S = cfg.size pixels -> the face restored, about [-1,1], float32.

    weight: how much of the given face's own features the drawn one takes, 0 to 1. Raises
    ValueError for other sizes.
    """
    if image.shape[1:] != (cfg.size, cfg.size, 3):
        raise ValueError(f'faces of {image.shape[1:]}: expected {cfg.size}x{cfg.size} pixels')
    p, seen = params, {}
    x = image.astype(p['feat_emb']['weight'].dtype)
    blocks = p['encoder']['blocks']
    for i, (kind, *_, fused) in enumerate(_encoder(cfg)):
        x = _block(kind, blocks[str(i)], x)
        if fused:
            seen[fused] = x
    x = _normed(_codes(p, cfg, x), x)
    blocks = p['generator']['blocks']
    for i, (kind, *_, fused) in enumerate(_generator(cfg)):
        x = _block(kind, blocks[str(i)], x)
        if fused:
            x = _fused(p['fuse_convs_dict'][str(fused)], seen[fused], x, weight)
    return x.astype(jnp.float32)


def _codes(p, cfg, x):
    """The codebook's entry for each pixel of the encoder's, as the transformer names them."""
    B, H, W, C = x.shape
    tokens, at = linear(p['feat_emb'], x.reshape(B, H * W, C)), p['position_emb']
    for layer in children(p['ft_layers']):
        own, h = layer['self_attn'], layer_norm(layer['norm1'], tokens)
        w, b = own['in_proj_weight'], own['in_proj_bias']
        q, k, _ = jnp.split((h + at) @ w + b, 3, -1)
        v = jnp.split(h @ w + b, 3, -1)[2]
        tokens = tokens + linear(own['out_proj'], attention(q, k, v, cfg.heads))
        h = gelu(linear(layer['linear1'], layer_norm(layer['norm2'], tokens)))
        tokens = tokens + linear(layer['linear2'], h)
    head = p['idx_pred_layer']
    found = linear(head['1'], layer_norm(head['0'], tokens)).argmax(-1)
    return p['quantize']['embedding']['weight'][found].reshape(B, H, W, C)


def _normed(x, like):
    """x with the means and deviations of `like`, channel by channel (Huang and Belongie 2017)."""
    def moments(x):
        x = x.astype(jnp.float32)
        return x.mean((1, 2), keepdims=True), jnp.sqrt(
            x.var((1, 2), ddof=1, keepdims=True) + 1e-5)

    (mean, deviation), (new_mean, new_deviation) = moments(x), moments(like)
    return ((x - mean) / deviation * new_deviation + new_mean).astype(like.dtype)


def _fused(p, seen, x, weight):
    """The generator's features, scaled and shifted by what the encoder saw at their size."""
    h = resnet(p['encode_enc'], jnp.concatenate([seen, x], -1), GROUPS, EPS)
    scale, shift = (conv(q['2'], _lrelu(conv(q['0'], h))) for q in (p['scale'], p['shift']))
    return x + jnp.asarray(weight, x.dtype) * (x * scale + shift)


def _block(kind, p, x):
    if kind == 'resnet':
        return resnet(p, x, GROUPS, EPS)
    if kind == 'attention':
        B, H, W, C = x.shape
        h = group_norm(p['norm'], x, GROUPS, EPS)
        q, k, v = (pointwise(p[name], h).reshape(B, H * W, C) for name in 'qkv')
        return x + pointwise(p['proj_out'], attention(q, k, v, 1).reshape(x.shape))
    if kind == 'down':
        return conv(p['conv'], x, 2, (0, 1))
    if kind == 'up':
        return upsample(p, x)
    return group_norm(p, x, GROUPS, EPS) if kind == 'norm' else conv(p, x)


def _encoder(c: CodeFormerConfig) -> Iterator[tuple[str, int, int, int]]:
    """(kind, channels in, channels out, the size at which the generator takes what comes out, or
    0) of each block."""
    below, last = c.channels[0], len(c.channels) - 1
    yield 'conv', 3, below, 0
    for i, width in enumerate(c.channels):
        for k in range(LAYERS):
            size = c.size >> i
            yield 'resnet', below, width, size * (k == LAYERS - 1 and size in c.connect)
            below = width
            if i == last:
                yield 'attention', width, width, 0
        if i < last:
            yield 'down', width, width, 0
    yield from _middle(below)
    yield 'norm', below, below, 0
    yield 'conv', below, c.codes, 0


def _generator(c: CodeFormerConfig) -> Iterator[tuple[str, int, int, int]]:
    """As `_encoder`; the size at which what comes out is fused."""
    below, last = c.channels[-1], len(c.channels) - 1
    yield 'conv', c.codes, below, 0
    yield from _middle(below)
    for i in range(last, -1, -1):
        for k in range(LAYERS):
            size = c.size >> i
            yield 'resnet', below, c.channels[i], size * (k == 0 and size in c.connect)
            below = c.channels[i]
            if i == last:
                yield 'attention', below, below, 0
        if i:
            yield 'up', below, below, 0
    yield 'norm', below, below, 0
    yield 'conv', below, 3, 0


def _middle(width):
    for kind in ('resnet', 'attention', 'resnet'):
        yield kind, width, width, 0


def _lrelu(x):
    return jnp.where(x > 0, x, 0.2 * x)


def names(c: CodeFormerConfig) -> Shapes:
    """Names and shapes of the parameters, see shapes.py."""
    d, table = c.width, Shapes()
    for half, blocks in (('encoder', _encoder(c)), ('generator', _generator(c))):
        for n, (kind, i, o, _) in enumerate(blocks):
            at = f'{half}.blocks.{n}'
            if kind == 'resnet':
                table |= shapes.resnet(at, i, o)
            elif kind == 'attention':
                table |= shapes.affine(f'{at}.norm', o)
                for name in ('q', 'k', 'v', 'proj_out'):
                    table |= shapes.conv(f'{at}.{name}', o, o, 1)
            elif kind == 'norm':
                table |= shapes.affine(at, o)
            else:
                table |= shapes.conv(at if kind == 'conv' else f'{at}.conv', i, o)
    table['quantize.embedding.weight'] = (c.codebook, c.codes)
    table['position_emb'] = (c.latent**2, d)
    table |= shapes.linear('feat_emb', c.codes, d)
    for n in range(c.layers):
        at = f'ft_layers.{n}'
        table |= {f'{at}.self_attn.in_proj_weight': (3 * d, d),
                  f'{at}.self_attn.in_proj_bias': (3 * d,)}
        table |= shapes.linear(f'{at}.self_attn.out_proj', d, d)
        table |= shapes.linear(f'{at}.linear1', d, 2 * d) | shapes.linear(f'{at}.linear2', 2 * d, d)
        table |= shapes.affine(f'{at}.norm1', d) | shapes.affine(f'{at}.norm2', d)
    table |= shapes.affine('idx_pred_layer.0', d)
    table |= shapes.linear('idx_pred_layer.1', d, c.codebook, bias=False)
    for size in c.connect:
        at, w = f'fuse_convs_dict.{size}', c.channels[int(math.log2(c.size // size))]
        table |= shapes.resnet(f'{at}.encode_enc', 2 * w, w)
        for name in ('scale', 'shift'):
            table |= shapes.conv(f'{at}.{name}.0', w, w) | shapes.conv(f'{at}.{name}.2', w, w)
    return table


def renamed(stored: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """{name of a parameter: its name in a file}, from the names there."""
    return {re.sub(r'^(params_ema|params)\.', '', name).replace('.conv_out.', '.conv_shortcut.'):
            name for name in stored}


def config_of(stored: Mapping[str, tuple[int, ...]]) -> CodeFormerConfig:
    """The config of a file's tensors: {name, as `renamed`: shape}. Raises ValueError or KeyError
    for those of no such network."""
    if not any(name.startswith('ft_layers.') for name in stored):
        raise ValueError('not CodeFormer')
    downs = [int(m[1]) for name in stored
             if (m := re.fullmatch(r'encoder\.blocks\.(\d+)\.conv\.weight', name))]
    connect = {int(m[1]) for name in stored if (m := re.match(r'fuse_convs_dict\.(\d+)\.', name))}
    codebook, codes = stored['quantize.embedding.weight']
    places, width = stored['position_emb']
    last = 1 + max(downs, default=0)  # the first block of the smallest size
    return CodeFormerConfig(
        channels=(*(stored[f'encoder.blocks.{n}.conv.weight'][0] for n in sorted(downs)),
                  stored[f'encoder.blocks.{last}.conv2.weight'][0]),
        codes=codes, codebook=codebook, width=width, latent=math.isqrt(places),
        layers=1 + max(int(m[1]) for name in stored if (m := re.match(r'ft_layers\.(\d+)', name))),
        connect=tuple(sorted(connect)))
