"""GGUF files, as stable-diffusion.cpp and ComfyUI-GGUF write them, by the `gguf` package."""

import math
import pathlib
from typing import Any

import numpy as np

from jaxsd.typing import Path


class GGUFFile:
    """A GGUF file with files.TensorFile's interface; tensors of blocks are read as float32.

    Every type that the `gguf` package dequantises: Q8_0, Q5, Q4, the K and the IQ ones. metadata:
    the texts in its header. Raises FileNotFoundError, ImportError without the extra `gguf`, and
    ValueError for a damaged file or another type.
    """

    def __init__(self, path: Path) -> None:
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f'{path}: no such file')
        try:
            import gguf
        except ImportError:
            raise ImportError(f"{path}: GGUF files need the gguf package: pip install "
                              "'jaxsd[gguf]'") from None
        try:
            reader = gguf.GGUFReader(self.path)
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
            fields = {name: field.contents() for name, field in reader.fields.items()
                      if not name.startswith('GGUF.')}
            self.shapes = {name: _shape(tensor, fields.get(f'comfy.gguf.orig_shape.{name}'))
                           for name, tensor in self._tensors.items()}
        except (ValueError, LookupError, TypeError, OverflowError, OSError, MemoryError) as error:
            text = ' '.join(str(error).split())[:300]
            raise ValueError(f'{path}: not a whole GGUF file, it is truncated or corrupt '
                             f'({text or type(error).__name__}); download it again') from None
        self.metadata = {name: value for name, value in fields.items() if isinstance(value, str)}
        kinds = gguf.GGMLQuantizationType
        self._types = {kinds.F32: np.float32, kinds.F16: np.float16, kinds.F64: np.float64,
                       kinds.I8: np.int8, kinds.I16: np.int16, kinds.I32: np.int32,
                       kinds.I64: np.int64}
        unknown = sorted(kind.name for kind in {t.tensor_type for t in self._tensors.values()}
                         if kind not in self._types and not _dequantises(gguf, kind))
        if unknown:
            raise ValueError(f'{path}: has tensors of type {", ".join(unknown)}, which the gguf '
                             'package cannot dequantise; take a file of another type, such as '
                             'Q8_0')
        self.dtypes = {name: np.dtype(self._types.get(tensor.tensor_type, np.float32))
                       for name, tensor in self._tensors.items()}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        """A tensor as a numpy array; rows=(i, n) only the n rows from row i*n."""
        import gguf
        tensor = self._tensors[name]
        if tensor.tensor_type in self._types:
            array = np.array(tensor.data)
        else:
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        array = array.reshape(self.shapes[name])
        return array if rows is None else array[rows[0] * rows[1]:(rows[0] + 1) * rows[1]]


def _dequantises(gguf, kind):
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _shape(tensor: Any, original: Any) -> tuple[int, ...]:
    """A tensor's shape in torch's order; original: what ComfyUI-GGUF's converter says it was before
    it made rows of 256."""
    shape = tuple(int(n) for n in reversed(tensor.shape))
    if original is not None:
        before, shape = shape, tuple(int(n) for n in original)
        if math.prod(before) != math.prod(shape):
            raise ValueError(f'{tensor.name}: {list(before)} is not {list(shape)}')
    return shape
