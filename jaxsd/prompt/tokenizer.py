"""CLIP's byte-pair tokenizer, as a diffusers folder describes it."""

import dataclasses
import json
import pathlib
import warnings
from collections.abc import Sequence

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import normalizers, pre_tokenizers

from jaxsd.config_files import VERSIONS
from jaxsd.typing import Path

CLIP = VERSIONS / 'clip'  # the vocabulary that all released versions share
START, END = '<|startoftext|>', '<|endoftext|>'
SPECIAL = {'bos_token': START, 'eos_token': END, 'unk_token': END, 'pad_token': END}
# Into words: CLIP's own pattern, as transformers' CLIPTokenizer has it.
WORDS = (r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
         r'|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+')


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Prompts -> int32 [B, length]: start, tokens, end, padding.

    The rules are those of transformers' CLIPTokenizer (since version 5; `CLIPTokenizerFast`
    before): text is NFC-normalised and lower-cased, and unlike OpenAI's original code, which ran
    ftfy, HTML entities (`&amp;`) and smart quotes are tokenized as they are written.
    A special token written out in a prompt stands for itself, as in diffusers; in 2.x, whose pad
    token is '!', this means that a '!' in the prompt is token 0.
    """

    backend: tokenizers.Tokenizer
    length: int  # tokens per prompt, start and end included; 77 in all released versions
    special: tuple  # the start, end, unknown and padding tokens

    @classmethod
    def from_folder(cls, path: Path, pad: str | None = None) -> 'Tokenizer':
        """Read `vocab.json`, `merges.txt` and the optional json files of a tokenizer folder.

        pad: the pad token, where it differs from the one that the folder names.
        A folder inside jaxsd/versions needs no vocabulary of its own: it is CLIP's.
        Raises FileNotFoundError without a vocabulary, ValueError for one that cannot be read.
        """
        path = pathlib.Path(path)
        settings, added = {}, {}
        for name in ('tokenizer_config.json', 'special_tokens_map.json'):
            if (path / name).exists():
                found = _read(path / name)
                settings.update({k: _word(v) for k, v in found.items() if k in SPECIAL})
                settings['length'] = found.get('model_max_length', settings.get('length'))
                more = found.get('added_tokens_decoder') or {}
                if not isinstance(more, dict):
                    raise ValueError(f'{path / name}: added_tokens_decoder: expected an object of '
                                     f'tokens by their ids, found {more!r:.100}')
                added |= more
        length = settings.pop('length', None) or 77
        if (path / 'added_tokens.json').exists():
            added |= {number: {'content': token}
                      for token, number in _read(path / 'added_tokens.json').items()}
        if not isinstance(length, (int, float)) or not length >= 3:
            raise ValueError(f'{path}: model_max_length={length!r:.100}: expected a number of '
                             'tokens, 3 or more')
        if pad is not None:
            settings['pad_token'] = pad
        vocabulary = path
        if VERSIONS in path.parents and not (path / 'vocab.json').exists():
            vocabulary = CLIP
        for name in ('vocab.json', 'merges.txt'):
            if not (vocabulary / name).exists() and not (vocabulary / 'tokenizer.json').exists():
                raise FileNotFoundError(
                    f'{vocabulary / name}: no such file. A tokenizer folder needs vocab.json and '
                    'merges.txt; download the whole folder.')
        special = tuple((SPECIAL | settings).values())
        # Files without a limit write a huge one.
        return cls(_backend(vocabulary, special, added), int(min(length, 10_000)), special)

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, 'B T']:
        """Tokenize a list of B texts -> int32 [B, length]; warns about words that do not fit."""
        room = self.room
        rows = np.zeros((len(texts), self.length), np.int32)
        for row, text in zip(rows, texts):
            found = self.backend.encode(text, add_special_tokens=False)
            tokens = found.ids
            if len(tokens) > room:
                start = found.offsets[room][0]
                warnings.warn(
                    f'prompt too long: {len(tokens)} tokens, of which this model reads the first '
                    f'{room}; dropped: {text[start:].strip()!r}', stacklevel=2)
                tokens = tokens[:room]
            row[:] = self.row(tokens)
        return rows

    @property
    def pad_id(self) -> int:
        """The id of the padding token."""
        return self._id(self.special[3])

    @property
    def room(self) -> int:
        """Tokens of text that fit between start and end."""
        return self.length - 2

    @property
    def comma(self) -> int | None:
        """The id of a comma; None where the vocabulary has none."""
        return self.backend.token_to_id(',</w>')

    def _id(self, special):
        return self.backend.token_to_id(special)

    def ids(self, text: str) -> list[int]:
        """Text of any length -> its tokens' ids, without start and end."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def row(self, ids: Sequence[int]) -> list[int]:
        """At most `room` ids -> `length` of them: start, ids, end, padding."""
        start, end = map(self._id, self.special[:2])
        row = [start, *ids, end]
        return row + [self.pad_id] * (self.length - len(row))


def _backend(folder, special, added):
    """The byte-pair encoder of a folder. added: tokens beyond the vocabulary, as
    tokenizer_config.json has them: {id: {content, ...}}."""
    try:
        if all((folder / name).exists() for name in ('vocab.json', 'merges.txt')):
            vocab, merges = tokenizers.models.BPE.read_file(
                str(folder / 'vocab.json'), str(folder / 'merges.txt'))
        else:
            whole = _read(folder / 'tokenizer.json')
            model = whole['model']
            added = {token.pop('id'): token for token in whole.get('added_tokens', ())} | added
            vocab = model['vocab']
            merges = [tuple(m.split(' ') if isinstance(m, str) else m) for m in model['merges']]
        found = tokenizers.Tokenizer(tokenizers.models.BPE(
            vocab, merges, continuing_subword_prefix='', end_of_word_suffix='</w>', fuse_unk=False,
            unk_token=special[2]))
        found.normalizer = normalizers.Sequence([
            normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r'\s+'), ' '),
            normalizers.Lowercase()])
        found.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(tokenizers.Regex(WORDS), 'removed', invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False)])
        for _, token in sorted(added.items(), key=lambda item: int(item[0])):
            found.add_tokens([tokenizers.AddedToken(**token)])
        found.add_special_tokens([
            tokenizers.AddedToken(token, normalized=False, special=True)
            for token in dict.fromkeys(special)])
    except Exception as error:  # the Rust tokenizers raise bare Exception
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(f'{folder}: not a CLIP tokenizer ({reason})') from None
    return found


def _read(path):
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path}: not valid JSON ({error})') from None
    if not isinstance(found, dict):
        raise ValueError(f'{path}: expected an object of settings, found {found!r:.100}')
    return found


def _word(token):
    """A special token is a string or a dict with its text as `content`."""
    text = token.get('content') if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ValueError(f'special tokens: expected text, found {token!r:.100}')
    return text
