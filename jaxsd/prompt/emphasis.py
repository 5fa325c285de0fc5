"""What brackets in a prompt weigh: the text at one step -> segments with weights.

Every reader of READERS gives a tuple of Segment and BREAK, at least one.
"""

import bisect
import contextlib
import itertools
import math
import re
from typing import NamedTuple

import numpy as np


class Segment(NamedTuple):
    """A piece of a prompt, and the weight of its words."""

    text: str
    weight: float


BREAK = Segment('BREAK', -1.0)  # among segments: a new block of tokens starts here

EMPHASIS = re.compile(r"""
    \\(?P<escaped>[][()\\]?)
    | (?P<open>[([])
    | :\s*(?P<weight>[-+]?(?:\d++\.?\d*+|\.\d++))\s*\)
    | (?P<close>[])])
    | [^\\()[\]:]+
    | :""", re.VERBOSE)
FACTORS = {'(': 1.1, '[': 1 / 1.1}


def _divided(text):
    """Text -> segments of weight 1 with BREAK between them."""
    first, *others = re.split(r'\bBREAK\b', text)
    if not others:
        return [Segment(text, 1.0)]
    segments = [Segment(first.rstrip(), 1.0)]
    for i, piece in enumerate(others, 1):
        piece = piece.lstrip() if i == len(others) else piece.strip()
        segments += [BREAK, Segment(piece, 1.0)]
    return segments


def _a1111(text):
    """parse_prompt_attention of A1111.

    Round and square brackets are counted apart and may cross, so this is no tree. The weight of
    BREAK is multiplied as well: within brackets it is a word, as in A1111.
    """
    segments, ranges = [], []
    opened = {'(': [], '[': []}
    for found in EMPHASIS.finditer(text):
        bracket = found['open'] or {')': '(', ']': '['}.get(found[0][-1])
        if found['escaped'] is not None:
            segments.append(Segment(found['escaped'], 1.0))
        elif found['open']:
            opened[bracket].append(len(segments))
        elif (found['close'] or found['weight']) and opened[bracket]:
            factor = float(found['weight'] or FACTORS[bracket])
            ranges.append((opened[bracket].pop(), len(segments), factor))
        else:
            segments += _divided(found[0])
    if not segments:
        return (Segment('', 1.0),)
    ranges += [(start, None, FACTORS[bracket]) for bracket in opened for start in opened[bracket]]
    weights = np.array([segment.weight for segment in segments])
    with np.errstate(over='ignore', invalid='ignore'):
        for start, end, factor in ranges:
            weights[start:end] *= factor
    runs = itertools.groupby(zip(weights.tolist(), segments), lambda pair: pair[0])
    merged = [Segment(''.join(text for _, (text, _) in run), weight) for weight, run in runs]
    return tuple(BREAK if segment == BREAK else segment for segment in merged)


def _comfy(text):
    """token_weights of ComfyUI (comfy/sd1_clip.py), in linear time.

    As there, a bracket that closes nothing makes a letter of the next one that opens, and for one
    that stays open the last character counts as its partner if it closes.
    """
    text = text.replace('\\)', '\0\1').replace('\\(', '\0\2')
    brackets = [found.start() for found in re.finditer(r'[()]', text)]
    partners, opened = {}, []
    for place in brackets:
        if text[place] == '(':
            opened.append(place)
        elif opened:
            partners[opened.pop()] = place

    def items(start, end, weight):
        """What a range holds: (start, end, weight, whether it was in brackets)."""
        owed, n = 0, bisect.bisect_left(brackets, start)
        while n < len(brackets) and brackets[n] < end:
            place = brackets[n]
            n += 1
            if text[place] == ')':
                owed += 1
            elif owed:
                owed -= 1
            else:
                yield start, place, weight, False
                start = min(partners.get(place, end) + 1, end)
                if text[start - 1] != ')':
                    yield place, end, weight, False
                    return
                yield *_weighted(text, place + 1, start - 1, weight * 1.1), True
                n = bisect.bisect_left(brackets, start)
        yield start, end, weight, False

    segments = []
    todo = [(0, len(text), 1.0, True)]  # the first comes last
    while todo:
        start, end, weight, inner = todo.pop()
        if inner:
            todo += reversed(list(items(start, end, weight)))
        elif start < end:
            words = text[start:end].replace('\0\1', ')').replace('\0\2', '(')
            segments += [piece if piece is BREAK else Segment(piece.text, weight)
                         for piece in _divided(words)]
    return tuple(segments) or (Segment('', 1.0),)


def _weighted(text, start, end, weight):
    """A range without the `:1.2` that it may end in -> (start, end, weight)."""
    colon = text.rfind(':', start, end)
    with contextlib.suppress(ValueError):
        if colon > start and math.isfinite(found := float(text[colon + 1:end])):
            return start, colon, found
    return start, end, weight


def _letters(text):
    return tuple(_divided(text))


READERS = {**dict.fromkeys(('a1111', 'no_norm', 'compel'), _a1111), 'comfy': _comfy,
           'none': _letters}
