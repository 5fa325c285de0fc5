"""Conditioning besides text, as arrays: initial images, masks, depth, ControlNets' hints, classes.

All of it on the host, in numpy, before anything compiles; and pasting back what was inpainted,
after.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsd import images, sampling
from jaxsd.config import ModelConfig, T2IAdapterConfig
from jaxsd.images.reading import Picture
from jaxsd.models import controlnet, t2i_adapter
from jaxsd.run import depth, unclip
from jaxsd.run.request import Request
from jaxsd.run.steps import fractions, over_rows, span
from jaxsd.sampling.choice import unknown
from jaxsd.weights import Model

UPSCALERS = 'upscaler', 'latent_upscaler'  # tasks
NOISE_LEVEL = 20  # of the upscaler's small picture, where a request names none


Arrays = dict[str, np.ndarray]


class InitImage(NamedTuple):
    """One request's image and mask at the size of the model's picture, and how to paste back."""

    image: np.ndarray | None = None  # uint8 [H,W,3]
    mask: np.ndarray | None = None  # [H,W], 0 to 1
    original: np.ndarray | None = None  # uint8 [H',W',3]: to paste into; None: nothing is pasted
    opacity: np.ndarray | None = None  # [H',W']: how much of what was inpainted goes into it
    box: tuple | None = None  # (left, top, right, bottom) of `original` that was inpainted
    crop: tuple | None = None  # (width, height): the rest only made the latents whole


def load(request: Request, config: ModelConfig) -> InitImage:
    """Open a resolved request's image and mask and bring them to its size -> InitImage."""
    if request.image is None:
        return InitImage()
    width, height = request.width, request.height
    picture = images.read(request.image)
    if config.task in UPSCALERS:
        factor = config.vae.factor if config.task == 'upscaler' else 2
        return InitImage(images.fit(picture, width // factor, height // factor, request.resize))
    if request.outpaint is not None:
        return _outpainted(request, picture)
    if request.mask is None:
        return InitImage(images.fit(picture, width, height, request.resize))
    mask = images.read_gray(request.mask)
    images.check_sizes(picture, mask)
    mask = images.feather(mask, request.mask_blur)
    if request.only_masked is None:
        picture, mask = (images.fit(a, width, height, request.resize) for a in (picture, mask))
        box = (0, 0, width, height)
    else:
        box = images.box(mask, request.only_masked, width, height)
    left, top, right, bottom = box
    part, hole = (images.fit(a[top:bottom, left:right], width, height, 'stretch')
                  for a in (picture, mask))
    opacity = (mask > 0).astype(np.float32) if request.mask_mode == 'strength' else mask
    return InitImage(_filled(request, part, hole), hole, picture, opacity, box)


def _outpainted(request, picture):
    """A picture grown by request.outpaint, and on to full latents at the right and bottom."""
    left, top, right, bottom = request.outpaint
    height, width = picture.shape[0] + top + bottom, picture.shape[1] + left + right
    fill = 'noise' if request.fill == 'noise' else 'edge'
    grown, mask = images.pad(picture, left, top, right + request.width - width,
                             bottom + request.height - height, fill=fill, seed=request.seed)
    mask = images.feather(mask, request.mask_blur)
    return InitImage(grown, mask, grown[:height, :width], mask[:height, :width],
                     (0, 0, width, height), (width, height))


def _filled(request, picture, mask):
    """What stands under the mask at first: noise or the nearest known pixel, where asked for."""
    if request.fill not in ('noise', 'edge'):
        return picture
    return images.cover(picture, mask, request.fill, request.seed)


def paste_back(init_image: InitImage, image: Picture) -> Picture:
    """Paste what was inpainted, uint8 [H,W,3], into the original -> uint8 [H',W',3]. Pixels outside
    a mask come back as they were."""
    if init_image.crop is not None:
        image = image[:init_image.crop[1], :init_image.crop[0]]
    if init_image.box is None:
        return image
    return images.paste(init_image.original, image, init_image.box, init_image.opacity)


def inputs(model: Model, requests: Sequence[Request], init_images: Sequence[InitImage],
           sigmas: Sequence[np.ndarray], rows: Any,
           prompts: np.ndarray) -> tuple[dict[str, Any], np.ndarray | None, Arrays | None]:
    """Conditioning besides text -> fields of `inputs.Inputs`, and of its Steps strength, control.

    sigmas: a list of noise levels, [steps + 1] for each picture; rows: stacked;
    prompts: bool [P], which texts of a picture are its prompts.
    Raises ValueError for requests that the model cannot serve.
    """
    config = model.config
    task, factor = config.task, config.vae.factor
    height, width = requests[0].height, requests[0].width
    cell = (len(requests), height // factor, width // factor, 1)
    if task in ('pix2pix', 'unclip') and any(c.image is None for c in init_images):
        does = 'edits' if task == 'pix2pix' else 'makes variations of'
        raise ValueError(f'image: expected one, the picture that this model {does}')
    found = {'labels': unclip.labels(model, requests, prompts) if task == 'unclip' else
             _labels(config, requests, prompts)}
    if task in UPSCALERS:
        if any(c.image is None for c in init_images):
            raise ValueError('image: expected one, the small picture that this model enlarges')
        for r in requests:
            for name, given in (('mask', r.mask), ('outpaint', r.outpaint), ('depth', r.depth),
                                ('controls', r.controls or None),
                                ('image_prompts', r.image_prompts or None),
                                ('regions', r.regions or None), ('window', r.window),
                                ('reference', r.reference)):
                if given is not None:
                    raise ValueError(f'{name}: an upscaler follows its image and text alone')
        found['low_res'] = np.stack([c.image for c in init_images])
        if task == 'latent_upscaler':
            if any(r.tiling for r in requests):
                raise ValueError('tiling: expected none, as this model enlarges across no edge')
            return found, None, None
        abar = sampling.alphas_cumprod(config.low_res)[found['labels'][:, 1]]
        found['low_res_scale'] = np.stack([np.sqrt(abar), np.sqrt(1 - abar)], 1).astype(np.float32)
        return found, None, None

    if any(c.image is not None for c in init_images):
        blank = np.zeros((height, width, 3), np.uint8)
        found['init_image'] = np.stack([blank if c.image is None else c.image for c in init_images])
        found['init_weight'] = np.stack([_init_weight(r, c, cell[1:], factor, task == 'inpainting')
                                         for r, c in zip(requests, init_images)])
    masked, strength = any(c.mask is not None for c in init_images), None
    if task == 'inpainting':
        found['inpaint_mask'] = np.stack([*map(_inpaint_mask, requests, init_images)])
        found['extra'] = np.stack([images.downsample(m, factor)[..., None]
                                   for m in found['inpaint_mask'][..., 0].astype(np.float32)])
    elif masked:
        found['mask'] = np.stack([
            np.ones(cell[1:], np.float32) if c.mask is None else
            images.downsample(c.mask, factor)[..., None] for c in init_images])
        found['differential'] = np.array([r.mask_mode == 'strength' for r in requests])
        strength = over_rows(
            [max(r.strength, 1e-6) * (1 - fractions(levels))  # above 0: black is never inpainted
             for r, levels in zip(requests, sigmas)],
            sigmas, rows, 'mask_mode=strength', found['differential']).astype(np.float32)
    if task == 'depth':
        found['extra'] = _depths(model, requests, init_images, cell)
    elif any(r.depth is not None for r in requests):
        raise ValueError('depth: this model does not follow depth maps; load a depth model (2.x '
                         'depth), or give the map as the hint of a depth ControlNet')
    hints, control = _controls(model, requests, sigmas, rows, prompts)
    return found | {'hints': hints}, strength, control


def _init_weight(request, c, shape, factor, seen):
    """How much of the image's latents is in the start [h,w,1]: none where all is inpainted.

    seen: the model sees picture and mask; it then starts from noise alone, as it was published.
    """
    if c.image is None or (request.strength == 1 and (seen or c.mask is None)):
        return np.zeros(shape, np.float32)
    if c.mask is None or (request.strength < 1 and request.fill != 'latent'):
        return np.ones(shape, np.float32)
    mask = c.mask >= 1 if request.mask_mode == 'strength' else c.mask
    return 1 - images.downsample(mask.astype(np.float32), factor)[..., None]


def _inpaint_mask(request, c):
    """What an inpainting model may not see, bool [H,W,1]; without a mask everything."""
    if c.mask is None:
        return np.ones((request.height, request.width, 1), bool)
    return c.mask[..., None] >= 0.5


def _labels(config, requests, prompts):
    """Class labels int32 [B,P]: the class of prompts, the negative one of the other texts."""
    count = config.unet.num_class_embeds
    if not count:
        for name in ('class_label', 'negative_class_label'):
            if any(getattr(r, name) is not None for r in requests):
                raise ValueError(f'{name}: this model has no classes; expected None')
        return None
    upscaler = config.task == 'upscaler'
    null = NOISE_LEVEL if upscaler else count - 1
    limit = min(count - 1, config.max_noise_level) if upscaler else count - 1
    labels = []
    for r in requests:
        label = null if r.class_label is None else r.class_label
        negative = r.negative_class_label
        if negative is None:
            negative = label if upscaler else null
        for value in (label, negative):
            if value > limit:
                raise ValueError(f'class_label={value}: expected 0 to {limit}')
        labels.append(np.where(prompts, label, negative))
    return np.array(labels, np.int32)


def _depths(model, requests, init_images, cell):
    """Depth maps as a depth model sees them, float32 [B,h,w,1]; estimated where none is given."""
    maps = {i: images.fit(images.read_gray(r.depth), r.width, r.height, r.resize)
            for i, r in enumerate(requests) if r.depth is not None}
    rest = [i for i in range(len(requests)) if i not in maps]
    if any(init_images[i].image is None for i in rest):
        raise ValueError('this model follows a depth map: expected depth=, or image= to estimate '
                         'the depth of')
    if rest:
        maps |= zip(rest, depth.estimate(model, np.stack([init_images[i].image for i in rest])))
    return np.concatenate([depth.condition(maps[i][None], *cell[1:3])
                           for i in range(len(requests))])


def _controls(model, requests, sigmas, rows, prompts):
    """Hints {net: uint8 [B,H,W,3]} and how much each net's outputs count {net: [calls,B,P,N]}; of
    a union (uint8 [B,K,H,W,3], its modes int32 [B,K]), and [calls,B,P,N+K] with each hint's."""
    used = sorted({control.net for r in requests for control in r.controls})
    hints, weights = {}, {}
    for name in used:
        if name not in model.controlnets:
            raise unknown('ControlNet', name, model.controlnets) if model.controlnets else (
                ValueError(f'control net={name!r}: the model has no ControlNets; expected '
                           'model.replace(controlnets={name: jaxsd.load_controlnet(path)})'))
        net = model.controlnets[name]
        adapter = isinstance(net.config, T2IAdapterConfig)
        (t2i_adapter if adapter else controlnet).check(net.config, model.config.unet)
        mine = [[c for c in r.controls if c.net == name] for r in requests]
        modes = _modes(name, net.config, mine)
        slots = 0 if modes is None else modes.shape[1]
        found = np.zeros((len(mine), max(map(len, mine)), requests[0].height, requests[0].width, 3),
                         np.uint8)
        for i, (some, r) in enumerate(zip(mine, requests)):
            for k, control in enumerate(some):
                found[i, k] = images.fit(images.read(control.image), r.width, r.height, r.resize)
        hints[name] = found[:, 0] if modes is None else (found, modes)
        weights[name] = over_rows(
            [_weights(some, net, fractions(levels), prompts, slots)
             for some, levels in zip(mine, sigmas)],
            sigmas, rows, f'control {name!r} with start or end',
            [any((c.start, c.end) != (0, 1) for c in some) for some in mine]).astype(np.float32)
    return hints, weights


def _modes(name, config, controls):
    """The modes of a union's hints, int32 [B,K], -1 where there is none; None for other nets."""
    if not getattr(config, 'num_control_type', 0):
        if any(c.mode is not None for some in controls for c in some):
            raise ValueError(f'control {name!r}: mode is for a ControlNet-Union, this net has one '
                             'kind of hint; leave mode out')
        return None
    modes = np.full((len(controls), max(map(len, controls))), -1, np.int32)
    for row, some in zip(modes, controls):
        try:
            row[:len(some)] = [controlnet.mode_number(config, c.mode) for c in some]
        except ValueError as error:
            raise ValueError(f'control {name!r}: {error}') from None
    return modes


def _weights(controls, net, before, prompts, slots=0):
    """How much each of a net's N outputs counts, [steps,P,N], and each of a union's K hints,
    [steps,P,N+K]; controls: those of one picture; slots: K.

    Outputs that are means over the whole picture (shuffle) count alike, and for prompts alone,
    as in diffusers. One hint has its scale on the outputs; several have theirs on what the network
    makes of each, and its outputs count whole while any of them does.
    """
    if isinstance(net.config, T2IAdapterConfig):
        count, pooled = len(net.config.widths), False
    else:
        count = len(net.params['controlnet_down_blocks']) + 1  # and the middle block's
        pooled = net.config.global_pool_conditions
    found = np.zeros((len(before), len(prompts), count + slots))
    if not controls:
        return found
    scales = np.stack([c.scale * span(before, c.start, c.end) for c in controls], 1)
    guess, alone = controls[0].guess, len(controls) == 1
    only = pooled or guess not in (None, 'soft')
    counted = prompts if only else np.ones(len(prompts))
    profile = np.ones(count)
    if guess is not None and not pooled:
        profile = controlnet.GUESS_MODES[guess](count)
    whole = scales[:, 0] if alone else scales.any(1)
    found[..., :count] = whole[:, None, None] * counted[:, None] * profile
    if slots:
        found[..., count:count + len(controls)] = 1 if alone else scales[:, None]
    return found
