"""Latents and text features on disk, by content: computed once, whatever happens to file names.

    ab/abcd....safetensors   arrays, and their hash

A file's name is the hash of all that it depends on: the bytes of the picture, its bucket, whether
it is mirrored and the VAE; or the caption and the text encoders. Files appear whole or not at all,
and one that was damaged later is noticed by its hash and computed again.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import filelock
import numpy as np
import safetensors
import safetensors.numpy
from tqdm import tqdm

from jaxsd.train.buckets import bucket_sizes, place
from jaxsd.train.data import cut, latent_key, text_key
from jaxsd.train.data_config import DataConfig
from jaxsd.train.examples import Example
from jaxsd.train.layouts import read_picture
from jaxsd.typing import Path

Arrays = Mapping[str, Any]  # {name: array}


@dataclasses.dataclass(frozen=True)
class Cache:
    """Arrays by what they were computed from.

    folder: may be shared by trainings and by hosts. fingerprint: of the weights and settings that
    compute the arrays, such as jaxsd.batch.identity.digest(params['vae']).
    """

    folder: Path
    fingerprint: str

    def path(self, *key: Any) -> pathlib.Path:
        """The file of a key, values that JSON knows."""
        name = hashlib.sha256(json.dumps([self.fingerprint, *key]).encode()).hexdigest()
        return pathlib.Path(self.folder, name[:2], f'{name}.safetensors')

    def find(self, *key: Any) -> dict[str, np.ndarray] | None:
        """The arrays of a key, or None where they are missing or damaged."""
        try:
            arrays = safetensors.numpy.load(self.path(*key).read_bytes())
        except (FileNotFoundError, safetensors.SafetensorError, ValueError, KeyError):
            return None
        stored = arrays.pop('sha256', np.zeros(0, np.uint8))
        return arrays if stored.tobytes() == _hash(arrays) else None

    def read(self, *key: Any) -> dict[str, np.ndarray]:
        """The arrays of a key. Raises ValueError where they are missing or damaged."""
        if (arrays := self.find(*key)) is None:
            raise ValueError(f'{self.path(*key)} is missing or damaged: start again, what is '
                             'missing is computed then')
        return arrays

    def write(self, arrays: Arrays, *key: Any, process: int = 0) -> None:
        """Store arrays, whole or not at all; only the holder of `lock(process)` may."""
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        stored = np.frombuffer(_hash(arrays), np.uint8)
        path = self.path(*key)
        path.parent.mkdir(parents=True, exist_ok=True)
        # The same name at every try: a kill leaves nothing that the next one does not take.
        part = path.with_name(f'.{path.stem}.{process}.tmp')
        part.write_bytes(safetensors.numpy.save({**arrays, 'sha256': stored}))
        os.replace(part, path)

    def lock(self, process: int = 0) -> filelock.BaseFileLock:
        """Held while the cache is filled; another training waits for it."""
        pathlib.Path(self.folder).mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(pathlib.Path(self.folder, f'.lock-{process}'))


def _hash(arrays):
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(f'{name} {array.dtype} {array.shape}\n'.encode() + array.tobytes())
    return found.digest()


def cache_latents(examples: Sequence[Example], config: DataConfig,
                  encode: Callable[[np.ndarray], Arrays], cache: Cache, batch_size: int = 8,
                  process: int = 0, processes: int = 1) -> int:
    """Compute the latents that the cache lacks -> how many it lacked.

    encode: uint8 [batch_size,H,W,3] -> {'moments': float32 [batch_size,h,w,2L], the VAE's mean and
    logvar}, and what else the batches are to carry. It gets one bucket after the other, so that it
    is compiled once for each. Mirrored pictures have
    latents of their own. Files that are there are read, too, and checked.

    Hosts that share the folder do a part each, and must wait for each other before they load;
    with folders of their own each does all (process=0, processes=1). Raises ValueError for random
    crops.
    """
    config.check_cached(True, False)
    sizes = bucket_sizes(config)
    wanted = {}
    for example in examples:
        placement = place(config, sizes, example.width, example.height)
        for flip in (False, True) if config.flip else (False,):
            wanted[latent_key(example, placement, flip)] = example, placement, flip
    todo: dict[Any, list] = {}

    def load(item):
        example, ((width, height), resized), flip = item
        return cut(read_picture(example.source), item[1], (resized[0] - width) // 2,
                   (resized[1] - height) // 2, flip)

    def compute(items):
        arrays = {name: np.asarray(a, np.float32) for name, a in encode(np.stack(items)).items()}
        return [{name: array[i] for name, array in arrays.items()} for i in range(len(items))]

    with cache.lock(process):
        for key in _missing(cache, list(wanted)[process::processes], config):
            todo.setdefault(wanted[key][1].bucket, []).append(key)
        return _fill(cache, [todo[bucket] for bucket in sorted(todo)], wanted, load, compute,
                     batch_size, config, process, 'latents')


def cache_texts(examples: Sequence[Example], config: DataConfig,
                encode: Callable[[list[str]], Arrays], cache: Cache, batch_size: int = 32,
                process: int = 0, processes: int = 1) -> int:
    """Compute the text features that the cache lacks, of all captions and of '' -> how many.

    encode: batch_size captions -> {'context': [batch_size,T,D], 'pooled': [batch_size,P]}, or
    whatever the batches are to carry. Hosts share as in `cache_latents`. Raises ValueError where
    tags are shuffled or dropped.
    """
    config.check_cached(False, True)
    captions = sorted({'', *(text for example in examples for text in example.captions)})
    wanted = {text_key(text): text for text in captions}

    def compute(items):
        arrays = {name: np.asarray(array) for name, array in encode(items).items()}
        return [{name: array[i] for name, array in arrays.items()} for i in range(len(items))]

    with cache.lock(process):
        todo = list(_missing(cache, list(wanted)[process::processes], config))
        return _fill(cache, [todo], wanted, str, compute, batch_size, config, process, 'texts')


def _missing(cache, keys, config):
    """The keys whose arrays are not there whole, in order."""
    with concurrent.futures.ThreadPoolExecutor(config.workers) as pool:
        for start in range(0, len(keys), 1024):
            some = keys[start:start + 1024]
            for key, there in zip(some, pool.map(lambda k: cache.find(*k) is not None, some)):
                if not there:
                    yield key


def _fill(cache, groups, wanted, load, compute, batch_size, config, process, what):
    """Load, compute and write the keys of each group, in batches of one size."""
    import grain
    keys = [key for group in groups for key in group + group[-1:] * (-len(group) % batch_size)]
    count = sum(map(len, groups))
    rows = grain.MapDataset.source(keys).map(lambda key: (key, load(wanted[key])))
    rows = rows.to_iter_dataset(grain.ReadOptions(
        num_threads=config.workers, prefetch_buffer_size=max(2 * batch_size, 2 * config.workers)))
    with tqdm(total=count, desc=f'caching {what}', unit='', disable=None) as bar:
        for batch in rows.batch(batch_size, batch_fn=list):
            names, items = zip(*batch)
            computed = dict(zip(names, compute(list(items))))  # the last of a group: repeated
            for key, arrays in computed.items():
                cache.write(arrays, *key, process=process)
            bar.update(len(computed))
    return count
