"""The U-Net of the x2 latent upscaler: UNet2DConditionModel of k-diffusion's blocks.

Residual and attention blocks take the time by adaptive group norms, there are no MLPs, and each
level of the way up sees one skip connection, the last one of the level on the way down. The
structure is read off the parameters; the config adds what arrays cannot say (heads, groups, eps).
"""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxsd.config import KUNetConfig
from jaxsd.models.layers import (
    attention,
    children,
    conv,
    gelu,
    group_norm,
    layer_norm,
    linear,
    pointwise,
)
from jaxsd.models.shapes import affine as norm
from jaxsd.models.shapes import conv as convolution
from jaxsd.models.shapes import linear as layer
from jaxsd.typing import Params, Shapes

GROUP = 32  # channels that are normalised together


def apply(params: Params, cfg: KUNetConfig, x: Float[Array, 'B H W C'], t: Float[Array, ' B'],
          context: Float[Array, 'B T D'], added: Float[Array, 'B A']) -> Float[Array, 'B H W O']:
    """The network's output for x at the noise levels t = log(sigma) / 4; O = cfg.out_channels.

    context: features of the text; added: what `conditioning.encode` makes of its pooled vector.
    Computes in the parameters' dtype and returns x's.
    """
    dtype = params['conv_in']['weight'].dtype
    p, angle = params['time_embedding'], 2 * np.pi * t[:, None] * params['time_proj']['weight']
    waves = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1).astype(dtype)
    time = gelu(linear(p['linear_1'], waves + linear(p['cond_proj'], added.astype(dtype))))
    time, context, skips = gelu(linear(p['linear_2'], time)), context.astype(dtype), []

    h, last = pointwise(params['conv_in'], x.astype(dtype)), len(params['down_blocks']) - 1
    for level, block in enumerate(children(params['down_blocks'])):
        h = _level(block, cfg, h, time, context)
        if level < last:
            skips.append(h)
            h = _halved(h)
    for level, block in enumerate(children(params['up_blocks'])):
        h = _level(block, cfg, jnp.concatenate([h, skips.pop()], -1) if level else h, time, context)
        if level < last:
            h = _doubled(h)
    return pointwise(params['conv_out'], h)[..., :cfg.out_channels].astype(x.dtype)


def _level(p, cfg, x, time, context):
    """The residual and attention blocks of a level."""
    for i, block in enumerate(children(p['resnets'])):
        h = conv(block['conv1'], gelu(_norm(block['norm1'], cfg, x, time)))
        h = conv(block['conv2'], gelu(_norm(block['norm2'], cfg, h, time)))
        x = h + (conv(block['conv_shortcut'], x, padding=0) if 'conv_shortcut' in block else x)
        if 'attentions' in p:
            x = _attend(p['attentions'][str(i)], cfg, x, time, context)
    return x


def _attend(p, cfg, x, time, context):
    """Self-attention, where there is one, and cross-attention."""
    B, H, W, C = x.shape
    for which in ('1', '2') if 'attn1' in p else ('2',):
        a = p[f'attn{which}']
        h = _norm(p[f'norm{which}'], cfg, x, time).reshape(B, H * W, C)
        source = layer_norm(a['norm_cross'], context) if which == '2' else h
        out = attention(linear(a['to_q'], h), linear(a['to_k'], source), linear(a['to_v'], source),
                        C // cfg.attention_head_dim)
        x = x + linear(a['to_out']['0'], out).reshape(x.shape)
    return x


def _norm(p, cfg, x, time):
    """A group norm whose scale and shift depend on the time."""
    scale, shift = jnp.split(linear(p['linear'], time)[:, None, None], 2, -1)
    return group_norm({'weight': 1 + scale, 'bias': shift}, x, max(1, x.shape[-1] // GROUP),
                      cfg.norm_eps)


def _halved(x):
    """Half as high and wide, by the weights 1/8, 3/8, 3/8, 1/8 along each axis."""
    for axis in (1, 2):
        widths = [(int(axis == k),) * 2 for k in range(4)]
        padded = jnp.moveaxis(jnp.pad(x, widths, 'reflect'), axis, 0)
        count = x.shape[axis]
        x = jnp.moveaxis(sum(w / 8 * padded[k:k + count:2] for k, w in enumerate((1, 3, 3, 1))), 0,
                         axis)
    return x


def _doubled(x):
    """Twice as high and wide: between each two cells two new ones, by the weights 1/4 and 3/4."""
    for axis in (1, 2):
        widths = [(int(axis == k),) * 2 for k in range(4)]
        padded = jnp.moveaxis(jnp.pad(x, widths, 'reflect'), axis, 0)
        before, here, after = padded[:-2], padded[1:-1], padded[2:]
        pair = jnp.stack([before / 4 + 3 / 4 * here, 3 / 4 * here + after / 4], 1)
        x = jnp.moveaxis(pair.reshape(-1, *pair.shape[2:]), 0, axis)
    return x


def names(c: KUNetConfig) -> Shapes:
    """{dotted name: shape}, as in its files; the order of axes is torch's."""
    channels, each, time = c.block_out_channels, c.layers_per_block, 2 * c.block_out_channels[0]
    found = layer('conv_in', c.in_channels, channels[0]) | layer(
        'conv_out', channels[0], c.out_channels + 1)
    found = {name: (*shape, 1, 1) if name.endswith('weight') else shape
             for name, shape in found.items()} | {'time_proj.weight': (time // 2,)}
    found |= layer('time_embedding.linear_1', time, time)
    found |= layer('time_embedding.linear_2', time, time)
    found |= layer('time_embedding.cond_proj', c.time_cond_dim, time, bias=False)

    def resnet(at, i, middle, o):
        names = layer(f'{at}.norm1.linear', time, 2 * i) | convolution(f'{at}.conv1', i, middle)
        names |= layer(f'{at}.norm2.linear', time, 2 * middle)
        names |= convolution(f'{at}.conv2', middle, o)
        return names | (convolution(f'{at}.conv_shortcut', i, o, 1, bias=False) if i != o else {})

    def attend(at, d, own):
        names, context = Shapes(), c.cross_attention_dim
        for which, source in (('1', d), ('2', context))[not own:]:
            names |= layer(f'{at}.norm{which}.linear', time, 2 * d)
            for proj, i in (('to_q', d), ('to_k', source), ('to_v', source), ('to_out.0', d)):
                names |= layer(f'{at}.attn{which}.{proj}', i, d)
        return names | norm(f'{at}.attn2.norm_cross', context)

    below, last = channels[0], len(channels) - 1
    for level, o in enumerate(channels):
        for k in range(each):
            at = f'down_blocks.{level}'
            found |= resnet(f'{at}.resnets.{k}', below, o, o)
            found |= attend(f'{at}.attentions.{k}', o, level == last) if level else {}
            below = o
    for up, level in enumerate(reversed(range(len(channels)))):
        o, above = channels[level], channels[max(level - 1, 0)]
        for k in range(each):
            end = above if k == each - 1 else o
            at, i = f'up_blocks.{up}', (o if k or not up else 2 * o)
            found |= resnet(f'{at}.resnets.{k}', i, o, end)
            found |= attend(f'{at}.attentions.{k}', end, not up) if level else {}
    return found
