"""Write a Model as a diffusers folder or as a single file, with nothing half-written."""

import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from jaxsd.config import KUNetConfig
from jaxsd.models import quantized
from jaxsd.models.spec import from_jax, spec
from jaxsd.prompt.tokenizer import SPECIAL
from jaxsd.typing import Path, Shapes
from jaxsd.weights import marks, names
from jaxsd.weights.configs import TOKENIZERS, write_config
from jaxsd.weights.files import Tensor, as_dtype, write_tensors
from jaxsd.weights.model import Model

LAYOUTS = ('diffusers', 'single-file')
_WEIGHTS = re.compile(r'(diffusion_pytorch_)?model\b.*\.safetensors\b.*')  # see files.choose


def save(model: Model, path: Path, layout: str = 'diffusers',
         dtype: DTypeLike | None = None) -> None:
    """Write a model to `path`: a folder in diffusers' layout, or one .safetensors file.

    dtype: of all weights in the files; None keeps each array's own.
    A single file says in its header and in marker tensors what names and shapes do not, see marks.
    Everything is written under a temporary name first. A folder that exists already keeps its
    other files (a README, say), except weights that the new ones replace.
    Raises ValueError when the arrays are not those of model.config or the layout is unknown.
    """
    if layout not in LAYOUTS:
        raise ValueError(f'layout {layout!r}: expected one of {LAYOUTS}')
    dtype = as_dtype(dtype)
    quantized.refuse(model.params, 'save')
    shapes = spec(model.config)
    arrays = {part: traverse_util.flatten_dict(tree, sep='.')
              for part, tree in model.params.items()}
    check(shapes, arrays)
    path = pathlib.Path(path).expanduser()
    if layout == 'single-file':
        if isinstance(model.config.unet, KUNetConfig):
            raise ValueError(f"layout {layout!r}: expected 'diffusers' for the x2 latent upscaler, "
                             'which has no other here')
        if path.is_dir() or path.suffix != '.safetensors':
            raise ValueError(f'{path}: expected the name of a .safetensors file')
        table = names.places(model.config, shapes)
        tensors = {k: t for part in shapes
                   for k, t in stored(arrays[part], shapes[part], table[part], dtype).items()}
        extras = {name: a for name, a in model.extras.items() if name not in marks.MARKERS}
        write_tensors(path, tensors | _plain(extras | marks.markers(model.config)),
                      marks.metadata(model.config, path.stem))
    else:
        with replacing_folder(path) as temporary:
            _write_folder(model, temporary, shapes, arrays, dtype)


def _write_folder(model, folder, shapes, arrays, dtype):
    write_config(model.config, folder, tokenizers=tuple(model.tokenizers))
    for part, expected in shapes.items():
        write_component(folder / part, part, expected, arrays[part], dtype)
    for part, tokenizer in model.tokenizers.items():
        _write_tokenizer(tokenizer, folder / TOKENIZERS[part])
    if model.extras:
        write_tensors(folder / 'extras.safetensors', _plain(model.extras))


def write_component(folder: pathlib.Path, part: str, shapes: Shapes, arrays: Mapping[str, Any],
                    dtype: np.dtype | None) -> None:
    """Write one component's weights, under the name that diffusers or transformers expects."""
    transformers = (*TOKENIZERS, 'depth_estimator', 'image_encoder')
    stem = 'model' if part in transformers else 'diffusion_pytorch_model'
    table = {name: names.Place(name) for name in shapes}
    write_tensors(folder / f'{stem}.safetensors', stored(arrays, shapes, table, dtype))


def stored(arrays: Mapping[str, Any], shapes: Shapes, table: Mapping[str, names.Place],
           dtype: np.dtype | None) -> dict[str, Tensor]:
    """What write_tensors takes, for one component."""
    groups = {}
    for name, place in table.items():
        groups.setdefault(place.name, []).append(name)
    for members in groups.values():
        members.sort(key=lambda name: 'qkv'.find(table[name].how))

    def make(members):
        parts = [from_jax(name, np.asarray(arrays[name])) for name in members]
        array = np.concatenate(parts) if len(parts) > 1 else parts[0]
        return array.T if table[members[0]].how == 'T' else array

    return {stored: (table[members[0]].shape(shapes[members[0]]),
                     np.dtype(dtype or arrays[members[0]].dtype),
                     functools.partial(make, members))
            for stored, members in groups.items()}


def finite(name: str, array: Any, dtype: np.dtype) -> np.ndarray:
    """An array in a dtype; ValueError where it is not finite in that, which `name` has."""
    with np.errstate(over='ignore'):
        found = np.asarray(array).astype(dtype)
    if not np.isfinite(found).all():
        raise ValueError(f'{name}: has values that are not finite in {dtype}; write it in float32 '
                         'or bfloat16, or train it again with a lower learning rate')
    return found


def write_new(path: pathlib.Path, arrays: Mapping[str, np.ndarray],
              metadata: Mapping[str, str], overwrite: bool = False) -> None:
    """Write arrays as a .safetensors file; ValueError where there is one, unless `overwrite`."""
    if path.is_dir() or path.suffix != '.safetensors':
        raise ValueError(f'{path}: expected the name of a .safetensors file')
    if path.exists() and not overwrite:
        raise ValueError(f'{path}: exists already; give another name, or overwrite=True')
    write_tensors(path, _plain(arrays), metadata)


def _plain(arrays):
    return {name: (a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}


def check(shapes: Mapping[str, Shapes], arrays: Mapping[str, Mapping[str, Any]]) -> None:
    """ValueError unless these are {component: {dotted name: shape}} of the arrays."""
    wrong = [f'{part} {name}'
             for part in shapes.keys() | arrays.keys()
             for name in shapes.get(part, {}).keys() ^ arrays.get(part, {}).keys()]
    wrong += [f'{part} {name} (expected {list(shape)}, found {list(found)})'
              for part in shapes.keys() & arrays.keys() for name, shape in shapes[part].items()
              if name in arrays[part]
              for found in [from_jax(name, np.broadcast_to(0, arrays[part][name].shape)).shape]
              if found != tuple(shape)]
    if wrong:
        raise ValueError(f'the arrays are not those of the config; {len(wrong)} differ: '
                         f'{", ".join(sorted(wrong)[:20])}')


def _write_tokenizer(tokenizer, folder):
    """vocab.json, merges.txt and the two settings files, which every transformers version reads."""
    folder.mkdir(parents=True, exist_ok=True)
    model = json.loads(tokenizer.backend.to_str())['model']
    merges = [m if isinstance(m, str) else ' '.join(m) for m in model['merges']]
    special = dict(zip(SPECIAL, tokenizer.special))
    settings = {'tokenizer_class': 'CLIPTokenizer', 'model_max_length': tokenizer.length,
                'do_lower_case': True, 'add_prefix_space': False, 'errors': 'replace', **special}
    vocab = json.dumps(model['vocab'], ensure_ascii=False, separators=(',', ':'))
    for name, text in (('vocab.json', vocab), ('merges.txt', '\n'.join(['#version: 0.2', *merges])),
                       ('tokenizer_config.json', json.dumps(settings, indent=2)),
                       ('special_tokens_map.json', json.dumps(special, indent=2))):
        (folder / name).write_text(text + '\n', encoding='utf-8')


@contextlib.contextmanager
def replacing_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Context: the name of a new folder whose files go to `path` if all goes well."""
    if path.exists() and not path.is_dir():
        raise ValueError(f'{path}: is a file; expected the name of a folder')
    temporary = path.absolute().with_name(f'.{path.absolute().name}.{os.getpid()}.tmp')
    try:
        yield temporary
        _replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(new, path):
    """Move a finished folder to its name, file by file where that name is in use."""
    if not path.exists():
        os.replace(new, path)
        return
    written = {p.relative_to(new) for p in new.rglob('*') if p.is_file()}
    for file in sorted(written):
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(new / file, path / file)
    # Shards or another variant of the old weights could be read instead of the new ones.
    folders = {path / file.parent for file in written if _WEIGHTS.fullmatch(file.name)}
    stale = [p for folder in folders for p in folder.iterdir() if _WEIGHTS.fullmatch(p.name)]
    for old in (path / 'extras.safetensors', *stale):
        if old.relative_to(path) not in written:
            old.unlink(missing_ok=True)
