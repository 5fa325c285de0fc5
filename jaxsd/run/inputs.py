"""From resolved requests to everything that a compiled program takes, numpy on the host."""

import functools
import itertools
from typing import NamedTuple

import jax
import numpy as np

from jaxsd import sampling
from jaxsd.config import TEXT_ENCODERS
from jaxsd.prompt import conditioning
from jaxsd.run import canvas
from jaxsd.sampling.guidance import Guidance
from jaxsd.sampling.guidance_options import stack, table

BY_ROW = ('rows', 'guidance', 'strength', 'control', 'draws')
REFINER = np.uint32([0x9E3779B9, 0])  # so that a refiner draws other noise than the base did


class Inputs(NamedTuple):
    """Everything about a batch but its shape. A field that is None is absent from the program.

    The leading axis is pictures; of the fields in BY_ROW it is rows, and the second pictures.
    """

    tokens: dict  # {text encoder: int32 [B,P,T]}, negative prompt, prompt, perp_neg's negatives
    ids: np.ndarray | None  # [B,P,N] SDXL's time ids
    zero: np.ndarray  # bool [B]: the negative conditioning is zeros
    guidance: Guidance  # of [calls,B]
    keys: np.ndarray  # uint32 [B,2]: threefry key data
    sigma: np.ndarray  # [B]: the noise level to start from
    rows: sampling.Rows  # [calls,B,...]; or sampling.Adaptive [B]
    noise: np.ndarray | None = None  # [B,h,w,L] to start from; None: drawn from the keys
    draws: np.ndarray | None = None  # [calls,B,h,w,L]: the noise of stochastic samplers
    given: np.ndarray | None = None  # bool [B]: whose noise and draws hold; None: everybody's
    labels: np.ndarray | None = None  # int32 [B,P] classes
    picture: np.ndarray | None = None  # uint8 [B,H,W,3] to start from, or to keep where not `free`
    signal: np.ndarray | None = None  # [B,h,w,1]: weight of its latent at the start
    hole: np.ndarray | None = None  # bool [B,H,W,1]: what inpainting models may not see of it
    extra: np.ndarray | None = None  # [B,h,w,E]: channels beside the latent: a mask, or depth
    low: np.ndarray | None = None  # uint8 [B,h,w,3]: the upscaler's small picture
    low_scale: np.ndarray | None = None  # [B,2]: weights of it and of noise
    free: np.ndarray | None = None  # [B,h,w,1]: mask, 1 where all is painted
    by_strength: np.ndarray | None = None  # bool [B]: the mask is how strongly, not a mixture
    strength: np.ndarray | None = None  # [calls,B]: a mask from here up is painted, by_strength
    hints: dict | None = None  # {ControlNet: uint8 [B,H,W,3]}
    control: dict | None = None  # {ControlNet: [calls,B,P,N]}: weights of its N outputs

    @property
    def axes(self):
        """Which axis is pictures, for each field."""
        by_row = BY_ROW if isinstance(self.rows, sampling.Row) else BY_ROW[1:]
        return [int(name in by_row) for name in self._fields]


def inputs(model, requests, noise=None, canvases=None, stage=None):
    """Resolved requests -> Inputs, numpy on the host: tokens, tables, keys. Compiles nothing.

    canvases: of `canvas.canvas`, opened here if None. stage: 'base' or 'refiner', the part of
    the walk up to `switch` or from there on; a refiner starts from `noise`, the base's latents.
    """
    config = model.config
    for name in TEXT_ENCODERS:
        if getattr(config, name) is not None and name not in model.tokenizers:
            raise ValueError(f'model.tokenizers: expected one for {name!r}, '
                             f'found {sorted(model.tokenizers)}')
    if canvases is None:
        canvases = [canvas.canvas(r, config) for r in requests]
    tokens = conditioning.tokens(model.tokenizers, functools.partial(_texts, requests))
    for name, ids in tokens.items():
        size = getattr(config, name).vocab_size
        if ids.max() >= size:
            raise ValueError(f'{name}: token {ids.max()} is outside its vocabulary of {size}; '
                             'the tokenizer belongs to another model')
    parts = next(iter(tokens.values())).shape[1]
    sigmas, starts, tables = zip(*(_plan(r, config.schedule, stage) for r in requests))
    rows = sampling.stack(tables)
    keys = np.array([divmod(r.seed, 2**32) for r in requests], np.uint32)
    follow = canvas.arrays(model, requests, canvases, sigmas, rows, parts)
    if stage == 'refiner':
        keys, starts = keys ^ REFINER, np.ones(len(requests))
        follow |= {'signal': np.zeros_like(follow['signal'])} if 'signal' in follow else {}
    return Inputs(
        tokens=tokens, ids=_ids(config, requests, parts),
        zero=np.array([config.zero_negative and not (r.negative_prompt or r.negative_prompt_2)
                       for r in requests]),
        guidance=_guidance(requests, sigmas, rows), keys=keys,
        sigma=np.array(starts, np.float32), rows=jax.tree.map(np.float32, rows),
        **_noise(config, requests, rows, noise, stage), **follow)


def networks(model, data):
    """What `pipeline` takes beside a batch's Inputs -> (params, config): the model's own, less what
    has done its work on the host, and the ControlNets that the batch names."""
    nets = {name: model.controlnets[name] for name in data.hints or ()}
    params = {part: tree for part, tree in model.params.items() if part != 'depth_estimator'}
    params['controlnet'] = {name: net.params for name, net in nets.items()}
    return params, model.config.replace(
        controlnets=tuple((name, net.config) for name, net in nets.items()))


def _plan(request, schedule, stage=None):
    """A request's sigmas, the one that its stage starts from, and the stage's table, with A1111's
    habit for the samplers that need it."""
    options = dict(request.schedule_options)
    if request.sampler in sampling.DISCARD_PENULTIMATE['a1111']:
        options.setdefault('discard_penultimate', True)
    if 0 < request.strength < 1:
        options = {'convention': 'diffusers', **options, 'denoise': request.strength}
    sigmas = part = np.zeros(1)
    if request.strength > 0:
        sigmas = part = sampling.schedule(request.schedule, request.steps, schedule, **options)
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
        return sigmas, part[0], sampling.idle()
    return sigmas, part[0], sampling.plan(request.sampler, part, config=schedule, **options)


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


def _noise(config, requests, rows, noise, stage):
    """The fields of Inputs that hold noise: what a caller gives, or other generators' draws."""
    factor = config.vae.factor
    shape = (requests[0].height // factor, requests[0].width // factor, config.vae.latent_channels)
    if noise is not None:
        if np.shape(noise) != (len(requests), *shape):
            raise ValueError(f'noise {np.shape(noise)}: expected the shape '
                             f'{(len(requests), *shape)}')
        return {'noise': np.asarray(noise, np.float32)}
    given = np.array([r.noise != 'threefry' for r in requests])
    if stage == 'refiner' or not given.any():
        return {}

    def draw(i, number):
        r = requests[i]
        return sampling.randn(r.noise, r.seed, (shape[-1], *shape[:-1]), number, r.noise_batch)

    start = np.zeros((len(requests), *shape), np.float32)
    noisy = getattr(rows, 'mix', np.zeros((0, len(requests), 2, 4)))[..., sampling.NOISE].any(-1)
    draws = np.zeros((len(noisy), *start.shape), np.float32) if noisy[:, given].any() else None
    for i in np.flatnonzero(given):
        start[i] = draw(i, 0)
        for number, row in enumerate(np.flatnonzero(noisy[:, i]), 1):
            draws[row, i] = draw(i, number)
    return {'noise': start, 'draws': draws, 'given': None if given.all() else given}


def _texts(requests, encoder):
    """What a text encoder reads: negative prompts, prompts, and perp_neg's negatives, '' where an
    image has fewer: lists of B."""
    def of(request, name):
        second = getattr(request, f'{name}_2') if encoder == 'text_encoder_2' else None
        return getattr(request, name) if second is None else second

    more = [[text for text, _ in r.guidance_options.get('perp_neg', ())] for r in requests]
    return [*([of(r, name) for r in requests] for name in ('negative_prompt', 'prompt')),
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
