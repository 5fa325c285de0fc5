"""Prompts of any length: blocks of tokens to encode, and how the results are weighted and mixed."""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsd.prompt.emphasis import BREAK, Segment
from jaxsd.prompt.tokenizer import Tokenizer
from jaxsd.sampling.choice import unknown
from jaxsd.weights.embeddings import Embedding, numbers

BACKTRACK = 20  # A1111's comma_padding_backtrack: tokens that may move to stand behind their comma
WORD = 8  # ComfyUI's max_word_length: words of so many tokens may be cut
FILES = ('.safetensors', '.pt', '.bin')

# By text encoder: for each image its texts, each in segments; the vectors in use, float32 [E,D].
Variants = Callable[[str], Sequence[Sequence[Sequence[Segment]]]]
Tables = dict[str, np.ndarray]
Embeddings = Mapping[str, Embedding] | list[Mapping[str, Embedding]]


class Texts(NamedTuple):
    """What one text encoder reads for B images, N texts of K blocks each; numpy, or traced.

    R rows of T tokens are encoded; row n K + k is block k of text n as it is written, the others
    (empty, or with some tokens hidden) serve the weights. Block (n, k) is, at each token, the sum
    over S of weight times row `source`.
    """

    tokens: Any  # int32 [B,R,T]; i below 0 is row -1 - i of the embeddings' table
    source: Any  # int32 [B,N,K,S]
    weight: Any  # float32 [B,N,K,S,T]
    restore: Any  # bool [B,N,K]: scaled to the mean that row n K + k has, over tokens and features
    keep: Any = None  # bool [B,R,T]: tokens that others may see; None: all


class Token(NamedTuple):
    """A token's id, its weight, and the number of the segment that it belongs to."""

    id: int
    weight: float
    segment: int


def texts(tokenizers: Mapping[str, Tokenizer], variants: Variants, weighting: Sequence[str],
          cut: Sequence[str], embeddings: Embeddings | None = None,
          widths: Mapping[str, int] | None = None) -> tuple[dict[str, Texts], Tables | None]:
    """Segments of text (prompt.grammar) -> ({text encoder: Texts}, the embeddings' table).

    variants(text encoder): for each of B images a list of N lists of Segment or BREAK; weighting
    and cut, as of a Request: one per image. All texts get the K blocks of the longest, empty ones
    at the end. embeddings: {name: Embedding}, or a list with one for each image; widths:
    {text encoder: D}, to be sure that they are for it.
    The table is {text encoder: float32 [E,D]} of the vectors in use, or None: there are none.
    R, S and E are padded, so that few programs serve all prompts; a batch of plain prompts has
    R = N K and S = 1.
    Raises ValueError for `embedding:name` that is not among the embeddings, or is of another model.

    Weights: AUTOMATIC1111's sd_emphasis.EmphasisOriginal scales features and restores their mean
    over a block, which its EmphasisOriginalNoNorm (no_norm) does not; ComfyUI's
    ClipTokenWeightEncoder goes from the empty prompt's features towards them; compel's
    EmbeddingsProvider does so too and mixes in, for every segment of a weight below 1, the prompt
    with this segment hidden (DownweightMode.MASK).
    """
    found, tables = {}, {}
    for name, tokenizer in tokenizers.items():
        table = _Table(name, (widths or {}).get(name))
        found[name] = _packed(tokenizer, variants(name), cut, embeddings, table)
        if table.rows:
            tables[name] = table.array()
    K = max(len(text) for packed in found.values() for image in packed for text in image)
    return {name: _stack([_image(tokenizers[name], image, K, rule)
                          for image, rule in zip(packed, weighting, strict=True)], weighting, K)
            for name, packed in found.items()}, tables or None


def captions(tokenizers: Mapping[str, Tokenizer], captions: Sequence[str], K: int,
             embeddings: Embeddings | None = None) -> dict[str, np.ndarray]:
    """B captions as they are, without weights or other syntax -> {text encoder: int32 [B,K,T]}.

    Always K blocks: what is beyond them is cut off. Ids below 0: see `Texts`.
    """
    found, _ = texts(tokenizers, lambda name: [[[Segment(text, 1.0)]] for text in captions],
                     ['none'] * len(captions), ['hard'] * len(captions), embeddings)

    def padded(rows, empty):
        more = np.tile(np.array(empty, np.int32), (len(rows), max(0, K - rows.shape[1]), 1))
        return np.concatenate([rows, more], 1)[:, :K]

    return {name: padded(found[name].tokens, tokenizer.row([]))
            for name, tokenizer in tokenizers.items()}


def count(tokenizers: Mapping[str, Tokenizer], variants: Variants, cut: Sequence[str],
          embeddings: Embeddings | None = None) -> np.ndarray:
    """The blocks that each image's longest text takes -> int [B]; arguments as of `texts`."""
    def longest(name, tokenizer):
        return [max(map(len, image)) for image in
                _packed(tokenizer, variants(name), cut, embeddings, _Table(name))]

    return np.max([longest(*item) for item in tokenizers.items()], 0)


def _packed(tokenizer, images, cut, embeddings, table):
    """The blocks of each image's texts, with its embeddings in a table of all."""
    each = embeddings if isinstance(embeddings, list) else [embeddings or {}] * len(cut)
    finders = {id(own): _Vectors(tokenizer, own, table) for own in each}  # most images share one
    return [[_blocks(tokenizer, text, how, finders[id(own)]) for text in image]
            for image, how, own in zip(images, cut, each, strict=True)]


class _Table:
    """The vectors in use, of one text encoder."""

    def __init__(self, encoder, width=None):
        self.encoder, self.width = encoder, width
        self.first, self.rows = {}, []  # {id of an Embedding: its first row}

    def ids(self, name, embedding):
        """The ids of an embedding's vectors: -1 - row of the table."""
        vectors = embedding.vectors
        if self.encoder not in vectors:
            raise ValueError(f'embedding {name!r}: expected vectors for {self.encoder}, found '
                             f'those for {", ".join(vectors)}; it belongs to another version')
        found = np.asarray(vectors[self.encoder], np.float32)
        if self.width not in (None, found.shape[1]):
            raise ValueError(f'embedding {name!r}: its vectors have {numbers(found.shape[1])}; '
                             f'expected {numbers(self.width)} for {self.encoder}; give one that '
                             'was made for this model')
        if id(embedding) not in self.first:
            self.first[id(embedding)] = len(self.rows)
            self.rows.extend(found)
        return [-1 - self.first[id(embedding)] - i for i in range(len(found))]

    def array(self):
        """float32 [E,D], E a power of two."""
        return np.pad(self.rows, ((0, bucket(len(self.rows)) - len(self.rows)), (0, 0)))


class _Vectors:
    """Textual inversion: finds embeddings' names in texts."""

    def __init__(self, tokenizer, embeddings, table):
        self.embeddings, self.table = embeddings, table
        names = [(tokenizer.ids(name), name) for name in embeddings]
        self.names = sorted((n for n in names if n[0]), key=lambda n: -len(n[0]))  # longest first
        marks = [f'<{re.escape(name)}>' for name in embeddings]
        self.mentions = re.compile('|'.join([r'(?<!\S)embedding:[^\s,]+', *marks]))

    def ids(self, name):
        """The ids of a name's vectors in the table."""
        return self.table.ids(name, self.embeddings[name])

    def at(self, tokens, i):
        """The longest name that stands at token i -> (its length, its name); else (1, None)."""
        return next(((len(ids), name) for ids, name in self.names
                     if tokens[i:i + len(ids)] == ids), (1, None))

    def named(self, mention):
        """`embedding:name`, as ComfyUI writes it, or `<name>` -> name."""
        name = mention.removeprefix('embedding:')
        plain = name.removesuffix(next((end for end in FILES if name.endswith(end)), ''))
        for known in (name, plain, mention[1:-1]):
            if known in self.embeddings:
                return known
        if not self.embeddings:
            raise ValueError(f'{mention}: expected its vectors in model.embeddings, found none')
        raise unknown('embedding', plain, self.embeddings)


def _pieces(tokenizer, text, cut, vectors):
    """A segment's text -> lists of ids: what shall stand in one block."""
    found, end = [], 0
    for mention in vectors.mentions.finditer(text):
        found += _words(tokenizer, text[end:mention.start()], cut, vectors)
        found.append(vectors.ids(vectors.named(mention[0])))
        end = mention.end()
    found += _words(tokenizer, text[end:], cut, vectors)
    longest = WORD - 1 if cut == 'word' else tokenizer.room
    return [part for piece in found
            for part in ([piece] if len(piece) <= longest else [[token] for token in piece])]


def _words(tokenizer, text, cut, vectors):
    """Text without mentions -> lists of ids: words if cut between words, else tokens; vectors."""
    words = text.replace('\n', ' ').split(' ') if cut == 'word' else [text]
    ids = [tokenizer.ids(word) for word in words]
    tokens = list(itertools.chain(*ids))
    word_of = range(len(tokens))
    if cut == 'word':
        word_of = [number for number, word in enumerate(ids) for _ in word]
    found, i, last = [], 0, None
    while i < len(tokens):
        length, name = vectors.at(tokens, i)
        if name is not None:
            found.append(vectors.ids(name))
            last = None
        elif word_of[i] == last:
            found[-1].append(tokens[i])
        else:
            found.append([tokens[i]])
            last = word_of[i]
        i += length
    return found


def _blocks(tokenizer, text, cut, vectors):
    """Segments -> lists of Token, at most tokenizer.room each, cut as A1111's tokenize_line does
    (comma, hard) or as ComfyUI's tokenize_with_weights (word)."""
    blocks, block = [], []
    for number, segment in enumerate(text):
        if segment == BREAK:
            blocks.append(block)
            block = []
            continue
        for piece in _pieces(tokenizer, segment.text, cut, vectors):
            while len(block) + len(piece) > tokenizer.room:
                at = len(block)
                if cut == 'comma' and at == tokenizer.room and piece != [tokenizer.comma]:
                    at = _after_comma(block, tokenizer.comma)
                blocks.append(block[:at])
                block = block[at:]
            block = block + [Token(i, segment.weight, number) for i in piece]
    return blocks + [block] if block or not blocks else blocks


def _after_comma(block, comma):
    """Where to cut a full block: behind its last comma, if that is near its end."""
    near = range(len(block) - 1, max(len(block) - BACKTRACK, 0) - 1, -1)
    return next((i + 1 for i in near if block[i].id == comma), len(block))


def _mixture(tokenizer, block, weighting, missing):
    """A block of Tokens -> [(row of ids, the places hidden in it, weight [T])], itself first.

    missing: {segment: compel's share of the text without it, against 1 of the text as it is}.
    """
    row, empty = (tuple(tokenizer.row(ids)) for ids in ([token.id for token in block], []))
    weight = np.ones(tokenizer.length)
    weight[1:1 + len(block)] = [token.weight for token in block]
    if weighting == 'none' or (weight == 1).all():
        return [(row, (), np.ones_like(weight))]
    shares = {(): 1 + sum(missing.values())}  # by what is hidden
    for segment, share in missing.items():
        hidden = tuple(i for i, token in enumerate(block, 1) if token.segment == segment)
        if hidden:
            shares[hidden] = share
            shares[()] -= share
    mixed = [(row, hidden, weight * share / (1 + sum(missing.values())))
             for hidden, share in shares.items()]
    return mixed if weighting in ('a1111', 'no_norm') else [*mixed, (empty, (), 1 - weight)]


def _image(tokenizer, image, K, weighting):
    """One image's N lists of blocks of Tokens -> N K lists of `_mixture`."""
    found = []
    for text in image:
        missing = {token.segment: math.tan((1 - max(token.weight, 1e-5)) * math.pi / 2)
                   for block in text for token in block
                   if weighting == 'compel' and token.weight < 1}
        found += [_mixture(tokenizer, block, weighting, missing)
                  for block in [*text, *[[]] * (K - len(text))]]
    return found


def _stack(images, weighting, K):
    """`_image` of each image -> Texts."""
    B, blocks = len(images), len(images[0])  # N K
    extra = [dict.fromkeys(part[:2] for mixed in image for part in mixed[1:]) for image in images]
    R = blocks + bucket(max(map(len, extra)))
    S = bucket(max(len(mixed) for image in images for mixed in image))
    T = len(images[0][0][0][0])
    tokens = np.zeros((B, R, T), np.int32)
    keep = np.ones((B, R, T), bool)
    source = np.zeros((B, blocks, S), np.int32)
    weight = np.zeros((B, blocks, S, T), np.float32)
    for b, image in enumerate(images):
        own = [mixed[0][:2] for mixed in image]
        for r, (ids, hidden) in enumerate([*own, *extra[b]]):
            tokens[b, r] = ids
            keep[b, r, list(hidden)] = False
        rows = {row: r for r, row in enumerate(extra[b], blocks)}
        for i, mixed in enumerate(image):
            source[b, i, :len(mixed)] = [i, *(rows[part[:2]] for part in mixed[1:])]
            weight[b, i, :len(mixed)] = [part[2] for part in mixed]
    restore = (weight[:, :, 0] != 1).any(-1) & (np.array(weighting) == 'a1111')[:, None]
    source, weight, restore = (a.reshape(B, -1, K, *a.shape[2:]) for a in (source, weight, restore))
    return Texts(tokens, source, weight, restore, None if keep.all() else keep)


def bucket(count: int) -> int:
    """The next power of two; 0 stays."""
    return count and 1 << (count - 1).bit_length()
