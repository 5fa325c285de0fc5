"""Textual inversion: vectors that a prompt's words stand for."""

import dataclasses
import pathlib
import re

import numpy as np

from jaxsd.config import TEXT_ENCODERS
from jaxsd.weights import names
from jaxsd.weights.files import open_tensors, printable

WIDTHS = {'text_encoder': (768, 1024), 'text_encoder_2': (1280,)}  # of the released versions
VERSIONS = {768: '1.x, SDXL', 1024: '2.x', 1280: 'SDXL'}
# What files for SDXL call the vectors of its encoders: A1111's, and .pti files of cog-sdxl.
SDXL = {'clip_l': 'text_encoder', 'clip_g': 'text_encoder_2',
        'text_encoders_0': 'text_encoder', 'text_encoders_1': 'text_encoder_2'}
# A textual inversion inside a LoRA, as OneTrainer writes it and A1111 reads it.
_BUNDLED = re.compile(r'bundle_emb\.(.+?)\.(clip_[lg]|emb_params|string_to_param\.[^.]+)')


@dataclasses.dataclass(frozen=True, eq=False)
class Embedding:
    """A textual inversion; vectors: {'text_encoder' / 'text_encoder_2': float32 numpy [n,D]}."""

    name: str
    vectors: dict


def load_embedding(path, config=None):
    """Read a textual inversion, an Embedding for `model.embeddings`.

    path: a file (.pt, .bin or .safetensors) of A1111, diffusers, or SDXL's clip_l and clip_g.
    config: the ModelConfig of a model of other widths than the released ones, or to be sure that
        the embedding is for this model.
    It is named as the file, or by its token where that is diffusers' learned_embeds.
    Raises FileNotFoundError, and ValueError for a file of anything else or for another model.
    """
    file = open_tensors(pathlib.Path(path).expanduser())
    # Beside its vectors A1111 keeps the number of the token that was trained.
    shapes = {name: shape for name, shape in file.shapes.items() if len(shape) in (1, 2)}
    if len(shapes) != max(1, sum(name in SDXL for name in shapes)):
        raise ValueError(f'{path}: expected the vectors of a textual inversion, found '
                         f'{len(file.shapes)} tensors; it is {names.kind(file.shapes)[0]}')
    name = file.path.stem
    name = next(iter(shapes)).strip('<>') if name == 'learned_embeds' else name
    return Embedding(name, _vectors(file, {key: SDXL.get(key) for key in shapes}, config))


def is_bundled(key):
    """Whether a tensor in a LoRA's file is of a textual inversion."""
    return bool(_BUNDLED.fullmatch(key))


def bundled(file, config):
    """The textual inversions in a LoRA's file -> {name: Embedding}."""
    found = {}
    for key in file.shapes:
        if match := _BUNDLED.fullmatch(key):
            found.setdefault(match[1].strip('<>'), {})[key] = SDXL.get(match[2])
    return {name: Embedding(name, _vectors(file, keys, config)) for name, keys in found.items()}


def _vectors(file, keys, config):
    """Embedding.vectors from {key: text encoder, None: the one of its width}."""
    widths = WIDTHS if config is None else {
        part: (getattr(config, part).hidden_size,) for part in TEXT_ENCODERS
        if getattr(config, part)}
    vectors = {}
    for key, part in keys.items():
        shape, said = file.shapes[key], printable(f'{file.path}: its vectors {key!r}')
        fitting = [part for part in widths if shape[-1:] and shape[-1] in widths[part]]
        part = part or next(iter(fitting), None)
        if part not in fitting or len(shape) > 2:
            known = ' or '.join(numbers(n) for some in widths.values() for n in some)
            raise ValueError(f'{said} have {numbers(*shape[-1:] or (0,))}; expected {known}; it '
                             'is for another model')
        vectors[part] = file.read(key).astype(np.float32).reshape(-1, shape[-1])
        if not np.isfinite(vectors[part]).all() or not vectors[part].size:
            raise ValueError(f'{said} are empty or not finite')
    if config is not None and len(vectors) < len(widths):
        raise ValueError(printable(
            f'{file.path}: has vectors for {", ".join(vectors)}, {", ".join(keys)}; this model '
            f'also needs {", ".join(set(widths) - set(vectors))}; it is for another one'))
    return vectors


def numbers(width):
    """The width of vectors, in words, with the versions whose text encoders have it."""
    return f'{width} numbers ({VERSIONS.get(width, "no released version")})'
