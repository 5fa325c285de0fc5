"""The settings of the data of a training, as a recipe gives them."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from jaxsd.config import WIDTH, Checked, choice, ranged
from jaxsd.train.buckets import Size


@dataclasses.dataclass(frozen=True)
class SetConfig(Checked):
    """One set of pictures; a training may have several."""

    path: str = ''
    kind: str = choice('auto', 'folder', 'imagefolder', 'webdataset', 'npz')
    repeats: int = ranged(1, 1, 10**6)  # how often a picture comes in an epoch
    prior: bool = False  # class pictures, for prior preservation
    caption: str = ''  # of pictures that have no other
    hints: str = ''  # a folder of hints whose files are named like the pictures
    text_column: str = 'text'  # imagefolder: the captions
    hint_column: str = ''  # imagefolder: the files of the hints
    plain_repeats: int = ranged(1, 1, 10**6)  # .npz: how often one comes that is marked `plain`

    def check(self) -> None:
        if not self.path:
            raise ValueError('sets: expected a path for each; found a set without one')


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked):
    """How pictures and captions become batches; lengths in pixels, rates from 0 to 1."""

    sets: tuple = dataclasses.field(default=(), metadata={'of': SetConfig})
    resolution: tuple = ranged((512,), 8, WIDTH)  # one side of a square, or width and height
    buckets: bool = True  # by proportions; else all pictures are cropped to the resolution
    bucket_step: int = ranged(64, 8, WIDTH)
    # The shortest and longest side; None: half and twice the resolution's (kohya's 256 and 1024).
    bucket_min: int | None = dataclasses.field(default=None, metadata={'of': int, 'low': 8})
    bucket_max: int | None = dataclasses.field(default=None, metadata={'of': int, 'low': 8})
    no_upscale: bool = False  # small pictures get buckets of their own size
    crop: str = choice('center', 'random')
    flip: bool = False  # half of the pictures are mirrored
    caption_extension: str = '.txt'
    caption_lines: str = choice('first', 'random')  # of a file with several
    caption_dropout: float = ranged(0.0, 0, 1)  # how often a caption is replaced by ''
    shuffle_tags: bool = False
    keep_tags: int = ranged(0, 0, 10**6)  # so many at the start are neither moved nor dropped
    tag_separator: str = ','
    tag_dropout: float = ranged(0.0, 0, 1)
    prior_weight: float = ranged(1.0, 0)  # of class pictures in the loss
    heldout: float = ranged(0.0, 0, 0.9)  # the part that is never trained on
    strict: bool = False  # stop at a bad file
    cache: str = ''  # a folder for the index, latents and text features; '': none
    cache_latents: bool = False
    cache_texts: bool = False
    threads: int = ranged(0, 0, 1024)  # that read pictures; 0: as many as there are CPUs

    def check(self) -> None:
        if len(self.resolution) > 2 or not self.resolution or any(n % 8 for n in self.resolution):
            raise ValueError(f'resolution={list(self.resolution)}: expected one or two multiples '
                             'of 8, width and height')
        if self.bucket_step % 8:
            raise ValueError(f'bucket_step={self.bucket_step}: expected a multiple of 8')
        low, high = self.bucket_limits
        if self.buckets and (low % self.bucket_step or high % self.bucket_step
                             or not low <= min(self.size) <= max(self.size) <= high):
            raise ValueError(
                f'bucket_min={low}, bucket_max={high}: expected multiples of bucket_step='
                f'{self.bucket_step} with the resolution {self.size[0]}x{self.size[1]} between')
        if not self.caption_extension.startswith('.'):
            raise ValueError(f'caption_extension={self.caption_extension!r}: expected a dot first')
        if not self.tag_separator.strip():
            raise ValueError('tag_separator: expected a character, found none')
        if (self.cache_latents or self.cache_texts) and not self.cache:
            raise ValueError('cache_latents, cache_texts: expected a folder in cache, found none')
        self.check_cached(self.cache_latents, self.cache_texts)

    def check_cached(self, latents: bool, texts: bool) -> None:
        """ValueError where what is to be cached would change from epoch to epoch."""
        if latents and self.crop == 'random':
            raise ValueError("crop='random': a cached latent has one crop; expected crop='center', "
                             'or no cached latents')
        if texts and (self.shuffle_tags or self.tag_dropout):
            raise ValueError('shuffle_tags, tag_dropout: cached text features have one order of '
                             'tags; expected neither, or no cached texts')

    @property
    def size(self) -> Size:
        """The resolution's width and height."""
        return self.resolution[0], self.resolution[-1]

    @property
    def bucket_limits(self) -> tuple[int, int]:
        """The shortest and the longest side of a bucket."""
        step, low, high = self.bucket_step, self.bucket_min, self.bucket_max
        return (max(step, min(self.size) // 2 // step * step) if low is None else low,
                -(-max(self.size) * 2 // step) * step if high is None else high)

    @property
    def workers(self) -> int:
        """Threads that read pictures."""
        return self.threads or os.cpu_count() or 1


def data_config(settings: Mapping[str, Any]) -> DataConfig:
    """A DataConfig from a recipe's part, e.g. a ConfigDict.

    sets: one path, a list of paths or of mappings of SetConfig's fields, or a mapping of them by
    names of your own. resolution: a number, or width and height. Raises ValueError for unknown
    fields.
    """
    fields = {**settings}
    sets = fields.get('sets', ())
    if isinstance(sets, str):
        sets = [sets]
    elif hasattr(sets, 'keys'):
        sets = [sets[name] for name in sets]
    fields['sets'] = tuple(_build(SetConfig, {'path': one} if isinstance(one, str) else one)
                           for one in sets)
    if isinstance(fields.get('resolution'), int):
        fields['resolution'] = (fields['resolution'],)
    return _build(DataConfig, fields)


def _build(cls, settings):
    names = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(set(settings) - set(names)):
        raise ValueError(f'unknown: {", ".join(unknown)}; expected fields of {cls.__name__}: '
                         + ', '.join(names))
    return cls(**settings)
