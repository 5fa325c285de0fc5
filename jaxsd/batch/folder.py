"""A run's folder: pictures, and a line for each in a manifest that only grows.

    config.json               what all of its pictures have in common
    manifest.jsonl            a line for each picture that is there, or that failed
    manifest-1.jsonl ...      the same of other processes, one file each
    pictures/ab/abcd....png   by id
    thumbs/ab/abcd....webp    of large pictures
    index.html                the gallery

A picture's line is written when its file is safe on disk. So whatever moment a process is killed
at, a picture that has a line is whole, and one without a line is made again. What happens to files
later, a line tells by their sizes: those that are cut, emptied or replaced are made again too.

Nothing else in the folder is written, renamed or deleted, and a folder in which one of these names
stands for something else is refused before anything is.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import pathlib
import re
import threading
from collections.abc import Mapping
from typing import Any

import filelock
import numpy as np

from jaxsd import images
from jaxsd.images.reading import Picture
from jaxsd.run import picture
from jaxsd.typing import Path

PLACES = {'file': 'pictures/{}/{}.png', 'thumb': 'thumbs/{}/{}.webp'}
TEMPORARY = ('.config.json.????????.tmp', '.index.html.????????.tmp', '.manifest*.????????.tmp',
             'pictures/??/.*.png.????????.tmp', 'thumbs/??/.*.webp.????????.tmp')
# What picture.write_whole leaves where it is killed.
FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, 'O_BINARY', 0)  # Windows: '\n' stays one byte


class Busy(ValueError):
    """Another process writes there."""


def check(path: Path, process: int = 0) -> None:
    """Raise ValueError where a folder's files are not a run's, before anything is written."""
    path, manifest = pathlib.Path(path), _manifest(process)
    names = ('config.json', manifest, 'index.html', 'pictures', 'thumbs', f'.lock-{process}')
    for name in names:
        if (path / name).is_symlink():
            raise ValueError(f"{path / name} is a link: expected the run's own file; give another "
                             'folder')
    if (path / 'config.json').exists():
        read_config(path)
        return
    for name in names[1:-1]:
        if (path / name).is_dir() or (path / name).exists() and (path / name).stat().st_size:
            raise ValueError(f'{path} holds {name}, which is of no run, as config.json is not '
                             'there: nothing was touched; give another folder')


def _manifest(process):
    return f'manifest-{process}.jsonl' if process else 'manifest.jsonl'


def _manifests(path):
    """{number of a process: path of its manifest}."""
    found = {}
    for name in os.listdir(path) if os.path.isdir(path) else ():
        if match := re.fullmatch(r'manifest(?:-([1-9]\d*))?\.jsonl', name):
            found[int(match[1] or 0)] = os.path.join(path, name)
    return dict(sorted(found.items()))


def _lines(file):
    """Each whole line of a manifest -> (the line, its record or None, what is wrong with it)."""
    with open(file, 'rb') as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b'\n'):
                break  # torn: its writer was killed
            try:
                record, wrong = _record(json.loads(line)), None
            except (ValueError, RecursionError) as error:
                record, wrong = None, f'{file}:{number}: damaged, this is no record: {error}'
            yield line, record, wrong


def _record(found):
    """A line's JSON, as it was written: a dict whose files are those of its id."""
    if not isinstance(found, dict) or not isinstance(found.get('id'), str):
        raise ValueError('expected an object with an id')
    if not isinstance(found.get('pixels' if 'file' in found else 'error'), str):
        raise ValueError('expected a file with the hash of its pixels, or an error')
    if not isinstance(found.get('request', {}), dict) or type(found.get('index', 0)) is not int:
        raise ValueError('expected request, an object, and index, a whole number')
    for name, place in PLACES.items():
        key = found['id']
        if name in found and (not re.fullmatch('[0-9a-f]+', key)
                              or found[name] != place.format(key[:2], key)):
            raise ValueError(f'{name} is {found[name]!a}, which does not belong to its id')
    return found


def read(path: Path, troubles: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """The records of a run, {id: record}, the last of each; a picture's record wins over errors.

    troubles: a list that is told, in a line each, the damaged lines of manifests: they are skipped.
    """
    found, troubles = {}, [] if troubles is None else troubles
    for file in _manifests(path).values():
        for _, record, wrong in _lines(file):
            if wrong:
                troubles.append(wrong)
            elif 'error' not in record or 'error' in found.get(record['id'], record):
                found[record['id']] = record
    return found


def finished(path: Path, troubles: list[str] | None = None) -> set[str]:
    """The ids of a run's pictures that are there, as long as they were written; none where there is
    no run. troubles: as of `read`, with the pictures that are not."""
    found, troubles = set(), [] if troubles is None else troubles
    for key, record in read(path, troubles).items():
        if 'file' in record:
            if wrong := damage(path, record):
                troubles.append(wrong)
            else:
                found.add(key)
    return found


def damage(path: Path, record: Mapping[str, Any], whole: bool = False) -> str | None:
    """What is wrong with the files of a picture's record, in a line, or None. whole: the picture is
    read too, and compared."""
    for name in PLACES:
        if name not in record:
            continue
        try:
            size = os.lstat(os.path.join(path, record[name])).st_size
        except OSError as error:
            return f'{record[name]}: {error.strerror}'
        if size != record.get(f'{name}_bytes', size):
            return f'{record[name]}: {size} bytes, expected {record[f"{name}_bytes"]}'
    try:
        if whole and pixels_of(os.path.join(path, record['file'])) != record['pixels']:
            return f'{record["file"]}: the file holds another picture than was written'
    except (ValueError, OSError) as error:
        return f'{record["file"]}: {error}'
    return None


def repair(path: Path) -> list[str]:
    """Take out of a run's manifests what is damaged, so that its next start makes it again: lines
    that are no records, and those of pictures that are not as they were written -> a list of what
    is wrong. Reads all pictures. Raises Busy, and as `read_config` does."""
    path, found = pathlib.Path(path), []
    read_config(path)
    with contextlib.ExitStack() as held:
        manifests = _manifests(path)
        for process in manifests:
            check(path, process)
            held.callback(_hold(path, process).release)
        for file in manifests.values():
            kept, before = [], len(found)
            for line, record, wrong in _lines(file):
                wrong = wrong or 'file' in record and damage(path, record, whole=True)
                found.append(wrong) if wrong else kept.append(line)
            if len(found) > before:
                picture.write_whole(file, b''.join(kept), sync=True)
        _sync(path)
    return found


def pixels(image: Picture) -> str:
    """The hash by which pictures are compared: of an image, uint8 [H,W,3] -> 64 hex digits."""
    image = np.ascontiguousarray(image)
    return hashlib.sha256(f'{image.shape}'.encode() + image.tobytes()).hexdigest()


def encode(image: Picture, texts: Mapping[str, str]) -> dict[str, Any]:
    """A picture, uint8 [H,W,3], and its text chunks -> what `Folder.add` takes."""
    height, width = image.shape[:2]
    return {'file': picture.png(image, texts), 'thumb': picture.thumbnail(image),
            'pixels': pixels(image), 'width': width, 'height': height}


def pixels_of(path: Path) -> str:
    """`pixels` of a picture's file, which is read whole. Raises as images.read does."""
    return pixels(images.read(path))


class Folder:
    """A run's folder, opened by one of its processes; threads may add to it at once.

    Raises Busy where another process holds it, ValueError where it holds a run of other settings or
    what is of no run (see `check`), OSError where nothing can be written.
    """

    def __init__(self, path: Path, config: Mapping[str, Any] | None = None,
                 process: int = 0) -> None:
        check(path, process)
        self.path = picture.check_folder(path)
        self._lock = threading.Lock()
        self._held = _hold(self.path, process)
        try:
            if process == 0:
                self._agree(config)
                for name in itertools.chain(*map(self.path.glob, TEMPORARY)):
                    name.unlink()
            self._manifest = os.open(self.path / _manifest(process), FLAGS, 0o666)
            self._end = _whole_lines(self._manifest)
            os.ftruncate(self._manifest, self._end)
            os.fsync(self._manifest)
            _sync(self.path)
        except BaseException:
            self._held.release()
            raise

    def close(self) -> None:
        """Let another process have it."""
        os.close(self._manifest)
        self._held.release()

    def add(self, key: str, encoded: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Keep a picture, `encode`d, and then its record: safe on disk when it returns. Raises
        OSError."""
        record = {'id': key, **record, **encoded}
        for name, place in PLACES.items():
            if (data := record.pop(name)) is None:
                continue
            record[name], record[f'{name}_bytes'] = place.format(key[:2], key), len(data)
            path = self.path / record[name]
            if not path.parent.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                _sync(path.parent.parent)
            picture.write_whole(path, data, sync=True)
            _sync(path.parent)
        self._append(record)

    def fail(self, key: str, error: Exception, record: Mapping[str, Any]) -> None:
        """Keep that a picture could not be made, and why."""
        self._append({'id': key, **record, 'error': str(error)})

    def _append(self, record):
        line = picture.unicode(
            json.dumps(record, default=picture.describe, ensure_ascii=False) + '\n')
        with self._lock:
            try:
                os.lseek(self._manifest, self._end, os.SEEK_SET)
                done = 0
                while done < len(line):
                    done += os.write(self._manifest, line[done:])
                os.fsync(self._manifest)
            except OSError:  # a full disk takes a part of a line
                with contextlib.suppress(OSError):
                    os.ftruncate(self._manifest, self._end)
                raise
            self._end += len(line)

    def _agree(self, config):
        """Write config.json, or find the same settings there."""
        file = self.path / 'config.json'
        if config is None:
            return
        if file.exists():
            before = read_config(self.path)
            wrong = [f'{name} {before["settings"].get(name)}, here {value}'
                     for name, value in config['settings'].items()
                     if before['settings'].get(name) != value]
            if wrong:
                raise ValueError(f'{self.path} holds pictures of a run with other settings: '
                                 f'{"; ".join(wrong)}. Give another folder, or the same settings')
        picture.write_whole(
            file, picture.unicode(json.dumps(config, indent=1, ensure_ascii=False)), True)
        _sync(self.path)


def read_config(path: Path) -> dict[str, Any]:
    """What a run's config.json says. Raises FileNotFoundError or ValueError where there is none."""
    file = pathlib.Path(path) / 'config.json'
    try:
        found = json.loads(file.read_text('utf-8'))
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: expected the folder of a run, with its config.json'
                                ) from None
    except (ValueError, RecursionError):
        raise ValueError(f'{file} is damaged') from None
    if not isinstance(found, dict) or not isinstance(found.get('settings'), dict):
        raise ValueError(f"{file} is of no run: expected its settings; give a run's folder, or one "
                         'that is not there yet')
    return found


def _hold(path, process):
    """A process's lock on a run -> it, held until it is released or the process ends."""
    lock = filelock.FileLock(path / f'.lock-{process}', blocking=False, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise Busy(f'{path}: another process makes pictures there; wait for it, or give '
                   'another folder') from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        # A file system without locks: nothing protects from a second run.
    return lock


def _whole_lines(handle):
    """The length of a file up to its last whole line."""
    end = os.lseek(handle, 0, os.SEEK_END)
    while end:
        start = max(end - 2**16, 0)
        os.lseek(handle, start, os.SEEK_SET)
        at = os.read(handle, end - start).rfind(b'\n')
        if at >= 0:
            return start + at + 1
        end = start
    return 0


def _sync(folder):
    """Make the names in a folder last; Windows, which opens no folders, keeps them in a journal."""
    if os.name == 'nt':
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
