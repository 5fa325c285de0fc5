"""CLIP's byte-pair tokenizer, as a diffusers folder describes it."""

import dataclasses
import json
import os
import pathlib
import warnings
from typing import Any

import numpy as np

from jaxsd.config import VERSIONS

CLIP = VERSIONS / 'clip'  # the vocabulary that all released versions share
SPECIAL = ('bos_token', 'eos_token', 'unk_token', 'pad_token')


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Prompts -> int32 [B, length]: start, tokens, end, padding.

    The rules are those of transformers' tokenizers-backed CLIPTokenizer (the only one since
    transformers 5, `CLIPTokenizerFast` before), with every transformers version: text is
    NFC-normalised and lower-cased, and unlike OpenAI's original code, which ran ftfy, HTML
    entities (`&amp;`) and smart quotes are tokenized as they are written.
    A special token written out in a prompt stands for itself, as in diffusers; in 2.x, whose pad
    token is '!', this means that a '!' in the prompt is token 0.
    """

    backend: Any  # transformers' tokenizer
    length: int  # tokens per prompt, start and end included; 77 in all released versions
    pad_id: int

    @classmethod
    def from_folder(cls, path, pad=None):
        """Read `vocab.json`, `merges.txt` and the optional json files of a tokenizer folder.

        pad: the pad token, where it differs from the one that the folder names.
        A folder inside jaxsd/versions needs no vocabulary of its own: it is CLIP's.
        Raises FileNotFoundError without a vocabulary, ValueError for one that cannot be read.
        """
        path = pathlib.Path(path)
        settings = {}
        for name in ('tokenizer_config.json', 'special_tokens_map.json'):
            if (path / name).exists():
                found = _read(path / name)
                settings.update({k: _word(v) for k, v in found.items() if k in SPECIAL})
                settings['length'] = found.get('model_max_length', settings.get('length'))
        length = settings.pop('length', None) or 77
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
        backend = _backend(vocabulary, settings)
        # Files without a limit make transformers answer with a huge one.
        return cls(backend, int(min(length, 10_000)), int(backend.pad_token_id))

    def __call__(self, texts):
        """Tokenize a list of B texts -> int32 [B, length]; warns about words that do not fit."""
        room = self.room
        rows = np.zeros((len(texts), self.length), np.int32)
        for row, text in zip(rows, texts):
            found = self.backend(text, add_special_tokens=False, return_offsets_mapping=True,
                                 verbose=False)
            tokens = found['input_ids']
            if len(tokens) > room:
                start = found['offset_mapping'][room][0]
                warnings.warn(
                    f'prompt too long: {len(tokens)} tokens, of which this model reads the first '
                    f'{room}; dropped: {text[start:].strip()!r}', stacklevel=2)
                tokens = tokens[:room]
            row[:] = self.row(tokens)
        return rows

    @property
    def room(self):
        """Tokens of text that fit between start and end."""
        return self.length - 2

    @property
    def comma(self):
        """The id of a comma; None where the vocabulary has none."""
        return self.backend.backend_tokenizer.token_to_id(',</w>')

    def ids(self, text):
        """Text of any length -> its tokens' ids, without start and end."""
        return self.backend(text, add_special_tokens=False, verbose=False)['input_ids']

    def row(self, ids):
        """At most `room` ids -> `length` of them: start, ids, end, padding."""
        row = [self.backend.bos_token_id, *ids, self.backend.eos_token_id]
        return row + [self.pad_id] * (self.length - len(row))


def _backend(folder, settings):
    # transformers advises to install torch at import; jaxsd does not need it.
    os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
    from transformers import CLIPTokenizerFast
    try:
        return CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True, **settings)
    except Exception as error:  # the Rust tokenizers raise bare Exception
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(f'{folder}: not a CLIP tokenizer ({reason})') from None


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
