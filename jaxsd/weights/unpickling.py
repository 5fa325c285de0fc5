"""Pickles of torch.save, run by a machine that can only build tensors and plain containers.

A pickle is a program: it may name any function of any module and call it. `Machine` has the
instructions that containers of tensors need; it imports nothing and calls nothing but the few
functions of this file. What else a pickle asks for is an error that names it.
"""


import math
import pickletools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

LONGEST_PICKLE = 1 << 23  # bytes; that of SDXL, without its tensors, has a third of a million
LONGEST_NAME = 1000

_STORAGES = {
    'DoubleStorage': 'f8', 'FloatStorage': 'f4', 'HalfStorage': 'f2',
    'BFloat16Storage': ml_dtypes.bfloat16, 'LongStorage': 'i8', 'IntStorage': 'i4',
    'ShortStorage': 'i2', 'CharStorage': 'i1', 'ByteStorage': 'u1', 'BoolStorage': '?',
    'storage.UntypedStorage': 'u1', 'UntypedStorage': 'u1',
}
_STORAGES = {f'torch.{name}': np.dtype(dtype) for name, dtype in _STORAGES.items()}
_DTYPES = {'float64': 'f8', 'float32': 'f4', 'float16': 'f2', 'bfloat16': ml_dtypes.bfloat16,
           'float8_e4m3fn': ml_dtypes.float8_e4m3fn, 'float8_e5m2': ml_dtypes.float8_e5m2,
           'uint64': 'u8', 'uint32': 'u4', 'uint16': 'u2', 'uint8': 'u1',
           'int64': 'i8', 'int32': 'i4', 'int16': 'i2', 'int8': 'i1', 'bool': '?'}
_DTYPES = {f'torch.{name}': np.dtype(dtype) for name, dtype in _DTYPES.items()}

# What stands beside the tensors of released checkpoints: becomes a Named that does nothing.
_INERT = re.compile(
    r'(pytorch_lightning|lightning\.pytorch)\.callbacks\.[\w.]+|omegaconf\.[\w.]+|typing\.Any'
    r'|numpy\.(core|_core)\.multiarray\.scalar|numpy\.dtype|_codecs\.encode|argparse\.Namespace'
    r'|torch\.(Size|device)|torch\.nn\.modules\.container\.ParameterDict'
    r'|(builtins|__builtin__)\.(list|dict|int|float|str|tuple|bool|object)')


class Refused(ValueError):
    """A pickle asks for what is no part of a tensor or of a plain container."""


class Named:
    """What stands for a global of a pickle, or for an object of it; state: its attributes."""

    def __init__(self, name):
        self.name, self.state = name, None


class Storage(NamedTuple):
    """A block of numbers in the file."""

    key: str
    dtype: np.dtype
    size: int  # of numbers


class Tensor(NamedTuple):
    """A view of a storage; offset and strides in numbers of `dtype`."""

    storage: Storage
    offset: int
    shape: tuple
    strides: tuple
    dtype: np.dtype

    @property
    def span(self) -> int:
        """Numbers between its first and its last one, both counted."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides))


def _tensor(storage, offset, shape, strides, *_, dtype=None):
    dtype = storage.dtype if dtype is None else dtype
    numbers = [offset, *shape, *strides]
    if (not isinstance(storage, Storage) or len(shape) != len(strides) or len(shape) > 32
            or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)):
        raise ValueError('a tensor whose storage, shape, strides or offset cannot be')
    tensor = Tensor(storage, offset, tuple(shape), tuple(strides), dtype)
    held = storage.size * storage.dtype.itemsize // dtype.itemsize
    if offset + tensor.span > held or math.prod(shape) > held:
        raise ValueError(f'a tensor of shape {list(shape)} in a storage of {held} numbers')
    return tensor


def _tensor_v3(storage, offset, shape, strides, grad, hooks, dtype, *_):
    return _tensor(storage, offset, shape, strides, dtype=_DTYPES[dtype.name])


def _parameter(data, *_):
    if not isinstance(data, Tensor):
        raise ValueError('a parameter that is no tensor')
    return data


def _dict(pairs=(), *_):
    return {_key(key): value for key, value in pairs}


def _pairs(items):
    return _dict(zip(items[::2], items[1::2]))


def _set(items=()):
    return {_key(item) for item in items}


_CALLS = {
    'torch._utils._rebuild_tensor': _tensor, 'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_tensor_v3': _tensor_v3,
    'torch._utils._rebuild_parameter': _parameter,
    'torch._utils._rebuild_parameter_with_state': _parameter,
    'collections.OrderedDict': _dict, 'collections.defaultdict': lambda *_: {},
    'builtins.set': _set, '__builtin__.set': _set,
}


def _global(name):
    if not (name in _CALLS or name in _STORAGES or name in _DTYPES or _INERT.fullmatch(name)):
        raise Refused(f'asks for {name[:LONGEST_NAME]!r}')
    return Named(name)


def _call(function, args):
    if not isinstance(function, Named) or not isinstance(args, tuple):
        raise Refused('calls what is no function')
    if function.name in _STORAGES or function.name in _DTYPES:
        raise Refused(f'calls {function.name!r}')
    call = _CALLS.get(function.name)
    return call(*args) if call else Named(function.name)


def _key(key):
    """A key of a dict or a member of a set: nothing that takes long to hash or to compare."""
    if isinstance(key, str | bytes) and len(key) <= LONGEST_NAME:
        return key
    if key is None or isinstance(key, Named) or (isinstance(key, int) and abs(key) < 1 << 32):
        return key
    raise ValueError(f'a {type(key).__name__} as a key (or one that is too long)')


class Machine:
    """The stack machine of a pickle; `storages` {key: Storage} are all that it named."""

    def __init__(self):
        self.stack, self.marks, self.memo, self.storages = [], [], {}, {}

    def run(self, stream: BinaryIO) -> Any:
        """The object that the pickle at the stream's position makes; stops behind it."""
        self.stack, self.marks, self.memo = [], [], {}
        start = stream.tell()
        for code, arg, position in pickletools.genops(stream):
            if (position or 0) - start > LONGEST_PICKLE:
                raise ValueError(f'a pickle of more than {LONGEST_PICKLE >> 20} MiB')
            if code.name == 'STOP':
                return self.stack.pop()
            if code.name in _PUSHED:
                self.stack.append(arg)
            elif code.name in _STEPS:
                _STEPS[code.name](self, arg)
            else:
                name = '.'.join(str(arg).split())[:LONGEST_NAME]
                raise Refused(f'has the instruction {code.name} ({name})')

    def above(self) -> list:
        """Take off everything above the last mark."""
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def take(self, n: int) -> tuple:
        """A tuple of the n last objects, taken off."""
        if len(self.stack) < n:
            raise ValueError('an empty stack')
        found = tuple(self.stack[-n:])
        del self.stack[-n:]
        return found

    def push(self, make: object) -> None:
        self.stack.append(make)

    def extend(self, items: Iterable) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(map(_key, items))
        else:
            raise Refused(f'adds items to a {type(target).__name__}')

    def fill(self, items: Sequence) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise Refused(f'sets items of a {type(target).__name__}')
        target.update(_pairs(items))

    def build(self) -> None:
        state, = self.take(1)
        target = self.stack[-1]
        if isinstance(target, Named):
            target.state = state
        elif not isinstance(target, dict):  # an OrderedDict's attributes do not matter
            raise Refused(f'sets the state of a {type(target).__name__}')

    def stored(self) -> None:
        found = self.stack.pop()
        if isinstance(found, tuple) and found[:1] == ('module',) and isinstance(found[1], Named):
            self.stack.append(found[1])  # a class and its source, in the older format
            return
        if not (isinstance(found, tuple) and len(found) in (5, 6) and found[0] == 'storage'):
            raise Refused('has a persistent id that is no storage')
        _, kind, key, _, size, *view = found
        if (not isinstance(kind, Named) or kind.name not in _STORAGES or type(key) is not str
                or type(size) is not int or not 0 <= size < 1 << 62 or any(view)):
            raise ValueError('a storage whose type, key or size cannot be')
        storage = Storage(_key(key), _STORAGES[kind.name], size)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f'a storage {key!r} of two sizes')
        self.stack.append(storage)


_PUSHED = ('INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4', 'FLOAT', 'BINFLOAT',
           'STRING', 'BINSTRING', 'SHORT_BINSTRING', 'UNICODE', 'BINUNICODE', 'SHORT_BINUNICODE',
           'BINUNICODE8', 'BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8')
_STEPS: dict[str, Callable[[Machine, Any], Any]] = {
    'PROTO': lambda m, arg: None, 'FRAME': lambda m, arg: None,
    'NONE': lambda m, arg: m.push(None),
    'NEWTRUE': lambda m, arg: m.push(True), 'NEWFALSE': lambda m, arg: m.push(False),
    'EMPTY_TUPLE': lambda m, arg: m.push(()), 'EMPTY_LIST': lambda m, arg: m.push([]),
    'EMPTY_DICT': lambda m, arg: m.push({}), 'EMPTY_SET': lambda m, arg: m.push(set()),
    'MARK': lambda m, arg: m.marks.append(len(m.stack)),
    'POP': lambda m, arg: m.take(1), 'POP_MARK': lambda m, arg: m.above(),
    'DUP': lambda m, arg: m.push(m.stack[-1]),
    'TUPLE': lambda m, arg: m.push(tuple(m.above())),
    'LIST': lambda m, arg: m.push(m.above()),
    'DICT': lambda m, arg: m.push(_pairs(m.above())),
    'FROZENSET': lambda m, arg: m.push(_set(m.above())),
    'TUPLE1': lambda m, arg: m.push(m.take(1)), 'TUPLE2': lambda m, arg: m.push(m.take(2)),
    'TUPLE3': lambda m, arg: m.push(m.take(3)),
    'APPEND': lambda m, arg: m.extend(m.take(1)), 'APPENDS': lambda m, arg: m.extend(m.above()),
    'ADDITEMS': lambda m, arg: m.extend(m.above()),
    'SETITEM': lambda m, arg: m.fill(m.take(2)), 'SETITEMS': lambda m, arg: m.fill(m.above()),
    **dict.fromkeys(('PUT', 'BINPUT', 'LONG_BINPUT'),
                    lambda m, arg: m.memo.__setitem__(arg, m.stack[-1])),
    'MEMOIZE': lambda m, arg: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    **dict.fromkeys(('GET', 'BINGET', 'LONG_BINGET'), lambda m, arg: m.push(m.memo[arg])),
    'GLOBAL': lambda m, arg: m.push(_global(arg.replace(' ', '.', 1))),
    'STACK_GLOBAL': lambda m, arg: m.push(_global('.'.join(m.take(2)))),
    'REDUCE': lambda m, arg: m.push(_call(*m.take(2))),
    'NEWOBJ': lambda m, arg: m.push(_call(*m.take(2))),
    'BUILD': lambda m, arg: m.build(),
    'BINPERSID': lambda m, arg: m.stored(),
}
