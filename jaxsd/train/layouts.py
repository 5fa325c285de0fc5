"""The layouts that data sets have on disk, and where in them the bytes of a picture are.

A reader takes (SetConfig, DataConfig, Report) and yields a Found for each picture, not yet opened;
what is wrong it tells the report. READERS has them by the names of SetConfig.kind.
"""

import collections
import csv
import functools
import glob
import io
import json
import os
import pathlib
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from jaxsd import images
from jaxsd.images.reading import Picture
from jaxsd.train.data_config import DataConfig, SetConfig

PICTURES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.avif')
MEMBERS = ('jpg', 'jpeg', 'png', 'webp')  # of a tar shard
METADATA = ('metadata.jsonl', 'metadata.csv')
KOHYA = re.compile(r'(\d+)_(.+)')  # a folder's name: repeats, and the caption of its pictures


class Source(NamedTuple):
    """Where the bytes of a picture are."""

    path: str
    name: str  # for people
    part: tuple | None = None  # (offset, size) in a tar, (array, row) in an .npz

    @property
    def in_array(self) -> bool:
        """Whether it is a row of an .npz."""
        return self.part is not None and isinstance(self.part[0], str)


def read_picture(source: Source) -> Picture:
    """The picture, uint8 [H,W,3]. Raises ValueError or OSError, which name it."""
    if source.part is None:
        return images.read(source.path)
    if source.in_array:
        name, row = source.part or ()
        return images.read(_arrays(source.path)[name][row])
    return images.read_bytes(read_bytes(source), source.name, 2**62)  # Pillow's limit stands


def read_bytes(source: Source) -> bytes:
    """The bytes of a file, a member or a row."""
    if source.in_array:
        name, row = source.part or ()
        return _arrays(source.path)[name][row].tobytes()
    offset, size = source.part or (0, -1)
    with open(source.path, 'rb') as file:
        file.seek(offset)
        return file.read(size)


@functools.lru_cache(maxsize=8)
def _arrays(path):
    """The arrays of an .npz, once a process."""
    try:
        with np.load(path) as data:
            return {name: data[name] for name in data.files}
    except FileNotFoundError:
        raise ValueError(f'{path}: no such file') from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f'{path} is no .npz of arrays that can be read: {error}') from None


class Found(NamedTuple):
    """A picture before it is looked at."""

    source: Source
    captions: tuple[str, ...] = ()  # (): nobody wrote one
    repeats: int = 1
    hint: Source | None = None
    heldout: bool | None = None  # None: by DataConfig.heldout


class Report:
    """Problems, and notes that are counted instead of said for every file."""

    def __init__(self) -> None:
        self.problems: dict[str, str] = {}  # by the file's name
        self.lines: list[str] = []  # notes of one file or folder
        self.counts: dict[str, int] = collections.Counter()  # of notes

    def problem(self, name: str, what: object) -> None:
        """Note what is wrong with a file, the first time only."""
        what = str(what)
        self.problems.setdefault(name, ' '.join(
            (what if str(name) in what else f'{name}: {what}').split('\n')))

    def notes(self) -> list[str]:
        """What a user should know, a line each."""
        return self.lines + [f'{what}: {count}' for what, count in sorted(self.counts.items())]

    def text(self, data: bytes, name: str) -> str:
        """The text in the bytes of a file."""
        try:
            wide = data[:2] in (b'\xff\xfe', b'\xfe\xff')
            return data.decode('utf-16' if wide else 'utf-8-sig')
        except UnicodeDecodeError:
            self.lines.append(f'{name}: not UTF-8, read as Latin-1')
            return data.decode('latin-1')

    def captions(self, data: bytes, name: str, config: DataConfig) -> tuple[str, ...]:
        """The captions in the bytes of a text file."""
        lines = [line.strip() for line in self.text(data, name).splitlines()] or ['']
        if len(several := [line for line in lines if line]) > 1:
            if config.caption_lines == 'random':
                return tuple(several)
            self.counts['captions of several lines, of which the first counts'] += 1
        return (lines[0],)


def kind_of(one: SetConfig) -> str:
    """What a path looks like."""
    path = pathlib.Path(one.path)
    if path.suffix == '.npz':
        return 'npz'
    if path.suffix == '.tar':
        return 'webdataset'
    if not path.is_dir():
        raise ValueError(f'{path}: no such folder; expected a folder, shards*.tar or an .npz')
    names = [name for _, _, files in _walk(path) for name in files]
    if any(name in METADATA for name in names):
        return 'imagefolder'
    if any(map(_is_picture, names)):
        return 'folder'
    return 'webdataset' if any(name.endswith('.tar') for name in names) else 'folder'


def _walk(root):
    """(path, folder relative to root, sorted file names) of each folder; hidden ones are left."""
    visited = set()
    for path, folders, files in os.walk(root, followlinks=True):
        here = os.path.realpath(path)
        folders[:] = [] if here in visited else sorted(f for f in folders if f[0] != '.')
        if here not in visited:
            visited.add(here)
            yield path, os.path.relpath(path, root), sorted(f for f in files if f[0] != '.')


def _is_picture(name):
    return os.path.splitext(name)[1].lower() in PICTURES


def _hints(one):
    """{path of a hint relative to its folder, less the extension: its path}."""
    if not one.hints:
        return None
    if not os.path.isdir(one.hints):
        raise ValueError(f'hints={one.hints}: no such folder')
    return {os.path.splitext(os.path.normpath(os.path.join(folder, name)))[0]:
            os.path.join(path, name)
            for path, folder, files in _walk(one.hints) for name in files if _is_picture(name)}


def _hint_of(hints, relative, one, path, report):
    """(whether a picture may be used, its hint)."""
    if hints is None:
        return True, None
    hint = hints.get(os.path.splitext(os.path.normpath(relative))[0])
    if hint is None:
        report.problem(path, f'{path} has no hint of the same name in {one.hints}')
        return False, None
    return True, Source(hint, hint)


def read_folder(one: SetConfig, config: DataConfig, report: Report) -> Iterator[Found]:
    """Pictures in a folder and the folders in it, each with its caption in a text file beside it.

    A folder in it called `N_words` (kohya's) repeats its pictures N times; the words are the
    caption of those that have no file. The innermost such folder counts.
    """
    hints, extension = _hints(one), config.caption_extension
    if KOHYA.fullmatch(pathlib.Path(os.path.abspath(one.path)).name):
        report.lines.append(f'{one.path}: repeats are read from the names of the folders in it, '
                            "not from its own; give the folder above, or the set's repeats")
    for folder, relative, files in _walk(one.path):
        names, used = set(files), set()
        parts = reversed(pathlib.Path(relative).parts)
        match = next((m for m in map(KOHYA.fullmatch, parts) if m), None)
        repeats, words = (int(match[1]), match[2]) if match else (1, '')
        pictures = [name for name in files if _is_picture(name)]
        if match and pictures and not repeats:
            report.problem(folder, f'{folder} is repeated 0 times: rename it to use it')
            continue
        if match and pictures:
            report.lines.append(f'{folder}: {len(pictures)} pictures, {repeats} times')
        for name in pictures:
            path, text = os.path.join(folder, name), os.path.splitext(name)[0] + extension
            good, hint = _hint_of(hints, os.path.join(relative, name), one, path, report)
            captions = (words,) if words and not one.caption else ()
            if text in names:
                used.add(text)
                full = os.path.join(folder, text)
                try:
                    captions = report.captions(read_bytes(Source(full, full)), full, config)
                except OSError as error:
                    report.problem(full, error)
                    good = False
            if good:
                yield Found(Source(path, path), captions, repeats, hint)
        for name in names - used - set(pictures):
            suffix = os.path.splitext(name)[1]
            kind = 'caption files without a picture' if suffix == extension else (
                f'files that are no pictures ({suffix or name})')
            report.counts[kind] += 1


def read_imagefolder(one: SetConfig, config: DataConfig, report: Report) -> Iterator[Found]:
    """Hugging Face's imagefolder: metadata.jsonl or .csv with file_name and the caption's column.

    A list of captions is several to choose from.
    """
    hints, listed, there = _hints(one), set(), set()
    for folder, relative, files in _walk(one.path):
        there |= {os.path.normpath(os.path.join(folder, f)) for f in files if _is_picture(f)}
        for metadata in (os.path.join(folder, name) for name in files if name in METADATA):
            for where, row in _rows(metadata, report):
                if not isinstance(row.get('file_name'), str) or one.text_column not in row:
                    report.problem(where, f'{where}: expected file_name and {one.text_column} (the '
                                   f'set\'s text_column), found {", ".join(map(str, row))}')
                    continue
                path = os.path.normpath(os.path.join(folder, row['file_name']))
                listed.add(path)
                good, hint = _hint_of(hints, os.path.join(relative, row['file_name']), one, path,
                                      report)
                if one.hint_column:
                    file = row.get(one.hint_column)
                    if not (good := isinstance(file, str)):
                        report.problem(where, f'{where}: expected {one.hint_column}, found none')
                    else:
                        file = os.path.normpath(os.path.join(folder, file))
                        listed.add(file)
                        hint = Source(file, file)
                if good:
                    yield Found(Source(path, path), _texts(row[one.text_column]), 1, hint)
    if rest := there - listed:
        report.counts[f'pictures that no line of metadata names, such as {min(rest)}'] = len(rest)


def _rows(path, report):
    """('file:line', dict) of each row of metadata."""
    text = report.text(pathlib.Path(path).read_bytes(), path)
    if path.endswith('.csv'):
        try:
            for i, row in enumerate(csv.DictReader(io.StringIO(text)), 1):
                yield f'{path}, row {i}', row
        except csv.Error as error:
            report.problem(path, f'{path} is no CSV: {error}')
        return
    for i, line in enumerate(text.split('\n'), 1):
        try:
            row = json.loads(line) if line.strip() else None
            if row is not None and not isinstance(row, dict):
                raise ValueError('expected an object')
        except ValueError as error:
            report.problem(f'{path}:{i}', f'{path}:{i} is no JSON object: {error}')
            continue
        if row is not None:
            yield f'{path}:{i}', row


def _texts(value):
    """A caption, or a list of them, as a tuple of texts."""
    values = value if isinstance(value, list) else [value]
    return tuple(str(text or '').strip() for text in values)


def expand_shards(path: str) -> list[str]:
    """The files of 'a-{000..012}.tar', 'a-{x,y}.tar', 'a-*.tar', or all .tar files of a folder.

    Numbers keep their zeros, as in a shell. Named files need not exist.
    """
    if os.path.isdir(path):
        return sorted(os.path.join(folder, name) for folder, _, files in _walk(path)
                      for name in files if name.endswith('.tar'))
    if match := re.search(r'\{([^{}]*)\}', path):
        parts = match[1].split(',')
        if span := re.fullmatch(r'(\d+)\.\.(\d+)', match[1]):
            first, last = span.groups()
            parts = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        return [file for part in parts
                for file in expand_shards(path[:match.start()] + part + path[match.end():])]
    return sorted(glob.glob(path)) if glob.has_magic(path) else [path]


def read_webdataset(one: SetConfig, config: DataConfig, report: Report) -> Iterator[Found]:
    """Tar shards: files of one name are one example, as 000.jpg with 000.txt or 000.json.

    The JSON's caption is its 'caption' or 'text'; a hint is 000.hint.png. Any example is read by
    its offset, so shards are shuffled as a whole.
    """
    if one.hints:
        raise ValueError(f'hints={one.hints}: in tar shards hints are members, 000.hint.png')
    for shard in expand_shards(one.path):
        groups = collections.defaultdict(dict)
        for member in _members(shard, report):
            folder, name = os.path.split(member.name)
            key, _, extension = name.partition('.')
            source = Source(shard, f'{shard}:{member.name}', (member.offset_data, member.size))
            group = groups[os.path.join(folder, key)]
            if group.setdefault(extension.lower(), source) != source:
                report.problem(source.name, f'{source.name} is there twice: the first is used')
        for key, files in groups.items():
            picture, *more = [files.pop(e) for e in MEMBERS if e in files] or [None]
            hint, *_ = [files.pop(f'hint.{e}') for e in MEMBERS if f'hint.{e}' in files] or [None]
            captions = ()
            if 'txt' in files:
                text = files.pop('txt')
                captions = report.captions(read_bytes(text), text.name, config)
                files.pop('json', None)  # further data of the same example
            elif 'json' in files:
                captions = _json_caption(files.pop('json'), report)
            for extension in files:
                report.counts[f'members that are not read (.{extension})'] += 1
            for source in more:
                report.problem(source.name, f'{source.name}: the example has another picture, too')
            if picture is None:
                report.counts[f'examples without a picture, such as {shard}:{key}'] += 1
            else:
                yield Found(picture, captions, 1, hint)


def _json_caption(source, report):
    try:
        row = json.loads(read_bytes(source))
        if not isinstance(row, dict):
            raise ValueError('expected an object')
    except ValueError as error:
        report.problem(source.name, f'{source.name} is no JSON object: {error}')
        return ()
    return next((_texts(row[key]) for key in ('caption', 'text') if key in row), ())


def _members(shard, report):
    """The files of a tar, whole ones only; names what is wrong with the rest."""
    try:
        size = os.path.getsize(shard)
        with tarfile.open(shard, 'r:') as tar:
            try:
                for member in tar:
                    if member.isreg() and member.offset_data + member.size <= size:
                        if not os.path.basename(member.name).startswith('.'):
                            yield member
                    elif member.isreg():
                        break
            except tarfile.ReadError:
                pass  # said below: the end is missing
            end = tar.offset
        with open(shard, 'rb') as file:
            file.seek(end)
            if file.read(512) != bytes(512):
                report.problem(shard, f'{shard} is cut off or damaged behind byte '
                               f'{min(end, size)}: what stands before is used')
    except FileNotFoundError:
        report.problem(shard, f'{shard}: no such file')
    except (tarfile.TarError, OSError) as error:
        report.problem(shard, f'{shard} is no uncompressed tar: {error}')


def read_npz(one: SetConfig, config: DataConfig, report: Report) -> Iterator[Found]:
    """Arrays: images uint8 [N,H,W,3], captions [N]; there may be plain, heldout bool [N], repeats
    int [N] and hints uint8 [N,H,W,3]."""
    arrays = _arrays(one.path)
    count = len(arrays.get('images', ()))
    for name, needed in {'images': True, 'captions': True, 'plain': False, 'heldout': False,
                         'repeats': False, 'hints': False}.items():
        if needed and name not in arrays:
            raise ValueError(f'{one.path} has no array {name}: expected images and captions, found '
                             + ', '.join(arrays))
        if name in arrays and len(arrays[name]) != count:
            raise ValueError(f'{one.path}: {count} images and {len(arrays[name])} of {name}: '
                             'expected as many')
    for i in range(count):
        def source(name, i=i):
            return Source(one.path, f'{one.path}:{name}[{i}]', (name, i))
        repeats = int(arrays['repeats'][i]) if 'repeats' in arrays else 1
        if 'plain' in arrays and arrays['plain'][i]:
            repeats *= one.plain_repeats
        yield Found(source('images'), (str(arrays['captions'][i]),), repeats,
                    source('hints') if 'hints' in arrays else None,
                    bool(arrays['heldout'][i]) if 'heldout' in arrays else None)


READERS: dict[str, Callable[[SetConfig, DataConfig, Report], Iterable[Found]]] = {
    'folder': read_folder, 'imagefolder': read_imagefolder, 'webdataset': read_webdataset,
    'npz': read_npz}
