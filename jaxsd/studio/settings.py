"""What the page sends, to Requests: the fields of a Request as JSON, and axes of a grid."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsd.batch import plan
from jaxsd.run.infotext import tuples
from jaxsd.run.request import Control, Hires, Request
from jaxsd.run.resolving import random_seed
from jaxsd.sampling.choice import choose, one_of
from jaxsd.sampling.names import SCHEDULE_NAMES
from jaxsd.serve.a1111 import Limits, decode

PICTURES = ('image', 'mask', 'depth')  # as base64 or a data: URL; no path and no address is read
FIELDS = tuple(name for name in Request.__dataclass_fields__
               if name not in ('wildcards', 'image_prompts', 'regions', 'reference'))
AXES = tuple(name for name in FIELDS if name not in (*PICTURES, 'controls'))
LONGEST = 4000  # characters of a prompt

Read = Callable[..., np.ndarray]  # decodes a picture, as images.read_bytes does


class Axis(NamedTuple):
    """A field of a Request, and the values that it takes along a side of a grid."""

    field: str
    values: list

    def labels(self) -> list[str]:
        """The values as people read them."""
        return [value if isinstance(value, str) else repr(value) for value in self.values]


def request(given: Any, defaults: Mapping[str, Any], limits: Limits,
            read: Read) -> Request:
    """The page's settings -> a Request with a seed. defaults: arguments of Request, for what is
    left open. Raises ValueError for what is wrong or too much."""
    if not isinstance(given, Mapping):
        raise ValueError(f'settings: expected an object of fields, found {given!r:.80}')
    for name in given:
        one_of('field', name, FIELDS)
    fields = {name: tuples(value) for name, value in given.items()}
    if fields.get('outpaint') or fields.get('aspect'):  # which make the size
        defaults = {**defaults, 'width': None, 'height': None}
        fields = {name: fields[name] for name in fields if name not in ('width', 'height')}
    if fields.get('aspect') is None and (fields.get('width') or fields.get('height')):
        fields['aspect'] = None
    most = 4 * limits.pixels
    for name in PICTURES:
        if fields.get(name) is not None:
            fields[name] = read(_bytes(fields[name], name), name, most, gray=name != 'image')
    fields['controls'] = tuple(_control(each, read, most) for each in given.get('controls') or ())
    if isinstance(fields.get('schedule'), str):  # never a file
        fields['schedule'] = choose('schedule', fields['schedule'].lower(), SCHEDULE_NAMES)
    for name in ('sampler', 'schedule'):  # whose options are another's no more
        if fields.get(name) not in (None, defaults.get(name)):
            fields.setdefault(f'{name}_options', {})
    if 'seed' in fields:
        fields['seed'] = _seed(fields['seed'])
    found = _made({**defaults, **fields})
    drawn = {name: random_seed() for name in ('seed', *['subseed'] * (found.subseed_strength > 0))
             if getattr(found, name) == -1}
    return check(found.replace(**drawn), limits)


def check(request: Request, limits: Limits) -> Request:
    """The request. Raises ValueError where its steps or texts are too many."""
    for steps in (request.steps, request.hires.steps if isinstance(request.hires, Hires) else 0):
        if steps and steps > limits.steps:
            raise ValueError(f'steps={steps}: expected at most {limits.steps}')
    if request.noise_batch[1] > limits.batch:
        raise ValueError(f'noise_batch={request.noise_batch}: expected a batch of at most '
                         f'{limits.batch}')
    if request.seed_resize_from and np.prod(request.seed_resize_from, dtype=int) > limits.pixels:
        raise ValueError(f'seed_resize_from={request.seed_resize_from}: expected at most '
                         f'{limits.pixels} pixels')
    for name in ('prompt', 'negative_prompt', 'prompt_2', 'negative_prompt_2'):
        if len(getattr(request, name) or '') > LONGEST:
            raise ValueError(f'{name}: expected at most {LONGEST} characters')
    return request


def axes(given: Sequence[Mapping[str, str]]) -> list[Axis]:
    """[{'field': 'steps', 'values': '4, 8'}, ...], two at most -> a list of Axis. Raises
    ValueError."""
    found = []
    for each in given:
        name = one_of('field of an axis', each.get('field'), AXES)
        text = each.get('values')
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'{name}: expected values, separated by commas')
        values = plan.seeds(text) if name == 'seed' else plan.grid([f'{name}={text}'])[name]
        found.append(Axis(name, values))
    if len({axis.field for axis in found}) < len(found) or len(found) > 2:
        raise ValueError('axes: expected at most two, of different fields')
    return found


def expand(base: Request, count: int, along: Sequence[Axis], limits: Limits,
           most: int) -> list[Request]:
    """A request times its axes, row by row, or `count` of it with seeds that count up.

    most: pictures of a grid. Raises ValueError for values that no Request takes.
    """
    if not along:
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= limits.batch:
            raise ValueError(f'count={count!r}: expected a whole number from 1 to {limits.batch}')
        return [base.numbered(i) for i in range(count)]
    size = np.prod([len(axis.values) for axis in along], dtype=int)
    if size > most:
        raise ValueError(f'a grid of {" x ".join(str(len(axis.values)) for axis in along)} '
                         f'pictures: expected at most {most}, as many as may wait (--queue)')
    made = []
    for values in itertools.product(*(axis.values for axis in reversed(along))):
        cell = {axis.field: value for axis, value in zip(reversed(along), values)}
        if isinstance(cell.get('schedule'), str):
            cell['schedule'] = choose('schedule', cell['schedule'].lower(), SCHEDULE_NAMES)
        if base.schedule == 'diffusers' != cell.get('schedule', 'diffusers'):
            cell.setdefault('schedule_options', {})  # which name a scheduler
        if cell.get('aspect'):
            cell |= {'width': None, 'height': None}
        try:
            made.append(check(base.replace(**cell), limits))
        except (TypeError, ValueError) as error:
            at = ', '.join(f'{name}={value!r}' for name, value in cell.items())
            raise ValueError(f'at {at}: {error}') from None
    return made


def shown(request: Request) -> dict[str, Any]:
    """A Request -> its settings as the page keeps them, without pictures; seeds as text, because
    JavaScript's numbers are too short for them."""
    found = {name: plain(getattr(request, name)) for name in AXES
             if name != 'strength' or request.image is not None}
    return {name: value for name, value in found.items()
            if name in CORE or value != DEFAULTS[name]} | {'seed': str(request.seed)}


def plain(value: Any) -> Any:
    """A field of a Request as JSON has it."""
    if dataclasses.is_dataclass(value):  # Hires
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)
                if getattr(value, field.name) is not None}
    return dict(value) if isinstance(value, Mapping) else value


CORE = ('prompt', 'negative_prompt', 'sampler', 'schedule', 'steps', 'guidance', 'width', 'height',
        'strength')
DEFAULTS = {name: getattr(Request(), name) for name in AXES}


def _made(fields):
    try:
        return Request(**fields)
    except TypeError as error:  # a list where a number stands
        raise ValueError(str(error)) from None


def _seed(value):
    try:
        return int(value if value not in ('', None) else -1)
    except (TypeError, ValueError):
        raise ValueError(f'seed={value!r:.80}: expected a whole number, -1 for a random one'
                         ) from None


def _bytes(text, name):
    if not isinstance(text, str):
        raise ValueError(f'{name}: expected a picture as base64 or a data: URL')
    return decode(text, name)


def _control(given, read, most):
    """An object of Control's fields -> a Control."""
    if not isinstance(given, Mapping):
        raise ValueError('controls: expected objects with net and image')
    for name in given:
        one_of('field of controls', name, Control.__dataclass_fields__)
    image = read(_bytes(given.get('image'), 'the hint'), 'the hint', most)
    return Control(**{'net': None, **given, 'image': image})
