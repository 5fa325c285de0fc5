"""What people write in prompts: AND, schedules, alternation, adapters' tags (weights: emphasis.py).

The language is that of A1111's web UI (modules/prompt_parser.py and extra_networks.py, 1.10), read
in its order: tags leave the text, AND divides it, schedules and alternation make of each part one
text for each step, and brackets in that text are weights. So `(cat:[1:1.3:0.5])` is a scheduled
weight.

A1111 parses schedules with Earley's algorithm, whose time explodes with brackets. Here a linear
pass (`_roles`) finds the brackets that can be schedules and makes letters of all others; what is
left is LALR. A bracket is a letter where it is unbalanced, or holds one that is, or colons or bars
where they mean nothing: `[a:b:c:0.5]`. As in A1111 a bar outside of `[a|b]`, or a backslash at the
end of a line, makes letters of all schedules of its part. Unlike it, brackets are letters around
schedules nested more than DEEPEST levels, and a weight that is no number, `(a:1.2.3)`, is letters;
A1111 fails on both.
"""

import dataclasses
import functools
import itertools
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jaxsd.prompt.emphasis import READERS, Segment

DEEPEST = 64
LONGEST = 2**15  # characters of a prompt
CHANGES = 2**20  # characters of a prompt times the steps at which it changes
ADAPTERS = ('lora', 'lyco')


class Part(NamedTuple):
    """One of the prompts that AND joins.

    schedule: ((end step, segments), ...): the segments up to and with that step, counted from 1; of
    several entries the first that ends late enough holds, and the last one ends at `steps`.
    """

    weight: float
    schedule: tuple


class Plan(NamedTuple):
    """parts: of Part; adapters: ((name, U-Net's weight, text encoders' weight), ...) as written."""

    parts: tuple
    adapters: tuple


class Prompt(NamedTuple):
    """The tree. tags: ((place in the text without tags, kind, arguments), ...); terms: of Term."""

    tags: tuple
    terms: tuple


class Term(NamedTuple):
    """nodes: strings, Switch and Alternate; weight: as written, with colon and spaces, or spaces"""

    nodes: tuple
    weight: str


class Switch(NamedTuple):
    """`[before:after:when]`, or `[after:when]`, where before is None; when: as written."""

    before: tuple | None
    after: tuple
    when: str


class Alternate(NamedTuple):
    """`[a|b|c]`: another option at each step."""

    options: tuple


@functools.lru_cache(256)  # batches have the same texts again and again
def plan(text: str, steps: int, weighting: str = 'a1111', negative: bool = False) -> Plan:
    """What a prompt asks for, at each of so many steps -> Plan.

    weighting: whose brackets these are. a1111, no_norm, compel: `(a)` times 1.1, `(a:1.3)`, `[a]`
    divided by 1.1; comfy: `(a)` and `(a:1.3)`, where an inner weight replaces an outer one; none:
    letters; plain: everything is letters, AND, schedules and tags too.
    negative: tags and AND are letters, as in A1111's negative prompts.
    Raises ValueError for an adapter's tag without a name or with a weight that is no number, and
    for a text that is too long, or that is long and changes at many steps.
    """
    check_length(text)
    if weighting == 'plain':
        return Plan((Part(1.0, ((steps, (Segment(text, 1.0),)),)),), ())
    tree = Prompt((), (Term(_schedules(text), ''),)) if negative else parse(text)
    read = functools.cache(READERS[weighting])
    parts, changes = [], 0
    for nodes, weight in tree.terms:
        ends = sorted({steps} | {end for end in _ends(nodes, steps) if end >= 1})
        changes += len(ends) * len(_source(nodes))
        if changes > CHANGES:
            raise ValueError(f'prompt: {len(text)} characters that change at {len(ends)} steps: '
                             f'expected a product of at most {CHANGES}')
        parts.append(Part(float(weight.replace(':', '').strip() or 1), tuple(
            (end, read(''.join(_at(nodes, end, steps)))) for end in ends)))
    ignored = sorted({kind for _, kind, _ in tree.tags} - {*ADAPTERS})
    if ignored:
        warnings.warn(f'prompt: left out the tags of kind {", ".join(ignored)}; '
                      f'known: {", ".join(ADAPTERS)}', stacklevel=2)
    return Plan(tuple(parts), tuple(_adapter(kind, arguments) for _, kind, arguments in tree.tags
                                    if kind in ADAPTERS))


def check_length(text: str) -> None:
    """Raises ValueError for a prompt of more than LONGEST characters."""
    if len(text) > LONGEST:
        raise ValueError(f'prompt: {len(text)} characters: expected at most {LONGEST}')


def parse(text: str) -> Prompt:
    """Text -> Prompt, the tree. No text is an error."""
    tags, rest, place = [], '', 0
    for found in TAG.finditer(text, 0, text.rfind('>') + 1):
        rest += text[place:found.start()]
        tags.append((len(rest), *found.groups()))
        place = found.end()
    rest += text[place:]
    terms = []
    for term in re.split(r'\bAND\b', rest):
        weight = WEIGHT.search(term)
        words = (term[:weight.start()] if weight else term).rstrip()
        terms.append(Term(_schedules(words), term[len(words):]))
    return Prompt(tuple(tags), tuple(terms))


def change_tags(text: str, change: Callable[[re.Match[str]], str]) -> str:
    """The text with its tags replaced: change(match of TAG) -> text."""
    end = text.rfind('>') + 1
    return TAG.sub(change, text[:end]) + text[end:]


def write(tree: Prompt) -> str:
    """The tree -> the text that it was parsed from."""
    text = 'AND'.join(_source(nodes) + weight for nodes, weight in tree.terms)
    for place, kind, arguments in reversed(tree.tags):
        text = f'{text[:place]}<{kind}:{arguments}>{text[place:]}'
    return text


TAG = re.compile(r'<(\w++):([^>]+)>')
WEIGHT = re.compile(r':\s*[-+]?(?:\d++\.?|\d*+\.\d++)\s*$')


def _adapter(kind, arguments):
    """-> (name, U-Net's weight, text encoders' weight).

    `name:te:unet` or `name:te=0.5:unet=1`; the U-Net's weight is the text encoders' unless given.
    """
    items = [item.split('=', 2) for item in arguments.split(':')]
    named = {item[0]: item[1] for item in items if len(item) == 2}
    name, *weights = ['='.join(item) for item in items if len(item) != 2] or ['']
    if not name:
        raise ValueError(f'prompt: <{kind}:{arguments}> names no adapter; '
                         f'expected <{kind}:name:weight>')
    text = named.get('te', weights[0] if weights else '1')
    unet = named.get('unet', weights[1] if len(weights) > 1 else text)
    for weight in (unet, text):
        if not re.fullmatch(r'\s*[-+]?(\d++\.?\d*|\.\d+)\s*', weight):
            raise ValueError(f'prompt: <{kind}:{arguments}>: expected <{kind}:name:weight> with a '
                             f'number such as 0.8, found {weight!r}')
    return name, float(unet), float(text)


# Schedules and alternation.

GRAMMAR = """
start: nodes
nodes: (LETTERS | switch | alternate)*
switch: _OPEN [nodes _COLON] nodes WHEN _CLOSE
alternate: _OPEN nodes (_BAR nodes)+ _CLOSE
%declare LETTERS WHEN _OPEN _COLON _BAR _CLOSE
"""
TOKEN = re.compile(r"""
    (?P<letters>(?:[^\\\[\]():|]+|\\.)+)
    | (?P<when>:\s*[-+]?(?:[0-9]++\.?[0-9]*+|\.[0-9]++)(?:[eE][-+]?[0-9]++)?\s*)(?=\])
    | [][():|\\]""", re.VERBOSE)
# A group of brackets by its marks, '.' for a number before the bracket that closes.
SHAPE = re.compile(r'\(:?\)|\[\]|(?P<schedule>\[(?::?\.|\|+)\])')
ROLES = {'[': '_OPEN', ':': '_COLON', '.': 'WHEN', '|': '_BAR', ']': '_CLOSE'}


@dataclasses.dataclass
class _Group:
    """Brackets that are open, or just closed."""

    tokens: list = dataclasses.field(default_factory=list)  # numbers of those that are its marks
    marks: str = ''
    depth: int = 0  # of schedules within it


def _roles(tokens):
    """The terminal of GRAMMAR that each token is, in linear time."""
    roles = ['LETTERS'] * len(tokens)
    groups = []
    for i, token in enumerate(tokens):
        if token['letters']:
            continue
        mark = '.' if token['when'] else token[0]
        if mark in '([':
            groups.append(_Group())
        if not groups:
            continue
        group = groups[-1]
        group.tokens.append(i)
        group.marks += mark
        if mark in ')]':
            shape = SHAPE.fullmatch(group.marks)
            group.depth += bool(shape and shape['schedule'])
            if not shape or group.depth > DEEPEST:
                groups.clear()  # these brackets are letters, and so are those around them
                continue
            groups.pop()
            if groups:
                groups[-1].depth = max(groups[-1].depth, group.depth)
            if shape['schedule']:
                for n, mark in zip(group.tokens, group.marks):
                    roles[n] = ROLES[mark]
    if any(role == 'LETTERS' and token[0] in ('|', '\\') for role, token in zip(roles, tokens)):
        return ['LETTERS'] * len(tokens)
    return roles


def _terminals(text):
    tokens = list(TOKEN.finditer(text))
    return zip(_roles(tokens), [token[0] for token in tokens])


def _joined(terminals):
    """(name, text) of terminals, with neighbouring LETTERS made one."""
    for name, run in itertools.groupby(terminals, lambda terminal: terminal[0]):
        texts = [text for _, text in run]
        yield from ((name, text) for text in ([''.join(texts)] if name == 'LETTERS' else texts))


def lalr(rules: str, terminals: Callable[[str], Iterable[tuple[str, str]]],
         tree: type) -> Callable[[str], Any]:
    """A parser, from text to a tree, by lark's LALR(1).

    terminals(text): (name, text) of each; tree: methods by rule, of a list of children.
    """
    import lark

    class Lexer(lark.lexer.Lexer):
        def __init__(self, conf):
            pass

        def lex(self, text):
            return itertools.starmap(lark.Token, _joined(terminals(text)))

    return lark.Lark(rules, parser='lalr', lexer=Lexer, transformer=tree).parse


class Nodes:
    """What both grammars of prompts have: their rules start and nodes."""

    @staticmethod
    def start(children: list) -> Any:
        return children[0]

    @staticmethod
    def nodes(children: list) -> tuple:  # lark's tokens, a kind of strings, become plain ones
        return tuple(str(node) if isinstance(node, str) else node for node in children)


class _Tree(Nodes):
    @staticmethod
    def switch(children: list) -> Switch:
        before, after, when = children
        return Switch(before, after, str(when[1:]))  # without its colon

    @staticmethod
    def alternate(children: list) -> Alternate:
        return Alternate(tuple(children))


@functools.cache
def _parser():
    return lalr(GRAMMAR, _terminals, _Tree)


def _schedules(text):
    """Text without AND -> nodes."""
    return _parser()(text)


def _source(nodes):
    return ''.join(node if isinstance(node, str) else _brackets(node) for node in nodes)


def _brackets(node):
    if isinstance(node, Alternate):
        return f'[{"|".join(map(_source, node.options))}]'
    before = '' if node.before is None else f'{_source(node.before)}:'
    return f'[{before}{_source(node.after)}:{node.when}]'


def _last(when, steps):
    """The last step before a switch: a number with a point is a fraction of the steps."""
    last = float(when) * (steps if '.' in when else 1)
    return int(max(0, min(steps, last)))


def _ends(nodes, steps):
    """The steps, counted from 1, after which the text may change."""
    if any(isinstance(node, Alternate) for node in nodes):
        return set(range(1, steps + 1))
    ends = set()
    for node in nodes:
        if isinstance(node, Switch):
            ends |= {_last(node.when, steps)}
            ends |= _ends((node.before or ()) + node.after, steps)
    return ends


def _at(nodes, step, steps):
    """The text at a step, counted from 1, in pieces."""
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif isinstance(node, Switch):
            early = step <= _last(node.when, steps)
            yield from _at((node.before or ()) if early else node.after, step, steps)
        else:
            yield from _at(node.options[(step - 1) % len(node.options)], step, steps)
