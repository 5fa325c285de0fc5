"""Prompts for parts of a picture, and pictures larger than what the network sees at once."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from jaxsd import images
from jaxsd.config import T2IAdapterConfig
from jaxsd.run.request import Request
from jaxsd.run.text_conditioning import Prompts
from jaxsd.weights import Model

MOST = 1024  # windows of a picture


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=['size', 'stride'])
@dataclasses.dataclass(frozen=True)
class Windows:
    """Squares of `size` x `size` latents, `stride` latents apart, in which the network sees a
    picture. They have no data: they choose the program."""

    size: int
    stride: int

    def places(self, height: int, width: int) -> np.ndarray:
        """The (top, left) of each in latents of this size, [V,2]; the last are at the border."""
        tops, lefts = ([*range(0, max(n - self.size, 0), self.stride), max(n - self.size, 0)]
                       for n in (height, width))
        return np.array([(top, left) for top in tops for left in lefts], np.int32)


def inputs(model: Model, requests: Sequence[Request], parsed: Sequence[Prompts]) -> dict[str, Any]:
    """Regions and windows of resolved requests -> fields of `inputs.Inputs`. Raises ValueError for
    what cannot be."""
    found: dict[str, Any] = {}
    factor = model.config.vae.factor
    if any(p.places for p in parsed):
        count = max(len(p.weights) for p in parsed)
        height, width = requests[0].height // factor, requests[0].width // factor
        maps = np.ones((len(requests), height, width, count), np.float32)
        for r, p, into in zip(requests, parsed, maps):
            if p.places:
                into[..., :len(p.places)] = _maps(r, p, factor)
        found['regions'] = maps
    windows = {_windows(r, factor) for r in requests}
    if len(windows) > 1:
        raise ValueError('windows of one batch: expected the same window and window_stride; run '
                         'them in batches of their own')
    [found['windows']] = windows
    nets = [model.controlnets[control.net].config for r in requests for control in r.controls]
    if found['windows'] is not None and any(isinstance(net, T2IAdapterConfig) for net in nets):
        raise ValueError('window: expected no T2I-Adapter, whose features are of the whole picture')
    return found


def _maps(request, prompts, factor):
    """How much each of a picture's K prompts counts where, [h,w,K], 1 in all."""
    lies = np.stack([_lies(request, None if place is None else request.regions[place], factor)
                     for place in prompts.places], -1)
    maps = lies * np.array(prompts.weights)
    everywhere = np.array([place is None for place in prompts.places])
    if not (request.prompt.strip() or (request.prompt_2 or '').strip()):
        alone = maps[..., ~everywhere].sum(-1, keepdims=True) == 0
        maps = np.where(everywhere, alone, maps)
    total = maps.sum(-1, keepdims=True)
    first = np.arange(maps.shape[-1]) == 0  # where nothing counts
    return np.where(total > 0, maps / np.where(total > 0, total, 1), first)


def _lies(request, region, factor):
    """Where a region lies, [h,w]: the part of each latent that it covers; None: everywhere."""
    height, width = request.height, request.width
    if region is None:
        mask = np.ones((height, width))
    elif region.box is None:
        mask = images.fit(images.read_gray(region.mask), width, height, request.resize)
    else:
        mask = np.zeros((height, width))
        left, top, right, bottom = (round(n) for n in np.multiply(
            region.box, (width, height, width, height)))
        mask[top:bottom, left:right] = 1
    return mask.reshape(height // factor, factor, width // factor, factor).mean((1, 3))


def _windows(request, factor):
    """A request's Windows; None where it has none, or the network sees all at once."""
    if request.window is None or request.window >= max(request.width, request.height):
        return None
    stride = request.window_stride or max(request.window // factor // 2, 1) * factor
    windows = Windows(request.window // factor, stride // factor)
    count = len(windows.places(request.height // factor, request.width // factor))
    if count > MOST:
        raise ValueError(f'window={request.window}, window_stride={stride}: {count} windows in '
                         f'{request.width}x{request.height}, expected at most {MOST}; take larger '
                         'ones, or a larger stride')
    return windows


def averaged(windows: Windows, see: Callable[[Callable[[Any], Any]], Float[Array, 'B s s C']],
             shape: tuple[int, ...]) -> Float[Array, 'B h w C']:
    """MultiDiffusion (https://arxiv.org/abs/2302.08113, eq. 5): the mean of what a network sees in
    all windows, one after the other.

    see(cut) -> its output for one window; cut(a): an array [...,h,w,C] there, others as they are.
    shape: of the mean. Each sampler's step is linear in the output, so that this mean is also that
    of the steps, which the paper has.
    """
    _, height, width, _ = shape
    rows, columns = min(windows.size, height), min(windows.size, width)
    places, count = windows.places(height, width), np.zeros((height, width, 1), np.float32)
    for top, left in places:
        count[top:top + rows, left:left + columns] += 1

    def add(total, place):
        def cut(a):
            if a is None or a.ndim < 4:
                return a
            for axis, start, length in ((-3, place[0], rows), (-2, place[1], columns)):
                a = lax.dynamic_slice_in_dim(a, start, length, a.ndim + axis)
            return a

        piece = cut(total) + see(cut).astype(total.dtype)
        return lax.dynamic_update_slice(total, piece, (0, place[0], place[1], 0)), None

    total, _ = lax.scan(add, jnp.zeros(shape), places)
    return total / count
