"""Guidance on the host: what a user writes, and from it a table, as for the samplers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxsd.models.self_attention import Fewer
from jaxsd.models.unet import DeepShrink

from .choice import check_number, choose, flag, one_of
from .guidance import DeepCache, Guidance, Projection, Shrink, Threshold, ZeroStar
from .tables import Custom

# Every kind at the value that changes nothing.
OFF = Guidance(1.0, 0.0, Threshold(1.0, 1.0, 0.0), ZeroStar(0.0, 0.0),
               Projection(1.0, np.inf, 0.0, 1.0), (), 0.0, 1.0, 0.0, (1.0, 1.0, 1.0, 1.0), (1.0,),
               easycache=0.0)

# Kinds that need no picture without the prompt, and those that a network which takes the scale as
# an input leaves possible.
ALONE = ('freeu', 'deep_shrink', 'interval', 'interval_sigma', 'easycache', 'deepcache',
         'hypertile', 'token_merging')


def table(scale: float | Sequence[float], options: Mapping[str, Any], sigmas: np.ndarray,
          levels: np.ndarray, prompts: Sequence[float] = (1.0,), embedded: bool = False,
          unguided: bool = False, alone: bool = True,
          image: float | Sequence[float] | None = None) -> Guidance:
    """One image's guidance -> Guidance of [calls]; what `options` does not name stays None.

    scale: a number or one per step; options: from `check`; sigmas [steps + 1]; levels [calls]: the
    noise level of each row, 0 where it calls no model; prompts: the weights of several prompts. A
    value per step holds for all calls of the step (`steps_of`). embedded: the network takes the
    scale as an input, and sees the prompt alone; so it does where the scale is 1 and it may be
    `alone`, unless the sampler wants the `unguided` output. image: a scale like the first, of the
    image that the network sees, None where it sees none. Raises ValueError for kinds that embedded
    leaves no room.
    """
    levels, steps = np.asarray(levels), len(sigmas) - 1
    step = steps_of(sigmas, levels)

    def rows(value):
        value = np.asarray(value, np.float64)
        return value[np.minimum(step, len(value) - 1)] if value.ndim else np.full(step.shape, value)

    scale, on = rows(scale), np.ones(step.shape, bool)
    if 'interval' in options:  # diffusers' rounding
        start, stop = (int(fraction * steps) for fraction in options['interval'])
        on = (start <= step) & (step < stop)
    if 'interval_sigma' in options:
        low, high = options['interval_sigma']
        on &= (low < levels) & (levels <= high)
    scale = np.where(on, scale, 1)
    image = None if image is None else np.where(on, rows(image), 1)
    found = {name: rows(options[name]) for name in ('rescale', 'pag', 'sag') if name in options}
    if 'threshold' in options:
        found['threshold'] = Threshold(**jax.tree.map(
            rows, options['threshold'], is_leaf=lambda v: isinstance(v, tuple)))
    if 'cfg_zero_star' in options:
        found['zero_star'] = ZeroStar(
            rows(1), (step < options['cfg_zero_star']['init_steps']).astype(np.float64))
    if 'apg' in options:
        eta, norm, momentum = (rows(options['apg'][name]) for name in ('eta', 'norm', 'momentum'))
        live = levels > 0
        found['apg'] = Projection(eta, norm, np.where(live, momentum, 1), live.astype(np.float64))
    if 'perp_neg' in options:
        found['perp_neg'] = tuple(rows(weight) for _, weight in options['perp_neg'])
    if 'freeu' in options:
        found['freeu'] = tuple(map(rows, options['freeu']))
    if 'easycache' in options:
        cache = options['easycache']
        before = step / max(steps, 1)
        found['easycache'] = np.where((before >= cache['start']) & (before < cache['end']),
                                  cache['threshold'], 0)
    if 'deep_shrink' in options:
        how = dict(options['deep_shrink'])
        start, end = how.pop('start') * steps, how.pop('end') * steps
        found['shrink'] = Shrink(DeepShrink(**how), ((start <= step + 1e-9) & (
            step < end - 1e-9)).astype(np.float64))
    if 'deepcache' in options:
        number = np.cumsum(levels > 0) - 1  # of the model call
        found['deepcache'] = DeepCache(options['deepcache']['branch'] + 1, (
            number % options['deepcache']['interval'] > 0).astype(np.float64))
    tiles, merged = (options.get(name) for name in ('hypertile', 'token_merging'))
    if tiles:
        found['attention'] = Fewer(tile=tiles['tile_size'] // 8, depth=tiles['max_depth'])
    elif merged:
        found['attention'] = Fewer(ratio=merged['ratio'], depth=merged['max_depth'])
    for name in FUNCTIONS.keys() & options.keys():
        found['function'] = Custom(FUNCTIONS[name], {
            **{option: rows(value) for option, value in options[name].items()},
            'on': on.astype(np.float64)})
    if tuple(prompts) != (1.0,):
        found['prompts'] = tuple(map(rows, prompts))
    others = [name for name in options if name not in ALONE]
    others += ['AND or regions'] * ('prompts' in found) + ['a CFG++ sampler'] * unguided
    if image is not None and (image != 1).any():
        others.append('image_guidance')
    if embedded:
        if others:
            raise ValueError(f'{others[0]}: expected none with this model, which takes the '
                             'guidance scale as an input and sees no negative prompt')
        found['embedded'] = scale
    alone = alone and not others and bool((scale == 1).all())
    if embedded or alone:
        return Guidance(None, **found)
    return Guidance(scale, image=image, **found)


def steps_of(sigmas: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The step, 0 to steps - 1, in which each row calls its model; sigmas [steps + 1], levels
    [calls]: the noise level of each row."""
    reached = np.asarray(sigmas)[:, None] >= np.asarray(levels) * (1 - 1e-6)  # float32
    return np.clip(reached.sum(0) - 1, 0, max(len(sigmas) - 2, 0))


def stack(tables: Sequence[Guidance]) -> Guidance:
    """One Guidance of [calls] per image -> one of [calls,B].

    A kind that some image uses is there for all; for the others its values change nothing.
    """
    negatives = max(len(t.perp_neg or ()) for t in tables)
    prompts = max(len(t.prompts or (1,)) for t in tables)
    shape = next(iter(jax.tree.leaves(list(tables))), np.zeros(0)).shape
    off = jax.tree.map(lambda value: np.full(shape, value), OFF._replace(
        perp_neg=(0.0,) * negatives, prompts=(1.0, *(0.0,) * (prompts - 1))))
    own = [t.function for t in tables if t.function is not None]
    if len({function.rule for function in own}) > 1:
        raise ValueError(f'guidance of one batch by {own[0].rule.name} and another function: '
                         'expected one; run them in batches of their own')
    if own:  # with `on` 0 the others' options change nothing
        off = off._replace(function=Custom(own[0].rule, {
            **own[0].fields, 'on': 0 * own[0].fields['on']}))
    for kind, what, name in (('shrink', 'how', 'deep_shrink'),
                             ('deepcache', 'layers', 'deepcache')):
        some = [value for t in tables if (value := getattr(t, kind)) is not None]
        if len({getattr(value, what) for value in some}) > 1:
            raise ValueError(f'{name} of one batch with several settings but for its steps: '
                             'expected the same; run them in batches of their own')
        if some:
            off = off._replace(**{kind: jax.tree.map(lambda a: 0 * a, some[0])})
    if len({t.attention for t in tables}) > 1:
        raise ValueError('hypertile or token_merging of one batch with several settings, or in '
                         'part of it: expected the same; run them in batches of their own')
    off = off._replace(attention=tables[0].attention)
    used = [any(field is not None for field in fields) for fields in zip(*tables)]

    def fill(t):
        lists = {name: getattr(t, name) and (*getattr(t, name),
                                             *getattr(off, name)[len(getattr(t, name)):])
                 for name in ('perp_neg', 'prompts')}
        return Guidance(*((neutral if field is None else field) if use else None for field, neutral,
                          use in zip(t._replace(**lists), off, used)))

    return jax.tree.map(lambda *values: np.stack(values, 1), *map(fill, tables))


def check(options: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Guidance options as a user writes them -> the same, complete, tuples for sequences.

    Every number may be a sequence of `steps` numbers instead, but for the intervals and init_steps:
        rescale         phi, 0 to 1
        interval        (start, stop), fractions of the steps: outside it guidance is 1
                        (https://arxiv.org/abs/2404.07724)
        interval_sigma  (low, high): the same, in sigma
        threshold       {mimic: guidance scale (1), percentile: 0 to 1 (1), weight: 0 to 1 (1)}
        cfg_zero_star   {init_steps (1)}: the first steps have a prediction of zero
        apg             {eta (0), norm (15), momentum (-0.5)}
        perp_neg        ((text, weight), ...)
        pag, sag        scale
        freeu           (b1, b2, s1, s2) (https://arxiv.org/abs/2309.11497)
        easycache       {threshold (0.1), start (0.15), end (0.95)}, fractions of the steps: fewer
                        model calls (https://arxiv.org/abs/2507.02860)
        deep_shrink     {block (3), factor (2), start (0), end (0.35), after_skip (True),
                        downscale_method ('bicubic'), upscale_method ('bicubic')}: see
                        `unet.DeepShrink`; from one fraction of the steps to another
        deepcache       {interval (3), branch (0)}: the features of all but the last branch + 1
                        layers are new in every interval-th model call (see `unet.Deep`)
        hypertile       {tile_size (256 pixels), max_depth (0)}: see `self_attention.Fewer`
        token_merging   {ratio (0.5), max_depth (0)}: the same
        and one of `jaxsd.guidance`, {option: number}
    Raises ValueError for an unknown name and for values that are out of range.
    """
    if not isinstance(options, Mapping):
        raise ValueError(f'guidance_options={options!r}: expected a mapping from names to values')
    if len(own := sorted(FUNCTIONS.keys() & options.keys())) > 1:
        raise ValueError(f'guidance options {" and ".join(own)}: expected one of these functions')
    if {'hypertile', 'token_merging'} <= options.keys():
        raise ValueError('guidance options hypertile and token_merging: expected one of them')
    return {name: choose('guidance option', name, CHECKS)(f'guidance option {name}', value, steps)
            for name, value in options.items()}


def per_step(name: str, value: Any, steps: int | None, low: float = -np.inf,
             high: float = np.inf) -> Any:
    """Check a number, or (unless steps is None) one for each step -> a number or a tuple. steps 0:
    not known yet, any number of them."""
    if steps is not None and isinstance(value, (list, tuple, np.ndarray)):
        if steps and len(value) != steps:
            raise ValueError(f'{name}: expected a number or {steps} of them, one per step; '
                             f'found {len(value)}')
        return tuple(per_step(name, v, None, low, high) for v in value)
    check_number(name, value, low, high)
    return value


def _scale(low=-np.inf, high=np.inf):
    return lambda name, value, steps: per_step(name, value, steps, low, high)


def _several(count, low, high, rising):
    """`count` numbers; rising: the first below the second, both fixed over the steps."""
    def check(name, value, steps):
        if not isinstance(value, (list, tuple, np.ndarray)) or len(value) != count:
            raise ValueError(f'{name}={value!r}: expected {count} numbers')
        found = tuple(per_step(name, v, None if rising else steps, low, high) for v in value)
        if rising and not found[0] < found[1]:
            raise ValueError(f'{name}={value!r}: expected the first to be below the second')
        return found
    return check


def fields(varies: bool = True,
           **fields: tuple[float, float, float]) -> Callable[..., dict[str, Any]]:
    """The check of a mapping; fields: name = (default, low, high); varies: may be one per step."""
    def check(name, value, steps):
        if not isinstance(value, Mapping):
            raise ValueError(f'{name}={value!r}: expected a mapping, of '
                             f'{", ".join(fields) or "nothing: {}"}')
        for field in value:
            choose(f'field of {name}', field, fields)
        return {field: per_step(f'{name}.{field}', value.get(field, default),
                                steps if varies else None, low, high)
                for field, (default, low, high) in fields.items()}
    return check


def _negatives(name, value, steps):
    if not isinstance(value, (list, tuple)) or not value or not all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str)
            for pair in value):
        raise ValueError(f'{name}={value!r}: expected pairs of a text and its weight')
    return tuple((text, per_step(name, weight, steps)) for text, weight in value)


def _whole(**names):
    """The check of a mapping of whole numbers."""
    def check(name, value, steps):
        found = fields(varies=False, **names)(name, value, steps)
        for field, number in found.items():
            if number != int(number):
                raise ValueError(f'{name}.{field}={number}: expected a whole number')
        return {field: int(number) for field, number in found.items()}
    return check


def _deep_shrink(name, value, steps):
    if not isinstance(value, Mapping):
        raise ValueError(f'{name}={value!r}: expected a mapping, of {", ".join(SHRINK)} or nothing:'
                         ' {}')
    for field in value:
        one_of(f'field of {name}', field, SHRINK)
    found = SHRINK | value
    for field, low, high in (('block', 1, 64), ('factor', 1, 16), ('start', 0, 1), ('end', 0, 1)):
        check_number(f'{name} {field}', found[field], low, high)
    if found['block'] != int(found['block']):
        raise ValueError(f'{name} block={found["block"]}: expected a whole number')
    if not found['start'] < found['end']:
        raise ValueError(f'{name} start={found["start"]}, end={found["end"]}: expected start < end')
    flag(f'{name} after_skip', found['after_skip'])
    for field in ('downscale_method', 'upscale_method'):
        one_of(f'{field} of {name}', found[field], METHODS)
    return found | {'block': int(found['block']), 'factor': float(found['factor'])}


SHRINK = DeepShrink()._asdict() | {'start': 0.0, 'end': 0.35}
METHODS = ('bicubic', 'bilinear', 'nearest')
FUNCTIONS = {}  # {name: Rule}, of `jaxsd.guidance`
CHECKS = {
    'rescale': _scale(0, 1),
    'interval': _several(2, 0, 1, rising=True),
    'interval_sigma': _several(2, 0, np.inf, rising=True),
    'threshold': fields(mimic=(1.0, -np.inf, np.inf), percentile=(1.0, 0, 1), weight=(1.0, 0, 1)),
    'cfg_zero_star': fields(varies=False, init_steps=(1, 0, np.inf)),
    'apg': fields(eta=(0.0, -np.inf, np.inf), norm=(15.0, 0, np.inf), momentum=(-0.5, -1, 1)),
    'perp_neg': _negatives,
    'pag': _scale(),
    'sag': _scale(),
    'freeu': _several(4, 0, np.inf, rising=False),
    'easycache': fields(varies=False, threshold=(0.1, 0, np.inf), start=(0.15, 0, 1),
                        end=(0.95, 0, 1)),
    'deep_shrink': _deep_shrink,
    'deepcache': _whole(interval=(3, 1, 64), branch=(0, 0, 63)),
    'hypertile': _whole(tile_size=(256, 32, 4096), max_depth=(0, 0, 3)),
    'token_merging': lambda name, value, steps: {
        **fields(varies=False, ratio=(0.5, 0, 0.75), max_depth=(0, 0, 3))(name, value, steps)},
}
