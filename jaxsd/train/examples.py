"""What a training is given: the pictures of all its sets, checked -> a list of examples.

Each picture is decoded once when it is first seen, so that a damaged one is named at the start and
not in the middle of the night; what was found is remembered in `cache`/index.jsonl by path, size
and time of change.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from typing import NamedTuple

from tqdm import tqdm

from jaxsd.train.buckets import bucket_sizes, place
from jaxsd.train.data_config import DataConfig
from jaxsd.train.layouts import READERS, Report, Source, kind_of, read_bytes, read_picture

SHOWN = 5  # problems in the one line of an error


@dataclasses.dataclass(frozen=True)
class Example:
    """A good picture and what goes with it."""

    source: Source
    sha256: str  # of the file's bytes
    width: int  # as it is seen, after EXIF's rotation
    height: int
    captions: tuple[str, ...]  # one of them, by chance
    repeats: int = 1
    weight: float = 1.0
    hint: Source | None = None


class Sets(NamedTuple):
    """What `read_sets` found. Problems name a file each; notes say what else a user should know."""

    examples: list[Example]
    heldout: list[Example]
    problems: list[str]
    notes: list[str]


def read_sets(config: DataConfig) -> Sets:
    """Find, decode and check all pictures of all sets.

    Examples come in the order of their sets and names, the same on every host. Which ones are held
    out depends on their bytes alone, so that more pictures do not move it. Class pictures come as
    often as the others together (kohya, diffusers): each is repeated, or only the first are used.
    Raises ValueError where there is nothing to train on, for a set that cannot be read at all, and
    with config.strict for the first bad file.
    """
    report, found = Report(), []
    for one in config.sets:
        read = READERS[kind_of(one) if one.kind == 'auto' else one.kind]
        found += [(one, item) for item in read(one, config, report)]
    scanned = _scan_all(config, [source for _, item in found
                                 for source in (item.source, item.hint) if source])
    sizes = bucket_sizes(config)
    examples, prior, heldout = [], [], []
    for one, item in found:
        example = _example(one, item, scanned, config, sizes, report)
        if example is None:
            continue
        apart = item.heldout if item.heldout is not None else (
            int(example.sha256[:8], 16) < config.heldout * 2**32)
        (prior if one.prior else heldout if apart else examples).append(example)
    problems = list(report.problems.values())
    bad = f'{len(problems)} bad: ' + '; '.join(problems[:SHOWN]) + '; ...' * (len(problems) > SHOWN)
    if config.strict and problems:
        raise ValueError(f'strict is set, and of {len(scanned)} files there are {bad}')
    if not examples:
        paths = ', '.join(one.path for one in config.sets) or 'sets'
        raise ValueError(f'no pictures to train on in {paths}' + f'; {bad}' * bool(problems))
    return Sets(examples + _balanced(prior, examples, report), heldout, problems, report.notes())


def _example(one, item, scanned, config, sizes, report):
    """The Example, or None for a picture that has a problem."""
    record = scanned[item.source]
    hint = scanned[item.hint] if item.hint else None
    for source, result in (item.source, record), (item.hint, hint):
        if result and 'problem' in result:
            return report.problem(source.name, result['problem'])
    width, height = record['width'], record['height']
    if hint and abs(hint['width'] * height / (hint['height'] * width) - 1) > 0.02:
        return report.problem(item.hint.name, f'has {hint["width"]}x{hint["height"]} pixels: '
                              f'expected the proportions of {item.source.name}, {width}x{height}')
    try:
        place(config, sizes, width, height)
    except ValueError as error:
        return report.problem(item.source.name, error)
    captions = item.captions or (one.caption,)
    if not item.captions and not one.caption:
        report.counts['pictures without a caption, trained with an empty one'] += 1
    elif not all(captions):
        report.counts['captions that are empty'] += 1
    return Example(item.source, record['sha256'], width, height, captions,
                   item.repeats * one.repeats, config.prior_weight if one.prior else 1.0, item.hint)


def _balanced(prior, examples, report):
    """Class pictures repeated so that they are as many as the examples."""
    if not prior:
        return []
    total = sum(example.repeats for example in examples)
    chosen, count = [], 0
    for example in prior:
        if count < total:
            chosen.append(example)
            count += example.repeats
    if len(chosen) < len(prior):
        report.counts['class pictures that are not used, as there are more than others'] = (
            len(prior) - len(chosen))
    each, rest = divmod(max(0, total - count), len(chosen))
    return [dataclasses.replace(example, repeats=example.repeats + each + (i < rest))
            for i, example in enumerate(chosen)]


def _scan_all(config, sources):
    """{source: {'sha256', 'width', 'height'} or {'problem'}}, in threads; new ones are written."""
    index = _Index(config.cache)
    found = {source: index.records.get(index.key(source)) for source in sources}
    todo = [source for source, record in found.items() if record is None]
    following, running = iter(todo), {}
    with (concurrent.futures.ThreadPoolExecutor(config.workers) as pool, index,
          tqdm(total=len(todo), desc='reading pictures', unit='', disable=None) as bar):
        while True:
            for source in itertools.islice(following, 4 * config.workers - len(running)):
                running[pool.submit(_scan, source)] = source
            if not running:
                return found
            done, _ = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                source = running.pop(future)
                found[source] = future.result()
                if 'problem' not in found[source]:
                    index.add(source, found[source])
                bar.update()


def _scan(source):
    """What a picture is, or what is wrong with it."""
    try:
        height, width = read_picture(source).shape[:2]
        sha256 = hashlib.sha256(read_bytes(source)).hexdigest()
    except (ValueError, OSError) as error:
        return {'problem': str(error)}
    return {'sha256': sha256, 'width': width, 'height': height}


class _Index:
    """What good pictures are, by path, part, size and time of change: lines of JSON in a file that
    grows. Bad ones are looked at again, as a newer Pillow may read them.

    Lines begin with their newline: one that a kill tore ends where the next begins.
    """

    def __init__(self, folder):
        self.path = pathlib.Path(folder, 'index.jsonl') if folder else None
        self.records, self.stamps = {}, {}
        if self.path and self.path.exists():
            for line in self.path.read_bytes().splitlines():
                try:
                    key, record = json.loads(line)
                    self.records[key] = record
                except (ValueError, TypeError):
                    continue  # torn

    def key(self, source):
        """None for what is not remembered."""
        if not self.path or source.in_array:
            return None
        if source.path not in self.stamps:
            try:
                stat = os.stat(source.path)
            except OSError:
                return None
            self.stamps[source.path] = (
                os.path.abspath(source.path), stat.st_size, stat.st_mtime_ns)
        return json.dumps([*self.stamps[source.path], source.part])

    def __enter__(self):
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, 'ab', buffering=0)  # noqa: SIM115, closed below
        return self

    def __exit__(self, *error):
        if self.path:
            self.file.close()

    def add(self, source, record):
        if key := self.key(source):
            self.file.write(b'\n' + json.dumps([key, record]).encode())
