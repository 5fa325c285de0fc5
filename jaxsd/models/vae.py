"""The autoencoder between pixels and latents (AutoencoderKL; Rombach et al. 2022).

Where the parameters are an AutoencoderTiny's, taesd.py stands in for it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from jaxsd.config import TinyVAEConfig, VAEConfig
from jaxsd.models import taesd
from jaxsd.models.layers import (
    attention,
    children,
    conv,
    group_norm,
    linear,
    pointwise,
    prepared,
    resnet,
    upsample,
)
from jaxsd.typing import Params

EPS = 1e-6


def encode(params: Params, cfg: VAEConfig | TinyVAEConfig,
           image: Float[Array, 'B H W 3']) -> tuple[Array, Array]:
    """image in [-1,1] -> (mean, logvar), each [B,h,w,L] float32; latents unscaled."""
    if isinstance(cfg, TinyVAEConfig):
        mean = taesd.encode(params, cfg, image)
        return mean, jnp.full_like(mean, -30.0)
    p = params['encoder']
    x = conv(p['conv_in'], image.astype(p['conv_in']['weight'].dtype))
    for block in children(p['down_blocks']):
        for layer in children(block['resnets']):
            x = resnet(layer, x, cfg.norm_num_groups, EPS)
        if 'downsamplers' in block:  # pads after only, unlike the U-Net
            x = conv(block['downsamplers']['0']['conv'], x, stride=2, padding=(0, 1))
    x = _head(p, cfg, _mid(p['mid_block'], cfg, x))
    mean, logvar = jnp.split(pointwise(params['quant_conv'], x).astype(jnp.float32), 2, -1)
    return mean, jnp.clip(logvar, -30.0, 20.0)


def decode(params: Params, cfg: VAEConfig | TinyVAEConfig,
           latent: Float[Array, 'B h w L']) -> Float[Array, 'B H W 3']:
    """Unscaled latents -> image in float32, about [-1,1]."""
    if isinstance(cfg, TinyVAEConfig):
        return taesd.decode(params, cfg, latent)
    p = prepared(params['decoder'])
    x = pointwise(params['post_quant_conv'], latent.astype(p['conv_in']['weight'].dtype))
    x = _mid(p['mid_block'], cfg, conv(p['conv_in'], x))
    for block in children(p['up_blocks']):
        for layer in children(block['resnets']):
            x = resnet(layer, x, cfg.norm_num_groups, EPS)
        if 'upsamplers' in block:
            x = upsample(block['upsamplers']['0'], x)
    return _head(p, cfg, x).astype(jnp.float32)


def unit(image: Array | np.ndarray) -> Array:
    """Pixels uint8 -> float32 in [-1,1], as `encode` takes them."""
    return jnp.asarray(image, jnp.float32) / 127.5 - 1


def scale(cfg: VAEConfig | TinyVAEConfig, z: Float[Array, '... L']) -> Float[Array, '... L']:
    """Latents of the encoder -> as the U-Net sees them, see VAEConfig."""
    shift, factor, mean, std = _statistics(cfg)
    return (z - shift - mean) * (factor / std)


def unscale(cfg: VAEConfig | TinyVAEConfig, latent: Float[Array, '... L']) -> Float[Array, '... L']:
    """The inverse of `scale`."""
    shift, factor, mean, std = _statistics(cfg)
    return latent / (factor / std) + shift + mean


def _statistics(cfg):
    """Shift and factor, and mean and deviation of the channels."""
    return (cfg.shift_factor, cfg.scaling_factor, np.float32(cfg.latents_mean or 0),
            np.float32(cfg.latents_std or 1))


def decode_tiled(params: Params, cfg: VAEConfig | TinyVAEConfig, latent: Float[Array, 'B h w L'],
                 tile: int = 64, overlap: int = 16) -> Float[Array, 'B H W 3']:
    """`decode` in overlapping square tiles, cross-faded: the memory of one tile, any size.

    tile, overlap: in latents. Group norms see a tile each, so the result is close to `decode`
    and equals it when the latent fits into one tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f'overlap {overlap}: expected 0 <= overlap < tile, which is {tile}')
    B, H, W, L = latent.shape
    if max(H, W) <= tile:
        return decode(params, cfg, latent)
    f, h, w = cfg.factor, min(tile, H), min(tile, W)
    starts = np.array([(y, x) for y in _starts(H, h, overlap) for x in _starts(W, w, overlap)])
    window = np.outer(_ramp(h * f, overlap * f), _ramp(w * f, overlap * f))[None, :, :, None]
    window = window.astype(np.float32)

    def add(carry, start):
        image, weight = carry
        y, x = start
        part = decode(params, cfg, lax.dynamic_slice(latent, (0, y, x, 0), (B, h, w, L)))
        at = (0, y * f, x * f, 0)
        old = lax.dynamic_slice(image, at, part.shape)
        image = lax.dynamic_update_slice(image, old + part * window, at)
        old = lax.dynamic_slice(weight, at, window.shape)
        return (image, lax.dynamic_update_slice(weight, old + window, at)), None

    empty = (jnp.zeros((B, H * f, W * f, cfg.out_channels)), jnp.zeros((1, H * f, W * f, 1)))
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


def _head(p, cfg, x):
    x = jax.nn.silu(group_norm(p['conv_norm_out'], x, cfg.norm_num_groups, EPS))
    return conv(p['conv_out'], x)


def _mid(p, cfg, x):
    """ResNet, single-head self-attention over all pixels, ResNet: [B,H,W,C] -> [B,H,W,C]."""
    block = functools.partial(resnet, groups=cfg.norm_num_groups, eps=EPS)
    x = block(p['resnets']['0'], x)
    a = p['attentions']['0']
    h = group_norm(a['group_norm'], x, cfg.norm_num_groups, EPS).reshape(
        x.shape[0], -1, x.shape[-1])
    h = attention(linear(a['to_q'], h), linear(a['to_k'], h), linear(a['to_v'], h), heads=1)
    x = x + linear(a['to_out']['0'], h).reshape(x.shape)
    return block(p['resnets']['1'], x)
