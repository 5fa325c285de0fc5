"""What a batch's text encoders read: prompts taken apart, and which text holds in which step."""

import itertools
from typing import NamedTuple

import numpy as np

from jaxsd.config import TEXT_ENCODERS
from jaxsd.prompt import blocks, grammar
from jaxsd.sampling.choice import unknown
from jaxsd.weights import adapters

SIDES = ('negative', 'prompt', 'further')  # in the order of guidance's parts


class Reading(NamedTuple):
    """One request's texts.

    sides: {side: list of schedules}; a schedule has for each step a text: the segments that each of
    TEXT_ENCODERS reads, see prompt.grammar. weights: of the prompts; adapters: {name: (weight in
    the U-Net, in the text encoders)}.
    """

    sides: dict
    weights: tuple
    adapters: dict


class Arrangement(NamedTuple):
    """A batch's texts: N for each picture, of which each of its P parts follows one at a time.

    texts: per picture N pairs of side and text; followed: per picture int [steps,P], indices into
    the N, or None where all parts have one text in all steps, in their order; prompts: bool [P],
    the parts that are prompts.
    """

    texts: list
    followed: list | None
    prompts: np.ndarray


def read(request):
    """Take a request's prompts apart -> Reading."""
    def parts(text, second, **options):
        plans = [grammar.plan(t, request.steps, request.weighting, **options)
                 for t in (text, text if second is None else second)]
        pairs = list(itertools.zip_longest(*(plan.parts for plan in plans)))
        schedules = [tuple(zip(*(_by_step(part, request.steps) for part in pair)))
                     for pair in pairs]
        weights = tuple((first or other).weight for first, other in pairs)
        return schedules, weights, [tag for plan in plans[:1 + (second is not None)]
                                    for tag in plan.adapters]

    negative, *_ = parts(request.negative_prompt, request.negative_prompt_2, negative=True)
    prompts, weights, tags = parts(request.prompt, request.prompt_2)
    further = [schedule for text, _ in request.guidance_options.get('perp_neg', ())
               for schedule in parts(text, None, negative=True)[0]]
    named = dict(request.adapters)
    for name, *both in tags:
        named[name] = tuple(np.add(named.get(name, (0, 0)), both).tolist())
    return Reading({'negative': negative, 'prompt': prompts, 'further': further}, weights, named)


def _by_step(part, steps):
    """The segments of each step; of a prompt that the other text encoder does not have, none.

    A1111 counts its steps from 0 and an entry's last one from 1, so that `[a:b:5]` hears a six
    times and `[a|b]` a, a, b, a ...: here too, for the same pictures.
    """
    if part is None:
        return [()] * steps
    return [next(segments for end, segments in part.schedule if step <= end)
            for step in range(steps)]


def arrange(readings):
    """A batch's Readings -> Arrangement. Pictures with fewer parts than others get empty ones."""
    counts = {side: max(len(r.sides[side]) for r in readings) for side in SIDES}
    nothing = (((),) * len(TEXT_ENCODERS),)
    rows = [[(side, schedule) for side in SIDES for schedule in
             [*r.sides[side], *[nothing] * (counts[side] - len(r.sides[side]))]]
            for r in readings]
    prompts = np.repeat([side == 'prompt' for side in SIDES], list(counts.values()))
    if all(len(set(schedule)) == 1 for row in rows for _, schedule in row):
        return Arrangement([[(side, schedule[0]) for side, schedule in row] for row in rows], None,
                     prompts)
    found = [list(dict.fromkeys((side, text) for side, schedule in row for text in schedule))
             for row in rows]
    followed = [np.array(list(itertools.zip_longest(*(
        [texts.index((side, text)) for text in schedule] for side, schedule in row),
        fillvalue=0))) for texts, row in zip(found, rows)]
    most = blocks.bucket(max(map(len, found)))  # so that few numbers compile
    return Arrangement([texts + texts[:1] * (most - len(texts)) for texts in found], followed,
                       prompts)


def variants(texts):
    """Arrangement.texts -> what `blocks.texts` takes: encoder -> segments of each picture's N."""
    def of(encoder):
        which = TEXT_ENCODERS.index(encoder)
        return [[text[which] for _, text in picture] for picture in texts]
    return of


def count(model, request):
    """The blocks of 75 tokens that a request's longest text takes; a batch has one number of them.
    """
    readings = [read(request)]
    found = variants(arrange(readings).texts)
    return int(blocks.count(model.tokenizers, found, [request.cut], embeddings(model, readings))[0])


def embeddings(model, readings):
    """What words of each picture stand for: the model's embeddings, and those in the files of the
    adapters that it names; of one name the model's, then the first adapter's -> list of dicts."""
    def of(reading):
        inside = {}
        for adapter in reading.adapters:
            if adapter in model.adapters:
                inside = model.adapters[adapter].embeddings | inside
        return inside | model.embeddings if inside else model.embeddings

    return [of(reading) for reading in readings]


def side_paths(model, readings):
    """The adapters that a batch names -> their `factors` and weights {component: float32 [B,A]}."""
    names = sorted({name for r in readings for name in r.adapters})
    for name in names:
        if name not in model.adapters:
            raise unknown('adapter', name, model.adapters) if model.adapters else ValueError(
                f'adapter {name!r}: the model has none; expected '
                'model.replace(adapters={name: jaxsd.load_adapter(path, model)})')
    if not names:
        return None, None
    both = np.array([[r.adapters.get(name, (0, 0)) for name in names] for r in readings],
                    np.float32)  # [B,A,2]
    factors = adapters.factors(model, names)
    return factors, {part: both[..., int(part != 'unet')] for part in factors}
