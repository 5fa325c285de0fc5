"""What a server may load: files of weights by their names, with A1111's hashes."""

import pathlib
import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxsd.run.hashes import SHORT, sha256, tensors_sha256
from jaxsd.sampling.choice import unknown

KINDS = ('checkpoints', 'vaes', 'lora', 'embeddings', 'controlnet', 'upscalers', 'ip_adapter',
         'detectors')


class Weights(NamedTuple):
    """A file or a folder of weights. sha256: None until it is computed; of a LoRA that of its
    tensors, as A1111 has it."""

    name: str
    path: str
    sha256: str | None = None

    @property
    def hash(self) -> str | None:
        """A1111's: the first ten digits of the file's sha256."""
        return self.sha256 and self.sha256[:10]

    @property
    def title(self) -> str:
        """'name [hash]', as A1111 lists checkpoints; the name alone until the hash is known."""
        return f'{self.name} [{self.hash}]' if self.hash else self.name

    @property
    def filename(self) -> str:
        """Without its folder: clients learn no path of the server."""
        return pathlib.PurePath(self.path).name or self.name

    @property
    def aliases(self) -> tuple[str, ...]:
        """All that clients may call it by."""
        return tuple(filter(None, (self.title, self.name, self.filename, self.hash, self.sha256)))


class Choices:
    """Weights of all KINDS. list_files() -> {kind: {name: path}}; raises as `recipe.files`.

    Their hashes are computed in a thread, one file after the other.
    """

    def __init__(self, list_files: Callable[[], Mapping[str, Mapping[str, str]]]) -> None:
        self._list = list_files
        self._files: Mapping[str, Mapping[str, str]] = {}
        self._hashes: dict[str, str | None] = {}
        self.refresh()

    def refresh(self) -> set[str]:
        """Look again which files there are -> the kinds that have changed."""
        found = self._list()
        changed = {kind for kind in KINDS if found.get(kind, {}) != self._files.get(kind, {})}
        self._files = found
        threading.Thread(target=self._hash, daemon=True).start()
        return changed

    def _hash(self):
        for kind in ('checkpoints', 'vaes', 'lora', 'controlnet', 'ip_adapter'):
            for path in list(self._files.get(kind, {}).values()):
                try:
                    self._hashes[path] = (tensors_sha256 if kind == 'lora' else sha256)(path)
                except OSError:  # gone: loading it will say so
                    self._hashes[path] = None

    def all(self, kind: str) -> list[Weights]:
        """The weights of a kind, in the order of their names."""
        return [Weights(name, path, self._hashes.get(path))
                for name, path in sorted(self._files.get(kind, {}).items())]

    def hashes(self, model: str, vae: str = '') -> dict[str, str]:
        """Those of a checkpoint and a VAE of these names and of all LoRAs, as of
        `run.hashes.of_files`, less what is not computed yet."""
        found = {'model': ('checkpoints', model), 'vae': ('vaes', vae), **{
            f'lora:{one.name}': ('lora', one.name) for one in self.all('lora')}}
        known = {name: self._hashes.get(self._files.get(kind, {}).get(file, ''))
                 for name, (kind, file) in found.items()}
        return {name: digest[:SHORT[name.partition(':')[0]]]
                for name, digest in known.items() if digest}

    def find(self, kind: str, what: str, text: str) -> Weights:
        """The weights that a client calls by this name, title, file name or hash. what: the field,
        for the ValueError that names what there is."""
        found = [one for one in self.all(kind) if text in one.aliases]
        if not found:
            raise unknown(what, text, [one.title for one in self.all(kind)])
        return found[0]
