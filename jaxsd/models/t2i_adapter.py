"""T2I-Adapter (Mou et al. 2023, https://arxiv.org/abs/2302.08453): diffusers' T2IAdapter.

A small network that reads a picture once, before sampling, and gives a feature for each level of
the U-Net's first half: the types full_adapter and light_adapter (1.x, 2.x) and full_adapter_xl
(SDXL).
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxsd.config import T2IAdapterConfig, UNetConfig
from jaxsd.models import shapes
from jaxsd.models.layers import children, conv, pointwise
from jaxsd.typing import Params, Shapes


def apply(params: Params, cfg: T2IAdapterConfig, hint: Float[Array, 'B H W C']) -> list[Array]:
    """A hint in [0,1], C = cfg.in_channels -> unet.apply's `features`, unscaled.

    H, W: multiples of 8 (of 16 for SDXL). cfg: T2IAdapterConfig.
    """
    p, r = params['adapter'], cfg.downscale_factor
    light = 'conv_in' not in p  # narrow blocks, with a layer to their width at both ends
    B, H, W, C = hint.shape
    x = hint.astype(jax.tree.leaves(p)[0].dtype).reshape(B, H // r, r, W // r, r, C)
    x = x.transpose(0, 1, 3, 5, 2, 4).reshape(B, H // r, W // r, -1)  # channels vary slowest
    x, features = x if light else conv(p['conv_in'], x), []
    for i, block in enumerate(children(p['body'])):
        if i in cfg.halved:
            x = _halve(x)
        if 'in_conv' in block:
            x = pointwise(block['in_conv'], x)
        for layer in children(block['resnets']):
            h = jax.nn.relu(conv(layer['block1'], x))
            x = x + (conv if light else pointwise)(layer['block2'], h)
        if light:
            x = pointwise(block['out_conv'], x)
        features.append(x)
    return features


def check(cfg: T2IAdapterConfig, unet_cfg: UNetConfig) -> None:
    """ValueError unless an adapter fits a U-Net: the widths of its levels."""
    widths = unet_cfg.block_out_channels
    xl = cfg.adapter_type == 'full_adapter_xl'
    if cfg.widths[:len(widths)] != widths or xl != (unet_cfg.added_dim > 0):
        raise ValueError(f'this T2I-Adapter is for {"SDXL" if xl else "1.x or 2.x"} with levels of '
                         f'{cfg.widths}, the model has {widths}'
                         f'{" and is SDXL" * (unet_cfg.added_dim > 0)}; give one made for it')


def _halve(x):
    """Mean of 2x2 pixels, of those that exist at odd edges: [B,H,W,C] -> [B,ceil(H/2),...]."""
    B, H, W, C = x.shape
    x = jnp.pad(x, ((0, 0), (0, H % 2), (0, W % 2), (0, 0)), 'edge')
    return x.reshape(B, -(-H // 2), 2, -(-W // 2), 2, C).mean((2, 4))


def names(c: T2IAdapterConfig) -> Shapes:
    """Names and shapes of the parameters, see shapes.py."""
    if c.adapter_type == 'light_adapter':
        return _light_names(c)
    table = shapes.conv('adapter.conv_in', c.in_channels * c.downscale_factor**2, c.channels[0])
    for i, (below, o) in enumerate(zip((c.channels[0], *c.channels), c.channels)):
        at = f'adapter.body.{i}'
        if below != o:
            table |= shapes.conv(f'{at}.in_conv', below, o, 1)
        for j in range(c.num_res_blocks):
            table |= shapes.conv(f'{at}.resnets.{j}.block1', o, o)
            table |= shapes.conv(f'{at}.resnets.{j}.block2', o, o, 1)
    return table


def _light_names(c):
    table, below = Shapes(), c.in_channels * c.downscale_factor**2
    for i, o in enumerate(c.widths):
        at, narrow = f'adapter.body.{i}', o // 4
        table |= shapes.conv(f'{at}.in_conv', below, narrow, 1)
        for j in range(c.num_res_blocks):
            for name in ('block1', 'block2'):
                table |= shapes.conv(f'{at}.resnets.{j}.{name}', narrow, narrow)
        table |= shapes.conv(f'{at}.out_conv', narrow, o, 1)
        below = o
    return table
