"""A1111's JSON (AUTOMATIC1111/stable-diffusion-webui, modules/api) to Requests and back.

Pure functions: nothing here opens a file, and no text of a request is ever taken for a path.
"""

import base64
import binascii
import difflib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from inspect import signature
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from jaxsd import images
from jaxsd.config import CodeFormerConfig
from jaxsd.images.reading import Picture
from jaxsd.run import infotext
from jaxsd.run.detectors import DETECTORS, hint, possible
from jaxsd.run.hires import enlarge
from jaxsd.run.request import MAX_SEED, Control, Hires, ImagePrompt, Reference, Request
from jaxsd.run.resolving import random_seed
from jaxsd.run.upscale import to_size
from jaxsd.sampling import BROWNIAN, SAMPLERS
from jaxsd.sampling.choice import choose, one_of, unknown
from jaxsd.sampling.names import A1111_SAMPLERS, SCHEDULE_NAMES, find_sampler
from jaxsd.serve.schemas import Body, ControlUnit, Extras, Img2Img, Neutral, Txt2Img
from jaxsd.weights.model import Network

AUTOMATIC = infotext.AUTOMATIC | dict.fromkeys(infotext.BY_TIMESTEPS, 'ddim_uniform')
RESIZE = ('stretch', 'crop', 'pad')  # by resize_mode
FILLS = ('edge', 'original', 'latent', 'latent')  # by inpainting_fill: there noise and nothing
UNION = {  # control types of sd-webui-controlnet: modes of a ControlNet-Union
    'Unknown': None, 'OpenPose': 'openpose', 'Depth': 'depth', 'Soft Edge': 'scribble',
    'Hard Edge': 'canny', 'Normal Map': 'normal', 'Segmentation': 'segment', 'Tile': 'tile',
    'Inpaint': 'repaint'}
MODULES = {  # of sd-webui-controlnet: the preprocessor here, and what its thresholds are
    'none': ('none', ()), 'canny': ('canny', ('low', 'high')), 'scribble': (
        'scribble', ('threshold',)), 'tile': ('tile', ('factor',)), 'tile_resample': (
        'tile', ('factor',))}
# Of modules that networks find, which have the names of detect.DETECTORS: older names, what their
# thresholds are, and what they are for a ControlNet-Union.
ALIASES = {'depth': 'depth_midas', 'hed': 'softedge_hed', 'hed_safe': 'softedge_hedsafe',
           'lineart': 'lineart_realistic', 'bae': 'normal_bae', 'normal': 'normal_bae'}
THRESHOLDS = {'mlsd': ('score', 'distance')}
KINDS = {'openpose': 'openpose', 'softedge': 'scribble', 'scribble': 'scribble',
         'lineart': 'canny', 'mlsd': 'canny', 'normal': 'normal', 'depth': 'depth'}
REFERENCE = 'reference_only'  # of units without a model
# Of units whose model is an IP-Adapter, which chooses what is looked at itself.
LOOKS = ('ip-adapter-auto', 'ip-adapter_clip_sd15', 'ip-adapter_clip_sdxl',
         'ip-adapter_clip_sdxl_plus_vith', 'ip-adapter_clip_h', 'ip-adapter_clip_g')
CHURN = {'s_churn': 0, 's_tmin': 0, 's_tmax': 0, 's_noise': 1}  # A1111's defaults, left to samplers

LEAST = 1e-6  # denoising_strength 0 is one step too in A1111

Schema = TypeVar('Schema', bound=BaseModel)


class Limits(NamedTuple):
    """What one request may ask for. pixels: width times height; of a picture sent, 4 times that."""

    pixels: int = 2**20
    steps: int = 100
    batch: int = 16


def parse(model: type[Schema], data: Any) -> Schema:
    """JSON as bytes, or what it says -> an instance of the model. Raises ValueError, in one line.
    """
    try:
        return (model.model_validate_json if isinstance(data, bytes) else model.model_validate)(
            data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    name = '.'.join(map(str, first['loc'])) or 'the body'
    if first['type'] == 'extra_forbidden':
        raise unknown('field', name[:80], model.model_fields)
    told = first['type'] not in ('json_invalid', 'missing')
    found = f', found {brief(first["input"])}' if told else ''
    if first['loc'] and first['loc'][0] in Neutral.model_fields:
        found += ': this is not supported here'
    raise ValueError(f'{name}: {first["msg"]}{found}')


def brief(value: object) -> str:
    """A value as an error tells it: one short line."""
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:77]}...'


def requests(body: Body, defaults: Mapping[str, Any], limits: Limits,
             model: str | Sequence[str] = '', vae: str = '', refiner: str = '',
             read: Callable[..., np.ndarray] = images.read_bytes,
             controlnets: Mapping[str, Network] = MappingProxyType({}),
             upscalers: Collection[str] = (), ip_adapters: Collection[str] = (),
             edits: bool = False,
             detectors: Mapping[str, Network] = MappingProxyType({})) -> list[Request]:
    """A Body -> its Requests, with seeds that count up.

    defaults: arguments of Request, for what the body leaves open. model, vae, refiner: the names
    of what is loaded; the model may have several. read: decodes pictures, as images.read_bytes
    does. controlnets, detectors: those there are; upscalers, ip_adapters: their names. edits:
    whether the model is an instruct-pix2pix. Raises ValueError for what is wrong or too much.
    """
    given = {**defaults, 'prompt': body.prompt or '', 'negative_prompt': body.negative_prompt or ''}
    given |= {ours: getattr(body, theirs) for ours, theirs in (
        ('steps', 'steps'), ('guidance', 'cfg_scale'), ('width', 'width'), ('height', 'height')
        ) if getattr(body, theirs) is not None}
    if body.width or body.height:
        given['aspect'] = None
    given |= _denoising(body, defaults)
    if body.eta is not None and 'eta' in signature(SAMPLERS[given['sampler']]).parameters:
        given['eta'] = body.eta  # clients send it always: A1111 passes over it as well
    given |= _settings(body.override_settings or {}, model, vae)
    given |= _refiner(body, refiner)
    count = (body.batch_size or 1) * (body.n_iter or 1)
    for name, value, most in (('steps', given.get('steps', 0), limits.steps),
                              ('batch_size * n_iter', count, limits.batch)):
        if value > most:
            raise ValueError(f'{name}={value}: expected at most {most}')
    if isinstance(body, Img2Img):
        given |= _pictures(body, limits, read)
        if edits and body.image_cfg_scale is not None:  # clients send it always, as eta
            given['image_guidance'] = body.image_cfg_scale
        given['schedule_options'] = {'convention': 'a1111', **(given.get('schedule_options') or {})}
    elif isinstance(body, Txt2Img) and body.enable_hr:
        given['hires'] = _hires(body, limits, (model,) if isinstance(model, str) else model,
                                upscalers)
        # There the second pass makes as many steps as it is given.
        given['schedule_options'] = {'convention': 'comfyui', **(given.get('schedule_options') or
                                                                 {})}
    given |= _scripts(body, given, limits, read, controlnets, ip_adapters, detectors)
    for name in ('seed', 'subseed') if body.subseed_strength else ('seed',):
        value = getattr(body, name)
        given[name] = random_seed() if value in (-1, None) else value % (MAX_SEED + 1)  # as torch's
    if body.tiling is not None:
        given['tiling'] = body.tiling
    if given.get('noise') == 'torch' and given.get('sampler') in BROWNIAN:
        given['step_noise'] = 'philox'  # A1111's tree is on the GPU all the same
    first = Request(**{**given, **_variation(body, limits)})
    return [first.numbered(i) for i in range(count)]


def _variation(body, limits):
    """subseed_strength and seed_resize_from_* -> arguments of Request."""
    found = {'subseed_strength': body.subseed_strength} if body.subseed_strength else {}
    width, height = body.seed_resize_from_w or 0, body.seed_resize_from_h or 0
    if width > 0 and height > 0:
        if width * height > limits.pixels:
            raise ValueError(f'seed_resize_from_w={width}, seed_resize_from_h={height}: expected '
                             f'at most {limits.pixels} pixels')
        found['seed_resize_from'] = width, height
    return found


def _denoising(body, defaults):
    """Sampler and schedule, by A1111's names, its old ones ('DPM++ 2M Karras'), or ours."""
    found, schedule = {}, None
    name = body.sampler_name or body.sampler_index
    if name and name.lower() != 'automatic':
        sampler, schedule, options = _sampler(name)
        found = {'sampler': sampler, 'schedule': schedule or AUTOMATIC.get(sampler, 'normal'),
                 'schedule_options': {}, 'sampler_options': {}}
        if sampler == defaults.get('sampler'):
            found['sampler_options'] = defaults.get('sampler_options') or {}
        if options:
            found['sampler_options'] = options
    if body.scheduler and body.scheduler.lower() == 'automatic':
        sampler = found.get('sampler', defaults.get('sampler'))
        found |= {'schedule': schedule or AUTOMATIC.get(sampler, 'normal'), 'schedule_options': {}}
    elif body.scheduler:
        found |= {'schedule': choose('scheduler', body.scheduler.lower(), SCHEDULE_NAMES),
                  'schedule_options': {}}
    churn = {option: getattr(body, option) for option, usual in CHURN.items()
             if getattr(body, option) not in (None, usual)}
    if churn:
        found['sampler_options'] = {**found.get('sampler_options', {}), **churn}
    return found


def _sampler(name):
    """A sampler's name -> ours, the schedule that an old name holds, or None, and options."""
    sampler, schedule, options = find_sampler(name)
    if sampler is None:
        known = list(dict.fromkeys([*A1111_SAMPLERS.values(), *SAMPLERS]))
        near = difflib.get_close_matches(name.lower(), map(str.lower, known), n=1, cutoff=0)
        raise ValueError(f'unknown sampler {brief(name)}: did you mean '
                         f'{next(k for k in known if k.lower() == near[0])!r}? '
                         f'Known: {", ".join(known)}')
    return sampler, schedule, options


def _settings(settings, model, vae):
    """override_settings -> arguments of Request. Raises ValueError for what it cannot honour."""
    only = {'sd_model_checkpoint': (model,) if isinstance(model, str) else model,
            'sd_vae': (vae or 'Automatic', 'Automatic', 'None'),
            'samples_format': ('png',)}
    honoured = {'CLIP_stop_at_last_layers': lambda v: {'clip_skip': v},
                'randn_source': lambda v: {'noise': choose('randn_source', v, infotext.NOISES)},
                'eta_noise_seed_delta': lambda v: {'eta_noise_seed_delta': v},
                'emphasis': lambda v: {'weighting': choose('emphasis', v, infotext.EMPHASIS)}}
    found = {}
    for name, value in settings.items():
        one_of('override setting', name, [*honoured, *only])
        if value is None:
            continue
        if name in honoured:
            found |= honoured[name](value)
        elif value not in only[name]:
            raise ValueError(f'override_settings.{name}={brief(value)}: expected '
                             f'{" or ".join(map(repr, dict.fromkeys(only[name])))}; '
                             'POST /sdapi/v1/options loads another for all')
    return found


def _refiner(body, refiner):
    """When the refiner takes over; 1, never, for requests that do not name it."""
    if not body.refiner_checkpoint or body.refiner_checkpoint == 'None':
        return {'switch': 1.0} if refiner else {}
    one_of('refiner_checkpoint', body.refiner_checkpoint, [refiner] if refiner else [])
    return {} if body.refiner_switch_at is None else {'switch': body.refiner_switch_at}


def _hires(body, limits, models, upscalers):
    """enable_hr and its fields -> Hires."""
    for name in ('firstphase_width', 'firstphase_height'):
        if getattr(body, name):
            raise ValueError(f'{name}={getattr(body, name)}: expected width and height, those of '
                             'the first pass')
    one_of('hr_checkpoint_name', body.hr_checkpoint_name or 'Use same checkpoint', [
        'Use same checkpoint', *models])
    known = {name: name for name in upscalers} | infotext.HIRES_UPSCALERS
    found = {'upscaler': choose('hr_upscaler', body.hr_upscaler or 'Latent', known),
             'scale': 2.0 if body.hr_scale is None else body.hr_scale,
             'strength': 0.75 if body.denoising_strength is None else body.denoising_strength,
             'width': body.hr_resize_x or None, 'height': body.hr_resize_y or None,
             'steps': body.hr_second_pass_steps or None, 'prompt': body.hr_prompt or None,
             'negative_prompt': body.hr_negative_prompt or None}
    if (body.hr_second_pass_steps or 0) > limits.steps:
        raise ValueError(f'hr_second_pass_steps={body.hr_second_pass_steps}: expected at most '
                         f'{limits.steps}')
    if body.hr_sampler_name and body.hr_sampler_name != 'Use same sampler':
        found['sampler'], schedule, options = _sampler(body.hr_sampler_name)
        if options:
            raise ValueError(f'hr_sampler_name={brief(body.hr_sampler_name)}: expected a sampler '
                             'without options')
        found['schedule'] = schedule or AUTOMATIC.get(found['sampler'], 'normal')
    if (name := body.hr_scheduler) and name.lower() not in ('automatic', 'use same scheduler'):
        found['schedule'] = choose('hr_scheduler', name.lower(), SCHEDULE_NAMES)
    elif name and name.lower() == 'use same scheduler':
        found['schedule'] = None
    return Hires(**found)


def _pictures(body, limits, read):
    """init_images, mask and what is done with them -> arguments of Request."""
    strength = 0.75 if body.denoising_strength is None else body.denoising_strength
    image = decode(body.init_images[0], 'init_images.0')
    found = {'image': read(image, 'init_images.0', 4 * limits.pixels),
             'strength': max(strength, LEAST),
             'resize': RESIZE[body.resize_mode or 0]}
    if not body.mask:
        return found
    mask = read(decode(body.mask, 'mask'), 'mask', 4 * limits.pixels, gray=True)
    blurs = {blur for blur in (body.mask_blur_x, body.mask_blur_y) if blur is not None}
    if len(blurs) > 1 and body.mask_blur is None:
        raise ValueError(f'mask_blur_x={body.mask_blur_x}, mask_blur_y={body.mask_blur_y}: '
                         'expected the same of both')
    blur = body.mask_blur if body.mask_blur is not None else next(iter(blurs), 4)
    return found | {
        'mask': np.float32(1) - mask if body.inpainting_mask_invert else mask, 'mask_blur': blur,
        'only_masked': None if body.inpaint_full_res is False else
        body.inpaint_full_res_padding or 0, 'fill': FILLS[body.inpainting_fill or 0]}


def _scripts(body, given, limits, read, controlnets, ip_adapters, detectors):
    """alwayson_scripts -> arguments of Request."""
    controls, prompts, references = [], [], []
    for name, script in (body.alwayson_scripts or {}).items():
        if name.lower() != 'controlnet':
            raise ValueError(f'alwayson_scripts.{name}: there is no such script, only ControlNet')
        for i, args in enumerate(script.args):
            unit = parse(ControlUnit, args)
            if unit.enabled is False:
                continue
            where = f'alwayson_scripts.{name}.args.{i}'
            image = unit.image.get('image') if isinstance(unit.image, dict) else unit.image
            if isinstance(unit.image, dict) and unit.image.get('mask'):
                raise ValueError(f'{where}.image.mask: this is not supported here')
            if image or unit.input_image:
                image = read(decode(image or unit.input_image, f'{where}.image'), f'{where}.image',
                             4 * limits.pixels)
            elif (image := given.get('image')) is None:
                raise ValueError(f'{where}.image: expected the hint')
            if unit.module == REFERENCE:
                references.append(_reference(unit, image))
            elif unit.module in LOOKS:
                prompts.append(_image_prompt(unit, image, ip_adapters))
            else:
                controls.append(_control(unit, image, given, controlnets, detectors))
    if len(references) > 1:
        raise ValueError(f'{len(references)} units of {REFERENCE}: expected one')
    found = {'controls': controls, 'image_prompts': prompts, 'reference': next(iter(references),
                                                                               None)}
    return {name: value for name, value in found.items() if value}


def _image_prompt(unit, image, ip_adapters):
    """A ControlUnit whose module is one of LOOKS, and its picture -> ImagePrompt."""
    net = one_of('IP-Adapter', (unit.model or '').partition(' [')[0], ip_adapters)
    if (unit.control_mode or 0) not in (0, 'Balanced'):
        raise ValueError(f'control_mode={brief(unit.control_mode)}: expected Balanced with '
                         f'{unit.module}')
    return ImagePrompt(net, image, *_weight(unit))


def _reference(unit, image):
    """A ControlUnit that needs no model, and its picture -> Reference. As that extension does, the
    mode decides on the fidelity, which is threshold_a where it is balanced."""
    mode, fidelity = _mode(unit), 0.5 if unit.threshold_a in (None, -1) else unit.threshold_a
    weight, start, end = _weight(unit)
    return Reference(image, min(weight, 1.0), start, end,
                     {'soft': 0.0, 'original': 1.0, None: fidelity}[mode])


def _mode(unit):
    """A ControlUnit's control_mode -> a guess mode."""
    mode = unit.control_mode or 0
    guess = {0: None, 'Balanced': None, 1: 'soft', 'My prompt is more important': 'soft',
             2: 'original', 'ControlNet is more important': 'original'}
    if mode not in guess:
        raise ValueError(f'control_mode={brief(mode)}: expected 0, 1, 2 or '
                         f'{", ".join(name for name in guess if isinstance(name, str))}')
    return guess[mode]


def _weight(unit):
    """A ControlUnit's weight, start and end."""
    return (1.0 if unit.weight is None else unit.weight, unit.guidance_start or 0.0,
            1.0 if unit.guidance_end is None else unit.guidance_end)


def _control(unit, image, given, controlnets, detectors=MappingProxyType({})):
    """A ControlUnit and its picture -> Control."""
    net = one_of('ControlNet', (unit.model or '').partition(' [')[0], controlnets)
    guess = _mode(unit)
    kind = choose('union_control_type', unit.union_control_type or 'Unknown', UNION)
    if not getattr(controlnets[net].config, 'num_control_type', 0):
        kind = None  # it is sent with any net, and says something to a union
    elif kind is None and unit.module in MODULES and unit.module != 'none':
        kind = MODULES[unit.module][0]  # as that extension does
    elif kind is None and unit.module and unit.module != 'none':
        kind = KINDS.get(ALIASES.get(unit.module, unit.module).partition('_')[0])
    width, height = given.get('width'), given.get('height')
    if width and height and 'hires' in given:
        width, height = given['hires'].size(width, height)
    resize = {None: 'crop', **dict(enumerate(RESIZE)), 'Just Resize': 'stretch',
              'Crop and Resize': 'crop', 'Resize and Fill': 'pad'}
    if unit.resize_mode not in resize:
        raise ValueError(f'resize_mode={brief(unit.resize_mode)}: expected 0, 1 or 2')
    if width and height and unit.pixel_perfect:
        image = images.fit(image, width, height, resize[unit.resize_mode])
    image = detect(unit.module or 'none', image, None if unit.pixel_perfect else unit.processor_res,
                   unit.threshold_a, unit.threshold_b, detectors)
    if width and height and image.shape[1] * height != image.shape[0] * width:
        image = images.fit(image, width, height, resize[unit.resize_mode])
    return Control(net, image, *_weight(unit), guess, kind)


def modules(detectors: Mapping[str, Network]) -> list[str]:
    """The modules that units may name: MODULES, and what these networks can find."""
    return [*MODULES, *possible(detectors), REFERENCE]


def detect(module: str, image: Picture, resolution: int | None = None, a: float | None = None,
           b: float | None = None,
           detectors: Mapping[str, Network] = MappingProxyType({})) -> Picture:
    """The hint of one of `modules`. resolution: pixels of the picture's shorter side, in steps of
    64 for both, at which it is looked at, as sd-webui-controlnet does; None, or less than 64: as
    it is. a, b: the module's thresholds. Raises ValueError."""
    module = ALIASES.get(module, module)
    if module in DETECTORS:
        kind, names = module, THRESHOLDS.get(module, ())
    else:
        kind, names = choose('module', module, MODULES | {
            name: (name, ()) for name in possible(detectors)})
    if kind != 'none' and resolution is not None and resolution >= 64:
        height, width = image.shape[:2]
        height, width = (max(64, round(n * resolution / min(image.shape[:2]) / 64) * 64)
                         for n in (height, width))
        image = images.fit(image, width, height, 'stretch')
    options: dict[str, Any] = {name: value for name, value in zip(names, (a, b))
                               if value not in (None, -1)}
    return hint(kind, image, networks=detectors, **options)


def enlarged(body: Extras, image: Picture, limits: Limits,
             networks: Mapping[str, Network]) -> Picture:
    """A picture as extra-single-image enlarges it: by two upscalers of which the second one shows
    by its visibility. networks: those that there are, by name."""
    height, width = image.shape[:2]
    if body.resize_mode == 1:
        across, down = body.upscaling_resize_w or 512, body.upscaling_resize_h or 512
        scale = max(across / width, down / height)
    else:
        scale = body.upscaling_resize or 2.0
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if size[0] * size[1] > 16 * limits.pixels:
        raise ValueError(f'the picture would have {size[0]}x{size[1]} pixels: expected at most '
                         f'{16 * limits.pixels}')

    def by(field, name):
        one_of(field, name, ['None', 'Lanczos', 'Nearest', *networks])
        if name in networks:
            area, step = width * height, networks[name].config.scale ** 2
            while step > 1 and area < size[0] * size[1]:  # what it comes to before it is resized
                area *= step
            if area > 16 * limits.pixels:
                raise ValueError(f'{field}={name}: comes to {area} pixels on its way to '
                                 f'{size[0]}x{size[1]}: expected at most {16 * limits.pixels}')
            return to_size(networks[name], image, *size)
        return image if name == 'None' else enlarge(image, *size, name.lower())

    found = by('upscaler_1', body.upscaler_1 or 'None')
    second, part = body.upscaler_2 or 'None', body.extras_upscaler_2_visibility or 0
    if second != 'None' and part > 0 and body.upscaler_1 not in (None, 'None'):
        found = np.round((1 - part) * found + part * by('upscaler_2', second).astype(np.float32)
                         ).astype(np.uint8)
    if body.resize_mode == 1 and body.upscaling_crop and body.upscaler_1 not in (None, 'None'):
        found = images.fit(found, across, down, 'crop')
    return found


def restorer_name(restorer: Network | None) -> str | None:
    """What A1111 calls a network of `load_face_restorer`."""
    if restorer is None:
        return None
    return 'CodeFormer' if isinstance(restorer.config, CodeFormerConfig) else 'GFPGAN'


def faces(body: Extras, restorer: Network | None) -> tuple[float, float | None] | None:
    """The visibility and the weight by which faces are to be restored, None: not at all. Raises
    ValueError where the network for it is not there."""
    asked = {'GFPGAN': (body.gfpgan_visibility, None),
             'CodeFormer': (body.codeformer_visibility, body.codeformer_weight or 0.0)}
    there = restorer_name(restorer)
    for name, (visibility, _) in asked.items():
        if visibility and name != there:
            raise ValueError(f'{name.lower()}_visibility={visibility}: this server restores '
                             f'{"no faces" if there is None else f"faces by {there}"}, it was '
                             f'started without --restore_faces=PATH of {name}')
    visibility, weight = asked.get(there or '', (None, None))
    return (visibility, weight) if visibility else None


def decode(text: str, name: str) -> bytes:
    """base64 or a data: URL -> bytes. Raises ValueError."""
    head = re.match(r'\s*data:[\w/+.-]{0,64}(;[\w=.-]{0,64}){0,4},', text[:512])
    try:
        return base64.b64decode(re.sub(r'\s', '', text[head.end() if head else 0:]), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f'{name}: expected a picture as base64 or a data: URL (no file and no '
                         f'address is read), found {brief(text)}') from None


def answer(body: Body, found: Sequence[tuple[Request, bytes]], texts: Sequence[str],
           model: str = '', unfinished: Sequence[tuple[int, int] | None] = ()
           ) -> dict[str, Any]:
    """What txt2img and img2img answer -> a dict for JSON.

    found: per picture its Request and PNG file; texts: their `parameters`; unfinished: of those
    that were interrupted, the model calls that were done, and all.
    """
    made, files = zip(*found)
    first = made[0]
    seeds, prompts, negatives = ([getattr(r, name) for r in made]
                                 for name in ('seed', 'prompt', 'negative_prompt'))
    info = {
        'prompt': first.prompt, 'all_prompts': prompts, 'negative_prompt': first.negative_prompt,
        'all_negative_prompts': negatives, 'seed': first.seed, 'all_seeds': seeds,
        'subseed': first.subseed, 'all_subseeds': [r.subseed for r in made],
        'subseed_strength': first.subseed_strength, 'width': first.width,
        'height': first.height,
        'sampler_name': A1111_SAMPLERS.get(first.sampler, first.sampler),
        'cfg_scale': float(np.ravel(first.guidance)[0]), 'steps': first.steps,
        'batch_size': body.batch_size or 1, 'restore_faces': False, 'face_restoration_model': None,
        'sd_model_name': model, 'sd_model_hash': None, 'sd_vae_name': None, 'sd_vae_hash': None,
        **dict(zip(('seed_resize_from_w', 'seed_resize_from_h'),
                   first.seed_resize_from or (-1, -1))),
        'denoising_strength': first.hires.strength if isinstance(first.hires, Hires) else
        None if first.image is None else first.strength,
        'extra_generation_params': {}, 'index_of_first_image': 0, 'infotexts': texts, 'styles': [],
        'unfinished': unfinished or [None] * len(made), 'job_timestamp': '0',
        'clip_skip': first.clip_skip,
        'is_using_inpainting_conditioning': False, 'version': texts[0].rpartition('Version: ')[2]}
    hidden = {} if getattr(body, 'include_init_images', True) else {'init_images': None,
                                                                    'mask': None}
    return {'images': [] if body.send_images is False else
            [base64.b64encode(file).decode() for file in files],
            'parameters': body.model_dump() | hidden, 'info': json.dumps(info, ensure_ascii=False)}


def png_info(text: str, limits: Limits,
             read: Callable[..., tuple[dict[str, str], Any]] = images.read_texts,
             ) -> tuple[str, dict[str, str], dict[str, str]]:
    """A picture as base64 -> the text that it carries: (info, items, parameters).

    read: finds it, as images.read_texts does.
    """
    items, comment = read(decode(text, 'image'), 'image', 4 * limits.pixels)
    if comment and 'parameters' not in items:
        items['parameters'] = infotext.comment(comment)
    info = items.pop('parameters', '')
    prompt, negative, pairs = infotext.parse(info) if info else ('', '', {})
    return info, items, {'Prompt': prompt, 'Negative prompt': negative, **pairs} if info else {}
