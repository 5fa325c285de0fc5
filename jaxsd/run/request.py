"""What a user asks for: one picture, from a text and whatever else it shall follow."""

import dataclasses
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxsd.images.opencv import opencv
from jaxsd.models.controlnet import GUESS_MODES, MODES
from jaxsd.sampling import SAMPLERS, known_schedule
from jaxsd.sampling.choice import check_number, choose, flag, one_of
from jaxsd.sampling.guidance_options import check, per_step
from jaxsd.sampling.names import SCHEDULE_NAMES, find_sampler
from jaxsd.sampling.noise_schedule import ScheduleLike
from jaxsd.typing import ImageLike, Path

MAX_SEED = 2**64 - 1
MAX_STEPS, MAX_SIDE, MAX_BLUR = 10_000, 2**16, 2**10  # beyond is a slip, and fills memory
MAX_PIXELS = 2**26  # 8192x8192
MAX_DRAWN = 2**32  # pixels times steps times noise_batch's size, of which noise is drawn at once


# Of Hires: of latents, as torch interpolates them ('latent': linearly), and of pixels.
UPSCALERS = ('latent', 'latent_bicubic', 'latent_bicubic_antialiased', 'latent_nearest',
             'latent_nearest_floor', 'lanczos', 'nearest')
RESIZE = ('crop', 'pad', 'stretch')
FILLS = ('original', 'edge', 'noise', 'latent')
TILINGS = ('x', 'y', 'xy')
MASK_MODES = ('blend', 'strength')
# Weights of the blocks for an image prompt of SDXL, of InstantStyle (Wang et al. 2024,
# https://arxiv.org/abs/2404.02733).
BLOCKS = {'style': {'up': {'block_0': (0, 1, 0)}}, 'layout': {'down': {'block_2': (0, 1)}},
          'style+layout': {'down': {'block_2': (0, 1)}, 'up': {'block_0': (0, 1, 0)}}}
WEIGHTINGS = ('a1111', 'no_norm', 'comfy', 'compel', 'none', 'plain')
CUTS = ('comma', 'hard', 'word')
PROMPTS = ('prompt', 'negative_prompt', 'prompt_2', 'negative_prompt_2')
NOISES = ('threefry', 'torch', 'philox')
USUAL = {'sampler': 'dpmpp_2m', 'schedule': 'karras', 'steps': 25}


@dataclasses.dataclass(frozen=True, eq=False)
class Control:
    """One ControlNet at work on one picture; all of it is data.

    net: its name among model.controlnets. image: the hint as the network was trained on it (edges,
    a depth map, a pose ...), as for Request.image. It counts times `scale` from the fraction
    `start` of the steps to the fraction `end`, as in diffusers. guess: the hint alone decides: it
    does not count for the negative prompt, and less the finer the level: 'diffusers' from 0.1 to 1
    evenly in the logarithm, 'original' by 0.825 a level (lllyasviel/ControlNet). guess='soft': the
    prompt decides more: by 0.825 a level, for both prompts (sd-webui-controlnet).
    mode: what the hint is, for a ControlNet-Union: one of controlnet.MODES, or its number. A
    request may name a union several times, with its scale and span for each hint.
    """

    net: str
    image: 'ImageLike'
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: str | None = None
    mode: str | int | None = None

    def __post_init__(self):
        if not isinstance(self.net, str):
            raise ValueError(f'control net={self.net!r}: expected the name of a ControlNet')
        if self.image is None:
            raise ValueError(f'control {self.net!r}: expected image=, the hint to follow')
        check_number('control scale', self.scale)
        _check_span('control', self.start, self.end)
        if self.guess is not None:
            one_of('guess mode', self.guess, GUESS_MODES)
        if isinstance(self.mode, str):
            one_of('mode', self.mode, MODES)
        elif self.mode is not None:
            _integer('control mode', self.mode, 0)


@dataclasses.dataclass(frozen=True, eq=False)
class ImagePrompt:
    """A picture as a prompt, by an IP-Adapter; all of it but the number of pictures is data.

    net: its name among model.ip_adapters. image: a picture as for Request.image, of which the
    square in the middle is seen, or a list of pictures that are seen as one. It counts times
    `weight` from the fraction `start` of the steps to the fraction `end`. mask: where it counts, at
    the picture's size: white is 1. blocks: the weight is multiplied by one for each block, as in
    diffusers' set_ip_adapter_scale: {'down': {'block_2': [0, 1]}, 'mid': 0.5, 'up': 1}, where what
    is left out is 0; or the name of one of BLOCKS, of SDXL.
    embeds: the image encoder's features in the image's place (of the kind base [P], of plus and
    full face [T,D]), or the embedding of a face (insightface's, [512]) for FaceID, beside the image
    for FaceID plus; an array, or the path of a .npy file; with one more axis for several pictures.
    negative_embeds: the same for the negative prompt; None: zeros, of plus and full face the
    features of an image that is 0.
    """

    net: str
    image: 'ImageLike | Sequence[ImageLike] | None' = None
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mask: 'ImageLike | None' = None
    blocks: str | Mapping[str, Any] | None = None
    embeds: 'Path | np.ndarray | None' = None
    negative_embeds: 'Path | np.ndarray | None' = None

    def __post_init__(self):
        if not isinstance(self.net, str):
            raise ValueError(f'image prompt net={self.net!r}: expected the name of an IP-Adapter')
        if self.image is None and self.embeds is None:
            raise ValueError(f'image prompt {self.net!r}: expected image= or embeds=, what to '
                             'follow')
        if isinstance(self.image, (tuple, list)):
            object.__setattr__(self, 'image', tuple(self.image))
            if not self.image:
                raise ValueError(f'image prompt {self.net!r}: expected at least one image')
        check_number('image prompt weight', self.weight)
        _check_span('image prompt', self.start, self.end)
        if isinstance(self.blocks, str):
            one_of('blocks of an image prompt', self.blocks, BLOCKS)
        elif self.blocks is not None and (not isinstance(self.blocks, Mapping)
                                          or not self.blocks.keys() <= {'down', 'mid', 'up'}):
            raise ValueError(f'image prompt blocks={self.blocks!r}: expected weights of '
                             f"'down', 'mid' and 'up', or one of {', '.join(BLOCKS)}")

    @property
    def pictures(self) -> tuple:
        """The images, none, one or several."""
        if self.image is None:
            return ()
        return self.image if isinstance(self.image, tuple) else (self.image,)

    @property
    def sources(self) -> tuple:
        """All that it is read from: paths, pictures, arrays or None."""
        return *self.pictures, self.mask, self.embeds, self.negative_embeds


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """A prompt for a part of the picture; all of it is data.

    Where it lies: mask, of the picture's size, white is 1; or box, (left, top, right, bottom) as
    fractions of the picture. Where several prompts lie, each counts by weight times mask, divided
    by the sum of these (ComfyUI's ConditioningSetMask); the request's own prompt lies everywhere
    with weight 1, an empty one only where no region does.
    """

    prompt: str
    mask: 'ImageLike | None' = None
    box: Sequence[float] | None = None
    weight: float = 1.0

    def __post_init__(self):
        _check_text('region prompt', self.prompt)
        if (self.mask is None) == (self.box is None):
            raise ValueError(f'region {self.prompt!r:.80}: expected mask= or box=, where it lies')
        check_number('region weight', self.weight, 0)
        if self.box is not None:
            if not isinstance(self.box, (tuple, list)) or len(self.box) != 4:
                raise ValueError(f'region box={self.box!r}: expected four fractions of the '
                                 'picture: left, top, right, bottom')
            for side in self.box:
                check_number('region box', side, 0, 1)
            left, top, right, bottom = map(float, self.box)
            if left >= right or top >= bottom:
                raise ValueError(f'region box={self.box}: expected left < right and top < bottom')
            object.__setattr__(self, 'box', (left, top, right, bottom))


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """A picture whose style and things the request's is to have, without a network for it: the
    U-Net's self-attentions see its keys too (sd-webui-controlnet's reference_only).

    image: as for Request.image; it comes to the picture's size by Request.resize. weight: the part
    of the self-attentions that see it, 0 to 1, the widest first. It counts from the fraction
    `start` of the steps to the fraction `end`. fidelity: 1: the negative prompt's half does not see
    it, so that guidance leads to it; 0: it sees it as the prompt's. Each step is two model calls.
    """

    image: 'ImageLike'
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    fidelity: float = 0.5

    def __post_init__(self):
        if self.image is None:
            raise ValueError('reference: expected image=, the picture to follow')
        for name in ('weight', 'fidelity'):
            check_number(f'reference {name}', getattr(self, name), 0, 1)
        _check_span('reference', self.start, self.end)


@dataclasses.dataclass(frozen=True)
class Hires:
    """A second pass at a larger size, image to image from the first one ("hires fix").

    scale: times the first pass's sides, in whole 8 pixels; or width and height, of which one makes
    the other; what is too much of the proportions is cut off. upscaler: how the first pass is
    enlarged, one of UPSCALERS, in latents (at a strength below about 0.5 they stay blurred) or in
    pixels, or a network of model.upscalers by its name. strength: as of an image to start from.
    steps, sampler, schedule, guidance, prompts: None: those of the first pass.
    """

    scale: float = 2.0
    width: int | None = None
    height: int | None = None
    upscaler: str = 'latent'
    strength: float = 0.7
    steps: int | None = None
    sampler: str | None = None
    schedule: ScheduleLike | None = None
    guidance: float | None = None
    prompt: str | None = None
    negative_prompt: str | None = None

    def __post_init__(self):
        check_number('hires scale', self.scale, 1, 16)
        for name in ('width', 'height'):
            if getattr(self, name) is not None:
                _integer(f'hires {name}', getattr(self, name), 8, MAX_SIDE)
        if not isinstance(self.upscaler, str) or not self.upscaler:
            raise ValueError(f'hires upscaler={self.upscaler!r}: expected a name')
        check_number('hires strength', self.strength, 0, 1)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) after a first pass of these."""
        across, down = self.width, self.height
        if across is None and down is None:
            across, down = width * self.scale, height * self.scale
        elif across is None:
            across = down * width / height
        elif down is None:
            down = across * height / width
        return int(across) // 8 * 8, int(down) // 8 * 8


@dataclasses.dataclass(frozen=True)
class Request:
    """One picture. Everything except its size is data: no field but width and height recompiles.
    What compiles is a kind that the last batch did not have: of guidance, an image to start from, a
    mask, a ControlNet; within a kind every value may differ from picture to picture.

    image, mask, depth: a path, a PIL image or an array, of any mode that Pillow reads.
    Raises ValueError, at construction, for values that no model could serve.
    """

    prompt: str = ''  # A1111's language, see docs
    negative_prompt: str = ''
    seed: int = -1  # 0 to 2^64 - 1; -1: picked at random by `resolve`
    # None of these four: what suits the model, see `suit`.
    sampler: str | None = None  # or as A1111 ('DPM++ 2M Karras') and diffusers name it
    schedule: ScheduleLike | None = None  # a name, a schedule file (.json), the levels, or
    # 'diffusers:PATH', a scheduler_config.json
    steps: int | None = None
    guidance: float | Sequence[float] | None = None  # classifier-free, or one a step; 1: none
    # Of the image that an instruct-pix2pix model edits, or one a step; None: 1.5, 1: none.
    image_guidance: float | Sequence[float] | None = None
    width: int | None = None  # pixels; None: the model's native size
    height: int | None = None
    force_size: bool = False  # take one so far from the native size that only noise can come of it
    aspect: str | None = None  # SDXL: 'W:H', the nearest size that it was trained on
    image: 'ImageLike | None' = None  # to start from, repaint, take the depth of, or enlarge
    strength: float | None = None  # 0: the image as it is; 1: all new. None: 1 with a mask or
    # outpaint and for models that see the image, 0.75 without
    resize: str = 'crop'  # how an image comes to the picture's size: crop, pad or stretch
    mask: 'ImageLike | None' = None  # its size; white is painted anew, black stays to the bit
    mask_mode: str = 'blend'  # gray of the mask: a mixture, or 'strength' (differential diffusion)
    mask_blur: float = 0.0  # pixels by which a mask's border is softened
    only_masked: int | None = None  # paint only the mask's box, so many pixels wider, at full size
    fill: str | None = None  # what a mask hides at first: original, edge, noise, or latent noise
    outpaint: Sequence[int] | None = None  # pixels to add: (left, top, right, bottom)
    depth: 'ImageLike | None' = None  # depth models: near is white; None: estimated from the image
    tiling: str | bool = ''  # whose edges meet, for patterns: 'x' (left and right), 'y' or 'xy'
    controls: Sequence[Control] = ()
    image_prompts: Sequence[ImagePrompt] = ()
    regions: Sequence[Region] = ()  # prompts for parts of the picture; or mappings of fields
    window: int | None = None  # MultiDiffusion: the network sees so many pixels per side at once
    window_stride: int | None = None  # pixels from window to window; None: half a window
    reference: Reference | None = None
    hires: 'Hires | Mapping[str, Any] | None' = None  # a second, larger pass, or its fields
    class_label: int | None = None  # class-conditional models; upscaler and unCLIP: noise level of
    # the image, None: 20 and 0
    negative_class_label: int | None = None  # None: the last class; upscaler: the same level
    prompt_2: str | None = None  # SDXL: for its second text encoder; None: the same prompt
    negative_prompt_2: str | None = None
    weighting: str = 'a1111'  # what brackets do, see docs; plain: nothing has a meaning
    cut: str = 'comma'  # where long prompts fall into blocks: comma (A1111), hard, word (ComfyUI)
    clip_skip: int = 1  # 1: the layer that the version uses; n: n - 1 layers before it
    adapters: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # {name: weight}, as
    # <lora:name:weight> in the prompt; or (U-Net's weight, text encoders' weight)
    wildcards: Path | Mapping[str, Any] | None = None  # folder of NAME.txt, or {NAME: options}
    noise: str = 'threefry'  # or torch (its CPU generator) or philox (A1111's NV), for their seeds
    noise_batch: Sequence[int] = (0, 1)  # torch: place in a batch drawn at once, its size
    step_noise: str | None = None  # torch or philox: a generator of its own for the noise of the
    # steps, as of programs that start on the CPU and go on on a GPU; None: that of `noise`
    subseed: int = -1  # A1111's "variation seed"; -1: picked at random where it counts
    subseed_strength: float = 0.0  # 0: the seed's noise to start from; 1: the subseed's
    seed_resize_from: Sequence[int] | None = None  # (width, height) of a picture of this seed whose
    # composition stays
    eta_noise_seed_delta: int = 0  # A1111's ENSD: the noise of the steps is that of seed + it
    switch: float = 0.8  # with a refiner: the part of the noise that the base model removes
    eta: float | None = None  # noise of ddim and the ancestral samplers; None: the sampler's own
    sampler_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    schedule_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    guidance_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # see docs
    original_size: Sequence[int] | None = None  # SDXL: (height, width); None: the picture's
    crop: Sequence[int] = (0, 0)  # SDXL: (top, left)
    target_size: Sequence[int] | None = None  # SDXL base: (height, width); None: the picture's
    aesthetic: float = 6.0  # SDXL refiner
    negative_aesthetic: float = 2.5

    def __post_init__(self):
        for name in ('sampler', *PROMPTS):
            value = getattr(self, name)
            if value is not None or not (name.endswith('_2') or name == 'sampler'):
                _check_text(name, value)
        flag('force_size', self.force_size)
        self._translate()
        if self.sampler is not None:
            choose('sampler', self.sampler, SAMPLERS)
        if self.schedule is not None:
            known_schedule(self.schedule)
        if not isinstance(self.schedule, str | None):
            plain = (os.fspath(self.schedule) if isinstance(self.schedule, os.PathLike)
                     else tuple(map(float, self.schedule)))
            if len(plain) > MAX_STEPS + 1:
                raise ValueError(f'schedule: {len(plain)} levels, expected at most {MAX_STEPS + 1}')
            object.__setattr__(self, 'schedule', plain)
        for name in ('sampler_options', 'schedule_options'):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f'{name}={getattr(self, name)!r}: expected a mapping')
        _integer('seed', self.seed, -1, MAX_SEED)
        for name, most in (('steps', MAX_STEPS), ('width', MAX_SIDE), ('height', MAX_SIDE)):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 1, most)
        steps = self.steps or 0
        if self.guidance is not None:
            object.__setattr__(self, 'guidance',
                               per_step('guidance', self.guidance, steps, low=0))
        if self.image_guidance is not None:
            object.__setattr__(self, 'image_guidance', per_step(
                'image_guidance', self.image_guidance, steps, low=0))
        object.__setattr__(self, 'guidance_options', check(self.guidance_options, steps))
        for name in ('eta', 'aesthetic', 'negative_aesthetic'):
            if name != 'eta' or self.eta is not None:
                check_number(name, getattr(self, name))
        self._check_image()
        one_of('weighting', self.weighting, WEIGHTINGS)
        one_of('cut', self.cut, CUTS)
        one_of('noise', self.noise, NOISES)
        _integer('clip_skip', self.clip_skip, 1, 100)
        self._check_noise_batch()
        self._check_variation()
        self._check_memory(self.width or 1, self.height or 1)
        object.__setattr__(self, 'adapters', _weights(self.adapters))
        for name in ('original_size', 'crop', 'target_size'):
            value = getattr(self, name)
            if value is not None and len(tuple(value)) != 2:
                raise ValueError(f'{name}={value!r}: expected two numbers')

    def _translate(self):
        """A1111's and diffusers' names of samplers and schedules -> ours."""
        found = {}
        if isinstance(self.schedule, str):
            found['schedule'] = SCHEDULE_NAMES.get(self.schedule.lower(), self.schedule)
        if self.sampler is not None and self.sampler not in SAMPLERS:
            sampler, schedule, options = find_sampler(self.sampler)
            if sampler:
                found['sampler'] = sampler
            if schedule:
                found['schedule'] = schedule
            if options and isinstance(self.sampler_options, Mapping):
                found['sampler_options'] = {**options, **self.sampler_options}
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def _check_image(self):
        """Of what concerns pictures, all that can be known without opening them."""
        if self.strength is not None:
            check_number('strength', self.strength, 0, 1)
            if self.image is None and self.strength < 1:
                raise ValueError(f'strength={self.strength}: expected image= as well, the picture '
                                 'to start from')
        check_number('switch', self.switch, 0, 1)
        check_number('mask_blur', self.mask_blur, 0, MAX_BLUR)
        if isinstance(self.tiling, bool):
            object.__setattr__(self, 'tiling', 'xy' * self.tiling)
        if self.tiling != '':
            one_of('tiling', self.tiling, TILINGS)
        one_of('resize', self.resize, RESIZE)
        one_of('mask_mode', self.mask_mode, MASK_MODES)
        if self.fill is not None:
            one_of('fill', self.fill, FILLS)
            if self.fill == 'edge' and self.mask is not None:
                opencv("fill='edge'")  # what is missing is known before a model is loaded
        for name, most in (('only_masked', MAX_SIDE), ('class_label', None),
                           ('negative_class_label', None)):  # how many classes: the model knows
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, most)
        if self.outpaint is not None:
            if not isinstance(self.outpaint, (tuple, list)) or len(self.outpaint) != 4:
                raise ValueError(f'outpaint={self.outpaint!r}: expected four whole numbers, the '
                                 'pixels to add at the left, top, right and bottom')
            for amount in self.outpaint:
                _integer('outpaint', amount, 0, MAX_SIDE)
            object.__setattr__(self, 'outpaint', tuple(map(int, self.outpaint)))
            if not any(self.outpaint):
                raise ValueError('outpaint=(0, 0, 0, 0): expected pixels to add on some side')
        if self.mask is not None and self.outpaint is not None:
            raise ValueError('mask and outpaint: expected one of them; outpainting masks what it '
                             'adds')
        for name in ('mask', 'outpaint'):
            if getattr(self, name) is not None and self.image is None:
                raise ValueError(f'{name}: expected image= as well, the picture to paint on')
        if self.only_masked is not None and self.mask is None:
            raise ValueError(f'only_masked={self.only_masked}: expected mask= as well')
        if not isinstance(self.controls, (tuple, list)) or not all(
                isinstance(control, Control) for control in self.controls):
            raise ValueError(f'controls={self.controls!r}: expected a list of jaxsd.Control')
        for name in {control.net for control in self.controls}:
            some = [control for control in self.controls if control.net == name]
            if len(some) > 1 and any(control.mode is None for control in some):
                raise ValueError(f'controls: {name!r} names a ControlNet twice; give it a second '
                                 'name in model.controlnets, or a mode to each hint of a union')
            if len({control.guess for control in some}) > 1:
                raise ValueError(f'controls: {name!r}: expected the same guess for all hints of a '
                                 'union, which sees them in one call')
        object.__setattr__(self, 'controls', tuple(self.controls))
        prompts = self.image_prompts
        if not isinstance(prompts, (tuple, list)) or not all(
                isinstance(prompt, ImagePrompt) for prompt in prompts):
            raise ValueError(f'image_prompts={prompts!r}: expected a list of jaxsd.ImagePrompt')
        object.__setattr__(self, 'image_prompts', tuple(prompts))
        self._check_regions()
        if not isinstance(self.reference, Reference | None):
            raise ValueError('reference: expected jaxsd.Reference or None, found '
                             f'{type(self.reference).__name__}')
        self._check_hires()

    def _check_regions(self):
        if not isinstance(self.regions, (tuple, list)):
            raise ValueError(f'regions={self.regions!r}: expected a list of jaxsd.Region')
        found = []
        for region in self.regions:
            if isinstance(region, Mapping):
                for name in region:
                    one_of('field of regions', name, Region.__dataclass_fields__)
                region = Region(**{'prompt': None, **region})
            if not isinstance(region, Region):
                raise ValueError(f'regions: {region!r}: expected a jaxsd.Region or a mapping of '
                                 'its fields')
            found.append(region)
        object.__setattr__(self, 'regions', tuple(found))
        if found and 'pag' in self.guidance_options:
            raise ValueError('regions and pag: expected one of them, as pag perturbs one prompt')
        for name in ('window', 'window_stride'):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 8, MAX_SIDE)
        if self.window is None:
            if self.window_stride is not None:
                raise ValueError(f'window_stride={self.window_stride}: expected window= as well')
            return
        if (self.window_stride or 0) > self.window:
            raise ValueError(f'window_stride={self.window_stride}: expected at most the window of '
                             f'{self.window} pixels, or some are never seen')
        for name, given in (
                ('sag', 'sag' in self.guidance_options), ('tiling', self.tiling),
                ('masks of image_prompts', any(p.mask is not None for p in self.image_prompts))):
            if given:
                raise ValueError(f'window and {name}: expected one of them')

    @property
    def texts(self) -> tuple[str, ...]:
        """All that its text encoders read, but for what a second pass has of its own."""
        own = (getattr(self, name) for name in PROMPTS)
        return tuple(filter(None, (*own, *(region.prompt for region in self.regions))))

    def _check_hires(self):
        if self.hires is None:
            return
        if isinstance(self.hires, Mapping):
            for name in self.hires:
                one_of('field of hires', name, Hires.__dataclass_fields__)
            object.__setattr__(self, 'hires', Hires(**self.hires))
        elif not isinstance(self.hires, Hires):
            raise ValueError(f'hires={self.hires!r}: expected jaxsd.Hires or a mapping of its '
                             'fields')
        for name in ('mask', 'outpaint'):
            if getattr(self, name) is not None:
                raise ValueError(f'hires and {name}: expected one of them')
        own = {name: getattr(self.hires, name) for name in (
            'steps', 'sampler', 'schedule', 'guidance', 'prompt', 'negative_prompt')}
        Request(**{name: value for name, value in own.items() if value is not None})

    @property
    def final_size(self) -> tuple[int, int]:
        """The (width, height) of a resolved request's picture before it is pasted anywhere."""
        size = self.width, self.height
        return self.hires.size(*size) if isinstance(self.hires, Hires) else size

    def _check_memory(self, width, height):
        """What sides, steps and the noise of a batch come to together."""
        if width * height > MAX_PIXELS:
            raise ValueError(f'{width}x{height}: expected at most {MAX_PIXELS} pixels, such as '
                             f'{math.isqrt(MAX_PIXELS)}x{math.isqrt(MAX_PIXELS)}')
        size = self.noise_batch[1] if self.noise == 'torch' else 1
        steps = self.steps or USUAL['steps']
        drawn = self.step_noise or self.noise
        if drawn != 'threefry' and width * height * steps * size > MAX_DRAWN:
            raise ValueError(
                f'noise={drawn!r}: {width}x{height} pixels times {steps} steps times '
                f'{size}, the size of noise_batch: expected at most {MAX_DRAWN}, as all of its '
                'noise is drawn beforehand; noise=threefry needs no memory')

    def _check_noise_batch(self):
        batch = self.noise_batch
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(f'noise_batch={batch!r}: expected two whole numbers, the place '
                             'in a batch and its size')
        _integer("noise_batch's size", batch[1], 1)
        _integer("noise_batch's place", batch[0], 0, batch[1] - 1)
        object.__setattr__(self, 'noise_batch', tuple(map(int, batch)))

    def _check_variation(self):
        if self.step_noise is not None:
            one_of('step_noise', self.step_noise, NOISES[1:])
        _integer('subseed', self.subseed, -1, MAX_SEED)
        check_number('subseed_strength', self.subseed_strength, 0, 1)
        _integer('eta_noise_seed_delta', self.eta_noise_seed_delta, -MAX_SEED, MAX_SEED)
        if self.seed_resize_from is not None:
            size = self.seed_resize_from
            if not isinstance(size, (tuple, list)) or len(size) != 2:
                raise ValueError(f'seed_resize_from={size!r}: expected two whole numbers, the '
                                 'width and the height of the other picture')
            for side in size:
                _integer('seed_resize_from', side, 8, MAX_SIDE)
            object.__setattr__(self, 'seed_resize_from', tuple(map(int, size)))
            self._check_memory(*size)
        if self.varied and self.noise_batch[1] > 1:
            raise ValueError(f'noise_batch={self.noise_batch}: expected (0, 1) beside '
                             'subseed_strength and seed_resize_from, which vary the noise of one '
                             'picture')

    @property
    def varied(self) -> bool:
        """Whether the noise that it starts from is another than the seed's own."""
        return self.subseed_strength > 0 or self.seed_resize_from is not None

    def numbered(self, number: int) -> 'Request':
        """The picture of this number, from 0, of several that one asks for: its seed counts up, or
        as in A1111 its subseed where that has a strength."""
        name = 'subseed' if self.subseed_strength else 'seed'
        start = getattr(self, name)
        return self if start == -1 else self.replace(**{name: (start + number) % (MAX_SEED + 1)})

    def replace(self, **fields: Any) -> 'Request':
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **fields)


def _weights(adapters):
    """{adapter: weight, or (U-Net's, text encoders')} -> {adapter: both}."""
    if not isinstance(adapters, Mapping):
        raise ValueError(f'adapters={adapters!r}: expected a mapping from names to weights')
    found = {}
    for name, weight in adapters.items():
        both = tuple(weight) if isinstance(weight, (tuple, list)) else (weight, weight)
        if len(both) != 2:
            raise ValueError(f'adapters: {name}={weight!r}: expected a weight or two, of the U-Net '
                             'and of the text encoders')
        for value in both:
            check_number(f'weight of adapter {name!r}', value)
        found[name] = both
    return found


def _check_text(name, value):
    if not isinstance(value, str):
        raise ValueError(f'{name}={value!r}: expected a string')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f'{name}: expected text, found {value[error.start]!a} at '
                         f'{error.start}, which is no character') from None


def _check_span(what, start, end):
    check_number(f'{what} start', start, 0, 1)
    check_number(f'{what} end', end, 0, 1)
    if start >= end:
        raise ValueError(f'{what} start={start}, end={end}: expected start < end')


def _integer(name, value, low, high=None):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f'{name}={value!r}: expected a whole number')
    if value < low or (high is not None and value > high):
        limits = f'at least {low}' if high is None else f'between {low} and {high}'
        raise ValueError(f'{name}={value}: expected a whole number {limits}')
