"""Hashes of files of weights, as A1111 (modules/hashes.py) writes them beside names of models."""

import contextlib
import functools
import hashlib
import pathlib
import threading
from collections.abc import Mapping
from typing import Any

from jaxsd.run.programs import recall, remember
from jaxsd.typing import Path

SHORT = {'model': 10, 'vae': 10, 'lora': 12}  # digits that are written
LARGE = 2**26  # bytes; hashes of smaller files are not kept on the disk
_computing = threading.RLock()  # who waits for a file finds it computed


def sha256(path: Path) -> str | None:
    """A file's, or that of the U-Net's file in a folder of diffusers' -> hex digits; None for a
    model of the Hub and for a folder without weights."""
    return _digest(path, 'whole')


def tensors_sha256(path: Path) -> str | None:
    """The same of a .safetensors file without its header, which kohya-ss' sd-scripts and A1111
    call a LoRA by; of other files the whole."""
    return _digest(path, 'tensors' if str(path).endswith('.safetensors') else 'whole')


def old_hash(path: Path) -> str | None:
    """The 8 digits that A1111 had before version 1.0, of 64 KiB behind the first MiB."""
    found = _file(path)
    if found is None:
        return None
    with open(found, 'rb') as file:
        file.seek(2**20)
        return hashlib.sha256(file.read(2**16)).hexdigest()[:8]


def files_of(run: Mapping[str, Any]) -> dict[str, str]:
    """What a picture's record names (checkpoint, vae, lora) -> {'model', 'vae', 'lora:NAME':
    path}."""
    found = {name: run.get(key) for name, key in (('model', 'checkpoint'), ('vae', 'vae'))}
    found |= {f'lora:{name}': path for name, _, path in
              (text.partition('=') for text in run.get('lora') or ())}
    return {name: str(path) for name, path in found.items() if path}


def of_files(run: Mapping[str, Any]) -> dict[str, str]:
    """The same -> the short hashes of these files, for `picture.parameters`. Seconds for each GB
    that is not known yet."""
    found = {}
    for name, path in files_of(run).items():
        kind = name.partition(':')[0]
        digest = (tensors_sha256 if kind == 'lora' else sha256)(path)
        if digest:
            found[name] = digest[:SHORT[kind]]
    return found


def begin(run: Mapping[str, Any]) -> None:
    """`of_files` in a thread, so that they are known when they are asked for."""
    def compute():
        with contextlib.suppress(OSError):  # `of_files` raises it again
            of_files(run)

    threading.Thread(target=compute, daemon=True).start()


def differences(expected: Mapping[str, str], run: Mapping[str, Any]) -> list[str]:
    """A line for each file that is not the one whose hash a picture's text has. expected: of
    Metadata.hashes; run: as of `files_of`."""
    lines = []
    for name, path in files_of(run).items():
        digest = expected.get(name, '').lower()
        if not digest:
            continue
        ours = [tensors_sha256(path) if name.startswith('lora:') else None, sha256(path)]
        known = [one for one in ours if one]
        if len(digest) == 8:
            known += [one for one in (old_hash(path),) if one]
        if known and not any(one.startswith(digest) for one in known):
            what = name.replace('lora:', 'LoRA ')
            lines.append(f'{what}: the picture was made with the file of hash {digest}, and {path} '
                         f'has {known[0][:len(digest)]}')
    return lines


def _file(path):
    """The file that is hashed, None where there is none."""
    found = pathlib.Path(path)
    if found.is_dir():
        inside = found / 'unet' if (found / 'unet').is_dir() else found
        files = sorted(inside.glob('*.safetensors')) or sorted(inside.glob('*.bin'))
        found = files[0] if files else found
    return found if found.is_file() else None


def _digest(path, part):
    found = _file(path)
    if found is None:
        return None
    state = found.stat()
    with _computing:
        return _computed(str(found.resolve()), part, state.st_size, state.st_mtime_ns)


@functools.lru_cache(4096)
def _computed(path, part, size, mtime):
    """Of a file that is as it was: known to this process, or to one before it."""
    key, state = f'{part} {path}', [size, mtime]
    if size >= LARGE and (known := recall('hashes.json').get(key)) and known[:2] == state:
        return known[2]
    with open(path, 'rb') as file:
        if part == 'tensors':
            file.seek(8 + int.from_bytes(file.read(8), 'little'))
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
    if size >= LARGE:
        remember('hashes.json', **{key: [*state, digest]})
    return digest
