"""Textual inversion: vectors that a prompt's words stand for."""

import base64
import dataclasses
import json
import pathlib
import re
import zlib
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from jaxsd.config import TEXT_ENCODERS, ModelConfig
from jaxsd.typing import Path
from jaxsd.weights import names
from jaxsd.weights.files import PICKLES, Reader, as_dtype, open_tensors, printable
from jaxsd.weights.writing import finite, write_new

WIDTHS = {'text_encoder': (768, 1024), 'text_encoder_2': (1280,)}  # of the released versions
VERSIONS = {768: '1.x, SDXL', 1024: '2.x', 1280: 'SDXL'}
# What files for SDXL call the vectors of its encoders: A1111's, and .pti files of cog-sdxl.
SDXL = {'clip_l': 'text_encoder', 'clip_g': 'text_encoder_2',
        'text_encoders_0': 'text_encoder', 'text_encoders_1': 'text_encoder_2'}
PICTURES = ('.png', '.webp')
ENDINGS = ('.safetensors', *PICKLES, '.pti', *PICTURES)
LARGEST = 2**26  # bytes of text in a picture

# What a tensor is called: in a LoRA (OneTrainer's, which A1111 reads), the encoder, and A1111's
# name of the token. Other names are tokens themselves.
_KEY = re.compile(r'(?:bundle_emb\.(?P<bundle>.+?)\.)?(?:'
                  rf'(?P<part>{"|".join(SDXL)})|emb_params|string_to_param\.(?P<token>[^.]+))')


@dataclasses.dataclass(frozen=True, eq=False)
class Embedding:
    """A textual inversion; vectors: {'text_encoder' / 'text_encoder_2': float32 numpy [n,D]}."""

    name: str
    vectors: dict


def load_embedding(path: Path, config: ModelConfig | None = None,
                   name: str | None = None) -> Embedding:
    """Read a textual inversion, an Embedding for `model.embeddings`.

    path: a file (.pt, .bin or .safetensors) of A1111 or diffusers, SDXL's clip_l and clip_g, a
        .pti of cog-sdxl, or a picture with A1111's vectors in it; diffusers' learned_embeds for
        SDXL is read with the learned_embeds_2 beside it.
    config: the ModelConfig of a model of other widths than the released ones, or to be sure that
        the embedding is for this model.
    name: which one of a file of several tokens, or what to call the only one. Without it that is
        named as the file, or by its token where that is diffusers' learned_embeds, or as A1111's
        picture says.
    Raises FileNotFoundError, and ValueError for a file of anything else or for another model.
    """
    found = _read(pathlib.Path(path).expanduser())
    if len(found) > 1 and name not in found:
        raise ValueError(printable(f'{path}: holds several tokens, {", ".join(found)}; expected '
                                   f'the name of one of them{f", found {name}" if name else ""}'))
    own = name if name and len(found) > 1 else next(iter(found))
    return Embedding(name or own, _vectors(path, found[own], config))


def save_embedding(embedding: Embedding, path: Path, dtype: DTypeLike | None = None,
                   overwrite: bool = False) -> None:
    """Write a textual inversion as a .safetensors file, which A1111, ComfyUI and diffusers read.

    One text encoder's vectors stand under the word, <word>, as diffusers' scripts write them;
    those of both of SDXL's as clip_l and clip_g. A1111 and `load_embedding` call it as the file.
    dtype: of the vectors; None: float32. overwrite: replace a file that exists.
    Raises ValueError for a path that exists, and vectors that are not finite in the dtype.
    """
    keys = {part: key for key, part in reversed(SDXL.items())}
    if len(embedding.vectors) == 1:
        keys = dict.fromkeys(embedding.vectors, f'<{embedding.name}>')
    dtype = np.dtype(as_dtype(dtype) or np.float32)
    arrays = {keys[part]: finite(embedding.name, vectors, dtype)
              for part, vectors in embedding.vectors.items()}
    write_new(pathlib.Path(path).expanduser(), arrays, {}, overwrite)


def listed(path: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
    """The textual inversions in a file, or in the files of a folder -> [(name, path)].

    In a folder pictures without any are passed over (most are previews), and a file that cannot be
    read goes by its own name, so that it is an error where it is used.
    """
    if not path.is_dir():
        return [(name, path) for name in _read(path)]
    paths, found = sorted(p for p in path.iterdir() if p.suffix.lower() in ENDINGS), []
    stems = {p.stem for p in paths if p.suffix.lower() not in PICTURES}
    for path in dict.fromkeys(map(_first, paths)):
        picture = path.suffix.lower() in PICTURES
        if picture and (path.stem in stems or path.stem.endswith('.preview')):
            continue
        try:
            found += [(name, path) for name in _read(path)]
        except ValueError:
            found += [] if picture else [(path.stem, path)]
    return found


def is_bundled(key: str) -> bool:
    """Whether a tensor in a LoRA's file is of a textual inversion."""
    found = _KEY.fullmatch(key)
    return bool(found and found['bundle'])


def bundled(file: Reader, config: ModelConfig | None) -> dict[str, Embedding]:
    """The textual inversions in a LoRA's file -> {name: Embedding}; config: of the model."""
    return {name: Embedding(name, _vectors(file.path, tensors, config))
            for name, tensors in in_lora(file).items()}


def in_lora(file: Reader) -> dict[str, dict[tuple[Any, str], str | None]]:
    """`bundled` by the header: {name: {(file, key): text encoder, or None: by width}}."""
    return _tokens([(file, None)], list(filter(is_bundled, file.shapes)))


def numbers(width: int) -> str:
    """The width of vectors, in words, with the versions whose text encoders have it."""
    return f'{width} numbers ({VERSIONS.get(width, "no released version")})'


class PictureFile:
    """A1111's picture of a textual inversion, with files.TensorFile's interface."""

    def __init__(self, path):
        self.path = path
        text = _text(path)
        try:
            data = json.loads(text)
            self._arrays = {f'string_to_param.{token}': np.asarray(value['TORCHTENSOR'], np.float32)
                            for token, value in data['string_to_param'].items()}
            self.metadata = {'name': str(data.get('name') or path.stem)}
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError,
                RecursionError) as error:
            raise ValueError(printable(f'{path}: the textual inversion in this picture is damaged '
                                       f'({error}); download it again')) from None
        self.shapes = {key: array.shape for key, array in self._arrays.items()}

    def read(self, key: str) -> np.ndarray:
        """A tensor as a numpy array."""
        return self._arrays[key]


def _text(path):
    """The JSON in a picture that A1111 wrote: in its text, else in its pixels."""
    from PIL import Image

    from jaxsd import images
    pixels = images.read(path)
    with Image.open(path) as file:
        text = file.info.get('sd-ti-embedding')
    try:
        if text is not None:
            return base64.b64decode(text, validate=True)
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(_hidden(pixels), LARGEST)
        if unpacker.eof:
            return text
    except (ValueError, zlib.error):
        pass
    raise ValueError(f'{path}: no textual inversion in this picture; expected one that A1111 '
                     'wrote, without loss')


def _hidden(pixels):
    """The bytes in the pixels of A1111's picture, uint8 [H,W,3]; empty if there are none.

    They are two blocks, left and right of the picture and of a black column each: the low and the
    high halves of the bytes, in the low halves of the colours, XOR a pattern.
    """
    bright = (pixels > 0).all(2)
    rows, columns = (np.flatnonzero(bright.any(axis)) for axis in (1, 0))
    if not rows.size:
        return b''
    low = pixels[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1] & 15
    black = np.flatnonzero(~low.any((0, 2)))
    if len(black) < 2:
        return b''
    left, right = low[:, :black[0]], low[:, black[-1] + 1:]
    if left.shape != right.shape or not left.size:
        return b''
    pattern = _pattern(left.size)
    return ((left.reshape(-1) ^ pattern) | (right.reshape(-1) ^ pattern) << 4).tobytes()


def _pattern(n):
    """The low halves of n numbers of A1111's generator, x' = a x + c, as x modulo 255."""
    a, c = 1664525, 1013904223
    found = np.array([c], np.uint32)  # from x = 0
    while len(found) < n:  # twice as many: a, c take a number as far on as there are numbers
        found = np.concatenate([found, found * np.uint32(a) + np.uint32(c)])
        a, c = a * a % 2**32, (a * c + c) % 2**32
    return (found[:n] % 255 & 15).astype(np.uint8)


def _first(path):
    """Of the two files of diffusers for SDXL's encoders the first, which names the other."""
    first = path.with_name(path.name.replace('learned_embeds_2', 'learned_embeds', 1))
    return first if path.name.startswith('learned_embeds_2') and first.is_file() else path


def _read(path):
    """The textual inversions in a file -> {name: {(file, key): text encoder, or None: by width}}.
    """
    path = _first(path)
    second = path.with_name(path.name.replace('learned_embeds', 'learned_embeds_2', 1))
    if path.name.startswith('learned_embeds') and second != path and second.is_file():
        files = [(open_tensors(path), 'text_encoder'), (open_tensors(second), 'text_encoder_2')]
    elif _is_picture(path):
        files = [(PictureFile(path), None)]
    else:
        files = [(open_tensors(path), None)]
    file = files[0][0]
    tokens = _tokens(files)
    several = [key for table in tokens.values() for _, key in table]
    if not tokens or len(tokens) > 1 and not all(map(_is_token, several)):
        raise ValueError(printable(
            f'{path}: expected the vectors of a textual inversion, found {len(file.shapes)} '
            f'tensors; it is {names.kind(file.shapes)[0]}'))
    if len(tokens) == 1 and not is_bundled(several[0]):
        name = file.metadata['name'] if isinstance(file, PictureFile) else path.stem
        token, table = next(iter(tokens.items()))
        by_token = re.fullmatch(r'learned_embeds(_2)?(-steps-\d+)?', name) and token
        return {token if by_token else name: table}
    return tokens


def _is_picture(path):
    """By its first bytes: PNG's or WebP's."""
    if not path.is_file():
        return False
    with open(path, 'rb') as file:
        head = file.read(12)
    return head[:8] == b'\x89PNG\r\n\x1a\n' or head[:4] + head[8:] == b'RIFFWEBP'


def _is_token(key):
    """Whether a tensor's name says that it is a token's, where a file has several."""
    found = _KEY.fullmatch(key)
    return bool(found and (found['bundle'] or found['token']) or re.fullmatch('<.+>', key))


def _tokens(files, keys=None):
    """{token, '' where none is named: {(file, key): text encoder or None}} of [(file, encoder)]."""
    tokens = {}
    for file, part in files:
        for key in file.shapes if keys is None else keys:
            # Beside its vectors A1111 keeps the number of the token that was trained.
            if len(file.shapes[key]) not in (1, 2) and not is_bundled(key):
                continue
            found = _KEY.fullmatch(key)
            token = (found['bundle'] or found['token'] or '').strip('*') if found else key
            known = SDXL.get(found['part']) if found else None
            tokens.setdefault(token.strip('<>'), {})[file, key] = known or part
    return tokens


def _vectors(path, tensors, config):
    """Embedding.vectors from {(file, key): text encoder, None: the one of its width}."""
    widths = WIDTHS if config is None else {
        part: (getattr(config, part).hidden_size,) for part in TEXT_ENCODERS
        if getattr(config, part)}
    vectors = {}
    for (file, key), part in tensors.items():
        shape, said = file.shapes[key], printable(f'{file.path}: its vectors {key!r}')
        if len(shape) not in (1, 2):
            raise ValueError(f'{said} are of shape {list(shape)}; expected [vectors, numbers]')
        fitting = [part for part in widths if shape[-1] in widths[part]]
        part = part or next(iter(fitting), None)
        if part not in fitting:
            known = ' or '.join(numbers(n) for some in widths.values() for n in some)
            raise ValueError(f'{said} have {numbers(shape[-1])}; expected {known}; it is for '
                             'another model')
        if part in vectors:
            raise ValueError(f'{said} are a second time those for {part}; the file is damaged')
        vectors[part] = file.read(key).astype(np.float32).reshape(-1, shape[-1])
        if not np.isfinite(vectors[part]).all() or not vectors[part].size:
            raise ValueError(f'{said} are empty or not finite')
    if config is not None and len(vectors) < len(widths):
        keys = ', '.join(key for _, key in tensors)
        raise ValueError(printable(
            f'{path}: {keys} has vectors for {", ".join(vectors)}; this model also needs '
            f'{", ".join(set(widths) - set(vectors))}; it is for another one'))
    return vectors
