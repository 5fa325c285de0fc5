"""A run's folder: pictures, and a line for each in a manifest that only grows.

    config.json               what all of its pictures have in common
    manifest.jsonl            a line for each picture that is there, or that failed
    manifest-1.jsonl ...      the same of other processes, one file each
    pictures/ab/abcd....png   by id
    thumbs/ab/abcd....webp    of large pictures
    index.html                the gallery

A picture's line is written when its file is safe on disk. So whatever moment a process is killed
at, a picture that has a line is whole, and one without a line is made again.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import pathlib
import threading

import numpy as np

from jaxsd import images
from jaxsd.run import picture

TEMPORARY = '.*.tmp'  # what picture.write_whole leaves where it is killed


class Busy(ValueError):
    """Another process writes there."""


def read(path):
    """The records of a run, {id: record}, the last of each; a picture's record wins over errors."""
    found = {}
    for name in sorted(glob.glob(os.path.join(glob.escape(str(path)), 'manifest*.jsonl'))):
        with open(name, 'rb') as file:
            for line in file:
                if not line.endswith(b'\n'):
                    break  # torn: its writer was killed
                try:
                    record = json.loads(line)
                except ValueError:
                    raise ValueError(f'{name} is damaged, by a line that is no JSON') from None
                if 'error' not in record or 'error' in found.get(record['id'], record):
                    found[record['id']] = record
    return found


def finished(path):
    """The ids of a run's pictures that are there; none where there is no run."""
    return {key for key, record in read(path).items()
            if 'file' in record and os.path.exists(os.path.join(path, record['file']))}


def pixels(image):
    """The hash by which pictures are compared: of an image, uint8 [H,W,3] -> 64 hex digits."""
    image = np.ascontiguousarray(image)
    return hashlib.sha256(f'{image.shape}'.encode() + image.tobytes()).hexdigest()


def encode(image, texts):
    """A picture, uint8 [H,W,3], and its text chunks -> what `Folder.add` takes."""
    height, width = image.shape[:2]
    return {'file': picture.png(image, texts), 'thumb': picture.thumbnail(image),
            'pixels': pixels(image), 'width': width, 'height': height}


def pixels_of(path):
    """`pixels` of a picture's file, which is read whole. Raises as images.read does."""
    return pixels(images.read(path))


class Folder:
    """A run's folder, opened by one of its processes; threads may add to it at once.

    Raises Busy where another process holds it, ValueError where it holds a run of other settings,
    OSError where nothing can be written.
    """

    def __init__(self, path, config=None, process=0):
        self.path = picture.check_folder(path)
        self._lock = threading.Lock()
        self._held = self._hold(process)
        try:
            if process == 0:
                for name in self.path.rglob(TEMPORARY):
                    name.unlink()
                self._agree(config)
            name = f'manifest-{process}.jsonl' if process else 'manifest.jsonl'
            self._manifest = os.open(self.path / name, os.O_RDWR | os.O_CREAT, 0o666)
            self._end = _whole_lines(self._manifest)
            os.ftruncate(self._manifest, self._end)
            os.fsync(self._manifest)
            _sync(self.path)
        except BaseException:
            os.close(self._held)
            raise

    def close(self):
        """Let another process have it."""
        os.close(self._manifest)
        os.close(self._held)

    def add(self, key, encoded, record):
        """Keep a picture, `encode`d, and then its record: safe on disk when it returns. Raises
        OSError."""
        record = {'id': key, **record, **encoded}
        for name, place in (('file', 'pictures/{}/{}.png'), ('thumb', 'thumbs/{}/{}.webp')):
            if (data := record.pop(name)) is None:
                continue
            record[name] = place = place.format(key[:2], key)
            path = self.path / place
            if not path.parent.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                _sync(path.parent.parent)
            picture.write_whole(path, data, sync=True)
            _sync(path.parent)
        self._append(record)

    def fail(self, key, error, record):
        """Keep that a picture could not be made, and why."""
        self._append({'id': key, **record, 'error': str(error)})

    def _append(self, record):
        line = picture.unicode(
            json.dumps(record, default=picture.describe, ensure_ascii=False) + '\n')
        with self._lock:
            try:
                done = 0
                while done < len(line):
                    done += os.pwrite(self._manifest, line[done:], self._end + done)
                os.fsync(self._manifest)
            except OSError:  # a full disk takes a part of a line
                with contextlib.suppress(OSError):
                    os.ftruncate(self._manifest, self._end)
                raise
            self._end += len(line)

    def _hold(self, process):
        handle = os.open(self.path / f'.lock-{process}', os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(handle)
                raise Busy(f'{self.path}: another process makes pictures there; wait for it, or '
                           'give another folder') from None
            # A file system without locks: nothing protects from a second run.
        return handle

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


def read_config(path):
    """What a run's config.json says. Raises FileNotFoundError or ValueError where there is none."""
    file = pathlib.Path(path) / 'config.json'
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: expected the folder of a run, with its config.json'
                                ) from None
    except ValueError:
        raise ValueError(f'{file} is damaged') from None


def _whole_lines(handle):
    """The length of a file up to its last whole line."""
    end = os.lseek(handle, 0, os.SEEK_END)
    while end:
        start = max(end - 2**16, 0)
        at = os.pread(handle, end - start, start).rfind(b'\n')
        if at >= 0:
            return start + at + 1
        end = start
    return 0


def _sync(folder):
    """Make the names in a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
