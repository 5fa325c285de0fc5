"""Pictures and gray maps from anything that Pillow reads, and from arrays."""

import contextlib
import io
import os
import re
import struct
import warnings
import zlib
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from jaxsd.typing import ImageLike

Picture = UInt8[np.ndarray, 'H W 3']
Mask = Float32[np.ndarray, 'H W']  # or another gray map in [0,1]

LUMA = np.array([19595, 38470, 7471], np.float32) / 65536  # ITU-R BT.601 as Pillow has it: sum 1
FORMATS = ('PNG', 'JPEG', 'WEBP')  # read from bytes: some others of Pillow's readers start programs
SCANS = 200  # of a JPEG; encoders write a dozen, and each one costs as much as the whole picture
SCALES = {np.dtype(bool): 1, np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}
ONES = [np.float32(1) / np.float32(white) for white in (255, 65535)]


def read(source: ImageLike) -> Picture:
    """The picture, uint8 [H,W,3].

    source: a path, a PIL.Image, or an array [H,W] or [H,W,1|3|4] of uint8, uint16, bool or of
    floats in [0,1]. Any mode that Pillow reads: transparency lies over white, 16-bit and float
    gray is scaled, not clipped (`_gray`), EXIF rotation is applied; of an animation, the first
    frame. Raises FileNotFoundError, and ValueError for what is no picture, is damaged, is empty or
    has more pixels than Pillow's MAX_IMAGE_PIXELS (a decompression bomb: it is never decoded).
    """
    array = _array(source)
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3 and array.size:
        return np.array(array)  # what follows would come to the same, ten times as slow
    colour, alpha = _planes(array)
    over_white = np.rint(255 * (colour * alpha + (1 - alpha)))
    return np.ascontiguousarray(np.broadcast_to(over_white, (*colour.shape[:2], 3)), np.uint8)


def read_gray(source: ImageLike) -> Mask:
    """The luminance of a picture, float32 [H,W] in [0,1], for masks and depth maps.

    Sources and errors are those of `read`. All 16 bits of a deep image are kept. Transparency lies
    over black: in a mask drawn on a transparent layer what is not painted is not masked. Whole
    numbers that are all 0 or 1 are taken for black and white.
    """
    colour, alpha = _planes(_array(source))
    colour = colour * alpha
    top = colour.max(initial=0)
    if top in ONES and np.isin(colour, (0, top)).all():
        colour = colour / top
    return colour[..., 0] if colour.shape[2] == 1 else colour @ LUMA


def read_bytes(data: bytes, name: str, most: int, gray: bool = False) -> Picture | Mask:
    """`read`, or `read_gray`, of the bytes of a PNG, JPEG or WebP file.

    name: what errors call it. most: pixels; a larger picture is never decoded. Raises ValueError.
    """
    return (read_gray if gray else read)(_open_bytes(data, name, most))


def read_texts(data: bytes, name: str, most: int) -> tuple[dict[str, str], Any]:
    """The texts in such a file -> {keyword: text}, and EXIF's user comment as it is, or None."""
    image = _open_bytes(data, name, most)
    with _one_line(name):
        _check_scans(image, name)
        image.load()  # PNG: text may stand behind the pixels
        texts = {str(key): value for key, value in image.info.items() if isinstance(value, str)}
        return texts, image.getexif().get_ifd(0x8769).get(0x9286)


def _open_bytes(data, name, most):
    from PIL import Image
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Pillow's own limit is another
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:  # whatever its readers raise for bytes that somebody made up
        raise ValueError(f'{name}: expected a picture, {", ".join(FORMATS)}; found {len(data)} '
                         'bytes that are none') from None
    if (pixels := image.width * image.height) > most:
        raise ValueError(f'{name} has {pixels} pixels: expected at most {most}')
    return image


def _array(source):
    """Any source that `read` takes -> an array that `_unit` takes."""
    from PIL import Image
    if isinstance(source, (str, os.PathLike)):
        return _open(source)
    if isinstance(source, Image.Image):
        return _decode(source, 'the picture')
    if hasattr(source, '__array__'):
        return np.asarray(source)
    raise ValueError(f'expected a path, a PIL.Image or an array, found {type(source).__name__}')


def _planes(array):
    """Colour float32 [H,W,1|3] and alpha [H,W,1], or 1 without one, both in [0,1]."""
    array = _unit(array)
    alpha = array[..., 3:] if array.shape[2] == 4 else np.float32(1)
    return array[..., :3], alpha


def _unit(array):
    """Any array that `read` takes -> float32 [H,W,1|3|4] in [0,1]."""
    shape = array.shape
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ValueError(f'expected a picture of shape [H,W] or [H,W,1|3|4], found {list(shape)}')
    if 0 in shape:
        raise ValueError(f'the picture is empty: its shape is {list(shape)}')
    if array.dtype in SCALES:
        return array.astype(np.float32) / np.float32(SCALES[array.dtype])
    if array.dtype.kind != 'f':
        raise ValueError('expected a picture of uint8, uint16, bool or of floats in [0, 1], found '
                         f'{array.dtype}')
    low, high = array.min(), array.max()
    if not 0 <= low <= high <= 1:  # NaN too
        raise ValueError(f'expected floats in [0, 1], found values from {low:g} to {high:g}')
    return array.astype(np.float32)


def _open(path):
    """The file as an array that `_unit` takes."""
    from PIL import Image
    with _one_line(path):
        image = Image.open(path)
    with image:
        return _decode(image, path)


def _decode(image, name):
    """A PIL.Image as an array that `_unit` takes."""
    from PIL import Image, ImageOps
    pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        raise _bomb(name, pixels)
    with _one_line(name):
        _check_scans(image, name)
        image.load()
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I;16'):
        return np.asarray(image).astype(np.uint16)
    if image.mode in ('I', 'F'):
        return _gray(np.asarray(image, np.float64), name)
    if image.has_transparency_data:
        straight = image.convert('LA') if image.mode == 'La' else image  # no way to RGBA at once
        return np.asarray(straight.convert('RGBA'))
    return np.asarray(image.convert('L' if image.mode in ('1', 'L') else 'RGB'))


def _check_scans(image, name):
    """ValueError for a JPEG of so many scans that its decoding takes minutes."""
    file = getattr(image, 'fp', None)
    if image.format not in ('JPEG', 'MPO') or file is None:
        return
    at = file.tell()
    file.seek(0)
    scans = file.read().count(b'\xff\xda')  # never inside of a scan, whose FF are followed by 00
    file.seek(at)
    if scans > SCANS:
        raise ValueError(f'it has {scans} scans, expected at most {SCANS}')


def _gray(values, name):
    """Gray of a mode that has no white -> [0,1].

    White is the least of 1, 255 and 65535 that no value exceeds; values outside of all of them, as
    in a depth map in millimetres below zero, are stretched between their extremes.
    """
    low, high = values.min(initial=np.inf), values.max(initial=-np.inf)
    if not np.isfinite(values).all():
        raise ValueError(f'{name} holds values that are not finite')
    for white in (1, 255, 65535):
        if 0 <= low and high <= white:
            return values / white
    return (values - low) / ((high - low) or 1)


@contextlib.contextmanager
def _one_line(name):
    """Whatever Pillow raises for a file, and its warning about bombs, as one line."""
    from PIL import Image, UnidentifiedImageError
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('error', Image.DecompressionBombWarning)
            yield
    except FileNotFoundError:
        raise FileNotFoundError(f'no such file: {name}') from None
    except IsADirectoryError:
        raise ValueError(f'{name} is a folder: expected an image') from None
    except UnidentifiedImageError:
        raise ValueError(f'{name} is not an image that Pillow can read') from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise _bomb(name, int(re.search(r'\d+', str(error))[0])) from None
    except (OSError, SyntaxError, EOFError, ValueError, IndexError, TypeError, struct.error,
            zlib.error) as error:
        if getattr(error, 'errno', None):  # the system's: no permission, no such device
            raise
        raise ValueError(f'{name} is damaged or cut off: {error}') from None


def _bomb(name, pixels):
    from PIL import Image
    return ValueError(f'{name} has {pixels} pixels, more than the limit of '
                      f'{Image.MAX_IMAGE_PIXELS}: make it smaller')
