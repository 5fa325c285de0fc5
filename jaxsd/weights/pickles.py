"""Checkpoints that torch.save wrote, read without torch and without running anything in them.

torch.save has two formats: a zip file whose data.pkl is the pickle and whose data/<key> are the
storages, uncompressed; and, before torch 1.6, four pickles (magic number, protocol, platform, the
object), a list of the storages' keys and the storages. See torch/serialization.py.
"""

import io
import mmap
import pathlib
import struct
import zipfile

import numpy as np

from jaxsd.typing import Path
from jaxsd.weights.unpickling import LONGEST_NAME, Machine, Named, Refused, Tensor

MAGIC = 0x1950a86a20f9469cfc6c  # torch's, in the first pickle of its older format
WRAPPERS = ('state_dict', 'model_state_dict', 'model', 'module', 'params_ema', 'params')


def read_at(path: Path, offset: int, size: int) -> np.ndarray:
    """`size` bytes of a file as uint8."""
    with open(path, 'rb', buffering=0) as file:
        file.seek(offset)
        data = np.fromfile(file, np.uint8, size)
    if data.size != size:
        raise ValueError(f'{path}: ends inside a tensor; it changed while it was read')
    return data


class PickleFile:
    """A file of torch.save with files.TensorFile's interface; nothing in it is run.

    Names: those of the dict in it, below 'state_dict' and other WRAPPERS, nested ones joined with
    dots. metadata: the numbers and strings beside the tensors.
    Raises FileNotFoundError, and ValueError for what is damaged or asks for anything but tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f'{path}: no such file')
        try:
            with open(self.path, 'rb') as file:
                machine = Machine()
                whole = file.read(4) == b'PK\x03\x04'
                root, self._at = (_open_zip if whole else _open_old)(machine, file)
            tensors, self.metadata = _find(root)
            for tensor in tensors.values():
                self._check(tensor)
        except Refused as error:
            raise ValueError(
                f'{path}: is a pickle that {error}, which no file of weights needs; it may be an '
                'attack. Nothing of it was run; look for a .safetensors copy') from None
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError,
                OverflowError, NotImplementedError, RuntimeError, struct.error,
                zipfile.BadZipFile) as error:
            text = ' '.join(str(error).split())[:300]
            raise ValueError(f'{path}: not a whole pickle of torch.save, it is truncated or '
                             f'corrupt ({text or type(error).__name__}); download it '
                             'again') from None
        self._tensors = tensors
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def _check(self, tensor):
        storage = tensor.storage
        if storage.key not in self._at:
            raise ValueError(f'no storage {storage.key!r}')
        if storage.size * storage.dtype.itemsize > self._at[storage.key][1]:
            raise ValueError(f'storage {storage.key!r} is shorter than its {storage.size} numbers')

    def read(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        """A tensor as a numpy array; rows=(i, n) only the n rows from row i*n."""
        tensor = self._tensors[name]
        if rows is not None:
            i, n = rows
            tensor = tensor._replace(shape=(n, *tensor.shape[1:]),
                                     offset=tensor.offset + i * n * tensor.strides[0])
        size = tensor.dtype.itemsize
        start = self._at[tensor.storage.key][0] + tensor.offset * size
        # As unsigned numbers: numpy has strides for no float8.
        flat = read_at(self.path, start, tensor.span * size).view(f'u{size}')
        strides = [stride * size for stride in tensor.strides] if len(flat) else None
        view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides)
        return np.asarray(view, order='C').view(tensor.dtype)


def _open_zip(machine, file):
    """-> the object, {key of a storage: (where it starts in the file, bytes)}."""
    end = file.seek(0, 2)
    found = {}
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            parts = pathlib.PurePosixPath(info.filename.replace('\\', '/')).parts
            if '..' in parts or parts[:1] == ('/',):
                raise Refused(f'has an entry named {info.filename[:LONGEST_NAME]!r}')
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise Refused(f'has a compressed entry, {info.filename[:LONGEST_NAME]!r}')
            found['/'.join(parts[1:])] = info
        if 'data.pkl' not in found:
            raise ValueError('a zip file without data.pkl')
        places = {name: (_start(file, info), info.file_size) for name, info in found.items()}
    if any(start + size > end for start, size in places.values()):
        raise ValueError('entries beyond the end of the file')
    if 'byteorder' in places and _slice(file, *places['byteorder']) != b'little':
        raise ValueError('numbers that are not little-endian')
    root = machine.run(io.BytesIO(_slice(file, *places['data.pkl'])))
    return root, {name.removeprefix('data/'): place for name, place in places.items()
                  if name.startswith('data/')}


def _start(file, info):
    """Where an entry's data start: behind its local header, 30 bytes, a name and an extra field."""
    head = _slice(file, info.header_offset, 30)
    if len(head) < 30:
        raise ValueError('entries beyond the end of the file')
    return info.header_offset + 30 + sum(int.from_bytes(head[i:i + 2], 'little') for i in (26, 28))


def _slice(file, start, size):
    if start < 0:
        raise ValueError('entries before the start of the file')
    file.seek(start)
    return file.read(size)


def _open_old(machine, file):
    """-> the object, {key of a storage: (where it starts in the file, bytes)}."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        if machine.run(stream) != MAGIC:
            raise ValueError('a pickle, but not of torch.save')
        machine.run(stream)  # the protocol
        platform = machine.run(stream)
        if platform.get('little_endian') is not True:
            raise ValueError('numbers that are not little-endian')
        root, keys, found = machine.run(stream), machine.run(stream), {}
        position = stream.tell()
        for key in keys:
            storage = machine.storages[key]
            size = storage.size * storage.dtype.itemsize
            if int.from_bytes(stream[position:position + 8], 'little') != storage.size:
                raise ValueError(f'another size of storage {key!r}')
            found[key] = position + 8, size
            position += 8 + size
            if position > len(stream):
                raise ValueError(f'ends inside storage {key!r}')
    return root, found


def _find(root):
    """The tensors by name, and the numbers and strings beside them."""
    if not isinstance(root, dict):
        raise ValueError(f'holds a {type(root).__name__}, no dict of tensors')
    plain = {key: str(value) for key, value in root.items()
             if isinstance(key, str) and isinstance(value, str | int | float)}
    for _ in WRAPPERS:
        inside = [root[key] for key in WRAPPERS if isinstance(root.get(key), dict)]
        root = inside[0] if inside else root
    found, seen, left = {}, set(), [('', root, 0)]
    while left:
        prefix, table, depth = left.pop()
        if id(table) in seen or depth > 8:
            continue
        seen.add(id(table))
        for key, value in table.items():
            if isinstance(value, Named) and isinstance(value.state, dict):  # a ParameterDict
                value = value.state.get('_parameters')
            if isinstance(value, Tensor):
                found[f'{prefix}{key}'] = value
            elif isinstance(value, dict) and isinstance(key, str):
                left.append((f'{prefix}{key}.', value, depth + 1))
    if not found:
        raise ValueError('no tensors in it')
    return found, plain
