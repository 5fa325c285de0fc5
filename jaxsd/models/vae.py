"""The autoencoder between pixels and latents (AutoencoderKL; Rombach et al. 2022).

Where the parameters are an AutoencoderTiny's, taesd.py stands in for it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
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
