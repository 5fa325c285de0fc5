"""Hints for ControlNets that need no network: from a picture, uint8 [H,W,3], to one of its size."""

import math
import numbers
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsd.images.fitting import fit
from jaxsd.images.opencv import opencv
from jaxsd.images.pose import draw_pose, read_pose
from jaxsd.images.reading import Picture, read


def canny(image: Picture, low: float = 100, high: float = 200) -> Picture:
    """White edges on black: Canny's, with hysteresis between two thresholds of the gradient.

    The annotator of lllyasviel/ControlNet (annotator/canny).
    """
    check_option('low', low, 0)
    check_option('high', high, 0)
    if low >= high:
        raise ValueError(f'canny low={low}, high={high}: expected low < high')
    return _three(opencv('canny').Canny(image, low, high))


def scribble(image: Picture, threshold: float = 127) -> Picture:
    """Dark strokes on white -> white strokes on black: where any channel is below the threshold.

    As in lllyasviel/ControlNet, gradio_scribble2image.py.
    """
    check_option('threshold', threshold, 1, 255)
    return _three(np.where(image.min(-1) < threshold, np.uint8(255), np.uint8(0)))


def tile(image: Picture, factor: float = 1) -> Picture:
    """The picture without its detail: `factor` times smaller, and back.

    The tile ControlNet of 1.1 was trained on pictures made smaller and brought back linearly
    (gradio_tile.py); they are made smaller by averages, as by sd-webui-controlnet's tile_resample.
    """
    check_option('factor', factor, 1, min(image.shape[:2]))
    cv2 = opencv('tile')
    height, width = image.shape[:2]
    small = (max(1, int(width / factor)), max(1, int(height / factor)))
    small = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


def depth(depth_map: Float[np.ndarray, 'H W']) -> Picture:
    """Inverse depth, float [H,W], larger when nearer -> uint8 [H,W,3], from black to white.

    As diffusers' depth-estimation pipeline for ControlNet. Raises ValueError for one value only.
    """
    low, high = float(depth_map.min()), float(depth_map.max())
    if not math.isfinite(high - low):
        raise ValueError('the depth map holds values that are not finite')
    if low == high:
        raise ValueError(f'the depth map is {low:g} everywhere: expected near and far parts')
    return _three(np.rint(255 * ((depth_map - low) / (high - low))).astype(np.uint8))


def _three(gray):
    return np.repeat(gray[..., None], 3, -1)


def check_option(option: str, value: Any, low: float, high: float = math.inf) -> None:
    """ValueError unless an option is a number from low to high."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not (
            low <= float(value) <= high and math.isfinite(float(value))):
        limits = f'{low} to {high}' if math.isfinite(high) else f'{low} or more'
        raise ValueError(f'{option}={value!r}: expected {limits}')


PREPROCESSORS = {'none': lambda image: image, 'canny': canny, 'scribble': scribble, 'tile': tile}


def hint(kind: str, source: Any, width: int | None = None, height: int | None = None,
         **options: Any) -> Picture:
    """The hint of a kind, for a picture of width x height, or of the source's own size.

    kind: a key of PREPROCESSORS, or 'pose', for which source is OpenPose's JSON; else as for
    `read`. The source is fitted (`fit`) before it is looked at, so that lines are a pixel thin.
    Raises ValueError for an unknown kind, and for a pose whose size nobody says.
    """
    if kind == 'pose':
        return _pose(source, width, height, **options)
    if kind not in PREPROCESSORS:
        raise ValueError(f'unknown preprocessor {kind!r}: expected '
                         f'{", ".join(PREPROCESSORS)} or pose')
    image = read(source)
    if width and height and kind != 'none':
        image = fit(image, width, height)
    return PREPROCESSORS[kind](image, **options)


def _pose(source, width, height):
    pose = read_pose(source, width, height)
    size = width or pose.width, height or pose.height
    if None in size:
        raise ValueError(f'{source} names no canvas: expected width and height')
    return draw_pose(pose.people, *size)
