"""Look-up of samplers and schedules by name, with errors that help."""

import difflib
import inspect


def unknown(what, name, known):
    """A ValueError that lists what is known and names the nearest."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.0)
    return ValueError(f'unknown {what} {name!r}: did you mean {near[0]!r}? '
                      f'Known: {", ".join(known)}')


def choose(what, name, known):
    """`known[name]`, or the error of `unknown`."""
    if name not in known:
        raise unknown(what, name, known)
    return known[name]


def call(what, name, function, *args, **options):
    """`function(*args, **options)`, or a ValueError that lists the options it takes."""
    known = list(inspect.signature(function).parameters)[len(args):]
    for option in options:
        if option not in known:
            raise ValueError(f'{what} {name!r} has no option {option!r}; '
                             f'it takes: {", ".join(known) or "none"}')
    return function(*args, **options)
