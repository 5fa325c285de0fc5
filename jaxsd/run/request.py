"""What a user asks for: one picture."""

import dataclasses
import math
import numbers
import os
import random
from collections.abc import Mapping
from typing import Any

from jaxsd.sampling import SAMPLERS, known_schedule
from jaxsd.sampling.choice import choose
from jaxsd.sampling.guidance_options import check, per_step

MAX_SEED = 2**64 - 1


@dataclasses.dataclass(frozen=True)
class Request:
    """One picture. Everything except its size is data: no field but width and height recompiles,
    nor any value of guidance_options; using a kind of guidance that the last batch did not, does.

    Raises ValueError, at construction, for values that no model could serve.
    """

    prompt: str = ''
    negative_prompt: str = ''
    seed: int = -1  # 0 to 2^64 - 1; -1: picked at random by `resolve`
    sampler: str = 'dpmpp_2m'
    schedule: Any = 'karras'  # a name, the path of a schedule file (.json), or the levels, a list
    steps: int = 25
    guidance: Any = 7.0  # classifier-free guidance scale, or one for each step; 1: none
    width: int | None = None  # pixels; None: the model's native size
    height: int | None = None
    eta: float | None = None  # noise of ddim and the ancestral samplers; None: the sampler's own
    sampler_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    schedule_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    guidance_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # see docs
    original_size: tuple | None = None  # SDXL: (height, width); None: the picture's
    crop: tuple = (0, 0)  # SDXL: (top, left)
    target_size: tuple | None = None  # SDXL base: (height, width); None: the picture's
    aesthetic: float = 6.0  # SDXL refiner
    negative_aesthetic: float = 2.5

    def __post_init__(self):
        for name in ('prompt', 'negative_prompt', 'sampler'):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f'{name}={getattr(self, name)!r}: expected a string')
        choose('sampler', self.sampler, SAMPLERS)
        known_schedule(self.schedule)
        if not isinstance(self.schedule, str):
            plain = (os.fspath(self.schedule) if isinstance(self.schedule, os.PathLike)
                     else tuple(map(float, self.schedule)))
            object.__setattr__(self, 'schedule', plain)
        for name in ('sampler_options', 'schedule_options'):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f'{name}={getattr(self, name)!r}: expected a mapping')
        _integer('seed', self.seed, -1, MAX_SEED)
        _integer('steps', self.steps, 1)
        for name in ('width', 'height'):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 1)
        for name, value in (('guidance', per_step('guidance', self.guidance, self.steps)),
                            ('guidance_options', check(self.guidance_options, self.steps))):
            object.__setattr__(self, name, value)
        for name in ('eta', 'aesthetic', 'negative_aesthetic'):
            value = getattr(self, name)
            if name == 'eta' and value is None:
                continue
            if not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise ValueError(f'{name}={value!r}: expected a finite number')
        for name in ('original_size', 'crop', 'target_size'):
            value = getattr(self, name)
            if value is not None and len(tuple(value)) != 2:
                raise ValueError(f'{name}={value!r}: expected two numbers')

    def replace(self, **fields):
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **fields)


def resolve(requests, config):
    """Fill in what a request leaves open: the native size, and a random seed for -1.

    `generate` does this itself; call it first to know the seeds that it will use.
    Raises ValueError for a size that the model cannot make.
    """
    if isinstance(requests, Request):
        raise ValueError('requests: expected a list of Request, found a single Request')
    factor = config.vae.factor
    native = config.unet.sample_size * factor
    resolved = []
    for request in requests:
        size = {name: getattr(request, name) or native for name in ('width', 'height')}
        for name, value in size.items():
            if value % factor:
                below = value // factor * factor
                near = f'{below} or {below + factor}' if below else f'{factor}'
                raise ValueError(f'{name}={value}: expected a multiple of {factor} pixels, '
                                 f'for example {near}')
        seed = random_seed() if request.seed == -1 else int(request.seed)
        resolved.append(request.replace(seed=seed, **size))
    return resolved


def random_seed():
    """What -1 stands for: 32 bits, short enough to copy by hand, and other programs take it."""
    return random.SystemRandom().randrange(2**32)


def _integer(name, value, low, high=None):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f'{name}={value!r}: expected a whole number')
    if value < low or (high is not None and value > high):
        limits = f'at least {low}' if high is None else f'between {low} and {high}'
        raise ValueError(f'{name}={value}: expected a whole number {limits}')
