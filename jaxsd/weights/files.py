"""Files of tensors, read and written tensor by tensor.

The format of safetensors: 8 bytes with the header's length, a JSON header {name: dtype, shape,
data_offsets}, the data. The safetensors package checks the header; tensors are read with plain
reads, because pages of a memory map count as memory until the last tensor is read.
"""

import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from jaxsd.typing import Path
from jaxsd.weights.gguf_file import GGUFFile
from jaxsd.weights.pickles import PickleFile, read_at

# A tensor to write: its shape, its dtype, and what makes the array.
Tensor = tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]

PICKLES = ('.ckpt', '.pt', '.pth', '.bin', '.pkl')
DTYPES = {
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16,
    'F8_E4M3': ml_dtypes.float8_e4m3fn, 'F8_E5M2': ml_dtypes.float8_e5m2,
    'I64': np.int64, 'I32': np.int32, 'I16': np.int16, 'I8': np.int8,
    'U64': np.uint64, 'U32': np.uint32, 'U16': np.uint16, 'U8': np.uint8, 'BOOL': np.bool_,
}
DTYPES = {code: np.dtype(dtype) for code, dtype in DTYPES.items()}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def as_dtype(dtype: DTypeLike | None) -> np.dtype | None:
    """A dtype that weights can have, or None; ValueError for another."""
    known = ('float32', 'float16', 'bfloat16')
    try:
        if dtype is None or np.dtype(dtype).name in known:
            return dtype if dtype is None else np.dtype(dtype)
    except TypeError:
        pass
    raise ValueError(f'dtype {dtype!r}: expected one of {", ".join(known)}, or None')


class TensorFile:
    """One safetensors file: `shapes` and `dtypes` by name from its header, tensors on demand.

    Raises FileNotFoundError, and ValueError for a truncated or corrupt file.
    """

    def __init__(self, path: Path) -> None:
        self.path = pathlib.Path(path)
        header, self._start = _header(self.path)
        self.metadata = header.pop('__metadata__', None) or {}
        unknown = sorted({str(h['dtype']) for h in header.values()} - DTYPES.keys())
        if unknown:
            raise ValueError(f'{path}: tensors of type {", ".join(unknown)}; expected one of '
                             f'{", ".join(DTYPES)}')
        self.shapes = {name: tuple(h['shape']) for name, h in header.items()}
        self.dtypes = {name: DTYPES[h['dtype']] for name, h in header.items()}
        self._offsets = {name: h['data_offsets'][0] for name, h in header.items()}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        """A tensor as a numpy array; rows=(i, n) only the n rows from row i*n."""
        shape, dtype = self.shapes[name], self.dtypes[name]
        offset = self._start + self._offsets[name]
        if rows is not None:
            i, n = rows
            shape = (n, *shape[1:])
            offset += i * math.prod(shape) * dtype.itemsize
        size = math.prod(shape) * dtype.itemsize
        return read_at(self.path, offset, size).view(dtype).reshape(shape)


def printable(text: str) -> str:
    """Text with names out of a file in it, for a message: without line breaks and the like."""
    return ''.join(c if c.isprintable() else '\N{REPLACEMENT CHARACTER}' for c in text)


def open_tensors(path: Path) -> 'Reader':
    """The reader for a file of tensors, by what is in it: TensorFile, PickleFile or GGUFFile.

    All have `path`, `metadata`, `shapes`, `dtypes` and `read`, and raise alike. Weights with a
    scale beside them are read as their product.
    """
    path = pathlib.Path(path)
    if path.is_file() and _head(path)[:4] == b'GGUF':
        return GGUFFile(path)
    file = (TensorFile if not path.is_file() or _is_safetensors(path) else PickleFile)(path)
    return ScaledFile(file) if any(map(_BESIDE.fullmatch, file.shapes)) else file


class ScaledFile:
    """Another reader's file where float8 weights have scales beside them: read as the product.

    ComfyUI's scaled_fp8: `x.weight` stands for x.weight * x.scale_weight (x.weight_scale in later
    files); the scales of inputs are for multiplying in float8, and not needed.
    """

    def __init__(self, file: 'TensorFile | PickleFile') -> None:
        self._file, self.path, self.metadata = file, file.path, file.metadata
        self._scales = {f'{found[1]}weight': name for name in file.shapes
                        if (found := _BESIDE.fullmatch(name)) and found[2]}
        self.shapes = {n: s for n, s in file.shapes.items() if not _BESIDE.fullmatch(n)}
        self.dtypes = {name: np.dtype(np.float32) if name in self._scales else file.dtypes[name]
                       for name in self.shapes}
        for name, scale in self._scales.items():
            dtype, shape = file.dtypes.get(name), file.shapes[scale]
            if not str(dtype).startswith('float8') or math.prod(shape) != 1:
                raise ValueError(f'{self.path}: {name!r} of {dtype} has a scale of shape '
                                 f'{list(shape)}; jaxsd reads float8 with one scale per tensor')

    def read(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        """As TensorFile.read; what has a scale comes in float32."""
        array = self._file.read(name, rows)
        if name not in self._scales:
            return array
        return array.astype(np.float32) * self._file.read(self._scales[name]).astype(np.float32)


Reader = TensorFile | PickleFile | ScaledFile | GGUFFile  # what open_tensors gives

# What stands beside float8 weights: scales of weights, of inputs, and marks of the file or a layer.
_BESIDE = re.compile(r'(.*\.)?(?:(scale_weight|weight_scale)|scale_input|input_scale|scaled_fp8'
                     r'|comfy_quant)')


def _is_safetensors(path):
    """By the brace that opens its header; by its name where the file is cut before that."""
    head = _head(path)
    if head[8:] == b'{':
        return True
    return not (path.suffix in PICKLES or head[:4] == b'PK\x03\x04'
                or head[:1] == b'\x80' and head[1:2] in (b'\x02', b'\x03', b'\x04', b'\x05'))


def _head(path):
    with open(path, 'rb') as file:
        return file.read(9)


def _header(path):
    """A safetensors file's checked header and where its data start."""
    import safetensors
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such file')
    with open(path, 'rb') as file:
        head = file.read(8)
        try:
            with safetensors.safe_open(path, 'numpy'):
                pass
        except safetensors.SafetensorError as error:
            raise ValueError(printable(f'{path}: not a whole safetensors file, it is truncated or '
                                       f'corrupt ({error}); download it again')) from None
        length = int.from_bytes(head, 'little')
        return json.loads(file.read(length)), 8 + length


def write_tensors(path: Path, tensors: Mapping[str, Tensor],
                  metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, to a temporary name and then renamed.

    tensors: {name: (shape, dtype, get)}, where get() makes the numpy array when its turn comes,
        so that one tensor at a time is in memory. metadata: {entry of the header: text}.
    """
    # Sorted as safetensors itself does, widest type first: every tensor is aligned.
    order = sorted(tensors, key=lambda name: (-np.dtype(tensors[name][1]).itemsize, name))
    # transformers insists on a format
    header: dict[str, Any] = {'__metadata__': {'format': 'pt', **(metadata or {})}}
    end = 0
    for name in order:
        shape, dtype, _ = tensors[name]
        start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {'dtype': CODES[np.dtype(dtype)], 'shape': list(shape),
                        'data_offsets': [start, end]}
    head = json.dumps(header, separators=(',', ':')).encode()
    head += b' ' * (-len(head) % 8)
    with replacing(path) as temporary, open(temporary, 'wb') as file:
        file.write(len(head).to_bytes(8, 'little') + head)
        for name in order:
            shape, dtype, get = tensors[name]
            array = np.ascontiguousarray(get(), dtype)
            if array.size != math.prod(shape):
                raise ValueError(f'{name}: expected shape {shape}, found {array.shape}')
            file.write(array.reshape(-1).view(np.uint8).data)


class LazyArray:
    """An array that is read or computed whenever it is wanted: numpy.asarray(this).

    get() -> the array, of this shape and dtype. What is kept is only how to make it, so that a
    model of them goes from file to file a tensor at a time.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike,
                 get: Callable[[], np.ndarray]) -> None:
        self.shape, self.dtype, self._get = tuple(shape), np.dtype(dtype), get
        self.size, self.ndim = math.prod(shape), len(shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._get(), dtype or self.dtype)


class replacing:
    """Context: a temporary name beside `path` that becomes `path` if all goes well."""

    def __init__(self, path: Path) -> None:
        self.path = pathlib.Path(path)
        self.temporary = self.path.with_name(f'.{self.path.name}.{os.getpid()}.tmp')

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.temporary

    def __exit__(self, kind, error, trace):
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)


def choose(names: Collection[str], half: bool = False) -> str | None:
    """The file among a component's files that holds its weights, or its shards' index; or None.

    half: prefer the fp16 variant, which is half the size. A pickle where there is nothing else.
    """
    variants = ('.fp16', '') if half else ('', '.fp16')
    stems = ('diffusion_pytorch_model', 'model', 'pytorch_model',
             'diffusion_pytorch_model_promax')  # ControlNet-Union's, beside the plain one
    for end, variant, stem in itertools.product(('safetensors', 'bin'), variants, stems):
        for name in (f'{stem}{variant}.{end}', f'{stem}{variant}.{end}.index.json',
                     f'{stem}.{end}.index{variant}.json'):  # as older versions wrote it
            if name in names:
                return name
    return None


def component_files(folder: Path, half: bool = False) -> list[Reader]:
    """The readers of one component of a diffusers folder."""
    folder = pathlib.Path(folder)
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    name = choose(names, half)
    if name is None:
        raise FileNotFoundError(f'{folder}: no weights here; expected a '
                                'diffusion_pytorch_model.safetensors or model.safetensors (or its '
                                'fp16 variant or shards). Download the whole folder.')
    if not name.endswith('.json'):
        return [open_tensors(folder / name)]
    try:
        shards = sorted(set(json.loads((folder / name).read_text())['weight_map'].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f'{folder / name}: not an index of shards; download it again') from None
    for shard in shards:
        if pathlib.PurePath(shard).name != shard:
            raise ValueError(f'{folder / name}: shard {shard!r} is not in the same folder')
    return [open_tensors(folder / shard) for shard in shards]
