"""`generate`: requests -> pictures, by one compiled program in which everything is data."""

import functools
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxsd import sampling
from jaxsd.run import canvas, texts
from jaxsd.run.inputs import Inputs, inputs, networks, padded, walks
from jaxsd.run.request import resolve
from jaxsd.run.walk import decode, stage
from jaxsd.weights.model import Network


class Preview(NamedTuple):
    """How to look on: `show(done, total, images)`, uint8 [B,H',W',3], after every so many rows.

    vae: a Network that fits the model's latents, small and fast: jaxsd.load_vae of a TAESD.
    """

    vae: Network
    show: Callable
    every: int = 1


def generate(model, requests, on_step=None, tile=None, noise=None, refiner=None, preview=None):
    """Make one picture per request -> uint8 [B,H,W,3].

    The requests of a call share their size; prompts, seeds, samplers, schedules, steps, guidance,
    strengths, masks and control scales may all differ. Only a new model config, dtype, size, batch
    size, number of 75-token blocks or step bucket (64 model calls, then powers of two), or a kind
    of guidance or condition switched on or off, compiles. With several local devices the batch is
    spread over them; a picture does not depend on its neighbours, but on another batch size or
    number of devices its last bits may (1 of 255). Pictures whose prompts take another number of
    blocks, and those of dpm_adaptive, are made in batches of their own, one after the other. Where
    only_masked or outpaint give the pictures different sizes, the result is a list of them.

    on_step(done, total): called as model calls finish.
    tile: decode in tiles of this many pixels per side, for less memory; None: in one piece.
    noise [B,h,w,L]: standard normal noise to start from, instead of the seeds' own.
    refiner: a Model that takes the latents over where each request's `switch` says, with the noise
        that is left (an ensemble of experts, https://arxiv.org/abs/2307.01952, section 2.5).
    preview: a Preview, to see the pictures come.
    Raises ValueError for requests that do not fit the model and for pictures that are not finite.
    """
    config = model.config
    requests = resolve(requests, config)
    sizes = {(r.height, r.width) for r in requests}
    if len(sizes) != 1:
        found = ', '.join(f'{w}x{h}' for h, w in sorted(sizes)) or 'no request'
        raise ValueError(f'requests: expected at least one, all of one size; found {found}')
    for name, other in (('refiner', refiner and refiner.config.vae),
                        ('preview', preview and preview.vae.config)):
        if other:
            check_latents(name, other, config.vae)
    tile = latent_tile(tile, config)
    canvases = [canvas.canvas(r, config) for r in requests]
    painted = {}
    for part in batches(model, requests, refiner):
        some = None if noise is None else np.asarray(noise)[part]
        images = _paint(model, [requests[i] for i in part], [canvases[i] for i in part], tile, some,
                        refiner, on_step, preview)
        painted |= zip(part.tolist(), images)
    return canvas.finish(canvases, [painted[i] for i in range(len(requests))])


def batches(model, requests, refiner=None):
    """The resolved requests that `generate` makes together: arrays of their indices."""
    nets = [model] if refiner is None else [model, refiner]
    kinds = [(r.sampler == 'dpm_adaptive' and walks(r),  # it has no table
              *(texts.count(net, r) for net in nets)) for r in requests]
    return [np.flatnonzero([found == kind for found in kinds]) for kind in sorted(set(kinds))]


def stages(model, requests, canvases, refiner=None, noise=None):
    """The walks of resolved requests, one after the other -> a list of (model, its Inputs)."""
    if refiner is None:
        return [(model, inputs(model, requests, noise, canvases))]
    plain = [r.replace(controls=()) for r in requests]  # made for the base model
    return [(model, inputs(model, requests, noise, canvases, 'base')),
            (refiner, inputs(refiner, plain, None, canvases, 'refiner'))]


def latent_tile(tile, config):
    """Pixels per side of a tile -> latents, or None. Raises ValueError for parts of latents."""
    if tile is None:
        return None
    if tile < config.vae.factor or tile % config.vae.factor:
        raise ValueError(f'tile={tile}: expected a multiple of {config.vae.factor} pixels')
    return tile // config.vae.factor


def not_finite(what, request):
    """The error for a picture that is none."""
    return ValueError(
        f'{what} (seed {request.seed}) is not finite: the weights hold NaN or infinity, or '
        'overflow in their dtype (float16: try bfloat16 or float32)')


def _paint(model, requests, canvases, tile, noise, refiner, on_step, preview):
    """`generate` for requests that one program can do -> uint8 [B,H,W,3] at the working size."""
    walks = stages(model, requests, canvases, refiner, noise)
    progress = _Progress([data.rows for _, data in walks], on_step, preview)
    found = None
    for number, (net, data) in enumerate(walks):
        if number:
            data = data._replace(noise=found)
        progress.begin(number, len(requests))
        found, finite = _run(net, data, requests[0].height, requests[0].width, tile, progress,
                             last=number == len(walks) - 1)
    if not finite.all():
        i = int(np.argmin(finite))
        raise not_finite(f'picture {i}', requests[i])
    return found


def _run(model, data, height, width, tile, progress, last):
    """Spread a batch over the devices and run the program -> pictures (if not last, latents) and
    whether they are finite, numpy."""
    count = len(data.keys)
    each = -(-count // min(count, jax.local_device_count()))  # images per device
    devices = -(-count // each)
    mesh = _mesh(devices)
    data = padded(data, devices * each)
    params, config = networks(model, data)
    preview = progress.preview
    if preview is not None:
        params['preview'] = preview.vae.params
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    ticket = np.uint32(next(_tickets) % 2**32)
    _listeners[int(ticket)] = progress
    try:
        found, finite = _program(params, data, ticket, config=config, height=height, width=width,
                                 tile=tile, mesh=mesh, report=progress.on_step is not None,
                                 preview=preview and (preview.vae.config, preview.every), last=last)
        found, finite = np.asarray(found)[:count], np.asarray(finite)[:count]
        if progress.on_step or preview:
            jax.effects_barrier()
    finally:
        _listeners.pop(int(ticket), None)
    return found, finite


def check_latents(what, found, vae):
    """ValueError where the latents of two models differ."""
    for name in ('latent_channels', 'factor'):
        if getattr(found, name) != getattr(vae, name):
            raise ValueError(f'{what}: expected latents like the model\'s, {name} '
                             f'{getattr(vae, name)}; found {getattr(found, name)}')


def replicated():
    """Where weights should lie for batches over all local devices: `load(..., device=...)`.

    Elsewhere is fine too, at the price of a copy in every call of `generate`.
    """
    return NamedSharding(_mesh(jax.local_device_count()), PartitionSpec())


@functools.partial(jax.jit, static_argnames=('config', 'height', 'width', 'tile', 'mesh', 'report',
                                             'preview', 'last'))
def _program(params, data, ticket, *, config, height, width, tile, mesh, report, preview, last):
    """walk.stage, each device on its own images: shard_map leaves XLA nothing to communicate."""
    def local(params, data, ticket):
        on_call = functools.partial(_tell, ticket) if report else None
        watch = preview and functools.partial(_watch, params, *preview, ticket)
        return stage(params, data, config, height, width, tile, last, on_call, watch)

    along = {0: PartitionSpec('data'), 1: PartitionSpec(None, 'data'), None: PartitionSpec()}
    specs = Inputs(*(along[axis] for axis in data.axes))
    return jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), specs, PartitionSpec()),
                         out_specs=along[0], check_vma=False)(params, data, ticket)


def _mesh(devices):
    return jax.make_mesh((devices,), ('data',), axis_types=(AxisType.Auto,),
                         devices=jax.local_devices()[:devices])


# Progress. The listener of a run is found by a ticket that is data too: a function in the program
# would be a constant, and another function another compilation.
_tickets = itertools.count()
_listeners = {}


def _tell(ticket, i, out):
    """Call the ticket's listener when a model call's output is there."""
    out, done = lax.optimization_barrier((out, i))
    jax.debug.callback(_hear, ticket, done)
    return out


def _hear(ticket, i):
    if listener := _listeners.get(int(ticket)):
        listener.step(int(i))


def _watch(params, vae, every, ticket, i, latents):
    """Show the ticket's listener what the latents are by now, every so many rows."""
    def show():
        parts = {'vae': params['preview']}
        images, _ = decode(parts, SimpleNamespace(vae=vae), latents)
        jax.debug.callback(_look, ticket, i, lax.axis_index('data'), images)

    lax.cond(i % every == 0, show, lambda: None)


def _look(ticket, i, device, images):
    if listener := _listeners.get(int(ticket)):
        listener.look(int(i), int(device), np.asarray(images))


class _Progress:
    """What the devices report, in any order, as a rising count and as whole batches of pictures.

    rows: of each stage; `begin` says which stage it is and of how many pictures.
    """

    def __init__(self, rows, on_step=None, preview=None):
        self.calls, before = [], 0
        for some in rows:
            if isinstance(some, sampling.Adaptive):  # how many calls it takes, nobody knows
                calls = np.arange(1, 1 + int(np.max(some.max_calls)))
            else:
                calls = np.cumsum((some.sigma > 0).any(1))  # model calls up to each row
            self.calls.append(before + calls)
            before += int(calls[-1])
        self.done, self.total, self.on_step, self.preview = 0, before, on_step, preview

    def begin(self, stage, count):
        self.stage, self.count, self.parts = stage, count, {}

    def step(self, i):
        done = int(self.calls[self.stage][i])
        if done > self.done:
            self.done = done
            self.on_step(done, self.total)

    def look(self, i, device, images):
        parts = self.parts.setdefault(i, {})
        parts[device] = images
        if sum(map(len, parts.values())) >= self.count:
            whole = np.concatenate([part for _, part in sorted(self.parts.pop(i).items())])
            self.preview.show(int(self.calls[self.stage][i]), self.total, whole[:self.count])
