"""`generate`: requests -> pictures, in one line."""

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from jaxsd import images
from jaxsd.images.reading import Picture
from jaxsd.run.engine import MOST_SLOTS, Engine, check_latents
from jaxsd.run.request import Request
from jaxsd.run.resolving import resolve
from jaxsd.weights.model import Model, Network


class Preview(NamedTuple):
    """How to look on: `show(done, total, images)`, uint8 [B,H',W',3], after every so many model
    calls; a picture that has not begun is gray.

    vae: a Network that fits the model's latents, small and fast: jaxsd.load_vae of a TAESD.
    """

    vae: Network
    show: Callable
    every: int = 1


def generate(model: Model, requests: str | Request | Sequence[str | Request],
             on_step: Callable[[int, int], object] | None = None, tile: int | None = None,
             noise: Float[np.ndarray, 'B h w L'] | None = None, refiner: Model | None = None,
             preview: Preview | None = None,
             slots: int | None = None) -> UInt8[np.ndarray, 'B H W 3'] | list[Picture]:
    """Make one picture per request -> uint8 [B,H,W,3], or a list of pictures if their sizes differ.

    requests: a Request, a prompt, or a list of them. All of their fields may differ; only another
    model config, dtype or size, another number of 75-token blocks, or a kind of guidance or
    condition that is switched on or off, compiles. The pictures are spread over the local devices.
    A picture depends neither on the others nor on their number or that of the devices, but on
    `slots` its last bits may (1 of 255); those that one device makes at once, see Engine. None: 1
    on CPU, elsewhere as many as there are requests for each device, a power of two up to 8.

    on_step(done, total): called as model calls finish, those of all pictures together.
    tile: decode in tiles of this many pixels per side, for less memory; None: in one piece.
    noise [B,h,w,L]: standard normal noise to start from, instead of the seeds' own.
    refiner: a Model that takes the latents over where each request's `switch` says, with the noise
        that is left (an ensemble of experts, https://arxiv.org/abs/2307.01952, section 2.5).
    preview: a Preview, to see the pictures come.
    Raises ValueError for requests that do not fit the model and for pictures that are not finite.
    """
    if isinstance(requests, (str, Request)):
        requests = [requests]
    requests = resolve([Request(r) if isinstance(r, str) else r for r in requests], model.config)
    if not requests:
        raise ValueError('requests: expected at least one, found none')
    if preview is not None:
        check_latents('preview', preview.vae.config, model.config.vae)
    if noise is not None:
        noise = np.asarray(noise, np.float32)
        if len(noise) != len(requests):
            raise ValueError(f'noise {noise.shape}: expected one for each of {len(requests)} '
                             'requests')
    with Engine(model, refiner, slots or slots_for_requests(len(requests)), tile) as engine:
        found = engine.make(requests, _watch(on_step, preview), noise, preview and preview.every)
    return np.stack(found) if len({image.shape for image in found}) == 1 else found


def slots_for_requests(count: int) -> int:
    """The slots that `generate` takes for so many requests."""
    if jax.default_backend() == 'cpu':
        return 1
    each = -(-count // jax.local_device_count())
    return min(MOST_SLOTS, 1 << (each - 1).bit_length())


def _watch(on_step, preview):
    """What Engine.make tells as the pictures come, passed on; None: nobody looks on."""
    if on_step is None and preview is None:
        return None
    lock, seen, shown = threading.Lock(), [0], {}

    def watch(tasks, i, look):
        image = None
        if preview is not None and tasks[i].done // preview.every > shown.get(i, (0,))[0]:
            image = look(preview.vae)
        with lock:
            done, total = (sum(counts) for counts in zip(*((t.done, t.total) for t in tasks)))
            if on_step is not None and done > seen[0]:
                on_step(done, total)
            seen[0] = max(done, seen[0])
            if image is not None:
                shown[i] = tasks[i].done // preview.every, image
                height, width, _ = max((one.shape for _, one in shown.values()))
                gray = np.full((height, width, 3), 128, np.uint8)
                preview.show(done, total, np.stack([  # first passes are smaller
                    images.fit(shown[k][1] if k in shown else gray, width, height)
                    for k in range(len(tasks))]))

    return watch
