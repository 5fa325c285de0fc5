"""What pictures look like while they are made."""

import threading
from collections.abc import Callable

import numpy as np
from jax import Array
from jaxtyping import Float, UInt8

from jaxsd.images.reading import Picture
from jaxsd.run.engine import CPU_CELLS, Engine, Task, check_latents
from jaxsd.weights.model import Network


class Previews:
    """Shows unfinished pictures of an Engine, where somebody asks.

    vae: a small one that fits the model's latents (a TAESD), which shows all pictures. Without it,
    latents of at most 64 cells go through the model's own decoder; of larger ones each cell becomes
    one pixel, by the linear map from latents to colours that fits the pictures made so far best.
    """

    def __init__(self, engine: Engine, vae: Network | None = None) -> None:
        if vae is not None:
            check_latents('preview', vae.config, engine.config.vae)
        self.engine, self.vae = engine, vae
        size = engine.config.vae.latent_channels + 1
        self._lock = threading.Lock()  # guards these sums over cells, of products of latents and 1
        self._squares, self._colours = np.zeros((size, size)), np.zeros((size, 3))  # and of both

    def learn(self, task: Task) -> None:
        """See how the latents of a finished picture look."""
        latents, image = task.denoised, task.future.result()
        if latents is None or _small(latents):
            return
        cells = _with_ones(latents)
        height, width = cells.shape[:2]
        factor = self.engine.config.vae.factor
        if image.shape != (height * factor, width * factor, 3):
            return  # was pasted into a larger one
        means = image.reshape(height, factor, width, factor, 3).mean((1, 3), dtype=np.float32)
        cells, means = cells.reshape(-1, cells.shape[-1]), means.reshape(-1, 3)
        with self._lock:
            self._squares += cells.T @ cells
            self._colours += cells.T @ means

    def of(self, task: Task) -> Picture | None:
        """What a picture is by now -> uint8 [h,w,3], or None before there is anything to see. One
        that is done is whole; of others the size may be smaller. Returns at once: where a decoder
        is needed, the engine has it shown after the next rows, for the next who asks."""
        if task.future.done():
            failed = task.future.cancelled() or task.future.exception()
            return None if failed else task.future.result()
        if task.denoised is not None and not self._decodes(task.denoised):
            return self._linear(task.denoised)
        task.wanted = True
        return task.preview

    def watch(self, task: Task, look: Callable[[Network], Picture]) -> None:
        """The `watch` of the pictures that are shown. A decoder that other threads called would
        come after all that the lanes have begun: on a CPU, when the pictures are done."""
        if not task.wanted or not self._decodes(task.denoised):
            return
        task.wanted = False
        task.preview = (look(self.vae) if self.vae is not None else
                        np.asarray(task.decode()[0])[0])

    def _decodes(self, latents):
        return self.vae is not None or _small(latents)

    def _linear(self, latents: Float[Array, '1 h w L']) -> UInt8[np.ndarray, 'h w 3'] | None:
        """One pixel for each cell; None before a picture was made."""
        with self._lock:
            if not self._squares.any():
                return None
            shrink = 1e-3 * self._squares[-1, -1] * np.eye(len(self._squares))
            shrink[-1, -1] = 0  # a model that only drew one colour still has a mean
            colours = np.linalg.solve(self._squares + shrink, self._colours)
        return np.round(np.clip(_with_ones(latents) @ colours, 0, 255)).astype(np.uint8)


def _small(latents):
    return latents.shape[1] * latents.shape[2] <= CPU_CELLS


def _with_ones(latents):
    """Latents [1,h,w,L] -> [h,w,L+1]."""
    cells = np.asarray(latents[0], np.float32)
    return np.concatenate([cells, np.ones_like(cells[..., :1])], -1)
