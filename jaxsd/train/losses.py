"""What is minimised: `loss(params, batch, key) -> (scalar, {name: scalar})`, for each stage."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxsd.config import ControlNetConfig, ModelConfig
from jaxsd.models import clip, controlnet, unet, vae
from jaxsd.typing import Params

Batch = Mapping[str, Any]  # of arrays
Loss = tuple[Array, dict[str, Array]]  # the loss, and what else is logged, by name


def signal_and_noise(alphas_cumprod: Array, t: Int[Array, ' B']) -> tuple[Array, Array]:
    """(sqrt(abar_t), sqrt(1 - abar_t)) for t int [B], each [B,1,1,1]."""
    abar = alphas_cumprod[t][:, None, None, None]
    return jnp.sqrt(abar), jnp.sqrt(1 - abar)


def add_noise(x0: Float[Array, 'B H W C'], noise: Float[Array, 'B H W C'], alphas_cumprod: Array,
              t: Int[Array, ' B']) -> Float[Array, 'B H W C']:
    """Forward diffusion q(x_t | x_0) (Ho et al. 2020, eq. 4)."""
    signal, sigma = signal_and_noise(alphas_cumprod, t)
    return signal * x0 + sigma * noise


def target(x0: Float[Array, 'B H W C'], noise: Float[Array, 'B H W C'], alphas_cumprod: Array,
           t: Int[Array, ' B'], prediction_type: str) -> Float[Array, 'B H W C']:
    """What the network should say: the noise, v (Salimans and Ho 2022, eq. 13), or x0."""
    signal, sigma = signal_and_noise(alphas_cumprod, t)
    return {'epsilon': noise, 'v_prediction': signal * noise - sigma * x0,
            'sample': x0}[prediction_type]


def min_snr_weight(alphas_cumprod: Array, t: Int[Array, ' B'], prediction_type: str,
                   gamma: float = 5.0) -> Float[Array, ' B']:
    """Weights [B] that cap the signal-to-noise ratio at gamma (Hang et al. 2023, section 3.4)."""
    snr = alphas_cumprod[t] / (1 - alphas_cumprod[t])
    capped = jnp.minimum(snr, gamma)
    return capped / {'epsilon': snr, 'v_prediction': snr + 1,
                     'sample': jnp.ones_like(snr)}[prediction_type]


def autoencoder(params: Params, config: ModelConfig, batch: Batch, key: Array,
                kl_weight: float = 1e-6) -> Loss:
    """Absolute and squared error of the reconstruction, and a slight pull to a unit normal.

    batch: image [B,H,W,3] in [-1,1]. The last metric is the PSNR in dB, for a range of 2.
    """
    image = batch['image']
    mean, logvar = vae.encode(params['vae'], config.vae, image)
    latent = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    error = vae.decode(params['vae'], config.vae, latent) - image
    absolute, squared = jnp.abs(error).mean(), jnp.square(error).mean()
    kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).sum((1, 2, 3)).mean()
    loss = absolute + squared + kl_weight * kl
    return loss, {'absolute': absolute, 'kl': kl, 'psnr': 10 * jnp.log10(4 / squared)}


def decoder(params: Params, config: ModelConfig, batch: Batch, key: Array) -> Loss:
    """The same errors, of the decoder alone on given latents.

    batch: latent [B,h,w,L] as `vae.decode` takes it, image [B,H,W,3] in [-1,1].
    """
    error = vae.decode(params['vae'], config.vae, batch['latent']) - batch['image']
    absolute, squared = jnp.abs(error).mean(), jnp.square(error).mean()
    return absolute + squared, {'absolute': absolute, 'psnr': 10 * jnp.log10(4 / squared)}


def alignment(params: Params, config: ModelConfig, batch: Batch, key: Array) -> Loss:
    """Pooled text, through one linear layer, against the picture's latent.

    It gives the text encoder a start before the joint training, as CLIP's training on pictures
    does for the released models. batch: tokens int [B,T], latent [B,H,W,C].
    """
    assert config.text_encoder is not None
    pooled = clip.encode(params['text_encoder'], config.text_encoder, batch['tokens']).pooled
    head = params['alignment']
    guess = pooled @ head['weight'] + head['bias']
    loss = jnp.square(guess - batch['latent'].reshape(guess.shape)).mean()
    return loss, {}


def diffusion(params: Params, config: ModelConfig, batch: Batch, key: Array, alphas_cumprod: Array,
              caption_dropout: float = 0.1, gamma: float = 5.0,
              residuals: Callable[[Array, Array, Array], list[Array]] | None = None) -> Loss:
    """The weighted squared error of the U-Net's prediction at random timesteps.

    batch: latent [B,H,W,C] of unit scale, tokens int [B,T], empty int [T] (the encoded '', which
    replaces a caption with probability `caption_dropout`; Ho and Salimans 2022). gamma 0: no
    min-SNR weighting. residuals(x, t, context): what a ControlNet adds to the U-Net's states.
    """
    x0, tokens = batch['latent'], batch['tokens']
    k_t, k_noise, k_drop = jax.random.split(key, 3)
    B, kind = x0.shape[0], config.schedule.prediction_type
    # Stratified over the batch: the same expectation with less variance.
    u = (jnp.arange(B) + jax.random.uniform(k_t, (B,))) / B
    t = jnp.minimum(u * len(alphas_cumprod), len(alphas_cumprod) - 1).astype(jnp.int32)
    noise = jax.random.normal(k_noise, x0.shape)
    drop = jax.random.bernoulli(k_drop, caption_dropout, (B, 1))
    tokens = jnp.where(drop, batch['empty'], tokens)
    assert config.text_encoder is not None
    context = clip.encode(params['text_encoder'], config.text_encoder, tokens).hidden
    x = add_noise(x0, noise, alphas_cumprod, t)
    more = None if residuals is None else residuals(x, t, context)
    out = unet.apply(params['unet'], config.unet, x, t, context, residuals=more)
    error = jnp.square(out - target(x0, noise, alphas_cumprod, t, kind)).mean((1, 2, 3))
    weight = min_snr_weight(alphas_cumprod, t, kind, gamma) if gamma else jnp.ones(B)
    return (weight * error).mean(), {'error': error.mean()}


def control(params: Params, config: ModelConfig, net: ControlNetConfig, batch: Batch, key: Array,
            alphas_cumprod: Array, caption_dropout: float = 0.5, gamma: float = 0.0) -> Loss:
    """`diffusion` under a ControlNet, the only one that learns (Zhang et al. 2023, eq. 5).

    params: the ControlNet's, net its ControlNetConfig. batch: as of `diffusion`; hint uint8
    [B,8H,8W,3], what the pictures are to follow; model, the params of the model it is made for.
    Captions are dropped often, so that it learns to read the hint (section 3.3).
    """
    hint = controlnet.embed(params, batch['hint'] / 255)

    def residuals(x, t, context):
        return controlnet.apply(params, net, x, t, context, hint)

    return diffusion(batch['model'], config, batch, key, alphas_cumprod, caption_dropout, gamma,
                     residuals)
