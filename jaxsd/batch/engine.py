"""A model on the devices of this host, for microbatches of one fixed size.

Each device runs the same one-device program on `microbatch` pictures, the last one repeated where
there are fewer. So a picture's bits depend neither on how many others are made nor beside which,
nor on the number of devices: one program over a mesh of several devices would be another program,
of which XLA fuses other operations than of that for one, and with them the last bits change.
"""

import functools
import hashlib
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsd import sampling
from jaxsd.batch import sharded
from jaxsd.batch.cost import operations
from jaxsd.batch.sharded import AXIS
from jaxsd.run import canvas, networks, resolve, texts
from jaxsd.run.generate import check_latents, latent_tile, not_finite, stages
from jaxsd.run.inputs import padded, program
from jaxsd.run.walk import stage

MICROBATCH = 8
AT_ONCE = {'cpu': 2}  # one microbatch leaves cores idle between its operations


class Kind(NamedTuple):
    """What chooses a request's program: pictures of one kind may share a microbatch.

    programs: of each stage, `inputs.program`. shared: the adapters' names and a hash of the
    vectors of textual inversions, which are arguments that a whole microbatch shares.
    """

    height: int
    width: int
    programs: tuple
    shared: tuple


class Work(NamedTuple):
    """A microbatch on its way. `images` waits for it."""

    requests: list
    canvases: list
    found: jax.Array  # uint8 [microbatch,H,W,3]
    finite: jax.Array  # bool [microbatch]

    def images(self):
        """-> per request its picture, uint8 [H,W,3], or the ValueError that it came to."""
        count = len(self.requests)
        found, finite = np.asarray(self.found)[:count], np.asarray(self.finite)[:count]
        whole = canvas.finish(self.canvases, found)
        return [image if good else not_finite('the picture', request)
                for image, good, request in zip(whole, finite, self.requests)]


class Engine:
    """Makes microbatches of pictures; threads may call it at once.

    model, refiner: on any device; they are copied to all of `devices` (None: the local ones), or
    where `spread`, sharded over them, which then work on one microbatch of `capacity` pictures.
    microbatch: pictures that a device makes at once. tile: pixels per side, for `decode_tiled`.
    at_once: microbatches that a device works on at a time (None: 2 on CPU, elsewhere 1).
    """

    def __init__(self, model, refiner=None, microbatch=MICROBATCH, tile=None, devices=None,
                 spread=False, at_once=None):
        if microbatch < 1:
            raise ValueError(f'microbatch={microbatch}: expected at least one picture')
        if refiner is not None:
            check_latents('refiner', refiner.config.vae, model.config.vae)
        self.microbatch, self.tile = microbatch, latent_tile(tile, model.config)
        self.config, self.spread = model.config, spread
        self.devices = list(devices or jax.local_devices())
        self.places = self.devices  # of which each has its own microbatches
        at_once = at_once or AT_ONCE.get(self.devices[0].platform, 1)
        if spread:
            at_once = 1  # two programs would wait for each other's collectives
            self.places = [jax.make_mesh((len(self.devices),), (AXIS,), devices=self.devices,
                                         axis_types=(AxisType.Auto,))]
        self.capacity = microbatch * len(self.devices) // len(self.places)
        self.lanes = len(self.places) * at_once
        self.nets = [[net and _on(net, place) for net in (model, refiner)]
                     for place in self.places]

    def resolve(self, requests):
        """`run.resolve` with the model's config."""
        return resolve(requests, self.config)

    def kind(self, request):
        """A resolved request -> its Kind. Raises ValueError for what the model cannot make, and
        ValueError or OSError for files that cannot be read."""
        return self.survey(request)[0]

    def survey(self, request):
        """`kind`, and how many model calls the picture takes (of dpm_adaptive, at most)."""
        if self.spread and request.sampler == 'dpm_adaptive':
            raise ValueError('dpm_adaptive: expected a sampler of fixed steps where the weights '
                             'are spread over devices, which go step by step together')
        walks = self._walks(0, [request], [canvas.canvas(request, self.config)])
        shared = [*sorted(texts.read(request).adapters)]
        for _, data in walks:
            for name, vectors in sorted((data.embeddings or {}).items()):
                shared.append(f'{name}:{hashlib.sha256(vectors).hexdigest()}')
        kind = Kind(request.height, request.width, tuple(program(data) for _, data in walks),
                    tuple(shared))
        return kind, sum(_calls(data.rows) for _, data in walks)

    def start(self, requests, kind, lane=0):
        """Begin a microbatch of at most `capacity` resolved requests of one kind -> Work.

        lane: 0 to `lanes` - 1; those of a place stand `len(places)` apart. What one thread starts
        at a place runs one after the other: each lane needs a thread of its own. Returns before
        the pictures are there.
        """
        if not 0 < len(requests) <= self.capacity:
            raise ValueError(f'{len(requests)} requests: expected 1 to {self.capacity}')
        canvases = [canvas.canvas(r, self.config) for r in requests]
        place = lane % len(self.places)
        walks = self._walks(place, requests, canvases)
        if (found := tuple(program(data) for _, data in walks)) != kind.programs:
            raise RuntimeError(f'a microbatch of programs {found}, expected {kind.programs}: '
                               'its pictures would not be what they are alone')
        found = None
        for number, (net, data) in enumerate(walks):
            data = padded(data, self.capacity)
            if number:
                data = data._replace(noise=found)
            params, config = networks(net, data)
            found, finite = self._program(kind, config, number == len(walks) - 1)(
                params, data if self.spread else jax.device_put(data, self.places[place]))
        return Work(requests, canvases, found, finite)

    def make(self, requests):
        """Pictures of resolved requests, one after the other, each in a microbatch of its own ->
        a list of uint8 [H,W,3]. Raises the ValueError that one came to."""
        found = [self.start([request], self.kind(request)).images()[0] for request in requests]
        for image in found:
            if isinstance(image, Exception):
                raise image
        return found

    def cost(self, request, kind):
        """Of a kind, by one of its requests -> operations of a picture but for its model calls, of
        a model call on average, and the bytes that a device needs. Compiles."""
        walks = self._walks(0, [request], [canvas.canvas(request, self.config)])
        before = called = calls = held = working = 0
        for number, (net, data) in enumerate(walks):
            params, config = networks(net, data)
            program = self._program(kind, config, number == len(walks) - 1)
            one = {name: program.keywords[name] for name in STATIC}
            outside, call = operations(functools.partial(stage, **one), params, data)
            needs = self._compiled(program, params, data).memory_analysis()
            before, called = before + outside, called + call * _calls(data.rows)
            calls, held = calls + _calls(data.rows), held + needs.argument_size_in_bytes
            working = max(working, needs.temp_size_in_bytes + needs.output_size_in_bytes)
        return before, called // max(calls, 1), held + self.lanes // len(self.places) * working

    def compiled(self, request):
        """The compiled program of a resolved request's (first) walk, to look at."""
        kind = self.kind(request)
        (net, data), *others = self._walks(0, [request], [canvas.canvas(request, self.config)])
        params, config = networks(net, data)
        return self._compiled(self._program(kind, config, not others), params, data)

    def _compiled(self, program, params, data):
        return program.func.lower(params, padded(data, self.capacity), **program.keywords).compile()

    def _program(self, kind, config, last):
        """A stage of a kind, compiled when it is called: a partial of a jit function."""
        options = {'config': config, 'height': kind.height, 'width': kind.width,
                   'tile': self.tile, 'last': last}
        return functools.partial(_sharded, mesh=self.places[0], **options) if self.spread else (
            functools.partial(_alone, **options))

    def _walks(self, place, requests, canvases):
        model, refiner = self.nets[place]
        return stages(model, requests, canvases, refiner)


STATIC = ('config', 'height', 'width', 'tile', 'last')
_alone = jax.jit(stage, static_argnames=STATIC)
_sharded = jax.jit(sharded.run, static_argnames=(*STATIC, 'mesh'))


def _calls(rows):
    if isinstance(rows, sampling.Adaptive):
        return int(rows.max_calls.max())
    return int((rows.sigma > 0).sum())


def _on(model, place):
    """The model with all that a program takes on one device, or spread over a mesh; there each
    device has the ControlNets whole, which not all of them hear in the same rows."""
    if isinstance(place, Mesh):
        everywhere = NamedSharding(place, PartitionSpec())
        params = sharded.place(model.params, place)
    else:
        params, everywhere = jax.device_put(model.params, place), place
    nets = {name: type(net)(net.config, jax.device_put(net.params, everywhere))
            for name, net in model.controlnets.items()}
    return model.replace(params=params, controlnets=nets)
