"""Look-up of samplers and schedules by name, and checks of their options: errors that help."""

import difflib
import inspect
import math
import numbers
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

T = TypeVar('T')


def unknown(what: str, name: object, known: Collection[str]) -> ValueError:
    """A ValueError that names the nearest of what is known, and lists all or, of many, a few."""
    name = str(name)[:200]
    if not known:
        return ValueError(f'unknown {what} {name!r}: there are none')
    near = difflib.get_close_matches(name, list(known), n=10, cutoff=0.0)
    listed = (f'Known: {", ".join(known)}' if len(known) <= 100
              else f'The nearest of {len(known)}: {", ".join(near)}')
    return ValueError(f'unknown {what} {name!r}: did you mean {near[0]!r}? {listed}')


def choose(what: str, name: object, known: Mapping[str, T]) -> T:
    """`known[name]`, or the error of `unknown`."""
    return known[one_of(what, name, known)]


def one_of(what: str, name: object, known: Collection[str]) -> str:
    """The name, if it is known, or the error of `unknown`."""
    if not isinstance(name, str) or name not in known:
        raise unknown(what, name, known)
    return name


def number(option: str, value: T) -> T:
    """The value, infinity included, or a ValueError if it is no number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f'{option}={value!r}: expected a number')
    if math.isnan(value):
        raise ValueError(f'{option}={value!r}: expected a finite number')
    return value


def flag(option: str, value: T) -> T:
    """The value, or a ValueError if it is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f'{option}={value!r}: expected True or False')
    return value


def call(what: str, name: object, function: Callable[..., T], *args: Any, **options: Any) -> T:
    """`function(*args, **options)`, or a ValueError that lists the options it takes.

    An option whose default is a number, or True or False, must be one too.
    """
    known = dict(list(inspect.signature(function).parameters.items())[len(args):])
    for option, value in options.items():
        if option not in known:
            raise ValueError(f'{what} {name!r} has no option {option!r}; '
                             f'it takes: {", ".join(known) or "none"}')
        default = known[option].default
        if isinstance(default, bool):
            flag(option, value)
        elif isinstance(default, (int, float)):
            number(option, value)
    return function(*args, **options)


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise ValueError for what is no finite number within these bounds."""
    if (isinstance(value, bool) or not isinstance(value, numbers.Real)
            or not math.isfinite(value)):
        raise ValueError(f'{name}={value!r}: expected a finite number')
    if not low <= float(value) <= high:
        limits = f'of at least {low}' if high == math.inf else f'from {low} to {high}'
        raise ValueError(f'{name}={value}: expected a number {limits}')
