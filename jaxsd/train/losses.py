"""What is minimised: `loss(params, batch, key) -> (scalar, {name: scalar})`.

`diffusion` is the loss of all fine-tuning; TIMESTEPS, WEIGHTINGS and ERRORS hold its parts by name.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxsd import sampling
from jaxsd.config import TEXT_ENCODERS, ModelConfig, T2IAdapterConfig, UNetConfig
from jaxsd.models import clip, controlnet, t2i_adapter, unet, vae
from jaxsd.prompt.conditioning import Conditioning, with_time_ids
from jaxsd.train.config import LossConfig
from jaxsd.typing import Params

Batch = Mapping[str, Any]  # of arrays, see `diffusion`
PLAIN = LossConfig()
Loss = tuple[Array, dict[str, Array]]  # the loss, and what else is logged, by name

# How timesteps are drawn: (key, number of them, LossConfig) -> float [B] in [0,1).
TIMESTEPS: dict[str, Callable[..., Float[Array, ' B']]] = {
    'uniform': lambda key, B, c: jax.random.uniform(key, (B,)),
    # One in each of B equal parts: the same expectation with less variance (Kingma et al. 2021).
    'stratified': lambda key, B, c: (jnp.arange(B) + jax.random.uniform(key, (B,))) / B,
    # Esser et al. 2024, eq. 19.
    'logit_normal': lambda key, B, c: jax.nn.sigmoid(
        c.logit_mean + c.logit_std * jax.random.normal(key, (B,))),
    # More of the noisy ones (T2I-Adapter, Mou et al. 2023, section 3.4).
    'cubic': lambda key, B, c: 1 - jax.random.uniform(key, (B,)) ** 3,
}

# Weights of the error of x0, from the signal-to-noise ratio [B]: (snr, LossConfig) -> [B]. The
# errors of the noise and of v are this one times snr and snr + 1.
WEIGHTINGS: dict[str, Callable[..., Float[Array, ' B']]] = {
    'sample': lambda snr, c: jnp.ones_like(snr),
    'epsilon': lambda snr, c: snr,  # Ho et al. 2020, the simple loss
    'v_prediction': lambda snr, c: snr + 1,  # Salimans and Ho 2022
    'min_snr': lambda snr, c: jnp.minimum(snr, c.gamma),  # Hang et al. 2023, section 3.4
    'soft_min_snr': lambda snr, c: snr * c.gamma / (snr + c.gamma),  # Crowson et al. 2024
    'p2': lambda snr, c: snr / (1 + snr) ** c.p2_gamma,  # Choi et al. 2022, eq. 8, k = 1
    'edm': lambda snr, c: snr + 1 / c.sigma_data**2,  # Karras et al. 2022, table 1
    'debiased': lambda snr, c: jnp.sqrt(snr),  # Yu et al. 2023, section 4
}

# Of differences: (difference, the width c of pseudo-Huber's quadratic part) -> the same shape.
ERRORS: dict[str, Callable[[Array, Array], Array]] = {
    'l2': lambda d, c: jnp.square(d),
    'huber': lambda d, c: 2 * c * (jnp.sqrt(jnp.square(d) + c * c) - c),  # Khrapov et al. 2024
    'smooth_l1': lambda d, c: 2 * (jnp.sqrt(jnp.square(d) + c * c) - c),
}

# The width c over the noise levels (Khrapov et al. 2024): (t in [0,1], sigma, LossConfig) -> [B].
HUBER_SCHEDULES: dict[str, Callable[..., Float[Array, ' B']]] = {
    'constant': lambda t, sigma, c: jnp.full_like(t, c.huber_c),
    'exponential': lambda t, sigma, c: c.huber_c**t,
    'snr': lambda t, sigma, c: (1 - c.huber_c) / (1 + sigma) ** 2 + c.huber_c,
}


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
    """What the network is to predict: the noise, v (Salimans and Ho 2022, eq. 13), or x0."""
    signal, sigma = signal_and_noise(alphas_cumprod, t)
    return {'epsilon': noise, 'v_prediction': signal * noise - sigma * x0,
            'sample': x0}[prediction_type]


def weights(alphas_cumprod: Array, t: Int[Array, ' B'], prediction_type: str,
            c: LossConfig) -> Float[Array, ' B']:
    """The weights [B] of the squared errors of what the network predicts; see WEIGHTINGS."""
    snr = alphas_cumprod[t] / (1 - alphas_cumprod[t])
    if c.weighting == 'none':
        return jnp.ones_like(snr)
    return WEIGHTINGS[c.weighting](snr, c) / WEIGHTINGS[prediction_type](snr, c)


def draw_timesteps(key: Array, B: int, c: LossConfig, T: int = 1000) -> Int[Array, ' B']:
    """Timesteps int [B] in [c.min_timestep, c.max_timestep), of T."""
    low, high = c.min_timestep, c.max_timestep or T
    u = TIMESTEPS[c.timesteps](key, B, c)
    return jnp.clip(low + u * (high - low), low, high - 1).astype(jnp.int32)


def draw_noise(key: Array, shape: tuple[int, ...], c: LossConfig) -> Float[Array, 'B H W C']:
    """Noise of shape [B,H,W,C], white unless c says otherwise."""
    keys = jax.random.split(key, 2 + c.multires_noise_iterations)
    noise = jax.random.normal(keys[0], shape)
    B, H, W, C = shape
    if c.noise_offset:
        noise = noise + c.noise_offset * jax.random.normal(keys[1], (B, 1, 1, C))
    for i, k in enumerate(keys[2:], 1):
        h, w = max(1, H >> i), max(1, W >> i)
        coarse = jax.random.normal(k, (B, h, w, C))
        noise = noise + c.multires_noise_discount**i * jax.image.resize(coarse, shape, 'bilinear')
    return noise / noise.std() if c.multires_noise_iterations else noise


def encode_latents(params: Params, config: ModelConfig, batch: Batch,
                   key: Array) -> Float[Array, 'B h w L']:
    """The pictures of a batch as the U-Net sees them, drawn from the VAE's distribution.

    batch: latent [B,h,w,L], as it is; or moments [B,h,w,2L], mean and log variance; or image uint8
    [B,H,W,3].
    """
    if 'latent' in batch:
        return batch['latent']
    if 'moments' in batch:
        mean, logvar = jnp.split(batch['moments'].astype(jnp.float32), 2, -1)
    else:
        mean, logvar = vae.encode(params['vae'], config.vae, vae.unit(batch['image']))
    return vae.scale(config.vae, mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape))


def text_features(params: Params, config: ModelConfig, batch: Batch) -> tuple[Array, Array]:
    """The captions of a batch -> (context [B,K*T,D], pooled [B,P] of the last text encoder).

    batch: tokens {text encoder: int [B,K,T]}, where id -1 - i is row i of
    params['embeddings'][text encoder] [E,D] (textual inversion); or, from a cache, both.
    """
    if 'context' in batch:
        return batch['context'], batch['pooled']
    hidden = []
    for name in (n for n in TEXT_ENCODERS if n in batch['tokens']):
        tokens, vectors = batch['tokens'][name], params.get('embeddings', {}).get(name)
        B, K, T = tokens.shape
        found = clip.encode(params[name], getattr(config, name), tokens.reshape(-1, T),
                            extra=vectors)
        hidden.append(found.hidden.reshape(B, K * T, -1))
        pooled = found.pooled.reshape(B, K, -1)[:, 0]
    return jnp.concatenate(hidden, -1), pooled


def encode_text(params: Params, config: ModelConfig, batch: Batch) -> Conditioning:
    """The captions of a batch -> Conditioning, context [B,K*T,D] and added [B,A] or None.

    batch: as of `text_features`, and time_ids [B,6] for SDXL.
    """
    context, pooled = text_features(params, config, batch)
    if not config.unet.added_dim:
        return Conditioning(context, None)
    return Conditioning(context, with_time_ids(config, pooled, batch['time_ids']))


def autoencoder(params: Params, config: ModelConfig, batch: Batch, key: Array,
                kl_weight: float = 1e-6) -> Loss:
    """Absolute and squared error of the reconstruction, and a slight pull to a unit normal.

    batch: image uint8 [B,H,W,3]. The last metric is the PSNR in dB, for a range of 2.
    """
    image = vae.unit(batch['image'])
    mean, logvar = vae.encode(params['vae'], config.vae, image)
    latent = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    error = vae.decode(params['vae'], config.vae, latent) - image
    absolute, squared = jnp.abs(error).mean(), jnp.square(error).mean()
    kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).sum((1, 2, 3)).mean()
    loss = absolute + squared + kl_weight * kl
    return loss, {'absolute': absolute, 'kl': kl, 'psnr': 10 * jnp.log10(4 / squared)}


def decoder(params: Params, config: ModelConfig, batch: Batch, key: Array) -> Loss:
    """The same errors, of the decoder alone on given latents.

    batch: latent [B,h,w,L] as `vae.decode` takes it, image uint8 [B,H,W,3].
    """
    error = vae.decode(params['vae'], config.vae, batch['latent']) - vae.unit(batch['image'])
    absolute, squared = jnp.abs(error).mean(), jnp.square(error).mean()
    return absolute + squared, {'absolute': absolute, 'psnr': 10 * jnp.log10(4 / squared)}


def alignment(params: Params, config: ModelConfig, batch: Batch, key: Array) -> Loss:
    """Pooled text, through one linear layer, against the picture's latent.

    It gives the text encoder a start before the joint training, as CLIP's training on pictures
    does for the released models. batch: tokens {'text_encoder': int [B,1,T]}, latent [B,H,W,C].
    """
    assert config.text_encoder is not None
    tokens = batch['tokens']['text_encoder'][:, 0]
    pooled = clip.encode(params['text_encoder'], config.text_encoder, tokens).pooled
    head = params['alignment']
    guess = pooled @ head['weight'] + head['bias']
    loss = jnp.square(guess - batch['latent'].reshape(guess.shape)).mean()
    return loss, {}


def predict(params: Params, config: ModelConfig, batch: Batch, x: Float[Array, 'B h w L'],
            t: Int[Array, ' B'], text: Conditioning, remat: bool = False) -> Array:
    """The noise predictor's output for noisy latents x at timesteps t.

    batch: hint uint8 [B,H,W,3], for the ControlNets and T2I-Adapters of config.controlnets, whose
    parameters are params['controlnet'][name]; for inpainting mask [B,H,W,1], 1 where it is to be
    painted, and image; depth [B,h,w,1]; class_labels int [B].
    remat: states inside of the U-Net's blocks are computed again for the gradient, not kept.
    """
    labels, residuals, features = batch.get('class_labels'), None, []
    if config.controlnets:
        (name, cfg), = config.controlnets
        net, hint = params['controlnet'][name], batch['hint'] / 255
        if isinstance(cfg, T2IAdapterConfig):
            features = t2i_adapter.apply(net, cfg, hint[..., :cfg.in_channels])
        else:
            residuals = controlnet.apply(
                net, cfg, x, t, text.context, controlnet.embed(net, hint), text.added,
                labels if cfg.num_class_embeds else None)
    if inpaints(config):
        small = jax.image.resize(batch['mask'], (*x.shape[:3], 1), 'nearest')
        around = jnp.where(batch['mask'] > 0.5, 0, vae.unit(batch['image']))
        mean, _ = vae.encode(params['vae'], config.vae, around)
        x = jnp.concatenate([x, small, vae.scale(config.vae, mean)], -1)
    if 'depth' in batch:
        x = jnp.concatenate([x, batch['depth']], -1)
    return unet.apply(params['unet'], cast(UNetConfig, config.unet), x, t, text.context, text.added,
                      labels, residuals=residuals, features=features, remat=remat)


def inpaints(config: ModelConfig) -> bool:
    """Whether the U-Net sees a mask and the picture around it beside the latents."""
    return config.unet.in_channels == 2 * config.vae.latent_channels + 1


def draw_masks(key: Array, shape: tuple[int, ...]) -> Float[Array, 'B H W 1']:
    """Masks for pictures of shape [B,H,W,3], 1 where they are to be painted: all of a picture one
    time in four (Rombach et al. 2022, section E.2), else up to four boxes."""
    B, H, W, _ = shape
    k_whole, k_centre, k_size, k_there = jax.random.split(key, 4)
    centre = jax.random.uniform(k_centre, (B, 4, 2))
    half = jax.random.uniform(k_size, (B, 4, 2), minval=0.05, maxval=0.35)
    there = jax.random.bernoulli(k_there, 0.5, (B, 4)).at[:, 0].set(True)

    def inside(n, axis):  # [B,4,n]
        place = (jnp.arange(n) + 0.5) / n
        return jnp.abs(place - centre[..., axis, None]) < half[..., axis, None]

    boxes = inside(H, 0)[..., :, None] & inside(W, 1)[..., None, :] & there[..., None, None]
    whole = jax.random.bernoulli(k_whole, 0.25, (B, 1, 1))
    return (boxes.any(1) | whole)[..., None].astype(jnp.float32)


class Noised(NamedTuple):
    """A batch on its way through the network: clean latents, noise, timesteps, text, and the batch
    with the masks that were drawn."""

    x0: Array
    noise: Array
    t: Array
    text: Conditioning
    batch: Batch


def prepare(params: Params, config: ModelConfig, batch: Batch, key: Array, c: LossConfig,
            T: int) -> Noised:
    """Draw what a loss needs; batch as of `diffusion`."""
    k_t, k_noise, k_latent, k_mask = jax.random.split(key, 4)
    x0 = encode_latents(params, config, batch, k_latent)
    t = batch['timesteps'] if 'timesteps' in batch else draw_timesteps(k_t, len(x0), c, T)
    noise = batch['noise'] if 'noise' in batch else draw_noise(k_noise, x0.shape, c)
    if inpaints(config) and 'mask' not in batch:
        batch = {**batch, 'mask': draw_masks(k_mask, batch['image'].shape)}
    return Noised(x0, noise, t, encode_text(params, config, batch), batch)


def diffusion(params: Params, config: ModelConfig, batch: Batch, key: Array,
              c: LossConfig = PLAIN, remat: bool = False) -> Loss:
    """The weighted error of the network's prediction at random timesteps (Ho et al. 2020, eq. 14).

    batch: as of `encode_latents`, `encode_text` and `predict`; weight [B], of each example's error
    (prior preservation); mask, noise [B,h,w,L] and timesteps int [B], instead of drawn ones.
    """
    abar = jnp.asarray(sampling.alphas_cumprod(config.schedule), jnp.float32)
    kind, T = config.schedule.prediction_type, len(abar)
    x0, noise, t, text, batch = prepare(params, config, batch, key, c, T)
    more = noise
    if c.input_perturbation:
        again = jax.random.normal(jax.random.fold_in(key, 1), noise.shape)
        more = noise + c.input_perturbation * again
    out = predict(params, config, batch, add_noise(x0, more, abar, t), t, text, remat)
    difference = out.astype(jnp.float32) - target(x0, noise, abar, t, kind)
    signal, sigma = signal_and_noise(abar, t)
    width = HUBER_SCHEDULES[c.huber_schedule](t / T, (sigma / signal).reshape(-1), c)
    error = ERRORS[c.error](difference, width[:, None, None, None]).mean((1, 2, 3))
    weight = weights(abar, t, kind, c) * batch.get('weight', 1)
    return (weight * error).mean(), {'error': jnp.square(difference).mean()}


def consistency(params: Params, config: ModelConfig, batch: Batch, key: Array,
                c: LossConfig = PLAIN, remat: bool = False, teacher: Params | None = None) -> Loss:
    """Latent consistency distillation (Luo et al. 2023, algorithm 1): what is predicted from two
    neighbouring noise levels shall be the same clean latents.

    teacher: params of the model that steps, guided by c.guidance_min to c.guidance_max, from one of
    c.solver_steps levels to the next (DDIM); uncond_tokens {text encoder: int [1 or B,K,T]} in the
    batch are those of ''. As diffusers' train_lcm_distill_lora scripts, the target is the student
    itself.
    """
    assert teacher is not None
    abar = jnp.asarray(sampling.alphas_cumprod(config.schedule), jnp.float32)
    kind, T = config.schedule.prediction_type, len(abar)
    x0, noise, t, text, batch = prepare(params, config, batch, key, c, T)
    B, interval = len(x0), T // c.solver_steps
    k_w = jax.random.fold_in(key, 1)
    n = jnp.minimum(t // interval, c.solver_steps - 1) + 1
    t, before = n * interval - 1, jnp.maximum((n - 1) * interval - 1, 0)
    w = jax.random.uniform(k_w, (B, 1, 1, 1), minval=c.guidance_min, maxval=c.guidance_max)
    x = add_noise(x0, noise, abar, t)

    def parts(params, x, t, text, remat=False):
        """The network's clean latents and noise."""
        out = predict(params, config, batch, x, t, text, remat).astype(jnp.float32)
        signal, sigma = signal_and_noise(abar, t)
        return {'epsilon': lambda: ((x - sigma * out) / signal, out),
                'v_prediction': lambda: (signal * x - sigma * out, sigma * x + signal * out),
                'sample': lambda: (out, (x - signal * out) / sigma)}[kind]()

    def consistent(params, x, t, remat=False):  # Luo et al. 2023, eq. 9, with diffusers' constants
        scaled = (10.0 * t.astype(jnp.float32))[:, None, None, None]
        skip = 0.25 / (jnp.square(scaled) + 0.25)
        out = scaled / jnp.sqrt(jnp.square(scaled) + 0.25)
        return skip * x + out * parts(params, x, t, text, remat)[0]

    empty = encode_text(teacher, config, {**batch, 'tokens': jax.tree.map(
        lambda a: jnp.broadcast_to(a, (B, *a.shape[1:])), batch['uncond_tokens'])})
    cond = parts(teacher, x, t, encode_text(teacher, config, batch))
    uncond = parts(teacher, x, t, empty)
    clean, eps = (a + w * (a - b) for a, b in zip(cond, uncond))
    signal, sigma = signal_and_noise(abar, before)
    stepped = jax.lax.stop_gradient(signal * clean + sigma * eps)
    goal = jax.lax.stop_gradient(consistent(params, stepped, before))
    difference = consistent(params, x, t, remat) - goal
    error = ERRORS[c.error](difference, jnp.float32(c.huber_c)).mean()
    return error, {'error': jnp.square(difference).mean()}


def preference(params: Params, config: ModelConfig, batch: Batch, key: Array,
               c: LossConfig = PLAIN, remat: bool = False, teacher: Params | None = None) -> Loss:
    """Diffusion-DPO (Wallace et al. 2023, eq. 14): of two pictures of a caption the preferred one
    is predicted better, the other worse, than by the model that `teacher` is.

    batch: image and hint, the preferred and the other picture, uint8 [B,H,W,3]; both get the same
    noise at the same timestep. c.beta: how far the model may move from the teacher.
    """
    assert teacher is not None
    abar = jnp.asarray(sampling.alphas_cumprod(config.schedule), jnp.float32)
    kind, T = config.schedule.prediction_type, len(abar)
    x0, noise, t, text, batch = prepare(params, config, batch, key, c, T)
    k_other = jax.random.split(key, 4)[2]
    other = encode_latents(params, config, {'image': batch['hint']}, k_other)

    def error(params, x0, remat=False):
        out = predict(params, config, batch, add_noise(x0, noise, abar, t), t, text, remat)
        difference = out.astype(jnp.float32) - target(x0, noise, abar, t, kind)
        return jnp.square(difference).mean((1, 2, 3))

    ours = error(params, x0, remat) - error(params, other, remat)
    theirs = jax.lax.stop_gradient(error(teacher, x0) - error(teacher, other))
    logits = -0.5 * c.beta * (ours - theirs)
    return -jax.nn.log_sigmoid(logits).mean(), {
        'accuracy': (logits > 0).mean(dtype=jnp.float32), 'margin': (theirs - ours).mean()}


# By LossConfig.objective; (params, config, batch, key, LossConfig, remat, teacher's params).
OBJECTIVES: dict[str, Callable[..., Loss]] = {
    'diffusion': lambda *arguments, teacher: diffusion(*arguments),
    'consistency': consistency, 'preference': preference}
