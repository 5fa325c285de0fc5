"""From arrays to pictures, pure functions: `encode_text`, `encode`, `advance` (the denoise loop),
`decode`; and `pipeline`, all of it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, UInt8

from jaxsd import sampling
from jaxsd.config import KUNetConfig, ModelConfig, T2IAdapterConfig, UNetConfig
from jaxsd.models import controlnet, kunet, t2i_adapter, unet, vae
from jaxsd.models.layers import attention, attention_received, prepared, seamless
from jaxsd.models.tiling import tiled
from jaxsd.prompt import conditioning
from jaxsd.prompt.conditioning import Conditioning
from jaxsd.run import image_prompts, reference
from jaxsd.run.inputs import Inputs
from jaxsd.run.regions import Windows, averaged
from jaxsd.run.steps import Steps
from jaxsd.sampling.guidance import Guidance
from jaxsd.typing import Params
from jaxsd.weights import adapters

# Where attention is perturbed, and where it is watched: diffusers' choices.
PAG_PLACES = 'mid_block.'
SAG_PLACE = 'mid_block.attentions.0.transformer_blocks.0.attn1'
LOW_RES = np.uint32(2**31)  # the call number of the upscaler's noise, where no other is


Info = Callable[[Any], Any]  # see sampling.sample


class Encoded(NamedTuple):
    """What the denoise loop follows, of B pictures, the same in all steps. A field that is None is
    absent from the program."""

    text: Conditioning  # of N texts each
    keys: Any  # uint32 [B,2]: threefry key data, of the noise of stochastic samplers
    adapters: dict | None = None  # {component: [B,A]}: weights
    given: Any = None  # bool [B]: whose noise is the steps'; None: everybody's, if there is any
    extra: Any = None  # [B,h,w,E]: channels beside the latents
    labels: Any = None  # int [B,P]: classes; of unCLIP float [B,P,2*E]
    # {ControlNet: [B,h,w,C], from controlnet.embed; of a union ([B,K,h,w,C], modes int [B,K])};
    # {T2I-Adapter: t2i_adapter.apply's list}
    hints: Any = ()
    image_prompts: Any = None  # {IP-Adapter: image_prompts.Keys}
    reference: Any = None  # [B,h,w,L]: latents of the picture whose keys self-attention sees
    init_latents: Any = None  # [B,h,w,L], kept where the mask is 0
    mask: Any = None  # [B,h,w,1]: mask, 1 where all is painted
    differential: Any = None  # bool [B]: new where the mask is at least the step's strength
    regions: Any = None  # [B,h,w,K]: how much each prompt counts where
    windows: Windows | None = None


def pipeline(params: Params, inputs: Inputs, config: ModelConfig, height: int, width: int,
             tile: int | None = None) -> tuple[UInt8[Array, 'B H W 3'], Bool[Array, ' B']]:
    """The whole as one pure function: text -> latents -> pixels.

    params, config: of `inputs.networks`. inputs: Inputs of B pictures of height x width pixels.
    tile: latents along the sides of the squares that the VAE sees at once, for less memory; None:
    all of a picture.
    -> images uint8 [B,height,width,3] and finite, bool [B].
    """
    found = latents(params, inputs, config, height, width, tile=tile)
    return decode(params, config, found, tile)


def latents(params: Params, inputs: Inputs, config: ModelConfig, height: int, width: int,
            info: Info | None = None, tile: int | None = None) -> Any:
    """`pipeline` up to its decoder -> latents [B,h,w,L]; info: as of `sampling.sample`, whose
    result this is with it."""
    params = once(params)
    encoded, x = encode(params, config, inputs, encode_text(params, config, inputs), height, width,
                        tile)
    state, seen = advance(params, config, start(x, inputs.steps, config), encoded, inputs.steps,
                          info=info)
    return state.x if info is None else (state.x, seen)


def once(params: Params) -> Params:
    """What is computed from the weights once for many model calls: on CPU the tiles of wide
    convolutions, see `layers.prepared`. Accelerators would rather have the memory."""
    return params | {part: prepared(params[part]) for part in ('unet', 'controlnet')
                     if part in params}


def encode_text(params: Params, config: ModelConfig, inputs: Inputs) -> Conditioning:
    """The words of Inputs -> Conditioning of N texts for each of B pictures.

    On CPU with what cross-attention makes of them in each of its layers, as XLA would compute that
    in every step; accelerators would rather have the memory."""
    params = _with_adapters(params, inputs.adapters)
    found = conditioning.encode(params | {'embeddings': inputs.embeddings or {}}, config,
                                inputs.tokens, inputs.ids, inputs.zero, inputs.skip)
    if jax.default_backend() != 'cpu' or isinstance(config.unet, KUNetConfig):
        return found
    texts = found.context  # [B,N,T,D]
    cache = unet.cross_attention_cache(params['unet'], texts.reshape(-1, *texts.shape[2:]))
    return found._replace(context=jax.tree.map(
        lambda a: a.reshape(*texts.shape[:2], *a.shape[1:]), cache))


def encode(params: Params, config: ModelConfig, inputs: Inputs, text: Conditioning | None,
           height: int, width: int,
           tile: int | None = None) -> tuple[Encoded, Float[Array, 'B h w L']]:
    """Pictures, masks and hints of Inputs -> (Encoded, latents [B,h,w,L] at the first noise level).

    text: of `encode_text`; tile: as of `pipeline`.
    """
    shape = (height // config.vae.factor, width // config.vae.factor, config.vae.latent_channels)
    keys = jax.random.wrap_key_data(jnp.asarray(inputs.keys), impl='threefry2x32')
    x = _noise(inputs, keys, shape) * _each(inputs.sigma)
    extra, init = inputs.extra, None
    if inputs.init_image is not None:
        init = encode_image(params, config, vae.unit(inputs.init_image), tile)
        x = x + inputs.init_weight * init
        if config.task == 'pix2pix':  # its unscaled latents; of CosXL Edit as the U-Net has them
            extra = init if config.schedule.edm else vae.unscale(config.vae, init)
    elif inputs.init_latents is not None:
        x = x + inputs.init_weight * inputs.init_latents
    if (hidden := inputs.inpaint_mask) is not None:  # the mask, and the image around it
        seen = jnp.zeros(()) if inputs.init_image is None else vae.unit(inputs.init_image)
        seen = jnp.broadcast_to(jnp.where(hidden, 0, seen), (*hidden.shape[:3], 3))
        extra = jnp.concatenate([extra, encode_image(params, config, seen, tile)], -1)
    if inputs.low_res is not None and inputs.low_res_scale is None:  # of the x2 latent upscaler
        small = encode_image(params, config, vae.unit(inputs.low_res), tile)
        extra = small.repeat(2, 1).repeat(2, 2)
    elif inputs.low_res is not None:
        small, (signal, sigma) = vae.unit(inputs.low_res), map(_each, inputs.low_res_scale.T)
        extra = signal * small + sigma * sampling.draw(keys, LOW_RES, small.shape[1:])
    hints = {name: _embed(cfg, params['controlnet'][name], inputs.hints[name])
             for name, cfg in config.controlnets}
    return Encoded(text, inputs.keys, inputs.adapters, inputs.given_steps, extra, inputs.labels,
                   hints, image_prompts.encode(params, config, inputs.image_prompts),
                   None if inputs.reference is None else encode_image(
                       params, config, vae.unit(inputs.reference), tile),
                   None if inputs.mask is None else init, inputs.mask, inputs.differential,
                   inputs.regions, inputs.windows), x


def start(x: Float[Array, 'B h w L'], steps: Steps, config: ModelConfig) -> Any:
    """The state of the denoise loop before the first row -> sampling.State. x: as of `encode`;
    steps: as of `advance`."""
    return sampling.init(x, steps.row, memory(x, steps.guidance, config))


def memory(x: Float[Array, 'B h w L'], guidance: Guidance, config: ModelConfig) -> tuple | None:
    """What `denoiser` remembers from call to call, before the first; None: nothing. x: latents."""
    found: list[Any] = []
    if guidance.easycache is not None:
        found.append(sampling.Reuse.of(x))
    if guidance.deepcache is not None:
        shape = unet.deep_features(cast(UNetConfig, config.unet), guidance.deepcache.layers,
                                   *x.shape[1:3])
        found.append(jnp.zeros((len(x), guidance.parts, *shape), x.dtype))
    if guidance.momentum:
        found.append(jnp.zeros_like(x))
    return tuple(found) or None


def advance(params: Params, config: ModelConfig, state: Any, encoded: Encoded, steps: Steps,
            count: int | Array | None = None, info: Info | None = None) -> tuple[Any, Any]:
    """Go on with the denoise loop over the next rows -> (state, what info gave or None).

    state: of `start` or of this. encoded: of `encode`. steps: Steps of [rows,B]. count: how many
    rows; None: all. info: as of `sampling.sample`.
    """
    keys = jax.random.wrap_key_data(encoded.keys, impl='threefry2x32')
    shape = state.x.shape[1:]

    def noise(step):
        drawn = sampling.of_row(keys, step.call, step.row.path, shape)
        if step.noise is None:
            return drawn
        return step.noise if encoded.given is None else (
            jnp.where(_each(encoded.given), step.noise, drawn))

    steps = jax.tree.map(jnp.asarray, steps)
    return sampling.advance(denoiser(params, config, encoded), state, steps.row, noise, info, steps,
                            count)


def denoiser(params: Params, config: ModelConfig, encoded: Encoded) -> Callable[..., Any]:
    """-> denoise(x, sigma, step), guided, for `sampling.sample`: ([B,h,w,L] and the same without
    guidance), step: one row of Steps. Where there is something to remember, see `memory`,
    denoise(x, sigma, step, memory) -> (those, memory).

    params['controlnet']: {name: params} of the networks in config.controlnets.
    """
    params, schedule = _with_adapters(params, encoded.adapters), config.schedule
    params = params | {'unet': seamless(params['unet'], config.tiling)}

    def denoise(x, sigma, step, memory=None):
        guidance = step.guidance
        referred = _referred(encoded, schedule, sigma, step)
        perturbed = [1] if guidance.pag is not None else []  # follows what the prompt's does
        imageless = [0] if guidance.image is not None else []
        parts = guidance.parts - len(perturbed) - len(imageless)

        def model(which, **kinds):
            return sampling.denoiser(
                _network(params, config, encoded, step, which, referred, **kinds), schedule)

        every = [1] if guidance.scale is None else [*range(parts), *perturbed, *imageless]

        def guided(x, sigma, i, *memory):
            cached = []  # features to take, and in their place those to keep
            if guidance.deepcache is not None:
                features, *memory = memory
                cached.append(features.reshape(-1, *features.shape[2:]))
            found = sampling.guided(
                model(every, pag=parts if perturbed else None, sag=guidance.sag is not None,
                      imageless=bool(imageless), cached=cached), guidance,
                schedule.prediction_type, model([0]), schedule.sigma_data if schedule.edm else None,
                encoded.regions)(x, sigma, i, *memory)
            if not cached:
                return found
            out, *memory = found if memory else (found,)
            return (out, cached[0].reshape(features.shape), *memory)

        if guidance.easycache is not None:
            guided = sampling.easycache(guided, guidance.easycache, step.row.sigma <= 0)
        if encoded.mask is not None:
            mask = encoded.mask
            if step.strength is not None:
                mask = jnp.where(_each(encoded.differential), mask >= _each(step.strength), mask)
            guided = sampling.inpainted(guided, encoded.init_latents, lambda i: mask)
        if memory is None:
            return guided(x, sigma, None)
        out, *memory = guided(x, sigma, None, *memory)
        return out, tuple(memory)

    return denoise


def _referred(encoded, schedule, sigma, step):
    """The reference at a noise level, as the U-Net sees it [B,h,w,C], or None; with new noise for
    each call. An inpainting model sees it whole."""
    latents = encoded.reference
    if latents is None:
        return None
    keys = jax.random.wrap_key_data(encoded.keys, impl='threefry2x32')
    noise = sampling.draw(keys, reference.CALL + jnp.asarray(step.call, jnp.uint32),
                          latents.shape[1:])
    sigma = _each(jnp.broadcast_to(sigma, len(latents)))
    data = schedule.sigma_data if schedule.edm else 1
    x = (latents + sigma * noise) / jnp.hypot(sigma, data)
    beside = [] if encoded.extra is None else [jnp.zeros_like(latents[..., :1]), latents]
    return jnp.concatenate([x, *beside], -1)


def _network(params, config, encoded, step, which, referred=None, pag=None, sag=False,
             imageless=False, cached=None):
    """The U-Net, net(x, t, i) for `sampling.denoiser`, of some parts of the guidance: pictures and
    their parts are one axis, picture after picture. referred: of `_referred`; pag: the perturbed
    part among them, or None; sag: whether attention is watched; imageless: whether the last does
    not see the image. cached: a list of DeepCache's features, where they are used, whose place
    this call's take."""
    which, parts = np.array(which), len(which)
    labels = jax.tree.map(lambda a: a[:, which].reshape(-1, *a.shape[2:]), encoded.labels)
    weights = jax.tree.map(lambda a: a[:, which], step.control or {})
    context, added = encoded.text.of(which, step.text_index)
    plain = context[''] if isinstance(context, dict) else context

    def beside(a):
        return jnp.repeat(a, parts, 0)

    prompted = None
    if encoded.image_prompts is not None:
        prompted = image_prompts.attend(config.unet, encoded.image_prompts, step.image_prompts,
                                        which)

    def net(x, t, i):
        if encoded.windows is None:
            return see(x, t, encoded.hints, encoded.extra)
        seen = x, encoded.hints, encoded.extra

        def in_window(cut):
            x, hints, extra = jax.tree.map(cut, seen)
            return see(x, t, hints, extra)

        return averaged(encoded.windows, in_window, x.shape)

    def see(x, t, hints, extra):
        received = []
        if step.timestep is not None:
            given = beside(jnp.broadcast_to(step.timestep, len(x) // parts))
            t = jnp.where(given >= 0, given, t)

        followed = None

        def hook(place, heads, q, k, v):
            if place.endswith('attn2'):
                return prompted(place, heads, q, k, v) if prompted else None
            if followed is not None:
                return followed(place, heads, q, k, v)
            if sag and place == SAG_PLACE:
                received.append(attention_received(q, k, heads))
            if pag is not None and place.startswith(PAG_PLACES):  # the identity, not attention
                here = (np.arange(len(q)) % parts == pag)[:, None, None]
                return jnp.where(here, v, attention(q, k, v, heads))
            if (fewer := step.guidance.attention) is not None:
                return fewer(q, k, v, heads, *x.shape[1:3])

        freeu, scale = jax.tree.map(lambda a: beside(jnp.broadcast_to(a, len(x) // parts)),
                                    (step.guidance.freeu, step.guidance.embedded))

        def call(x, hook, **more):
            return unet.apply(params['unet'], config.unet, x, t, context, added, labels, hook=hook,
                              freeu=freeu, guidance=scale, **more)

        if referred is not None:
            follows = step.reference[:, which].reshape(len(x), -1)
            bank = reference.write(lambda keep: call(beside(referred), keep), prompted, follows)
            followed = reference.attend(config.unet, bank, follows)
        residuals, features = _controls(
            params.get('controlnet'), config.controlnets, weights, (x, t, plain),
            jax.tree.map(beside, hints), added, labels)
        if extra is not None:
            seen = beside(extra)
            if imageless:
                seen = _each(np.arange(len(seen)) % parts < parts - 1) * seen
            x = jnp.concatenate([x, seen], -1)

        if isinstance(config.unet, KUNetConfig):
            return kunet.apply(params['unet'], config.unet, x, t, context, added)

        def predict(how=None, deep=None):
            return call(x, hook, residuals=residuals, features=features, shrink=how, deep=deep)

        if (shrink := step.guidance.shrink) is not None:
            return _either(beside(jnp.broadcast_to(shrink.on, len(x) // parts)) > 0,
                           functools.partial(predict, shrink.how), predict)
        if cached:
            rows = step.guidance.deepcache
            again = (jnp.broadcast_to(rows.again, len(x) // parts) > 0) | (step.row.sigma <= 0)
            out, features = predict(deep=unet.Deep(
                rows.layers, beside(again),
                cached[0].astype(params['unet']['conv_in']['weight'].dtype)))
            cached[0] = features.astype(cached[0].dtype)
        else:
            out = predict()
        return (out, *received) if received else out

    return net


def _either(on, first, other):
    """first() where `on` [B] and other() elsewhere; what no picture needs is not computed."""
    shape = jax.eval_shape(other)

    def nothing():
        return jnp.zeros(shape.shape, shape.dtype)

    return jnp.where(_each(on), lax.cond(on.any(), first, nothing),
                     lax.cond(on.all(), nothing, other))


def _with_adapters(params, weights):
    """Params with the side paths of the adapters; weights {component: [B,A]} or None."""
    for part, some in (weights or {}).items():
        if part in params:
            params = params | {part: adapters.attach(params[part], params['adapters'][part], some)}
    return params


def _noise(inputs, keys, shape):
    """The noise that the pictures start from, [B,h,w,L]."""
    if inputs.noise is not None and inputs.given is None:
        return inputs.noise
    drawn = sampling.initial(keys, shape)
    return drawn if inputs.noise is None else jnp.where(_each(inputs.given), inputs.noise, drawn)


def _each(per_image):
    return per_image[:, None, None, None]


def _embed(cfg, params, hint):
    """A hint of Inputs as its network takes it in the loop."""
    if isinstance(hint, tuple):
        return controlnet.embed(params, hint[0] / 255), hint[1]
    hint = hint / 255
    if not isinstance(cfg, T2IAdapterConfig):
        return controlnet.embed(params, hint)
    return t2i_adapter.apply(params, cfg, hint[..., :cfg.in_channels])  # if one, the hint is gray


def _controls(nets, configs, weights, called, hints, added, labels):
    """What to add to the U-Net, weighted and summed: ControlNets' residuals, or None, and
    T2I-Adapters' features. A ControlNet whose weights are 0 for all pictures is not called."""
    residuals, features = [], []
    for name, cfg in configs:
        weight = weights[name].reshape(-1, weights[name].shape[-1])  # [B*P,N]
        hint, several = hints[name], ()
        if isinstance(hint, tuple):  # of a union, with the modes
            hint, modes = hint
            several = modes, weight[:, -modes.shape[1]:]
            weight = weight[:, :-modes.shape[1]]

        def weighed(outputs, weight=weight):
            return [weight[:, k, None, None, None] * r for k, r in enumerate(outputs)]

        def call(net=nets[name], cfg=cfg, hint=hint, several=several, weighed=weighed):
            known = labels if cfg.num_class_embeds else None
            return weighed(controlnet.apply(net, cfg, *called, hint, added, known, *several))

        if isinstance(cfg, T2IAdapterConfig):
            features.append(weighed(hints[name]))
        else:
            silent = jax.eval_shape(call)
            residuals.append(lax.cond((weight != 0).any(), call, lambda shapes=silent: [
                jnp.zeros(s.shape, s.dtype) for s in shapes]))
    added_up = [[sum(parts) for parts in zip(*found, strict=True)]
                for found in (residuals, features)]
    return added_up[0] or None, added_up[1]


def encode_image(params: Params, config: ModelConfig, image: Float[Array, 'B H W 3'],
                 tile: int | None = None) -> Float[Array, 'B h w L']:
    """image [B,H,W,3] in [-1,1] -> its latents as the U-Net sees them [B,h,w,L], the mean. tile: as
    of `pipeline`."""
    weights = _vae_weights(params, config)
    return vae.scale(config.vae, _in_tiles(
        lambda x: vae.encode(weights, config.vae, x)[0], image, tile, config.vae.factor))


def check_tile(tile: int | None, tiling: str | bool) -> None:
    """Raises ValueError where the VAE would see tiles of a picture whose edges meet."""
    if tile is not None and tiling:
        raise ValueError(f"tiling={tiling!r}: expected no tile, as the edges of a picture that is "
                         'decoded in parts do not meet')


def _in_tiles(apply, x, tile, down=1):
    """A part of the VAE, which sees a tile at a time: group norms make it a little different."""
    return apply(x) if tile is None else tiled(apply, x, tile, tile // 4, down)


def _vae_weights(params, config):
    weights = params['vae']
    if config.vae.force_upcast:  # SDXL's: overflows in float16
        weights = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.float16 else a,
                               weights)
    return seamless(weights, config.tiling)


def decode(params: Params, config: ModelConfig, latent: Float[Array, 'B h w L'],
           tile: int | None = None) -> tuple[UInt8[Array, 'B H W 3'], Bool[Array, ' B']]:
    """Latents [B,h,w,L] as the U-Net sees them -> images uint8 [B,H,W,3], finite bool [B]."""
    check_tile(tile, config.tiling)
    weights = _vae_weights(params, config)
    latent = vae.unscale(config.vae, latent)
    image = _in_tiles(lambda z: vae.decode(weights, config.vae, z), latent, tile)
    finite = jnp.isfinite(image).all((1, 2, 3))
    return jnp.round(jnp.clip(image * 127.5 + 127.5, 0, 255)).astype(jnp.uint8), finite
