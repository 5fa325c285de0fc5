"""What a request leaves open, decided: size, sampler, steps, guidance, seed, dynamic prompts."""

import dataclasses
import math
import random
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

from jaxsd import images
from jaxsd.config import KUNetConfig, ModelConfig
from jaxsd.prompt.wildcards import expand
from jaxsd.run.request import PROMPTS, USUAL, Hires, Request
from jaxsd.sampling import SAMPLERS, schedulers
from jaxsd.sampling.choice import one_of

# The scale that suits a version, as its recipe in configs/ has it; '': of all others.
GUIDANCE = {'': 7.0, 'sdxl': 6.0, 'sdxl_refiner': 6.0, 'x4_upscaler': 9.0, 'sd15_pix2pix': 7.5,
            'sdxl_pix2pix': 3.0}
IMAGE_GUIDANCE = 1.5  # that suits instruct-pix2pix, in diffusers and A1111 too
SUITED = ('sampler', 'schedule', 'steps', 'guidance', 'sampler_options', 'schedule_options')


def resolve(requests: Sequence[Request], config: ModelConfig) -> list[Request]:
    """Fill in what a request leaves open: size, what `suit` does, strength, a random seed for -1,
    and the choices of dynamic prompts, `{a|b}` and `__name__`, which the seed makes.

    `generate` does this itself; call it first to know the seeds and prompts that it will use.
    Warns of a size far from the model's own. Raises ValueError for a size or a strength that the
    model cannot make, and for wildcards that are not there.
    """
    if isinstance(requests, Request):
        raise ValueError('requests: expected a list of Request, found a single Request')
    config.check_fit()
    factor = config.vae.factor
    native = config.unet.sample_size * factor
    resolved = []
    for request in requests:
        request = request.replace(**suit({name: getattr(request, name) for name in SUITED}, config))
        width, height = _size(request, config)
        size = {'width': width or request.width or native,
                'height': height or request.height or native}
        unit = factor * config.unet.unit if isinstance(config.unet, KUNetConfig) else factor
        for name, value in size.items():
            if value % unit:
                below = value // unit * unit
                near = f'{below} or {below + unit}' if below else f'{unit}'
                raise ValueError(f'{name}={value}: expected a multiple of {unit} pixels, '
                                 f'for example {near}')
        _check_size(request, config, native, **size)
        if request.hires is not None:
            _check_hires(request, config, **size)
        seed = random_seed() if request.seed == -1 else int(request.seed)
        varied = {'subseed': random_seed()} if (
            request.subseed_strength and request.subseed == -1) else {}
        prompts = {name: expand(getattr(request, name), seed, request.wildcards)
                   for name in PROMPTS
                   if getattr(request, name) is not None and request.weighting != 'plain'}
        regions = request.regions
        if request.weighting != 'plain':
            regions = tuple(dataclasses.replace(region, prompt=expand(
                region.prompt, seed, request.wildcards)) for region in regions)
        hires = request.hires
        if isinstance(hires, Hires) and request.weighting != 'plain':
            own = {name: expand(getattr(hires, name), seed, request.wildcards)
                   for name in PROMPTS[:2] if getattr(hires, name) is not None}
            hires = dataclasses.replace(hires, **cast(dict[str, Any], own))
        resolved.append(request.replace(
            seed=seed, strength=_strength(request, config), hires=hires, regions=regions,
            image_guidance=_image_guidance(request, config), **size, **prompts,
            **varied))
    return resolved


def suit(given: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Arguments of a Request -> them, with what suits the model in the place of a sampler, a
    schedule, steps and guidance that are None or missing.

    In this order: what the model's folder says of it (ModelConfig.defaults: `_jaxsd` in
    model_index.json, and its scheduler where the model was distilled for it); what the network or
    its training needs: LCM's scheduler where the guidance scale is an input of the network,
    'trailing' timesteps at zero terminal SNR; GUIDANCE of its version, and USUAL. Options of a
    sampler and of a schedule count where these do. A schedule of diffusers brings its sampler.
    """
    own = _usual(config)
    for name in ('sampler', 'schedule'):
        if name in config.defaults:  # and no options of another
            own.pop(f'{name}_options', None)
    own |= config.defaults
    found, chosen = dict(given), schedulers.of_schedule(given.get('schedule'))
    if chosen is not None and found.get('sampler') is None:
        options = found.get('schedule_options') or {}
        own['sampler'], own['sampler_options'] = schedulers.sampler_of(chosen or {
            '_class_name': options.get('scheduler', 'DPMSolverMultistep'), 'clip_sample': False,
            **options})
    elif 'sampler' in config.defaults:
        one_of('sampler in _jaxsd, the defaults of the model,', own['sampler'], SAMPLERS)
    for name in ('sampler', 'schedule'):
        if found.get(name) is None:
            options = f'{name}_options'
            found[options] = {**own.get(options, {}), **(found.get(options) or {})}
    for name in ('sampler', 'schedule', 'steps', 'guidance'):
        if found.get(name) is None:
            found[name] = own[name]
    return found


def _usual(config):
    """What suits a model of which nobody says more than its config -> fields of a Request."""
    found: dict[str, Any] = {**USUAL, 'guidance': GUIDANCE.get(config.version, GUIDANCE[''])}
    if isinstance(config.unet, KUNetConfig):
        found['guidance'] = 1.0  # as its authors used the x2 latent upscaler
    embedded, scheduler = config.unet.time_cond_proj_dim > 0, config.defaults.get('scheduler')
    if scheduler is None and embedded:
        scheduler = {'_class_name': 'LCMScheduler'}
    if scheduler is None and config.schedule.rescale_betas_zero_snr:
        # Section 3.3 of https://arxiv.org/abs/2305.08891; as a folder of such a model is written.
        scheduler = {'_class_name': 'EulerDiscreteScheduler' if config.unet.added_dim else
                     'DDIMScheduler', 'timestep_spacing': 'trailing', 'clip_sample': False,
                     'set_alpha_to_one': False}
    if scheduler is None:
        return found
    try:
        found['sampler'], found['sampler_options'] = schedulers.sampler_of(scheduler)
        found['schedule'] = 'diffusers'
        found['schedule_options'] = schedulers.level_options(scheduler)
    except ValueError as error:
        warnings.warn(f'the scheduler in the model\'s folder is left out: {error}', stacklevel=4)
    if found['sampler'] in ('lcm', 'tcd'):
        found |= {'steps': 4, 'guidance': 8.5 if embedded else 1.0}  # diffusers' for LCM
    return found


def _check_hires(request, config, width, height):
    """ValueError for a second pass that the model cannot make."""
    if config.task:
        raise ValueError(f'hires: expected a model from text alone, found one for {config.task}')
    across, down = request.hires.size(width, height)
    if across < width or down < height:
        raise ValueError(f'hires: {across}x{down}, expected at least the {width}x{height} of the '
                         'first pass')
    request.replace(hires=None, width=across, height=down,
                    steps=request.hires.steps or request.steps)  # too much: says so


def _check_size(request, config, native, width, height):
    """Warn of a size of which the model knows little, a quarter of its pixels or four times as
    many. Raises ValueError for a sixteenth or sixteen times, which only give noise."""
    if request.window is not None:
        if request.window % config.vae.factor or (request.window_stride or 0) % config.vae.factor:
            raise ValueError(f'window={request.window}, window_stride={request.window_stride}: '
                             f'expected multiples of {config.vae.factor} pixels')
        width, height = min(width, request.window), min(height, request.window)
    ratio = width * height / native ** 2
    if config.task in ('upscaler', 'latent_upscaler') or 1 / 4 <= ratio <= 4:
        return
    said = f'{width}x{height}: this model is made for {native}x{native}'
    if not (request.force_size or 1 / 16 <= ratio <= 16):
        raise ValueError(f'{said}, and draws nothing but noise so far from it; leave width and '
                         'height out, or force_size=True takes it all the same')
    warnings.warn(f'{said}; expect poor pictures, or leave width and height out', stacklevel=2)


def _strength(request, config):
    """A request's strength, or what stands for None: 1 where there is nothing to start from."""
    upscaler = config.task in ('upscaler', 'latent_upscaler')
    if upscaler and request.strength not in (None, 1):
        raise ValueError(f'strength={request.strength}: expected 1 with an upscaler, which sees '
                         'the image and starts from noise')
    if request.strength is not None:
        return request.strength
    started = request.image is not None and request.mask is None and request.outpaint is None
    return 0.75 if started and config.task not in (
        'upscaler', 'latent_upscaler', 'pix2pix', 'unclip') else 1.0


def _image_guidance(request, config):
    """A request's image_guidance, or what stands for None; ValueError where it has no meaning."""
    if config.task == 'pix2pix':
        return IMAGE_GUIDANCE if request.image_guidance is None else request.image_guidance
    if request.image_guidance is not None:
        raise ValueError(f'image_guidance={request.image_guidance}: expected an instruct-pix2pix '
                         'model, which sees the image that it edits; leave it out for this one')
    return None


def _size(request, config):
    """The (width, height) that an aspect or an image gives a request; None where it gives none."""
    asked = request.width, request.height
    if request.aspect is not None:
        if not config.unet.added_dim:
            raise ValueError(f'aspect={request.aspect!r}: expected an SDXL model, which learnt '
                             'several; give width and height instead')
        found = bucket(request.aspect)
    else:
        found = _image_size(request, config)
    if found is not None and asked not in ((None, None), found):
        raise ValueError(f'width={request.width}, height={request.height}: expected neither beside '
                         f'aspect or outpaint, which make it {found[0]}x{found[1]}')
    return found or (None, None)


def _image_size(request, config):
    """The (width, height) that a request's image gives it, or None; opens the image."""
    factor = config.vae.factor
    if request.outpaint is not None:
        left, top, right, bottom = request.outpaint
        height, width, _ = images.read(request.image).shape
        return tuple(-(-n // factor) * factor
                     for n in (width + left + right, height + top + bottom))
    if config.task == 'upscaler' and request.image is not None and not (
            request.width or request.height):
        height, width, _ = images.read(request.image).shape
        return width * factor, height * factor
    if config.task == 'latent_upscaler' and request.image is not None and not (
            request.width or request.height):
        unit = factor * config.unet.unit
        height, width, _ = images.read(request.image).shape
        return tuple(max(2 * n // unit, 1) * unit for n in (width, height))
    return None


# The landscape sizes that SDXL was trained on; the portrait ones are the same, turned
# (https://arxiv.org/abs/2307.01952, app. I).
_WIDE = {512: (2048, 1984, 1920, 1856), 576: (1792, 1728, 1664), 640: (1600, 1536),
         704: (1472, 1408, 1344), 768: (1344, 1280), 832: (1216, 1152), 896: (1152, 1088),
         960: (1088, 1024)}
_WIDE = [(width, height) for height, widths in _WIDE.items() for width in widths]
BUCKETS = (*_WIDE, (1024, 1024), *((height, width) for width, height in reversed(_WIDE)))


def bucket(aspect: str) -> tuple[int, int]:
    """'W:H' -> the (width, height) that SDXL was trained on whose ratio is nearest.

    Raises ValueError for what is no ratio, and for one that no size comes near.
    """
    numbers = re.fullmatch(r'(\d++\.?\d*+)[:x](\d++\.?\d*+)', str(aspect))
    width, height = map(float, numbers.groups()) if numbers else (0, 1)
    if not height / 4 <= width <= 4 * height or not height:
        raise ValueError(f'aspect={aspect!r}: expected width:height, such as 16:9, from 1:4 to 4:1')
    return min(BUCKETS, key=lambda size: abs(math.log(size[0] / size[1] * height / width)))


def random_seed() -> int:
    """What -1 stands for: 32 bits, short enough to copy by hand, and other programs take it."""
    return random.SystemRandom().randrange(2**32)
