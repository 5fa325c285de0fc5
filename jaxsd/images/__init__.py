"""Pictures in: read from anything, fitted and masked, and turned into hints for a ControlNet."""

from jaxsd.images.fitting import (
    box,
    check_sizes,
    cover,
    downsample,
    feather,
    fit,
    pad,
    paste,
)
from jaxsd.images.reading import read, read_gray

__all__ = ['box', 'check_sizes', 'cover', 'downsample', 'feather', 'fit', 'pad', 'paste', 'read',
           'read_gray']
