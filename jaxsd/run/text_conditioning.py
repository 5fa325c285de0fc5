"""Conditioning by text: prompts taken apart, and which text holds in which step."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsd.config import TEXT_ENCODERS
from jaxsd.prompt import blocks, grammar
from jaxsd.run.request import Request
from jaxsd.sampling.choice import unknown
from jaxsd.weights import Model, adapters
from jaxsd.weights.embeddings import Embedding

ROLES = ('negative', 'positive', 'perp_neg')  # in the order of guidance's parts


Arrays = dict[str, np.ndarray]


class Prompts(NamedTuple):
    """One request's texts.

    roles: {role: list of schedules}; a schedule has for each step a text: the segments that each of
    TEXT_ENCODERS reads, see prompt.grammar. weights: of the prompts; adapters: {name: (weight in
    the U-Net, in the text encoders)}. places: for each prompt the number of its region, None where
    it lies everywhere; (): no regions.
    """

    roles: dict
    weights: tuple
    adapters: dict
    places: tuple = ()


class Arrangement(NamedTuple):
    """A batch's texts: N for each picture, of which each of its P parts follows one at a time.

    texts: per picture N pairs of role and text; text_index: per picture int [steps,P], indices into
    the N, or None where all parts have one text in all steps, in their order; prompts: bool [P],
    the parts that are prompts.
    """

    texts: list
    text_index: list | None
    prompts: np.ndarray


def parse_prompts(request: Request) -> Prompts:
    """Take a request's prompts apart -> Prompts."""
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
    positive, weights, tags = parts(request.prompt, request.prompt_2)
    perp_neg = [schedule for text, _ in request.guidance_options.get('perp_neg', ())
               for schedule in parts(text, None, negative=True)[0]]
    named = dict(request.adapters)
    for name, *both in tags:
        named[name] = tuple(np.add(named.get(name, (0, 0)), both).tolist())
    places: tuple = (None,) * len(weights) if request.regions else ()
    for number, region in enumerate(request.regions):
        more, own, tags = parts(region.prompt, None)
        if tags:
            raise ValueError(f'region {region.prompt!r:.80}: expected no LoRA, which works in the '
                             'whole picture: name it in the prompt')
        positive, weights = [*positive, *more], (*weights, *np.multiply(own, region.weight))
        places += (number,) * len(more)
    if places and min(weights) < 0:
        raise ValueError(f'regions: expected no weight below 0, found {min(weights):g}')
    roles = {'negative': negative, 'positive': positive, 'perp_neg': perp_neg}
    return Prompts(roles, weights, named, places)


def parse_for(model: Model, request: Request) -> Prompts:
    """`parse_prompts`, with the LoRAs that files of the request's IP-Adapters bring, which hold in
    the U-Net; they are called '/' and the IP-Adapter's name."""
    parsed = parse_prompts(request)
    nets = {prompt.net for prompt in request.image_prompts if prompt.net in model.ip_adapters}
    return parsed._replace(adapters=parsed.adapters | {
        f'/{name}': (1.0, 0.0) for name in sorted(nets) if model.ip_adapters[name].config.rank})


def _by_step(part, steps):
    """The segments of each step; of a prompt that the other text encoder does not have, none.

    A1111 counts its steps from 0 and an entry's last one from 1, so that `[a:b:5]` has a six
    times and `[a|b]` a, a, b, a ...: here too, for the same pictures.
    """
    if part is None:
        return [()] * steps
    return [next(segments for end, segments in part.schedule if step <= end)
            for step in range(steps)]


def arrange_texts(parsed: Sequence[Prompts]) -> Arrangement:
    """A batch's Prompts -> Arrangement. Pictures with fewer parts than others get empty ones."""
    counts = {role: max(len(r.roles[role]) for r in parsed) for role in ROLES}
    nothing = (((),) * len(TEXT_ENCODERS),)
    rows = [[(role, schedule) for role in ROLES for schedule in
             [*r.roles[role], *[nothing] * (counts[role] - len(r.roles[role]))]]
            for r in parsed]
    prompts = np.repeat([role == 'positive' for role in ROLES], list(counts.values()))
    if all(len(set(schedule)) == 1 for row in rows for _, schedule in row):
        return Arrangement([[(role, schedule[0]) for role, schedule in row] for row in rows], None,
                     prompts)
    found = [list(dict.fromkeys((role, text) for role, schedule in row for text in schedule))
             for row in rows]
    index = [np.array(list(itertools.zip_longest(*(
        [texts.index((role, text)) for text in schedule] for role, schedule in row),
        fillvalue=0))) for texts, row in zip(found, rows)]
    most = blocks.bucket(max(map(len, found)))  # so that few numbers compile
    return Arrangement([texts + texts[:1] * (most - len(texts)) for texts in found], index,
                       prompts)


def variants(texts: list) -> Callable[[str], list]:
    """Arrangement.texts -> what `blocks.texts` takes: encoder -> segments of each picture's N."""
    def of(encoder):
        which = TEXT_ENCODERS.index(encoder)
        return [[text[which] for _, text in picture] for picture in texts]
    return of


def count_blocks(model: Model, request: Request) -> int:
    """The blocks of 75 tokens that a request's longest text takes; a batch has one number of them.
    """
    parsed = [parse_prompts(request)]
    found, own = variants(arrange_texts(parsed).texts), embeddings_of(model, parsed)
    return int(blocks.count(model.tokenizers, found, [request.cut], own)[0])


def embeddings_of(model: Model, parsed: Sequence[Prompts]) -> list[Mapping[str, Embedding]]:
    """What words of each picture stand for: the model's embeddings, and those in the files of the
    adapters that it names; of one name the model's, then the first adapter's -> list of dicts."""
    def of(one):
        inside = {}
        for adapter in one.adapters:
            if adapter in model.adapters:
                inside = model.adapters[adapter].embeddings | inside
        return inside | model.embeddings if inside else model.embeddings

    return [of(one) for one in parsed]


def adapters_of(model: Model,
                parsed: Sequence[Prompts]) -> tuple[dict[str, Any] | None, Arrays | None]:
    """The adapters that a batch names -> their `factors` and weights {component: float32 [B,A]}."""
    names = sorted({name for r in parsed for name in r.adapters})
    loras = [f'/{name}' for name, net in model.ip_adapters.items() if net.config.rank]
    for name in names:
        if name not in model.adapters and name not in loras:
            raise unknown('adapter', name, model.adapters) if model.adapters else ValueError(
                f'adapter {name!r}: the model has none; expected '
                'model.replace(adapters={name: jaxsd.load_adapter(path, model)})')
    if not names:
        return None, None
    both = np.array([[r.adapters.get(name, (0, 0)) for name in names] for r in parsed],
                    np.float32)  # [B,A,2]
    factors = adapters.factors(model, names)
    return factors, {part: both[..., int(part != 'unet')] for part in factors}
