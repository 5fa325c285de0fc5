"""The sizes that pictures are trained at, and which of them a picture gets.

Every batch has one size, but a data set has pictures of all proportions. So pictures of like
proportions share a bucket: a width and a height in whole steps, with about as many pixels as the
training resolution. The rules are those of kohya's sd-scripts (library/train_util.py,
BucketManager), so that a data set falls into the same buckets here as there.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxsd.train.data_config import DataConfig

Size = tuple[int, int]  # width and height in pixels


class Placement(NamedTuple):
    """A picture is scaled to `resized`, which covers `bucket`, and what stands over is cut off."""

    bucket: Size
    resized: Size


def bucket_sizes(config: 'DataConfig') -> list[Size]:
    """The buckets of a training, sorted; without buckets, the resolution alone.

    A square whose area is at most that of the resolution, and for each width from `bucket_min` to
    `bucket_max` the largest height whose area is, both ways round.
    """
    width, height = config.size
    if not config.buckets:
        return [(width, height)]
    step, (low, high) = config.bucket_step, config.bucket_limits
    square = int(math.sqrt(width * height) // step) * step
    sizes = {(square, square)}
    for one in range(low, high + 1, step):
        other = min(high, width * height // one // step * step)
        if other >= low:
            sizes |= {(one, other), (other, one)}
    return sorted(sizes)


def place(config: 'DataConfig', sizes: list[Size], width: int, height: int) -> Placement:
    """Where a picture of width x height goes; sizes: those of `bucket_sizes`.

    The bucket is the one whose proportions are nearest. With `no_upscale` a picture keeps its size,
    or is scaled down to the area of the resolution, and its bucket is the largest in whole steps
    that lies in it. Raises ValueError where it is too small for that.
    """
    if config.buckets and config.no_upscale:
        resized = _shrunk(config, width, height)
        step = config.bucket_step
        bucket = resized[0] // step * step, resized[1] // step * step
        if 0 in bucket:
            raise ValueError(f'has {width}x{height} pixels: expected at least {step} along each '
                             'side as no_upscale is set')
        return Placement(bucket, resized)
    aspect = width / height
    bucket = (width, height) if (width, height) in sizes else min(
        sizes, key=lambda size: abs(size[0] / size[1] - aspect))
    if aspect > bucket[0] / bucket[1]:
        scale = bucket[1] / height
    else:
        scale = bucket[0] / width
    return Placement(bucket, (int(width * scale + 0.5), int(height * scale + 0.5)))


def _shrunk(config, width, height):
    """The size, or one of the same proportions whose area is at most about the resolution's.

    One side is brought to whole steps, whichever keeps the proportions of the bucket better. It is
    rounded to a pixel first, as kohya does, so that the area can be larger by half a pixel of it.
    """
    area, aspect = config.size[0] * config.size[1], width / height
    if width * height <= area:
        return width, height

    def steps(value):
        return int(value + 0.5) // config.bucket_step * config.bucket_step

    w = steps(math.sqrt(area * aspect))
    h = steps(area / math.sqrt(area * aspect))
    beside_w, beside_h = steps(w / aspect), steps(h * aspect)
    by_width = abs(w / beside_w - aspect) if beside_w else math.inf
    by_height = abs(beside_h / h - aspect) if h else math.inf
    if by_width < by_height:
        return w, int(w / aspect + 0.5)
    return int(h * aspect + 0.5), h
