"""Textual inversion: vectors that a prompt's words stand for."""

import dataclasses
import pathlib

import numpy as np

from jaxsd.config import TEXT_ENCODERS
from jaxsd.weights import names
from jaxsd.weights.files import open_tensors

WIDTHS = {'text_encoder': (768, 1024), 'text_encoder_2': (1280,)}  # of the released versions
VERSIONS = {768: '1.x, SDXL', 1024: '2.x', 1280: 'SDXL'}
SDXL = {'clip_l': 'text_encoder', 'clip_g': 'text_encoder_2'}


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
    by_name = {SDXL[name]: name for name in shapes if name in SDXL}
    if len(shapes) != max(1, len(by_name)):
        raise ValueError(f'{path}: expected the vectors of a textual inversion, found '
                         f'{len(file.shapes)} tensors; it is {names.kind(file.shapes)[0]}')
    widths = WIDTHS if config is None else {
        part: (getattr(config, part).hidden_size,) for part in TEXT_ENCODERS
        if getattr(config, part)}
    vectors = {}
    for name, shape in shapes.items():
        fitting = [part for part in widths if shape[-1] in widths[part]]
        part = SDXL.get(name) or next(iter(fitting), None)
        if part not in fitting:
            known = ' or '.join(numbers(n) for some in widths.values() for n in some)
            raise ValueError(f'{path}: its vectors {name!r} have {numbers(shape[-1])}; expected '
                             f'{known}; it is for another model')
        vectors[part] = file.read(name).astype(np.float32).reshape(-1, shape[-1])
        if not np.isfinite(vectors[part]).all() or not vectors[part].size:
            raise ValueError(f'{path}: its vectors {name!r} are empty or not finite')
    if config is not None and len(vectors) < len(widths):
        raise ValueError(f'{path}: has vectors for {", ".join(vectors)}; this model also needs '
                         f'{", ".join(set(widths) - set(vectors))}; it is for another one')
    name = file.path.stem
    return Embedding(next(iter(shapes)).strip('<>') if name == 'learned_embeds' else name, vectors)


def numbers(width):
    """The width of vectors, in words, with the versions whose text encoders have it."""
    return f'{width} numbers ({VERSIONS.get(width, "no released version")})'
