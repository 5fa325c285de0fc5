"""`generate`: requests -> pictures, by one compiled program in which everything is data."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxsd import sampling
from jaxsd.run import canvas
from jaxsd.run.inputs import Inputs, inputs
from jaxsd.run.request import resolve
from jaxsd.run.walk import latents, pipeline


def generate(model, requests, on_step=None, tile=None, noise=None, refiner=None):
    """Make one picture per request -> uint8 [B,H,W,3].

    The requests of a call share their size; prompts, seeds, samplers, schedules, steps, guidance,
    strengths, masks and control scales may all differ. Only a new model config, dtype, size, batch
    size or step bucket (64 model calls, then powers of two), or a kind of guidance or condition
    switched on or off, compiles. With several local devices the batch is spread over them; a
    picture does not depend on its neighbours. Pictures of dpm_adaptive are made in a batch of their
    own, after the others. Where only_masked or outpaint give the pictures different sizes, the
    result is a list of them.

    on_step(done, total): called as model calls finish.
    tile: decode in tiles of this many pixels per side, for less memory; None: in one piece.
    noise [B,h,w,L]: standard normal noise to start from, instead of the seeds' own.
    refiner: a Model that takes the latents over where each request's `switch` says, with the noise
        that is left (an ensemble of experts, https://arxiv.org/abs/2307.01952, section 2.5).
    Raises ValueError for requests that do not fit the model and for pictures that are not finite.
    """
    config = model.config
    requests = resolve(requests, config)
    sizes = {(r.height, r.width) for r in requests}
    if len(sizes) != 1:
        found = ', '.join(f'{w}x{h}' for h, w in sorted(sizes)) or 'no request'
        raise ValueError(f'requests: expected at least one, all of one size; found {found}')
    if refiner is not None:
        _check_refiner(config, refiner.config)
    if tile is not None:
        if tile < config.vae.factor or tile % config.vae.factor:
            raise ValueError(f'tile={tile}: expected a multiple of {config.vae.factor} pixels')
        tile //= config.vae.factor
    canvases = [canvas.canvas(r, config) for r in requests]
    adaptive = np.array([r.sampler == 'dpm_adaptive' and r.painted > 0 for r in requests])
    painted = {}
    for part in filter(len, map(np.flatnonzero, (~adaptive, adaptive))):  # it has no table
        some = None if noise is None else np.asarray(noise)[part]
        images = _paint(model, [requests[i] for i in part], [canvases[i] for i in part], on_step,
                        tile, some, refiner)
        painted |= zip(part.tolist(), images)
    return canvas.finish(canvases, [painted[i] for i in range(len(requests))])


def _paint(model, requests, canvases, on_step, tile, noise, refiner):
    """`generate` for requests that one program can do -> uint8 [B,H,W,3] at the working size."""
    if refiner is None:
        stages = [(model, inputs(model, requests, noise, canvases))]
    else:
        plain = [r.replace(controls=()) for r in requests]  # made for the base model
        stages = [(model, inputs(model, requests, noise, canvases, 'base')),
                  (refiner, inputs(refiner, plain, None, canvases, 'refiner'))]
    progress = None if on_step is None else _Progress([data.rows for _, data in stages], on_step)
    for number, (net, data) in enumerate(stages):
        if number:
            data = data._replace(noise=found)  # noqa: F821 (of the stage before)
        found, finite = _run(net, data, requests[0].height, requests[0].width, tile,
                             progress and functools.partial(progress, number),
                             last=number == len(stages) - 1)
    if not finite.all():
        i = int(np.argmin(finite))
        raise ValueError(
            f'picture {i} (seed {requests[i].seed}) is not finite: the weights hold NaN or '
            f'infinity, or overflow in their dtype (float16: try bfloat16 or float32)')
    return found


def _run(model, data, height, width, tile, hear, last):
    """Spread a batch over the devices and run the program -> pictures (if not last, latents) and
    whether they are finite, numpy."""
    count = len(data.keys)
    each = -(-count // min(count, jax.local_device_count()))  # images per device
    devices = -(-count // each)
    mesh = _mesh(devices)
    pad = functools.partial(_pad, count=devices * each)
    data = Inputs(*(jax.tree.map(functools.partial(pad, axis=axis), value)
                    for axis, value in zip(data.axes, data)))
    params = {part: tree for part, tree in model.params.items() if part != 'depth_estimator'}
    nets = {name: model.controlnets[name] for name in data.hints or ()}
    params['controlnet'] = {name: net.params for name, net in nets.items()}
    config = model.config.replace(
        controlnets=tuple((name, net.config) for name, net in nets.items()))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    ticket = np.uint32(next(_tickets) % 2**32)
    if hear is not None:
        _listeners[int(ticket)] = hear
    try:
        found, finite = _program(params, data, ticket, config=config, height=height, width=width,
                                 tile=tile, mesh=mesh, report=hear is not None,
                                 last=last)
        found, finite = np.asarray(found)[:count], np.asarray(finite)[:count]
        if hear is not None:
            jax.effects_barrier()
    finally:
        _listeners.pop(int(ticket), None)
    return found, finite


def _check_refiner(base, refiner):
    for name in ('latent_channels', 'factor'):
        ours, theirs = getattr(base.vae, name), getattr(refiner.vae, name)
        if ours != theirs:
            raise ValueError(f'refiner: expected latents like the base model\'s, {name} {ours}; '
                             f'found {theirs}')


def replicated():
    """Where weights should lie for batches over all local devices: `load(..., device=...)`.

    Elsewhere is fine too, at the price of a copy in every call of `generate`.
    """
    return NamedSharding(_mesh(jax.local_device_count()), PartitionSpec())


@functools.partial(jax.jit, static_argnames=('config', 'height', 'width', 'tile', 'mesh', 'report',
                                             'last'))
def _program(params, data, ticket, *, config, height, width, tile, mesh, report, last):
    """`pipeline`, or `latents` alone if not last, each device on its own images: shard_map leaves
    XLA nothing to communicate."""
    def local(params, data, ticket):
        on_call = functools.partial(_tell, ticket) if report else None
        if last:
            return pipeline(params, data, config, height, width, tile, on_call)
        x = latents(params, data, config, height, width, on_call)
        return x, jnp.isfinite(x).all((1, 2, 3))

    images = PartitionSpec('data')
    specs = Inputs(*(PartitionSpec(None, 'data') if axis else images for axis in data.axes))
    return jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), specs, PartitionSpec()),
                         out_specs=images, check_vma=False)(params, data, ticket)


def _mesh(devices):
    return jax.make_mesh((devices,), ('data',), axis_types=(AxisType.Auto,),
                         devices=jax.local_devices()[:devices])


def _pad(array, count, axis):
    """Repeat the last image until there are `count`; numpy, so that nothing compiles."""
    extra = [(0, count - size if i == axis else 0) for i, size in enumerate(array.shape)]
    return np.pad(array, extra, mode='edge')


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
    listener = _listeners.get(int(ticket))
    if listener is not None:
        listener(int(i))


class _Progress:
    """Row numbers, from several devices and in any order -> on_step(done, total), rising.

    rows: of each stage; called with a stage's number and a row's.
    """

    def __init__(self, rows, on_step):
        self.calls, before = [], 0
        for some in rows:
            if isinstance(some, sampling.Adaptive):  # how many calls it takes, nobody knows
                calls = np.arange(1, 1 + int(np.max(some.max_calls)))
            else:
                calls = np.cumsum((some.sigma > 0).any(1))  # model calls up to each row
            self.calls.append(before + calls)
            before += int(calls[-1])
        self.done, self.total, self.on_step = 0, before, on_step

    def __call__(self, stage, i):
        done = int(self.calls[stage][i])
        if done > self.done:
            self.done = done
            self.on_step(done, self.total)
