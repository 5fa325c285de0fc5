"""`generate`: requests -> pictures, by one compiled program in which everything is data."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxsd import sampling
from jaxsd.config import TEXT_ENCODERS
from jaxsd.models import unet, vae
from jaxsd.models.layers import attention, attention_received
from jaxsd.prompt import conditioning
from jaxsd.run.request import resolve
from jaxsd.sampling.guidance import Guidance
from jaxsd.sampling.guidance_options import stack, table


class Inputs(NamedTuple):
    """Everything about a batch but its shape; the leading axis is images, for rows the second."""

    tokens: dict  # {text encoder: int32 [B,P,T]}, negative prompt, prompt, perp_neg's negatives
    ids: np.ndarray | None  # [B,P,N] SDXL's time ids
    zero: np.ndarray  # bool [B]: the negative conditioning is zeros
    guidance: Guidance  # of [calls,B]
    keys: np.ndarray  # uint32 [B,2]: threefry key data
    sigma: np.ndarray  # [B]: the noise level to start from
    rows: sampling.Rows  # [calls,B,...]; or sampling.Adaptive [B]
    noise: np.ndarray | None = None  # [B,h,w,L] to start from; None: drawn from the keys

    @property
    def axes(self):
        """Which axis is images, for each field."""
        return Inputs(*(0,) * len(self))._replace(
            guidance=1, rows=int(isinstance(self.rows, sampling.Row)))


# Where attention is perturbed, and where it is watched: diffusers' choices.
PAG_PLACES = 'mid_block.'
SAG_PLACE = 'mid_block.attentions.0.transformer_blocks.0.attn1'


def generate(model, requests, on_step=None, tile=None, noise=None):
    """Make one picture per request -> uint8 [B,H,W,3].

    The requests of a call share their size; prompts, seeds, samplers, schedules, steps and
    guidance may all differ. Only a new model config, dtype, size, batch size or step bucket
    (64 model calls, then powers of two), or a kind of guidance switched on or off, compiles.
    With several local devices the batch is spread over them; a picture does not depend on its
    neighbours. Pictures of dpm_adaptive are made in a batch of their own, after the others.

    on_step(done, total): called as model calls finish.
    tile: decode in tiles of this many pixels per side, for less memory; None: in one piece.
    noise [B,h,w,L]: standard normal noise to start from, instead of the seeds' own.
    Raises ValueError for requests that do not fit the model and for pictures that are not finite.
    """
    config = model.config
    requests = resolve(requests, config)
    sizes = {(r.height, r.width) for r in requests}
    if len(sizes) != 1:
        found = ', '.join(f'{w}x{h}' for h, w in sorted(sizes)) or 'no request'
        raise ValueError(f'requests: expected at least one, all of one size; found {found}')
    (height, width), = sizes
    if tile is not None:
        if tile < config.vae.factor or tile % config.vae.factor:
            raise ValueError(f'tile={tile}: expected a multiple of {config.vae.factor} pixels')
        tile //= config.vae.factor
    adaptive = np.array([r.sampler == 'dpm_adaptive' for r in requests])
    if adaptive.any() and not adaptive.all():  # it has no table, so a batch of its own
        parts = np.flatnonzero(~adaptive), np.flatnonzero(adaptive)
        images = [generate(model, [requests[i] for i in part], on_step, tile,
                           None if noise is None else np.asarray(noise)[part]) for part in parts]
        return np.concatenate(images)[np.argsort(np.concatenate(parts))]
    data = inputs(model, requests, noise)

    count = len(requests)
    each = -(-count // min(count, jax.local_device_count()))  # images per device
    devices = -(-count // each)
    mesh = _mesh(devices)
    pad = functools.partial(_pad, count=devices * each)
    data = Inputs(*(jax.tree.map(functools.partial(pad, axis=axis), value)
                    for axis, value in zip(data.axes, data)))
    params = jax.device_put(model.params, NamedSharding(mesh, PartitionSpec()))

    ticket = np.uint32(next(_tickets) % 2**32)
    if on_step is not None:
        _listeners[int(ticket)] = _Progress(data.rows, on_step)
    try:
        images, finite = _program(params, data, ticket, config=config, height=height, width=width,
                                  tile=tile, mesh=mesh, report=on_step is not None)
        images, finite = np.asarray(images)[:count], np.asarray(finite)[:count]
        if on_step is not None:
            jax.effects_barrier()
    finally:
        _listeners.pop(int(ticket), None)
    if not finite.all():
        i = int(np.argmin(finite))
        raise ValueError(
            f'picture {i} (seed {requests[i].seed}) is not finite: the weights hold NaN or '
            f'infinity, or overflow in their dtype (float16: try bfloat16 or float32)')
    return images


def replicated():
    """Where weights should lie for batches over all local devices: `load(..., device=...)`.

    Elsewhere is fine too, at the price of a copy in every call of `generate`.
    """
    return NamedSharding(_mesh(jax.local_device_count()), PartitionSpec())


def inputs(model, requests, noise=None):
    """Resolved requests -> Inputs, numpy on the host: tokens, tables, keys. Compiles nothing."""
    config = model.config
    for name in TEXT_ENCODERS:
        if getattr(config, name) is not None and name not in model.tokenizers:
            raise ValueError(f'model.tokenizers: expected one for {name!r}, '
                             f'found {sorted(model.tokenizers)}')
    tokens = conditioning.tokens(model.tokenizers, *_texts(requests))
    for name, ids in tokens.items():
        size = getattr(config, name).vocab_size
        if ids.max() >= size:
            raise ValueError(f'{name}: token {ids.max()} is outside its vocabulary of {size}; '
                             'the tokenizer belongs to another model')
    sigmas, tables = zip(*(_plan(request, config.schedule) for request in requests))
    rows = sampling.stack(tables)
    if noise is not None:
        factor = config.vae.factor
        shape = (len(requests), requests[0].height // factor, requests[0].width // factor,
                 config.vae.latent_channels)
        if np.shape(noise) != shape:
            raise ValueError(f'noise {np.shape(noise)}: expected the shape {shape}')
        noise = np.asarray(noise, np.float32)
    return Inputs(
        tokens=tokens,
        ids=_ids(config, requests, len(_texts(requests))),
        zero=np.array([config.zero_negative and not r.negative_prompt for r in requests]),
        guidance=_guidance(requests, sigmas, rows),
        keys=np.array([divmod(r.seed, 2**32) for r in requests], np.uint32),
        sigma=np.array([s[0] for s in sigmas], np.float32),
        rows=jax.tree.map(np.float32, rows),
        noise=noise)


def pipeline(params, inputs, config, height, width, tile=None, on_call=None):
    """The one pure function: text -> latents -> pixels.

    -> images uint8 [B,height,width,3] and finite, bool [B].
    """
    return decode(params, config, latents(params, inputs, config, height, width, on_call), tile)


def latents(params, inputs, config, height, width, on_call=None, info=None):
    """`pipeline` up to its decoder: text -> latents [B,h,w,L]. on_call, info: `denoise_latents`."""
    conditioned = conditioning.encode(params, config, inputs.tokens, inputs.ids, inputs.zero)
    shape = (height // config.vae.factor, width // config.vae.factor, config.vae.latent_channels)
    keys = jax.random.wrap_key_data(inputs.keys, impl='threefry2x32')
    start = sampling.initial(keys, shape) if inputs.noise is None else inputs.noise
    return denoise_latents(
        params, config, start * inputs.sigma[:, None, None, None], conditioned, inputs.guidance,
        inputs.rows, sampling.fresh(keys, inputs.rows, shape), on_call, info)


def denoise_latents(params, config, x, conditioned, guidance, rows, noise, on_call=None,
                    info=None):
    """Walk latents x [B,h,w,L], at the rows' first noise level, to the last one.

    conditioned: Conditioning, [B,P,...]; guidance: [] or [B], or a Guidance, and P its texts; rows:
    of the batch or per image; noise(i): standard normal, like x; on_call(i, out): sees every model
    output and returns it; info: as for `sampling.sample`.
    """
    if not isinstance(guidance, Guidance):
        guidance = Guidance(guidance)
    if guidance.pag is not None:  # the perturbed picture hears the prompt
        conditioned = jax.tree.map(lambda a: jnp.concatenate([a, a[:, 1:2]], 1), conditioned)
    kind = config.schedule.prediction_type

    def model(conditioned, pag=None, sag=None):
        parts = conditioned.context.shape[1]
        # Images and their parts become one axis, image after image.
        context, added = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), conditioned)

        def net(x, t, i):
            received = []

            def hook(place, heads, q, k, v):
                if sag is not None and place == SAG_PLACE:
                    received.append(attention_received(q, k, heads))
                if pag is not None and place.startswith(PAG_PLACES):  # the identity, not attention
                    last = (np.arange(len(q)) % parts == parts - 1)[:, None, None]
                    return jnp.where(last, v, attention(q, k, v, heads))

            freeu = guidance.at(i).freeu
            if freeu is not None:
                freeu = [jnp.repeat(jnp.broadcast_to(a, len(x) // parts), parts) for a in freeu]
            out = unet.apply(params['unet'], config.unet, x, t, context, added, hook=hook,
                             freeu=freeu)
            out = out if on_call is None else on_call(i, out)
            return (out, *received) if received else out

        return sampling.denoiser(net, config.schedule)

    unguided = model(jax.tree.map(lambda a: a[:, :1], conditioned))
    denoise = sampling.guided(model(conditioned, guidance.pag, guidance.sag), guidance, kind,
                              unguided)
    return sampling.sample(denoise, x, rows, noise, info=info,
                           memory=jnp.zeros_like(x) if guidance.momentum else None)


def decode(params, config, latent, tile=None):
    """Latents [B,h,w,L] as the U-Net sees them -> images uint8 [B,H,W,3], finite bool [B]."""
    weights = params['vae']
    if config.vae.force_upcast:  # SDXL's: overflows in float16
        weights = jax.tree.map(
            lambda a: a.astype(jnp.float32) if a.dtype == jnp.float16 else a, weights)
    latent = latent / config.vae.scaling_factor + config.vae.shift_factor
    if tile is None:
        image = vae.decode(weights, config.vae, latent)
    else:
        image = vae.decode_tiled(weights, config.vae, latent, tile=tile, overlap=tile // 4)
    finite = jnp.isfinite(image).all((1, 2, 3))
    return jnp.round(jnp.clip(image * 127.5 + 127.5, 0, 255)).astype(jnp.uint8), finite


@functools.partial(jax.jit, static_argnames=('config', 'height', 'width', 'tile', 'mesh', 'report'))
def _program(params, data, ticket, *, config, height, width, tile, mesh, report):
    """`pipeline`, each device on its own images: shard_map leaves XLA nothing to communicate."""
    def local(params, data, ticket):
        on_call = functools.partial(_tell, ticket) if report else None
        return pipeline(params, data, config, height, width, tile, on_call)

    images = PartitionSpec('data')
    specs = Inputs(*(PartitionSpec(None, 'data') if axis else images for axis in data.axes))
    return jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), specs, PartitionSpec()),
                         out_specs=images, check_vma=False)(params, data, ticket)


def _mesh(devices):
    return jax.make_mesh((devices,), ('data',), axis_types=(AxisType.Auto,),
                         devices=jax.local_devices()[:devices])


def _pad(array, count, axis):
    """Repeat the last image until there are `count`; numpy, so that nothing compiles."""
    extra = [(0, count - size if i == axis else 0) for i, size in enumerate(array.shape)]
    return np.pad(array, extra, mode='edge')


def _plan(request, schedule):
    """A request's sigmas and table, with A1111's habit for the samplers that need it."""
    options = dict(request.schedule_options)
    if request.sampler in sampling.DISCARD_PENULTIMATE['a1111']:
        options.setdefault('discard_penultimate', True)
    sigmas = sampling.schedule(request.schedule, request.steps, schedule, **options)
    options = dict(request.sampler_options)
    if request.eta is not None:
        options['eta'] = request.eta
    return sigmas, sampling.plan(request.sampler, sigmas, config=schedule, **options)


def _guidance(requests, sigmas, rows):
    """The batch's Guidance of [calls,B]; of [1,B] for adaptive steps, which have no rows."""
    levels = getattr(rows, 'sigma', np.stack([s[:1] for s in sigmas], 1))
    for r in requests:
        varied = [name for name, value in (('guidance', r.guidance), *r.guidance_options.items())
                  if name not in ('freeu', 'perp_neg') and isinstance(value, tuple)]
        if isinstance(rows, sampling.Adaptive) and varied:
            raise ValueError(f'{varied[0]} over the steps: expected a constant with '
                             f'{r.sampler}, which chooses its own steps')
    return jax.tree.map(np.float32, stack([
        table(r.guidance, r.guidance_options, s, levels[:, i])
        for i, (r, s) in enumerate(zip(requests, sigmas))]))


def _texts(requests):
    """Negative prompts, prompts, and perp_neg's negatives, '' where an image has fewer: lists of B.
    """
    more = [[text for text, _ in r.guidance_options.get('perp_neg', ())] for r in requests]
    return [[r.negative_prompt for r in requests], [r.prompt for r in requests],
            *map(list, itertools.zip_longest(*more, fillvalue=''))]


def _ids(config, requests, parts):
    """SDXL's time ids [B,P,N]; further negatives have those of the negative prompt."""
    if not config.unet.added_dim:
        return None
    found = []
    for r in requests:
        size = (r.height, r.width)
        original = r.original_size or size
        if config.aesthetic:
            found.append(conditioning.aesthetic_ids(original, r.crop, r.aesthetic,
                                                    r.negative_aesthetic))
        else:
            found.append(conditioning.time_ids(original, r.crop, r.target_size or size))
    found = np.stack(found)  # [B,2,N]
    return found[:, [0, 1] + [0] * (parts - 2)]


# Progress. The listener of a run is found by a ticket that is data too: a function in the program
# would be a constant, and another function another compilation.
_tickets = itertools.count()
_listeners = {}


def _tell(ticket, i, out):
    """Call the ticket's listener when a model call's output is there."""
    out, done = lax.optimization_barrier((out, i))
    jax.debug.callback(_hear, ticket, done)
    return out


def _hear(ticket, i):
    listener = _listeners.get(int(ticket))
    if listener is not None:
        listener(int(i))


class _Progress:
    """Row numbers, from several devices and in any order -> on_step(done, total), rising."""

    def __init__(self, rows, on_step):
        if isinstance(rows, sampling.Adaptive):  # how many calls it takes, nobody knows
            self.calls = range(1, 1 + int(np.max(rows.max_calls)))
        else:
            self.calls = np.cumsum((rows.sigma > 0).any(1))  # model calls up to each row
        self.done, self.on_step = 0, on_step

    def __call__(self, i):
        if self.calls[i] > self.done:
            self.done = int(self.calls[i])
            self.on_step(self.done, int(self.calls[-1]))
