"""Examples -> batches: which ones come when, how they are cut, and loading ahead of the step.

Which batch a step gets is a pure function (`Plan`) of the examples, the batch size and the seed. So
a training is taken up again at any step, on any number of hosts, with the batches that it would
have had.

Loading is grain's: threads decode the pictures of the next batches while the device computes. Grain
is made for JAX and kept by its makers, reads by index, which is all that a Plan needs, and its
iterators have a state. Threads serve as well as processes, as Pillow decodes and scales without
Python's lock.
"""

import bisect
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxsd.images.reading import Picture
from jaxsd.train.buckets import Placement, Size, bucket_sizes, place
from jaxsd.train.data_config import DataConfig
from jaxsd.train.examples import Example
from jaxsd.train.layouts import read_picture

if TYPE_CHECKING:
    import grain

    from jaxsd.train.cache import Cache

ORDER, SHUFFLE, CHANGE = range(3)  # what a random generator is for


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which examples each step's batch holds.

    sizes: for each bucket, how many slots it has: its examples, each as often as it is repeated.
    A bucket is an endless stream: permutations of its slots, one after the other; its batch k holds
    positions k * batch_size and following. Epoch e has of a bucket with n slots the batches from
    floor(n e / batch_size) to floor(n (e + 1) / batch_size), and shuffles those of all buckets. So
    all batches are full, and what an epoch leaves over comes first in the next: nothing is dropped,
    and no slot comes twice before each has come once.
    """

    sizes: tuple[int, ...]
    batch_size: int
    seed: int = 0

    def steps(self, epochs: int) -> int:
        """Steps that so many epochs take."""
        return sum(size * epochs // self.batch_size for size in self.sizes)

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that a step belongs to."""
        most = (step + len(self.sizes) + 1) * self.batch_size // sum(self.sizes) + 2
        return bisect.bisect_right(range(most), step, key=self.steps) - 1

    def batch(self, step: int) -> tuple[int, range]:
        """(bucket, positions in its stream) of a step's batch."""
        bucket, k = _batch(self, step)
        return bucket, range(k * self.batch_size, (k + 1) * self.batch_size)

    def slot(self, bucket: int, position: int) -> int:
        """The slot at a position of a bucket's stream."""
        turn, i = divmod(position, self.sizes[bucket])
        return int(_permutation(self.seed, bucket, self.sizes[bucket], turn)[i])


@functools.lru_cache(maxsize=1024)
def _batch(plan, step):
    epoch = plan.epoch(step)
    buckets, batches = _order(plan, epoch)
    i = step - plan.steps(epoch)
    return int(buckets[i]), int(batches[i])


@functools.lru_cache(maxsize=2)
def _order(plan, epoch):
    """(bucket, batch of that bucket) for the steps of an epoch, two arrays."""
    spans = [range(size * epoch // plan.batch_size, size * (epoch + 1) // plan.batch_size)
             for size in plan.sizes]
    order = np.random.default_rng([plan.seed, ORDER, epoch]).permutation(sum(map(len, spans)))
    return (np.repeat(np.arange(len(spans)), [len(span) for span in spans])[order],
            np.concatenate([np.asarray(span, np.int64) for span in spans])[order])


@functools.lru_cache(maxsize=256)
def _permutation(seed, bucket, size, turn):
    order = np.random.default_rng([seed, SHUFFLE, bucket, turn]).permutation(size)
    return order.astype(np.int32)


class Buckets:
    """The examples by bucket: `slots` {bucket's size: examples, repeated}, `placements`, `plan`."""

    def __init__(self, examples: Sequence[Example], config: DataConfig, batch_size: int,
                 seed: int = 0) -> None:
        sizes = bucket_sizes(config)
        self.placements = {example: place(config, sizes, example.width, example.height)
                           for example in examples}
        slots: dict[Size, list[Example]] = {}
        for example in examples:
            slots.setdefault(self.placements[example].bucket, []).extend(
                [example] * example.repeats)
        self.slots = [slots[size] for size in sorted(slots)]
        self.plan = Plan(tuple(map(len, self.slots)), batch_size, seed)

    def describe(self) -> list[str]:
        """A line for each bucket, as '512x768: 120 pictures, 240 with repeats'."""
        lines = []
        for slots in self.slots:
            width, height = self.placements[slots[0]].bucket
            lines.append(f'{width}x{height}: {len(set(slots))} pictures, {len(slots)} with '
                         'repeats')
        return lines


def fingerprint(examples: Sequence[Example], config: DataConfig, batch_size: int,
                seed: int = 0) -> str:
    """A hash of all that the batches depend on -> 64 hex digits.

    Another one than at the start of a training says that its data has changed; hosts with different
    ones would train on different batches. Where files lie and how many threads read them is left
    out.
    """
    settings = dataclasses.asdict(dataclasses.replace(
        config, sets=(), threads=0, strict=False, cache='.'))
    rows = [[e.sha256, e.captions, e.repeats, e.weight] for e in examples]
    whole = json.dumps([settings, batch_size, seed, rows], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def cut(image: Picture, placement: Placement, left: int, top: int, flip: bool) -> Picture:
    """The picture scaled to placement.resized, less what lies outside of the bucket at left, top
    (pixels of the scaled picture); then mirrored, with flip -> uint8 [H,W,3].

    Lanczos, over the pixels that are kept only; large pictures are halved or more by means first,
    to no less than three times the size.
    """
    from PIL import Image
    (width, height), resized = placement
    rows, columns = image.shape[:2]
    across, down = columns / resized[0], rows / resized[1]
    if (columns, rows) == resized:
        out = image[top:top + height, left:left + width]
    else:
        box = (left * across, top * down, min(columns, (left + width) * across),
               min(rows, (top + height) * down))
        out = np.asarray(Image.fromarray(image).resize(
            (width, height), Image.Resampling.LANCZOS, box, reducing_gap=3.0))
    return out[:, ::-1] if flip else out


def vary_caption(captions: Sequence[str], config: DataConfig, rng: np.random.Generator) -> str:
    """One of the captions, its tags shuffled and dropped, or '', as config says.

    As in kohya's sd-scripts, tags are joined by ', ' again when they are changed.
    """
    text = captions[int(rng.integers(len(captions)))]
    if rng.random() < config.caption_dropout:
        return ''
    if not (config.shuffle_tags or config.tag_dropout):
        return text
    tags = [tag.strip() for tag in text.split(config.tag_separator)]
    kept, tags = tags[:config.keep_tags], tags[config.keep_tags:]
    if config.shuffle_tags:
        rng.shuffle(tags)
    if config.tag_dropout:
        tags = [tag for tag in tags if rng.random() >= config.tag_dropout]
    return f'{config.tag_separator.strip()} '.join(kept + tags)


def _row(example, placement, rng, config, latents, texts):
    """What a batch holds of one example."""
    (width, height), resized = placement
    flip = bool(rng.integers(2)) if config.flip else False
    spare = resized[0] - width, resized[1] - height
    left, top = (s // 2 for s in spare) if config.crop == 'center' else (
        int(rng.integers(s + 1)) for s in spare)
    caption = vary_caption(example.captions, config, rng)
    corner = top, spare[0] - left if flip else left  # of the mirrored picture
    row = {'weight': np.float32(example.weight), 'caption': caption, 'time_ids': np.float32(
        [example.height, example.width, *corner, height, width])}
    if latents:
        row |= latents.read(*latent_key(example, placement, flip))
    else:
        row['image'] = cut(read_picture(example.source), placement, left, top, flip)
    if example.hint:
        row['hint'] = cut(read_picture(example.hint), placement, left, top, flip)
    if texts:
        row |= texts.read(*text_key(caption))
    return row


def latent_key(example: Example, placement: Placement, flip: bool) -> tuple:
    """What a cached latent is of, besides the VAE; the crop is the centre's."""
    return 'latent', example.sha256, *placement.bucket, flip


def text_key(caption: str) -> tuple:
    """What cached text features are of, besides the text encoders."""
    return 'text', caption


class _Steps:
    """Item i is a host's part of step i's batch: what grain reads."""

    def __init__(self, buckets, part, load, tokenize, workers):
        self.buckets, self.part, self.load, self.tokenize = buckets, part, load, tokenize
        self.pool = concurrent.futures.ThreadPoolExecutor(workers)

    def __len__(self):
        return sys.maxsize

    def __getitem__(self, step):
        bucket, positions = self.buckets.plan.batch(step)
        rows = list(self.pool.map(functools.partial(self._row, bucket), positions[self.part]))
        captions = [row.pop('caption') for row in rows]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return batch | (dict(self.tokenize(captions)) if self.tokenize else {})

    def _row(self, bucket, position):
        plan = self.buckets.plan
        example = self.buckets.slots[bucket][plan.slot(bucket, position)]
        rng = np.random.default_rng([plan.seed, CHANGE, bucket, position])
        return self.load(example, self.buckets.placements[example], rng)


def batches(examples: Sequence[Example], config: DataConfig, batch_size: int, seed: int = 0,
            tokenize: Callable[[list[str]], Mapping[str, Any]] | None = None, *,
            process: int = 0, processes: int = 1, start: int = 0, latents: 'Cache | None' = None,
            texts: 'Cache | None' = None) -> 'grain.DatasetIterator[dict[str, Any]]':
    """An endless iterator over this host's rows of each step's batch, dicts of numpy arrays.

    image     uint8 [B,H,W,3], or with latents their arrays (`moments` float32 [B,h,w,2L])
    weight    float32 [B]
    time_ids  float32 [B,6]: original (height, width), crop (top, left), target (height, width)
    hint      uint8 [B,H,W,3], where the examples have one
    and what tokenize(captions) gives, or with texts their arrays (`context`, `pooled`)

    batch_size: of all hosts together; host `process` of `processes` gets an equal share of its
    rows, in order. latents, texts: what cache.cache_latents and cache.cache_texts filled.

    To take a training up again after step s, give start=s; or keep the iterator's get_state(),
    which is {'next_index': s}, and give it to set_state(). The number of hosts may be another.
    `fingerprint` tells whether the data is still the same. close() ends the threads.

    Raises ValueError for a batch that cannot be shared out, and for settings that cannot be cached.
    """
    import grain
    if batch_size % processes or not 0 <= process < processes:
        raise ValueError(f'batch_size={batch_size} for process {process} of {processes}: expected '
                         'an equal share for each')
    config.check_cached(latents is not None, texts is not None)
    hints = sum(example.hint is not None for example in examples)
    if hints not in (0, len(examples)):
        raise ValueError(f'{hints} of {len(examples)} pictures have a hint: expected all or none')
    rows = batch_size // processes
    load = functools.partial(_row, config=config, latents=latents, texts=texts)
    steps = _Steps(Buckets(examples, config, batch_size, seed),
                   slice(process * rows, (process + 1) * rows), load, tokenize, config.workers)
    ahead = max(2, -(-2 * config.workers // rows))  # batches, so that no worker is idle
    dataset = grain.MapDataset.source(steps).to_iter_dataset(
        grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead))
    iterator = iter(dataset)
    iterator.set_state({'next_index': start})
    return iterator
