"""From resolved requests to everything that a compiled program takes, numpy on the host."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from jaxsd import sampling
from jaxsd.config import TEXT_ENCODERS, KUNetConfig, ModelConfig, UNetConfig
from jaxsd.models import ip_adapter
from jaxsd.prompt import blocks, conditioning
from jaxsd.run import image_conditioning, image_prompts, reference, regions
from jaxsd.run.image_conditioning import InitImage
from jaxsd.run.regions import Windows
from jaxsd.run.request import Request
from jaxsd.run.resolving import suit
from jaxsd.run.steps import Steps, chunk, over_rows
from jaxsd.run.text_conditioning import (
    adapters_of,
    arrange_texts,
    embeddings_of,
    parse_for,
    variants,
)
from jaxsd.sampling.guidance_options import stack, table
from jaxsd.typing import Params
from jaxsd.weights import Model

REFINER = np.array([0x9E3779B9, 0], np.uint32)  # a refiner draws other noise than the base


class Inputs(NamedTuple):
    """Everything about B pictures but their size, numpy. A field that is None is absent from the
    program. The leading axis is pictures; of `steps` it is rows, and the second pictures;
    `embeddings` and `factors` have none.
    """

    tokens: dict  # {text encoder: blocks.Texts}: the picture's N texts
    ids: np.ndarray | None  # [B,N,I] SDXL's time ids
    zero: np.ndarray  # bool [B,N]: texts whose conditioning is zeros
    keys: np.ndarray  # uint32 [B,2]: threefry key data
    sigma: np.ndarray  # [B]: the noise level to start from
    steps: Steps  # [rows,B,...]
    noise: np.ndarray | None = None  # [B,h,w,L] to start from; None: drawn from the keys
    given: np.ndarray | None = None  # bool [B]: whose noise holds; None: everybody's, if any
    given_steps: np.ndarray | None = None  # the same of the noise of Steps
    labels: np.ndarray | None = None  # int32 [B,P] classes; of unCLIP float32 [B,P,2*E]
    init_image: np.ndarray | None = None  # uint8 [B,H,W,3], to start from
    init_latents: np.ndarray | None = None  # [B,h,w,L], to start from in the image's place
    init_weight: np.ndarray | None = None  # [B,h,w,1]: weight of its latent at the start
    inpaint_mask: np.ndarray | None = None  # bool [B,H,W,1]: hidden
    extra: np.ndarray | None = None  # [B,h,w,E]: channels beside the latent: a mask, or depth
    low_res: np.ndarray | None = None  # uint8 [B,h,w,3]: the upscaler's small picture
    low_res_scale: np.ndarray | None = None  # [B,2]: weights of it and of noise
    mask: np.ndarray | None = None  # [B,h,w,1]: 1 where all is new
    differential: np.ndarray | None = None  # bool [B]: the mask says how strongly
    regions: np.ndarray | None = None  # [B,h,w,K]: how much each of the prompts counts where
    windows: Windows | None = None
    hints: dict | None = None  # {ControlNet: uint8 [B,H,W,3], of a union [B,K,H,W,3], int32 [B,K]}
    image_prompts: dict | None = None  # {IP-Adapter: image_prompts.Prompted}
    tiling: dict | None = None  # {axis, 'x' or 'y', whose edges meet: [B,0]}, of all pictures
    reference: np.ndarray | None = None  # uint8 [B,H,W,3]: whose keys self-attention sees
    skip: np.ndarray | None = None  # int32 [B]: layers of the text encoders that are left out
    adapters: dict | None = None  # {component: [B,A]}: weights of the adapters
    embeddings: dict | None = None  # {text encoder: [E,D]}: vectors beyond its vocabulary
    factors: dict | None = None  # {component: low-rank factors of the A adapters}, for `networks`

    @property
    def rows(self) -> Any:
        """The sampler's table, of [rows,B]."""
        return self.steps.row

    @property
    def axes(self) -> list[int | None]:
        """Which axis is pictures, for each field; None: no axis."""
        return [{'embeddings': None, 'factors': None, 'steps': 1}.get(name, 0)
                for name in self._fields]


def program(data: Inputs) -> str:
    """A short name for all that chooses the programs of Inputs, but for the numbers of pictures and
    of rows."""
    shapes = [jax.tree.map(lambda a, axis=axis: np.shape(a) if axis is None else
                           np.shape(a)[axis + 1:], value)
              for axis, value in zip(data.axes, data)]
    return hashlib.sha256(repr(jax.tree.flatten(shapes)).encode()).hexdigest()[:10]


def lengthened(data: Inputs) -> Inputs:
    """Inputs whose tables have idle rows up to `sampling.bucket`, so that few lengths compile."""
    count = len(data.steps.call)
    return data._replace(steps=chunk(data.steps, 0, count, sampling.bucket(count)))


def inputs(model: Model, requests: Sequence[Request], noise: np.ndarray | None = None,
           init_images: Sequence[InitImage] | None = None, stage: str | None = None) -> Inputs:
    """Resolved requests -> Inputs, numpy on the host: tokens, tables, keys. Compiles nothing but
    networks that look at pictures: depth estimators, and image encoders of IP-Adapters.

    init_images: of `image_conditioning.load`, opened here if None. stage: 'base' or 'refiner', the
    part of the steps up to `switch` or from there on; a refiner starts from `noise`, the base's
    latents.
    """
    config = model.config
    for name in TEXT_ENCODERS:
        if getattr(config, name) is not None and name not in model.tokenizers:
            raise ValueError(f'model.tokenizers: expected one for {name!r}, '
                             f'found {sorted(model.tokenizers)}')
    for name in ('pag', 'sag'):
        if config.unet.mid_transformer_layers < 1 and any(name in r.guidance_options
                                                          for r in requests):
            raise ValueError(f'{name}: expected a U-Net with attention in its middle block, which '
                             f'{name} looks at; this one has none there')
    for r in requests:
        _check_features(config, r)
    if init_images is None:
        init_images = [image_conditioning.load(r, config) for r in requests]
    parsed = [parse_for(model, r) for r in requests]
    sigmas, starts, tables, calls = zip(*(_table(r, config.schedule, stage) for r in requests))
    rows = sampling.stack(tables, max(len(t.sigma) for t in tables))
    keys = np.array([divmod(_key(r), 2**32) for r in requests], np.uint32)
    words, text, prompts = _text(model, requests, parsed, sigmas, rows, stage)
    images, strength, control = image_conditioning.inputs(
        model, requests, init_images, sigmas, rows, prompts)
    images |= regions.inputs(model, requests, parsed)
    prompted, image_weights = image_prompts.inputs(model, requests, sigmas, rows, prompts)
    pictures, followed = reference.inputs(config, requests, sigmas, rows, prompts)
    start, fresh = _noise(config, requests, sigmas, rows, noise, stage)
    if stage == 'refiner':
        keys, starts = keys ^ REFINER, np.ones(len(requests))
        if 'init_weight' in images:
            images['init_weight'] = np.zeros_like(images['init_weight'])
    rows, count = jax.tree.map(np.float32, rows), len(rows.sigma)
    call = np.broadcast_to(np.arange(count, dtype=np.int32)[:, None], (count, len(requests)))
    guidance = _guidance(config, requests, parsed, sigmas, rows)
    return Inputs(
        tiling=_tiling(requests), keys=keys, sigma=np.array(starts, np.float32),
        steps=Steps(rows, call, guidance, text, control, image_weights, strength,
                    _timesteps(calls, count), fresh, followed),
        image_prompts=prompted, reference=pictures, **start, **words, **images)


def _check_features(config, request):
    """ValueError for a deep shrink or a DeepCache that the U-Net has no such block for, and for
    what works on the same features in other ways."""
    options, u = request.guidance_options, config.unet
    if isinstance(u, KUNetConfig):
        for name in ('freeu', 'deep_shrink', 'deepcache', 'hypertile', 'token_merging'):
            if name in options:
                raise ValueError(f'{name}: this U-Net has no such blocks; expected a model of '
                                 'another kind')
        return
    layers = len(u.block_out_channels) * (u.layers_per_block + 1)
    for kind, field, most, which in (
            ('deep_shrink', 'block', layers - 1, 'the last block before the middle'),
            ('deepcache', 'branch', layers - 2, 'the last but one layer on the way up')):
        if kind in options and options[kind][field] > most:
            raise ValueError(f'{kind} {field}={options[kind][field]}: expected at most {most}, '
                             f'{which} of this U-Net')
    masked = any(prompt.mask is not None for prompt in request.image_prompts)
    others = {*options, *(name for name, given in (
        ('controls', request.controls), ('masks of image_prompts', masked),
        ('window', request.window)) if given)}
    for kind, refused in (
            ('deep_shrink', ('sag', 'controls', 'masks of image_prompts', 'hypertile',
                             'token_merging', 'deepcache')),
            ('deepcache', ('sag', 'window'))):
        for name in refused:
            if kind in options and name in others:
                raise ValueError(f'{kind} and {name}: expected one of them, as both work on the '
                                 'same features')


def networks(model: Model, data: Inputs) -> tuple[Params, ModelConfig]:
    """What `pipeline` takes beside a batch's Inputs -> (params, config): the model's own, less what
    has done its work on the host, and the ControlNets, IP-Adapters and adapters that the batch
    names."""
    nets = {name: model.controlnets[name] for name in data.hints or ()}
    params = {part: tree for part, tree in model.params.items() if part not in (
        'depth_estimator', 'image_encoder', 'image_normalizer')}
    params['controlnet'] = {name: net.params for name, net in nets.items()}
    prompted = {name: model.ip_adapters[name] for name in data.image_prompts or ()}
    params['ip_adapter'] = {
        name: ip_adapter.by_place(net.params, cast(UNetConfig, model.config.unet))
        for name, net in prompted.items()}
    if data.factors:
        params['adapters'] = data.factors
    return params, model.config.replace(
        controlnets=tuple((name, net.config) for name, net in nets.items()),
        ip_adapters=tuple((name, net.config) for name, net in prompted.items()),
        tiling=''.join(data.tiling or ()))


def _tiling(requests):
    """Inputs.tiling. Padding is not data, as all other pictures would pay for it."""
    if len({r.tiling for r in requests}) > 1:
        raise ValueError(f'tiling: {", ".join(sorted({repr(r.tiling) for r in requests}))}: '
                         'expected the same of all pictures of a batch')
    return {axis: np.zeros((len(requests), 0), np.float32)
            for axis in requests[0].tiling} or None


def has_steps(request: Request) -> bool:
    """Whether a resolved request has steps: at strength 0 one by A1111's convention, else none."""
    return request.strength > 0 or request.schedule_options.get('convention') == 'a1111'


def _table(request, schedule, stage=None):
    """A request's sigmas, the level of the noise that its stage starts from, and the stage's table,
    with A1111's habit for the samplers that need it; and the timesteps of its rows, where the noise
    levels do not say them."""
    levels = dict(request.schedule_options)
    if request.sampler in sampling.DISCARD_PENULTIMATE['a1111'] and not _of_diffusers(request):
        levels.setdefault('discard_penultimate', True)
    if request.strength < 1:
        levels = {'convention': 'diffusers', **levels, 'denoise': request.strength}
    sigmas = part = np.zeros(1)
    if has_steps(request):
        sigmas = part = sampling.schedule(request.schedule, request.steps, schedule, **levels)
    if stage is not None:
        # As diffusers' denoising_end: a fraction of the timesteps trained on, not of the steps.
        count = schedule.num_train_timesteps
        cutoff = round(count - request.switch * count)
        t = sampling.sigma_to_t(sigmas[:-1], schedule)
        done = int((t > cutoff - 1e-3).sum())  # cutoff and above; t is rounded
        part = sigmas[:done + 1] if stage == 'base' else sigmas[done:]
    options = dict(request.sampler_options)
    if request.eta is not None:
        options['eta'] = request.eta
    if len(part) == 1:
        return sigmas, part[0], sampling.idle(), None
    if options.get('ratio') is True:  # diffusers'
        options['ratio'] = schedule.num_train_timesteps // request.steps
    rows = sampling.plan(request.sampler, part, config=schedule, **options)
    if not _of_diffusers(request):
        return sigmas, part[0], rows, None
    called = sampling.called_at(request.schedule, request.steps, schedule, **levels)
    if called.unit and part[-1] == sigmas[-1]:
        last = rows.mix[:, 0] if isinstance(rows, sampling.Row) else rows.fields.get('scale', [1])
        last[-1] /= np.hypot(1, sigmas[-1])
    start = called.start if part[0] == sigmas[0] else None
    return sigmas, start or part[0], rows, _called(rows, called, schedule)


def _of_diffusers(request):
    return str(request.schedule).startswith('diffusers')


def _called(rows, called, schedule):
    """The timesteps of a table's rows [calls]; None where their noise levels say as much."""
    if schedule.edm:  # the noise levels say it in full
        return None
    sigma = np.maximum(rows.sigma, 1e-12)
    said = sampling.sigma_to_t(sigma, schedule)
    step = np.abs(np.log(called.sigmas[:-1]) - np.log(sigma)[:, None]).argmin(1)
    exact = np.isclose(called.sigmas[step], rows.sigma, rtol=1e-9, atol=0)
    found = np.where(exact, called.timesteps[step], said)
    live = rows.sigma > 0
    if sampling.free(rows) or np.abs(found - said)[live].max(initial=0) <= 1e-3:
        return None
    return np.where(live, found, -1)


def _timesteps(calls, count):
    """Those of `_called`, of all pictures -> float32 [rows,B], -1 where the noise level says it;
    None where it does so for all."""
    if all(some is None for some in calls):
        return None
    found = np.full((count, len(calls)), -1, np.float32)
    for i, some in enumerate(calls):
        if some is not None:
            found[:len(some), i] = some
    return found


def _few_steps(config, request):
    """Whether a guidance of 1 leaves the negative prompt's picture out. Where that is usual it has
    programs of its own and costs half; elsewhere it shares those of guided pictures."""
    return (request.sampler in ('lcm', 'tcd') or _of_diffusers(request)
            or suit({}, config)['guidance'] == 1)


def _guidance(config, requests, parsed, sigmas, rows):
    """The batch's Guidance of [calls,B]."""
    for r in requests:
        for kind in ('easycache', 'deepcache'):
            if sampling.free(rows) and kind in r.guidance_options:
                raise ValueError(f'{kind}: expected a sampler that does not choose its own steps, '
                                 f'found {r.sampler}')
        varied = [name for name, value in (('guidance', r.guidance), (
            'image_guidance', r.image_guidance), *r.guidance_options.items())
                  if name not in ('freeu', 'perp_neg') and isinstance(value, tuple)]
        if sampling.free(rows) and varied:
            raise ValueError(f'{varied[0]} over the steps: expected a constant with '
                             f'{r.sampler}, which chooses its own steps')
    return jax.tree.map(np.float32, stack([
        table(r.guidance, r.guidance_options, s, rows.sigma[:, i],
              np.ones(len(p.weights)) if p.places else p.weights,
              config.unet.time_cond_proj_dim > 0, rows.unguided, _few_steps(config, r),
              r.image_guidance)
        for i, (r, p, s) in enumerate(zip(requests, parsed, sigmas))]))


def _key(request):
    """The seed of what a program draws: with A1111's delta, which its Brownian trees leave out."""
    delta = 0 if request.sampler in sampling.BROWNIAN else request.eta_noise_seed_delta
    return (request.seed + delta) % 2**64


def _noise(config, requests, sigmas, rows, noise, stage):
    """Noise that a caller gives, or that programs do not draw -> fields of Inputs, Steps.noise.
    sigmas: of each picture, [steps + 1]."""
    factor = config.vae.factor
    shape = (requests[0].height // factor, requests[0].width // factor, config.vae.latent_channels)
    if noise is not None:
        if np.shape(noise) != (len(requests), *shape):
            raise ValueError(f'noise {np.shape(noise)}: expected the shape '
                             f'{(len(requests), *shape)}')
        return {'noise': np.asarray(noise, np.float32)}, None
    noisy = rows.noisy & (not sampling.free(rows))
    # Programs draw threefry's from one key, of the seed alone.
    first = np.array([r.noise != 'threefry' or r.varied or _key(r) != r.seed for r in requests])
    later = np.array([(r.step_noise or r.noise) != 'threefry' for r in requests])
    if stage == 'refiner' or not (first.any() or later.any()):
        return {}, None
    planes = shape[-1], *shape[:-1]
    start = np.zeros((len(requests), *shape), np.float32)
    draws = np.zeros((len(noisy), *start.shape), np.float32) if noisy[:, later].any() else None
    for i in np.flatnonzero(first):
        start[i] = _start(requests[i], planes, factor)
    for i in np.flatnonzero(later if draws is not None else []):
        at = np.flatnonzero(noisy[:, i])
        draws[at, i] = _later(requests[i], planes, sigmas[i], config.schedule,
                              rows.path[at, i] if len(at) else [])
    found = {'noise': start, 'given': None if first.all() else first} if first.any() else {}
    if draws is not None and not later.all():
        found['given_steps'] = later
    return found, draws


def _start(request, shape, factor):
    """The noise that a picture starts from -> [h,w,C]; shape: (C,h,w)."""
    def draw(seed, shape):
        if request.noise == 'threefry':
            return np.asarray(sampling.initial(sampling.keys([seed]), (*shape[1:], shape[0])))[0]
        return sampling.randn(request.noise, seed, shape, 0, request.noise_batch)

    size = request.seed_resize_from
    return sampling.varied(draw, request.seed, shape, request.subseed, request.subseed_strength,
                           None if size is None else (size[1] // factor, size[0] // factor))


def _later(request, shape, sigmas, schedule, paths):
    """The noise of a picture's noisy rows, one after the other -> a list of [h,w,C]. paths: theirs,
    [rows,2]."""
    source = request.step_noise or request.noise
    if request.sampler in sampling.BROWNIAN:
        levels = sigmas
        if request.schedule_options.get('convention') == 'a1111' and request.strength < 1:
            # There the tree is over all levels, also those that the picture's noise leaves out.
            levels, *_ = _table(request.replace(strength=1.0), schedule)
        ends = levels[levels > 0].min(), levels.max()
        if request.sampler == 'dpmpp_sde':
            paths = sampling.rounded(paths)
        return sampling.brownian(source, request.seed, shape, paths, ends, request.noise_batch)
    # A generator goes on where the noise to start from was drawn by it.
    own = request.step_noise in (None, request.noise) and not request.eta_noise_seed_delta
    return [sampling.randn(source, _key(request), shape, number + own, request.noise_batch)
            for number in range(len(paths))]


def _text(model, requests, parsed, sigmas, rows, stage):
    """What comes from words -> fields of Inputs, Steps.text, and which parts are prompts."""
    config = model.config
    found, index, prompts = arrange_texts(parsed)
    if index:
        index = over_rows(index, sigmas, rows, 'a prompt that changes over the steps',
                             [True]).astype(np.int32)
    widths = {name: getattr(config, name).hidden_size for name in model.tokenizers}
    tokens, embeddings = blocks.texts(
        model.tokenizers, variants(found), [r.weighting for r in requests],
        [r.cut for r in requests], embeddings_of(model, parsed), widths)
    for name, some in tokens.items():
        size = getattr(config, name).vocab_size
        if some.tokens.max() >= size:
            raise ValueError(f'{name}: token {some.tokens.max()} is outside its vocabulary of '
                             f'{size}; the tokenizer belongs to another model')
    factors, weights = (None, None) if stage == 'refiner' else adapters_of(model, parsed)
    skip = np.array([r.clip_skip - 1 for r in requests], np.int32)
    check_clip_skip(config, skip.max() + 1)
    empty = [config.zero_negative and not (r.negative_prompt or r.negative_prompt_2)
             for r in requests]
    return {
        'tokens': tokens, 'embeddings': embeddings, 'adapters': weights, 'factors': factors,
        'skip': skip if skip.any() else None,
        'ids': _ids(config, requests, found),
        'zero': np.array([[e and role == 'negative' for role, _ in row]
                          for e, row in zip(empty, found)]),
    }, index, prompts


def check_clip_skip(config: ModelConfig, clip_skip: int) -> None:
    """ValueError where a text encoder has fewer layers."""
    for name in TEXT_ENCODERS:
        text = getattr(config, name)
        if text is not None and clip_skip > 1 and clip_skip + text.skip > text.num_hidden_layers:
            raise ValueError(f'clip_skip={clip_skip}: expected at most '
                             f'{text.num_hidden_layers - text.skip}, the layers of {name}')


def _ids(config, requests, found):
    """SDXL's time ids [B,N,I]; all texts but prompts have those of the negative prompt."""
    if not config.unet.added_dim:
        return None
    ids = []
    for r, row in zip(requests, found):
        size = (r.height, r.width)
        original = r.original_size or size
        if config.aesthetic:
            pair = conditioning.aesthetic_ids(original, r.crop, r.aesthetic, r.negative_aesthetic)
        else:
            pair = conditioning.time_ids(original, r.crop, r.target_size or size)
        ids.append([pair[int(role == 'positive')] for role, _ in row])
    return np.array(ids)
