"""Pictures in: read from anything, fitted and masked, and turned into hints for a ControlNet."""

from jaxsd.images.fitting import (
    box,
    check_sizes,
    cover,
    cubic,
    downsample,
    feather,
    fit,
    pad,
    paste,
)
from jaxsd.images.pose import Person, Pose, draw_pose, read_pose
from jaxsd.images.preprocess import PREPROCESSORS, canny, depth, hint, scribble, tile
from jaxsd.images.reading import read, read_bytes, read_gray, read_texts

__all__ = ['PREPROCESSORS', 'Person', 'Pose', 'box', 'canny', 'check_sizes', 'cover', 'cubic',
           'depth', 'downsample', 'draw_pose', 'feather', 'fit', 'hint', 'pad', 'paste', 'read',
           'read_bytes', 'read_gray', 'read_pose', 'read_texts', 'scribble', 'tile']
