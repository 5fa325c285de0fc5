"""A tiny stand-in for a VAE: AutoencoderTiny (TAESD; https://github.com/madebyollin/taesd).

Latents are those that the U-Net sees, pictures inside are in [0,1]. The structure is read off the
parameters: a layer without bias changes the resolution.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxsd.config import TinyVAEConfig
from jaxsd.models.layers import children, conv, upsample
from jaxsd.typing import Params


def encode(params: Params, cfg: TinyVAEConfig,
           image: Float[Array, 'B H W 3']) -> Float[Array, 'B h w L']:
    """image in [-1,1] -> latent in float32, as the U-Net sees it."""
    first, *rest = children(params['encoder']['layers'])
    x = (image.astype(first['weight'].dtype) + 1) / 2
    return _blocks(rest, conv(first, x), lambda p, x: conv(p, x, stride=2))


def decode(params: Params, cfg: TinyVAEConfig,
           latent: Float[Array, 'B h w L']) -> Float[Array, 'B H W 3']:
    """latent as the U-Net sees it -> image in float32, about [-1,1]."""
    first, *rest = children(params['decoder']['layers'])
    x = 3 * jnp.tanh(latent.astype(first['weight'].dtype) / 3)
    x = _blocks(rest, jax.nn.relu(conv(first, x)), lambda p, x: upsample({'conv': p}, x))
    return 2 * x - 1


def _blocks(layers, x, resample):
    for p in layers:
        if 'conv' in p:
            x = _block(p['conv'], x)
        else:
            x = conv(p, x) if 'bias' in p else resample(p, x)
    return x.astype(jnp.float32)


def _block(p, x):
    """Three convolutions beside the identity: [B,H,W,C] -> [B,H,W,C]."""
    first, second, third = children(p)
    h = jax.nn.relu(conv(second, jax.nn.relu(conv(first, x))))
    return jax.nn.relu(x + conv(third, h))
