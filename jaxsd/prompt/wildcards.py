"""Dynamic prompts: `{a|b}` and `__name__` give way to one of their options, by the seed.

The language is that of sd-dynamic-prompts: `{a|b}`, with odds `{2::a|3::b}`; several options, each
at most once, `{2$$a|b|c}`, `{1-2$$a|b|c}`, joined by `, ` or as in `{2$$ and $$a|b|c}`; `__name__`,
a line of NAME.txt, `__colours/*__`, a line of any file that matches; all of these in each other,
and in the files. An option that is a wildcard alone stands for its lines where several are chosen.
Letters are: what follows a backslash (which stays), braces without `|` or `$$`, braces that are
unbalanced, and `|` within square brackets, which is A1111's alternation.
"""

import bisect
import fnmatch
import functools
import itertools
import os
import pathlib
import random
import re
from collections.abc import Mapping
from typing import NamedTuple

from jaxsd.prompt.grammar import Nodes, lalr
from jaxsd.sampling.choice import unknown

MOST = 10_000  # choices in one prompt; a wildcard that names itself makes more

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


def expand(text, seed, wildcards=None):
    """The text with every choice made, always the same one for the same seed.

    wildcards: a folder of NAME.txt, an option a line (# starts a comment, `2::` gives odds), or a
    mapping {name: options}. Nothing outside of the folder is read.
    Raises ValueError for an unknown or empty wildcard, and for one that names itself without end;
    FileNotFoundError for a folder that is not there.
    """
    if '{' not in text and '__' not in text:
        return text
    rng = random.Random(seed)
    lines = functools.cache(functools.partial(_lines, wildcards))
    done, made = [], 0
    todo = [Line(text)]  # the first comes last
    while todo:
        node = todo.pop()
        if isinstance(node, str):
            done.append(node)
            continue
        made += 1
        if made > MOST:
            raise ValueError(f'prompt: more than {MOST} choices; does a wildcard name itself?')
        if isinstance(node, Line):
            nodes = _parser()(node.text)
        elif isinstance(node, Wildcard):
            nodes = _pick(rng, Choice(lines(node.name)))
        else:
            nodes = _pick(rng, _flat(node, lines))
        todo += reversed(nodes)
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
    return choice._replace(options=tuple(options))


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
        raise ValueError(f'prompt: __{name}__ stands for a wildcard and none are given; '
                         'expected wildcards=, a folder of NAME.txt or a mapping')
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
    def name(children):
        return Wildcard(str(children[0][2:-2]))

    @staticmethod
    def choice(children):
        options = tuple((float(re.search(f'{ODDS}$', mark)[1] or 1), nodes)
                        for mark, nodes in zip(children[::2], children[1::2]))
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
    tokens = list(TOKEN.finditer(text))
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
                bars = groups.pop()[1:] + bars
            start, *others = groups.pop()
            braces -= 1
            if others or bars or '$$' in tokens[start][0]:
                for n in (start, *others, *bars, i):
                    roles[n] = tokens[n].lastgroup
    return zip(roles, [token[0] for token in tokens])
