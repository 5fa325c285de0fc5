"""Dynamic prompts: `{a|b}` and `__name__` give way to one of their options, by the seed.

The language is that of sd-dynamic-prompts: `{a|b}`, with odds `{2::a|3::b}`; several options, each
at most once, `{2$$a|b|c}`, `{1-2$$a|b|c}`, joined by `, ` or as in `{2$$ and $$a|b|c}`; `__name__`,
a line of NAME.txt, `__colours/*__`, a line of any file that matches; all of these in each other,
and in the files. An option that is a wildcard alone stands for its lines where several are chosen.
Letters are: what follows a backslash (which stays), braces without `|` or `$$`, braces that are
unbalanced, `|` within square brackets, which is A1111's alternation, and `__` in a tag,
`<lora:my__style__v2:1>`, or where no wildcards are given.
"""

import bisect
import fnmatch
import functools
import itertools
import os
import pathlib
import random
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jaxsd.prompt.grammar import LONGEST, Nodes, change_tags, check_length, lalr
from jaxsd.sampling.choice import unknown
from jaxsd.typing import Path

MOST = 10_000  # choices in one prompt; a wildcard that names itself makes more
DRAWN = 10**6  # options that all choices of a prompt are drawn from

GRAMMAR = """
start: nodes
nodes: (LETTERS | name | choice)*
name: NAME
choice: OPEN nodes (BAR nodes)* _CLOSE
%declare LETTERS NAME OPEN BAR _CLOSE
"""
ODDS = r'(?:\s*(\d{1,6}(?:\.\d{0,6})?|\.\d{1,6})\s*::)?'
TOKEN = re.compile(rf"""
    (?P<LETTERS>(?:\\.|[^][\\{{}}|_])+)
    | (?P<NAME>__(?!_)[\w*?./-]+?__)
    | (?P<OPEN>{{(?:\s*(?:\d{{1,4}}(?:-\d{{0,4}})?|-\d{{0,4}})\$\$(?:[^][{{}}|$]*\$\$)?)?{ODDS})
    | (?P<BAR>\|{ODDS})
    | (?P<_CLOSE>}})
    | .""", re.VERBOSE | re.DOTALL)
COUNT = re.compile(r'\{\s*(\d*)(-?)(\d*)\$\$(?:(.*)\$\$)?', re.DOTALL)


class Line(NamedTuple):
    """A line of a wildcard, not parsed yet."""

    text: str


class Wildcard(NamedTuple):
    name: str


class Choice(NamedTuple):
    """options: ((odds, nodes), ...); between: what joins those chosen, from low to high of them."""

    options: tuple
    low: int = 1
    high: int = 1
    between: str | None = None


def expand(text: str, seed: int,
           wildcards: Path | Mapping[str, Iterable[str]] | None = None) -> str:
    """The text with every choice made, always the same one for the same seed.

    wildcards: a folder of NAME.txt, an option a line (# starts a comment, `2::` gives odds), or a
    mapping {name: options}. Nothing outside of the folder is read.
    None: `__name__` stays as it is, with a warning.
    Raises ValueError for an unknown or empty wildcard, for one that names itself without end, and
    for texts that are too long; FileNotFoundError for a folder that is not there.
    """
    check_length(text)
    if '{' not in text and '__' not in text:
        return text
    rng = random.Random(seed)
    lines = functools.cache(functools.partial(_lines, wildcards))
    done, made, length, drawn = [], 0, 0, 0
    todo = [Line(text)]  # the first comes last
    while todo:
        node = todo.pop()
        if isinstance(node, str):
            done.append(node)
            length += len(node)
            if length > LONGEST:
                raise ValueError(f'prompt: its choices make more than {LONGEST} characters')
            continue
        made += 1
        if made > MOST:
            raise ValueError(f'prompt: more than {MOST} choices; does a wildcard name itself?')
        if isinstance(node, Line):
            check_length(node.text)
            todo += reversed(_parser()(node.text))
            continue
        choice = _flat(node, lines) if isinstance(node, Choice) else Choice(lines(node.name))
        drawn += len(choice.options) * min(choice.high, len(choice.options))
        _check_drawn(drawn)
        todo += reversed(_pick(rng, choice))
    return ''.join(done)


def _flat(choice, lines):
    """Where several are chosen, a wildcard that is an option alone gives way to its lines."""
    if choice.between is None:
        return choice
    options = []
    for odds, nodes in choice.options:
        alone = len(nodes) == 1 and isinstance(nodes[0], Wildcard)
        options += [(odds * share, line) for share, line in lines(nodes[0].name)] if alone else [
            (odds, nodes)]
        _check_drawn(len(options))
    return choice._replace(options=tuple(options))


def _check_drawn(count):
    if count > DRAWN:
        raise ValueError(f'prompt: its choices are made among more than {DRAWN} options')


def _pick(rng, choice):
    """Nodes of the chosen options. random() is the one method that no Python version changes."""
    rest = [(odds, nodes) for odds, nodes in choice.options if odds > 0]
    if not rest:
        raise ValueError('prompt: a choice whose odds are all 0')
    low, high = sorted(min(n, len(rest)) for n in (choice.low, choice.high))
    chosen = []
    for _ in range(low + int(rng.random() * (high - low + 1))):
        ends = list(itertools.accumulate(odds for odds, _ in rest))
        n = bisect.bisect(ends, rng.random() * ends[-1])
        chosen += [choice.between, *rest.pop(min(n, len(rest) - 1))[1]]
    return chosen[1:]


def _lines(wildcards, name):
    """((odds, (Line,)), ...) of all wildcards that a name with *, ? matches."""
    if wildcards is None:
        warnings.warn('prompt: __NAME__ stays as it is: no wildcards are given', stacklevel=2)
        return ((1.0, (f'__{name}__',)),)
    known = wildcards if isinstance(wildcards, Mapping) else _files(wildcards)
    found = sorted(key for key in known if fnmatch.fnmatchcase(key, name))
    if not found:
        raise unknown('wildcard', name, known)
    options = []
    for key in found:
        lines = known[key]
        if isinstance(lines, pathlib.Path):
            lines = _read(lines)
        if isinstance(lines, str) or not all(isinstance(line, str) for line in lines):
            raise ValueError(f'wildcard {key!r}: {lines!r}: expected a list of strings')
        for line in lines:
            odds = re.match(ODDS, line)
            options.append((float(odds[1] or 1), (Line(line[odds.end():]),)))
    if not options:
        raise ValueError(f'wildcard {name!r}: expected options, found none in {", ".join(found)}')
    return tuple(options)


def _files(folder):
    """{name: path} of the text files in a folder and below, links out of it left alone."""
    if not isinstance(folder, (str, os.PathLike)):
        raise ValueError(f'wildcards={folder!r}: expected a folder or a mapping')
    root = pathlib.Path(folder).resolve()
    if not root.is_dir():
        raise FileNotFoundError(f'{folder}: no such folder; expected one of NAME.txt, wildcards')
    return {path.relative_to(root).with_suffix('').as_posix(): path
            for path in root.rglob('*.txt') if path.resolve().is_relative_to(root)}


def _read(path):
    """The lines of a file, without empty ones and comments."""
    try:
        lines = path.read_text('utf-8-sig').split('\n')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path}: expected text in UTF-8 ({error})') from None
    return [line for line in map(str.strip, lines) if line and line[0] != '#']


class _Tree(Nodes):
    @staticmethod
    def name(children: list) -> Wildcard:
        return Wildcard(str(children[0][2:-2]))

    @staticmethod
    def choice(children: list) -> Choice:
        odds = [found[1] for mark in children[::2]
                if (found := re.match(ODDS, mark[max(mark.rfind('$$') + 2, 1):]))]
        options = tuple((float(odd or 1), nodes) for odd, nodes in zip(odds, children[1::2]))
        count = COUNT.match(children[0])
        if not count:
            return Choice(options)
        low, to, high, between = count.groups()
        high = high or (low if not to else MOST)
        return Choice(options, int(low or 1), int(high), ', ' if between is None else between)


@functools.cache
def _parser():
    return lalr(GRAMMAR, _terminals, _Tree)


def _terminals(text):
    """The terminals of GRAMMAR; LETTERS: braces that are no choice, and bars that are A1111's."""
    tokens = list(TOKEN.finditer(change_tags(text, lambda tag: tag[0].replace('_', '-'))))
    roles = ['NAME' if token['NAME'] else 'LETTERS' for token in tokens]
    groups, braces = [], 0  # what is open: lists of tokens, the first the bracket, the others bars
    for i, token in enumerate(tokens):
        if token['OPEN'] or token[0] == '[':
            groups.append([i])
            braces += token[0] != '['
        elif token['BAR'] and groups:
            groups[-1].append(i)
        elif token[0] == ']' and groups and tokens[groups[-1][0]][0] == '[':
            groups.pop()
        elif token['_CLOSE'] and braces:
            bars = []
            while tokens[groups[-1][0]][0] == '[':
                bars += groups.pop()[1:]
            start, *others = groups.pop()
            braces -= 1
            if others or bars or '$$' in tokens[start][0]:
                for n in (start, *others, *bars, i):
                    roles[n] = tokens[n].lastgroup
    return zip(roles, [text[slice(*token.span())] for token in tokens])
