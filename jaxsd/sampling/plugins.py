"""Samplers, schedules, guidance of one's own: three decorators, whose docstrings are contracts.

docs/plugins.md has complete examples, from papers.
"""

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import pathlib
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.config import ScheduleConfig
from jaxsd.typing import Path

from . import scan
from .guidance_options import CHECKS, FUNCTIONS, fields
from .names import SAMPLER_NAMES, SCHEDULE_NAMES
from .plans import SAMPLERS, plan
from .schedule_tables import check_levels
from .schedules import SCHEDULES
from .tables import Custom, Row, Rule, custom

OWN = {}  # {(kind, name): (a hash of its file's code, module and name of the function)}
STEP = ('x', 'state', 'row', 'denoised', 'noise', 'uncond', 'point', 'sigma')
GUIDED = ('cond', 'uncond', 'scale', 'x', 'sigma')


def sampler(function: Callable | None = None, /, *, name: str | None = None,
            step: Callable | None = None, init: Callable | None = None,
            point: Callable | None = None) -> Any:
    """Decorator: a function from noise levels to rows, one row for each model call, as a sampler.

    function(sigmas, **options): sigmas numpy float64 [steps + 1], strictly decreasing, the last one
    usually 0; standard deviations of the noise in x = x0 + sigma noise. Options have defaults; one
    named `config` is given the model's ScheduleConfig. Without `step` it yields, or returns a list
    of, `sampling.row(...)`: the update is linear, and pictures share programs with all such
    samplers. Or it returns what another sampler does.

    With a `step` it yields dicts of numbers, or arrays of one shape: `sigma` above 0, the level at
    which the model is called, and whatever the step needs; `path` as in Row, the two levels between
    which the noise is the picture's Brownian path; `noisy=0` where no noise is needed.
    step, init, point are functions of one picture in jax.numpy, x [h,w,C] float32; they take what
    their parameters name:
        init(x, row) -> state, any pytree of arrays; none: ()
        step(x, state, row, denoised, noise, uncond, point, sigma) -> x, state
        point(x, state, row) -> x, sigma
    row: the call's row, `row.sigma` and the others as attributes, []. denoised [h,w,C]: the model's
    guided output x0 at x and sigma; uncond: without guidance. noise: standard normal, of the
    picture's seed and the row. point: for samplers that choose their own steps, where the model is
    called next, and sigma 0 when the picture is done; they yield as many rows as they may make
    calls, and guidance and prompts stay the same. Gradients pass through steps; through those that
    a point chooses as far as their formulas stay finite where a picture is done.

    name: the function's own if left out. Raises ValueError for a name that there is already, and
    where the function does not give rows for a few noise levels.
    """
    if function is None:
        return functools.partial(sampler, name=name, step=step, init=init, point=point)
    name = _free_name('sampler', name or function.__name__, function, {**SAMPLERS, **SAMPLER_NAMES})
    parts = [part and _blamed(part) for part in (step, init, point)]
    for part, known in zip(parts, (STEP, ('x', 'row'), ('x', 'state', 'row'))):
        _check_names(f'sampler {name!r}', part, known)
    if step is None and (init or point):
        raise ValueError(f'sampler {name!r}: expected step= beside init= and point=')
    rule = Rule(name, parts[0], parts[1], parts[2], code(function, step, init, point))
    function = _blamed(function)

    @functools.wraps(function)
    def rows(sigmas, **options):
        found = function(sigmas, **options)
        if isinstance(found, Row | Custom):
            return found
        with _blame(function):
            found = list(found) if isinstance(found, Iterable) else [found]
        if step is not None:
            return custom(rule, found)
        if not found or not all(isinstance(row, Row) for row in found):
            raise ValueError(f'sampler {name!r}: expected it to yield sampling.row(...), found '
                             f'{str(*found[:1])[:200]!r}; dicts need a step=')
        return Row(*map(np.stack, zip(*found)))

    def made():
        found = plan(name, [10.0, 3.0, 1.0, 0.0], ScheduleConfig())
        if isinstance(found, Custom):
            _try_step(found)

    _register('sampler', name, function, SAMPLERS, rows, made, rule.code)
    SAMPLER_NAMES[name.lower()] = name
    return rows


def schedule(function: Callable | None = None, /, *, name: str | None = None) -> Any:
    """Decorator: a function from a number of steps to noise levels, as a schedule.

    function(steps, config, **options) -> [steps] noise levels above 0, strictly decreasing, the
    first that of the noise to start from; 0 follows. config: the model's ScheduleConfig, for
    `sampling.model_sigmas(config)`, ascending, `t_to_sigma`, `sigma_to_t`. Options have defaults;
    those of the built-in ones are sigma_min and sigma_max, None for the model's own.

    name: the function's own if left out. Raises ValueError for a name that there is already, and
    where the function does not give five levels.
    """
    if function is None:
        return functools.partial(schedule, name=name)
    name = _free_name('schedule', name or function.__name__, function,
                      {**SCHEDULES, **SCHEDULE_NAMES})
    function = _blamed(function)

    def made():
        levels = np.asarray(function(5, ScheduleConfig()))
        if levels.shape != (5,):
            raise ValueError(f'schedule {name!r}: expected 5 noise levels for 5 steps, without the '
                             f'final 0, found an array {levels.shape}')
        check_levels(f'schedule {name!r}', np.append(levels, 0))

    _register('schedule', name, function, SCHEDULES, function, made, code(function))
    SCHEDULE_NAMES[name.lower()] = name
    return function


def guidance(function: Callable | None = None, /, *, name: str | None = None) -> Any:
    """Decorator: a function of the model's outputs with and without the prompt, as guidance.

    function(cond, uncond, scale, x, sigma, **options) -> the guided picture, of one picture in
    jax.numpy; it takes those of the first five that its parameters name. cond, uncond [h,w,C]:
    denoised pictures x0 with the prompt and with the negative one; the predicted noise is
    (x - x0) / sigma. x [h,w,C]: the noisy picture. scale, sigma []: the guidance scale and the
    noise level. Options have numbers as defaults and are [] too, each perhaps another in each step.

    It stands in the place of uncond + scale (cond - uncond), after CFG-Zero*, Perp-Neg and APG and
    before all other kinds; where guidance is off by an interval it is not used. Requests ask for it
    in their guidance_options, {name: {option: value}}.

    name: the function's own if left out. Raises ValueError for a name that there is already, and
    where the function does not give a picture.
    """
    if function is None:
        return functools.partial(guidance, name=name)
    name = _free_name('guidance option', name or function.__name__, function, CHECKS)
    what = f'guidance {name!r}'
    defaults = {p.name: p.default for p in inspect.signature(function).parameters.values()
                if p.name not in GUIDED}
    for option, value in defaults.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or option == 'on':
            raise ValueError(f'{what}: expected a number as the default of {option}')
    rule = Rule(name, _blamed(function), code=code(function))

    def made():
        picture = jnp.zeros((8, 8, 4))
        given = dict(cond=picture, uncond=picture, x=picture, scale=1.0, sigma=1.0)
        found = jax.eval_shape(lambda: rule.call(rule.step, {}, **given, **defaults))
        if getattr(found, 'shape', None) != picture.shape:
            raise ValueError(f'{what}: expected a picture like cond, {picture.shape}; found '
                             f'{found}')

    _register('guidance', name, function, CHECKS, fields(True, **{
        option: (value, -np.inf, np.inf) for option, value in defaults.items()}), made, rule.code)
    FUNCTIONS[name] = rule
    return function


def load_plugin(path: Path) -> types.ModuleType:
    """Run a Python file, whose decorators make samplers, schedules and guidance known -> module.

    Once: while the file stays as it is, the same module comes back. Raises ValueError, with the
    line, for what is wrong in it.
    """
    file = pathlib.Path(path).resolve()
    try:
        text = file.read_text('utf-8')
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise ValueError(f'plugin {path}: {reason}') from None
    name = f'jaxsd_plugin_{hashlib.sha256(str(file).encode()).hexdigest()[:16]}'
    if getattr(sys.modules.get(name), '__text__', None) == text:
        return sys.modules[name]
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__ = str(file)
    with _blame(file, always=True):
        exec(compile(text, str(file), 'exec'), vars(module))
    vars(module)['__text__'] = text
    return module


def load_plugins(paths: Iterable[Path] = ()) -> None:
    """Load files, and what installed packages offer as entry points of the group jaxsd.plugins."""
    for entry in importlib.metadata.entry_points(group='jaxsd.plugins'):
        try:
            entry.load()
        except Exception as error:
            raise ValueError(f'plugin {entry.name} = {entry.value}: {_brief(error)}') from error
    for path in paths:
        load_plugin(path)


def used(request: Any) -> dict[str, str]:
    """What of a Request is one's own -> {'sampler name': a hash of its file's code}."""
    names = [('sampler', request.sampler), ('schedule', request.schedule),
             *(('guidance', name) for name in request.guidance_options)]
    return {f'{kind} {name}': OWN[kind, name][0] for kind, name in names if (kind, name) in OWN}


def changed(codes: Mapping[str, str]) -> list[str]:
    """What of a picture's own, as of `used`, is other code here -> names. Raises ValueError for
    what is not here."""
    for kind, name in (key.split(' ', 1) for key in codes):
        if (kind, name) not in OWN:
            raise ValueError(f'{kind} {name!r} is of a file of somebody\'s own: give it as '
                             '--plugin=FILE, or to jaxsd.load_plugin')
    return [key for key, code in codes.items() if OWN[*key.split(' ', 1)][0] != code]


def code(*functions: Callable | None) -> str:
    """A hash of the code of the files that functions stand in, without comments and docstrings ->
    16 hex digits. Of a function alone where there is no file: a notebook, a console."""
    def text(function):
        function = inspect.unwrap(function)
        try:
            return stripped(pathlib.Path(inspect.getsourcefile(function)).read_text('utf-8'))
        except (OSError, TypeError):
            parts = function.__code__
            return repr((parts.co_code.hex(), parts.co_names, [
                c for c in parts.co_consts if not inspect.iscode(c)]))

    found = '\n'.join(sorted({text(function) for function in functions if function is not None}))
    return hashlib.sha256(found.encode()).hexdigest()[:16]


def stripped(text: str) -> str:
    """Python without comments and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, 'body', None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(
                body[0].value, ast.Constant):
            del body[0]
    return ast.unparse(tree)


def _free_name(kind, name, function, known):
    """The name, or a ValueError if something else has it. What is run again may replace itself."""
    if not name.isidentifier():
        raise ValueError(f'{kind} {name!r}: expected a name of letters, digits and _')
    own = OWN.get((kind.split()[0], name))
    if own is None and (name in known or name.lower() in known) or own is not None and own[1:] != (
            function.__module__, function.__qualname__):
        raise ValueError(f'{kind} {name!r}: there is one of this name; give it another, name=')
    return name


def _register(kind, name, function, known, value, made, code):
    """Make something known by its name if `made` does not raise an error."""
    before = known.get(name)
    known[name] = value
    try:
        made()
    except BaseException:
        known.pop(name) if before is None else known.update({name: before})
        raise
    OWN[kind, name] = code, function.__module__, function.__qualname__


def _check_names(what, function, known):
    """Raise ValueError for a parameter that nothing is given to."""
    for name in inspect.signature(function).parameters if function else ():
        if name not in known:
            raise ValueError(f'{what}: {function.__name__} takes {name}, expected some of '
                             f'{", ".join(known)}')


def _try_step(rows):
    """Trace a row of a sampler with a step of its own: what is wrong with it raises ValueError."""
    row = jax.tree.map(lambda a: jnp.float32(a[0]), rows)
    jax.eval_shape(lambda x: scan.step(scan.init(x, rows), row, x, x),
                   jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32))


def _blamed(function):
    """A function whose errors, but for its own ValueErrors, are ValueErrors that name its line."""
    @functools.wraps(function)
    def run(*arguments, **options):
        with _blame(function):
            return function(*arguments, **options)
    return run


@contextlib.contextmanager
def _blame(where, always=False):
    """Errors become a ValueError of one line with the file and the last line of it that was run.
    where: the file, or a function in it. always: ValueErrors too."""
    file = str(where) if isinstance(where, pathlib.Path) else inspect.unwrap(
        where).__code__.co_filename
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and not always or hasattr(error, 'blamed'):
            raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == file]
        if isinstance(error, SyntaxError) and error.filename == file:
            lines = [error.lineno]
        text = str(error).strip().partition('\n')[0] if type(error) is ValueError else _brief(error)
        located = ValueError(f'{file}:{lines[-1] if lines else 1}: {text}')
        located.blamed = True
        raise located from error


def _brief(error):
    """The name of an error and the first line of what it says."""
    text = error.msg if isinstance(error, SyntaxError) else str(error).strip().partition('\n')[0]
    return f'{type(error).__name__}: {text}'
