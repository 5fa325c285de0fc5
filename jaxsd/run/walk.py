"""From arrays to pictures, pure functions: text encoders, the walk down the levels, decoder."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsd import sampling
from jaxsd.config import T2IAdapterConfig
from jaxsd.models import controlnet, t2i_adapter, unet, vae
from jaxsd.models.layers import attention, attention_received, prepared
from jaxsd.prompt import conditioning
from jaxsd.sampling.guidance import Guidance
from jaxsd.weights import adapters

# Where attention is perturbed, and where it is watched: diffusers' choices.
PAG_PLACES = 'mid_block.'
SAG_PLACE = 'mid_block.attentions.0.transformer_blocks.0.attn1'
LOW_RES = np.uint32(2**31)  # the call number of the upscaler's noise, where no other is


class Conditions(NamedTuple):
    """What the walk follows besides text; a field that is None is absent from the program."""

    extra: Any = None  # [B,h,w,E]: channels beside the latent
    labels: Any = None  # int [B,P]: classes
    hints: Any = ()  # {ControlNet: [B,h,w,C]}, from controlnet.embed; t2i_adapter.apply's list
    control: dict | None = None  # {ControlNet: [calls,B,P,N]}: weights of its N outputs
    known: Any = None  # latents [B,h,w,L], kept where not free
    free: Any = None  # a function of the row -> [B,h,w,1], 0 to 1


NOTHING = Conditions()


def pipeline(params, inputs, config, height, width, tile=None, on_call=None, watch=None):
    """The one pure function: text -> latents -> pixels.

    -> images uint8 [B,height,width,3] and finite, bool [B].
    """
    return stage(params, inputs, config, height, width, tile, True, on_call, watch)


def stage(params, inputs, config, height, width, tile, last, on_call=None, watch=None):
    """`pipeline`; if not last, what another model goes on from: latents [B,h,w,L], finite [B]."""
    x = latents(params, inputs, config, height, width, on_call, watch=watch)
    return decode(params, config, x, tile) if last else (x, jnp.isfinite(x).all((1, 2, 3)))


def latents(params, inputs, config, height, width, on_call=None, info=None, watch=None):
    """`pipeline` up to its decoder: text -> latents [B,h,w,L]. on_call, info, watch:
    `denoise_latents`."""
    params, conditioned = condition(params, config, inputs)
    shape = (height // config.vae.factor, width // config.vae.factor, config.vae.latent_channels)
    keys = jax.random.wrap_key_data(inputs.keys, impl='threefry2x32')
    x = _start(inputs, keys, shape) * _each(inputs.sigma)
    conditions = _follow(params, config, inputs, keys)
    if inputs.picture is not None:
        known = encode(params, config, _unit(inputs.picture))
        x = x + inputs.signal * known
        if inputs.free is not None:
            conditions = conditions._replace(known=known)
    return denoise_latents(
        params, config, x, conditioned, inputs.guidance, inputs.rows,
        _fresh(inputs, keys, shape), on_call, info, conditions, watch)


def _start(inputs, keys, shape):
    """The noise that the pictures start from, [B,h,w,L]."""
    if inputs.noise is not None and inputs.given is None:
        return inputs.noise
    drawn = sampling.initial(keys, shape)
    return drawn if inputs.noise is None else jnp.where(_each(inputs.given), inputs.noise, drawn)


def _fresh(inputs, keys, shape):
    """The noise of stochastic samplers: a function of the row -> [B,h,w,L]."""
    drawn = sampling.fresh(keys, inputs.rows, shape)
    if inputs.draws is None:
        return drawn
    given = jnp.ones(len(keys), bool) if inputs.given is None else inputs.given
    return lambda i: jnp.where(_each(given), jnp.asarray(inputs.draws)[i], drawn(i))


def _each(per_image):
    return per_image[:, None, None, None]


def condition(params, config, inputs):
    """What the words of Inputs come to -> params with the adapters' side paths, Conditioning."""
    for part, factors in (inputs.factors or {}).items():
        params = params | {part: adapters.attach(params[part], factors, inputs.adapters[part])}
    told = conditioning.encode(params | {'embeddings': inputs.embeddings or {}}, config,
                               inputs.tokens, inputs.ids, inputs.zero, inputs.skip)
    return params, told._replace(heard=inputs.heard)


def _follow(params, config, inputs, keys):
    """The arrays of Inputs, encoded -> Conditions, without what is known of the latents."""
    extra = inputs.extra
    if inputs.hole is not None:  # an inpainting model: the mask, and the picture behind it
        seen = jnp.zeros(()) if inputs.picture is None else _unit(inputs.picture)
        seen = jnp.broadcast_to(jnp.where(inputs.hole, 0, seen), (*inputs.hole.shape[:3], 3))
        extra = jnp.concatenate([extra, encode(params, config, seen)], -1)
    if inputs.low is not None:
        small, (signal, sigma) = _unit(inputs.low), map(_each, inputs.low_scale.T)
        extra = signal * small + sigma * sampling.draw(keys, LOW_RES, small.shape[1:])
    hints = {name: _embed(cfg, params['controlnet'][name], inputs.hints[name] / 255)
             for name, cfg in config.controlnets}

    def free(i):
        level = jnp.asarray(inputs.strength)[jnp.minimum(i, len(inputs.strength) - 1)]
        painted = inputs.free >= _each(level)
        return jnp.where(_each(inputs.by_strength), painted, inputs.free)

    return Conditions(extra, inputs.labels, hints, inputs.control,
                      free=None if inputs.free is None else free)


def _embed(cfg, params, hint):
    """A hint [B,H,W,3] in [0,1] as its network takes it in the walk."""
    if not isinstance(cfg, T2IAdapterConfig):
        return controlnet.embed(params, hint)
    return t2i_adapter.apply(params, cfg, hint[..., :cfg.in_channels])  # if one, the hint is gray


def _unit(image):
    """uint8 -> float32 in [-1,1]."""
    return image.astype(jnp.float32) / 127.5 - 1


def denoise_latents(params, config, x, conditioned, guidance, rows, noise, on_call=None,
                    info=None, conditions=NOTHING, watch=None):
    """Walk latents x [B,h,w,L], at the rows' first noise level, to the last one.

    conditioned: Conditioning; guidance: [] or [B], or a Guidance, of P parts, each of which hears
    one of the conditioning's texts; rows: of the batch or per image; noise(i): standard normal,
    like x; on_call(i, out): sees every model output and returns it; watch(i, latents): sees what
    each call takes the picture to be; info: as for `sampling.sample`. params['controlnet']: {name:
    params} of the networks in config.controlnets, which the conditions name.
    """
    if not isinstance(guidance, Guidance):
        guidance = Guidance(guidance)
    params, conditioned = _ready(params, conditioned)
    parts = guidance.parts - (guidance.pag is not None)
    schedule = config.schedule

    def model(which, pag=None, sag=None):
        """The denoiser of some of the parts; images and their parts are one axis, image by image.
        """
        which, parts = np.array(which), len(which)
        labels = jax.tree.map(lambda a: a[:, which].reshape(-1), conditions.labels)
        weights = jax.tree.map(lambda a: a[:, :, which], conditions.control or {})

        def beside(a):
            return jnp.repeat(a, parts, 0)

        def net(x, t, i):
            received = []
            context, added = conditioned.of(which, i)
            plain = context[''] if isinstance(context, dict) else context

            def hook(place, heads, q, k, v):
                if sag is not None and place == SAG_PLACE:
                    received.append(attention_received(q, k, heads))
                if pag is not None and place.startswith(PAG_PLACES):  # the identity, not attention
                    last = (np.arange(len(q)) % parts == parts - 1)[:, None, None]
                    return jnp.where(last, v, attention(q, k, v, heads))

            freeu = guidance.at(i).freeu
            if freeu is not None:
                freeu = [beside(jnp.broadcast_to(a, len(x) // parts)) for a in freeu]
            residuals, features = _controls(
                params.get('controlnet'), config.controlnets, weights, i, (x, t, plain),
                jax.tree.map(beside, conditions.hints), added, labels)
            if conditions.extra is not None:
                x = jnp.concatenate([x, beside(conditions.extra)], -1)
            out = unet.apply(params['unet'], config.unet, x, t, context, added, labels, hook=hook,
                             freeu=freeu, residuals=residuals, features=features)
            out = out if on_call is None else on_call(i, out)
            return (out, *received) if received else out

        return sampling.denoiser(net, schedule)

    perturbed = [1] if guidance.pag is not None else []  # hears what the prompt's picture does
    denoise = sampling.guided(model([*range(parts), *perturbed], guidance.pag, guidance.sag),
                              guidance, schedule.prediction_type, model([0]),
                              schedule.sigma_data if schedule.edm else None)
    if conditions.free is not None:
        denoise = sampling.inpainted(denoise, conditions.known, conditions.free)
    if watch is not None:
        denoise = _watched(denoise, watch)
    return sampling.sample(denoise, x, rows, noise, info=info,
                           memory=jnp.zeros_like(x) if guidance.momentum else None)


def _ready(params, conditioned):
    """What is the same in every call, done once, as XLA moves nothing out of the walk's branches:
    on CPU, weights `prepared` and texts heard. Accelerators would rather have the memory."""
    if jax.default_backend() != 'cpu':
        return params, conditioned
    texts = conditioned.context  # [B,N,T,D]
    heard = unet.hear(params['unet'], texts.reshape(-1, *texts.shape[2:]))
    heard = jax.tree.map(lambda a: a.reshape(*texts.shape[:2], *a.shape[1:]), heard)
    nets = {part: prepared(params[part]) for part in ('unet', 'controlnet') if part in params}
    return params | nets, conditioned._replace(context=heard)


def _watched(denoise, watch):
    """A denoiser, `guided`, that shows its guided output to watch(i, latents)."""
    def look(x, sigma, i=None, *memory):
        out = denoise(x, sigma, i, *memory)
        watch(i, (out[0] if memory else out)[0])
        return out

    return look


def _controls(nets, configs, weights, i, called, hints, added, labels):
    """What to add to the U-Net in row i, weighted and summed: ControlNets' residuals, or None, and
    T2I-Adapters' features. A ControlNet that no picture of the batch hears in it is not called."""
    residuals, features = [], []
    for name, cfg in configs:
        weight = jnp.asarray(weights[name])
        weight = weight[jnp.minimum(i, len(weight) - 1)].reshape(-1, weight.shape[-1])  # [B*P,N]

        def weighed(outputs, weight=weight):
            return [weight[:, k, None, None, None] * r for k, r in enumerate(outputs)]

        def call(net=nets[name], cfg=cfg, hint=hints[name], weighed=weighed):
            known = labels if cfg.num_class_embeds else None
            return weighed(controlnet.apply(net, cfg, *called, hint, added, known))

        if isinstance(cfg, T2IAdapterConfig):
            features.append(weighed(hints[name]))
        else:
            silent = jax.eval_shape(call)
            residuals.append(lax.cond((weight != 0).any(), call, lambda shapes=silent: [
                jnp.zeros(s.shape, s.dtype) for s in shapes]))
    added_up = [[sum(parts) for parts in zip(*found, strict=True)]
                for found in (residuals, features)]
    return added_up[0] or None, added_up[1]


def encode(params, config, image):
    """image [B,H,W,3] in [-1,1] -> its latents as the U-Net sees them [B,h,w,L], the mean."""
    mean, _ = vae.encode(_vae_weights(params, config), config.vae, image)
    return vae.scale(config.vae, mean)


def _vae_weights(params, config):
    if not config.vae.force_upcast:
        return params['vae']
    return jax.tree.map(  # SDXL's: overflows in float16
        lambda a: a.astype(jnp.float32) if a.dtype == jnp.float16 else a, params['vae'])


def decode(params, config, latent, tile=None):
    """Latents [B,h,w,L] as the U-Net sees them -> images uint8 [B,H,W,3], finite bool [B]."""
    weights = _vae_weights(params, config)
    latent = vae.unscale(config.vae, latent)
    if tile is None:
        image = vae.decode(weights, config.vae, latent)
    else:
        image = vae.decode_tiled(weights, config.vae, latent, tile=tile, overlap=tile // 4)
    finite = jnp.isfinite(image).all((1, 2, 3))
    return jnp.round(jnp.clip(image * 127.5 + 127.5, 0, 255)).astype(jnp.uint8), finite
