"""The models on a device, or spread over a mesh of them, and the compiled programs there."""

import functools
import hashlib
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxsd import sampling
from jaxsd.config import TEXT_ENCODERS
from jaxsd.images.reading import Picture
from jaxsd.models.layers import prepared
from jaxsd.run import pipeline, sharded
from jaxsd.run.inputs import Inputs, networks
from jaxsd.run.pipeline import Encoded
from jaxsd.run.programs import PROGRAMS
from jaxsd.run.steps import beside, chunk
from jaxsd.weights import adapters
from jaxsd.weights.model import IPAdapter, Model, Network, on_host

TEXTS, KINDS = 8, 16  # encoded texts, and programs of kinds, that a replica keeps
WORDS = ('tokens', 'ids', 'zero', 'skip', 'embeddings')  # fields of Inputs for encode_text alone


class Kind(NamedTuple):
    """What chooses the programs of a stage: pictures of one kind share slots."""

    net: int  # 0: the model, 1: the refiner
    height: int
    width: int
    shapes: str  # see inputs.program
    adapters: tuple  # their names
    slots: int  # of a device


class Stage(NamedTuple):
    """A picture's way through one model; inputs: of this picture alone. upscaler: it starts from
    what the stage before came to, enlarged so, see run.hires; None: from its latents as they are,
    or from the inputs alone."""

    kind: Kind
    inputs: Inputs
    upscaler: str | None = None

    @property
    def calls(self) -> np.ndarray:
        """Model calls up to the end of each row, [rows]; at most, where the steps are free."""
        return np.cumsum(self.inputs.steps.row.sigma[:, 0] > 0)


class Replica:
    """The models on a device or spread over a mesh, with what is kept there: the programs of the
    kinds and the encoded texts that were used last.

    rows: of a table, that `advance` runs before it returns; tile: see `pipeline.pipeline`.
    """

    def __init__(self, nets: Sequence[Model], device: jax.Device | Mesh, rows: int,
                 tile: int | None) -> None:
        self.mesh = device if isinstance(device, Mesh) else None
        self.here, self.nets = _here(device), [placed(net, device) for net in nets]
        self.rows, self.tile = rows, tile
        self._lock, self._programs, self._texts = threading.Lock(), {}, {}

    def width(self, slots: int) -> int:
        """So many slots of each device -> those of a program."""
        return slots * (self.mesh.size if self.mesh else 1)

    def ready(self, kind: Kind) -> bool:
        """Whether a kind's programs are here."""
        return kind in self._programs

    def programs(self, stage: Stage) -> 'StagePrograms':
        """-> Stage's programs, compiled where they are not here."""
        return self._kept(self._programs, stage.kind, KINDS, lambda: StagePrograms(self, stage))

    def start(self, stage: Stage, latents: jax.Array | None) -> tuple[Encoded, Any]:
        """-> Encoded of a stage's picture, and its state before the first row. latents: of the
        stage before, or None. Words that are known are not encoded again."""
        programs, (words, rest) = self.programs(stage), _parts(stage.inputs)
        if latents is not None:
            rest = rest._replace(noise=jax.device_put(latents, self.here))
        leaves, tree = jax.tree.flatten(words)
        key = hashlib.sha256(f'{stage.kind.net} {stage.kind.adapters} {tree}'.encode())
        for leaf in leaves:
            key.update(f'{leaf.dtype} {leaf.shape}'.encode() + np.ascontiguousarray(leaf).data)
        text = self._kept(self._texts, key.digest(), TEXTS, lambda: programs.text(words))
        encoded, state = programs.encode(rest)
        return encoded._replace(text=text), state

    def _kept(self, kept, key, most, make):
        """What a dict has for a key, else make(); those used least recently go first."""
        with self._lock:
            found = kept.pop(key, None)
        found = make() if found is None else found
        with self._lock:
            kept[key] = found
            while len(kept) > most:
                del kept[next(iter(kept))]
        return found


class StagePrograms:
    """The compiled programs of a stage's kind, each with the weights that it takes: text, encode,
    advance, decode. parts: [(Program, its arguments)], in this order."""

    def __init__(self, replica, stage):
        kind, data = stage.kind, stage.inputs
        params, config = networks(replica.nets[kind.net], data)
        if kind.adapters:
            params['adapters'] = jax.device_put(
                adapters.factors(replica.nets[kind.net], kind.adapters), replica.here)
        self.parts = []

        def traced(function, names, *arguments, **static):
            """-> the shapes of its results."""
            def shapes(tree):
                return jax.tree.map(lambda a: jax.ShapeDtypeStruct(
                    np.shape(a), a.dtype, sharding=replica.here), tree)

            given = {name: params[name] for name in names if name in params}
            arguments = [{name: shapes(tree) if on_host(tree) else tree
                          for name, tree in given.items()}, *shapes(arguments)]
            if replica.mesh:
                static |= {'function': function, 'mesh': replica.mesh}
                function = sharded.run
            program = PROGRAMS.get(function, *arguments, **static)
            self.parts.append((program, [given, *arguments[1:]]))
            return program.result

        words, rest = _parts(data)
        text = traced(_encode_text, (*TEXT_ENCODERS, 'unet', 'adapters'), words, config=config)
        encoded, state = traced(_encode, ('vae', 'controlnet', 'ip_adapter'), rest, config=config,
                                height=kind.height, width=kind.width, tile=replica.tile)
        one, width = (encoded._replace(text=text), state), replica.width(kind.slots)
        traced(_advance, ('unet', 'controlnet', 'adapters'), [one] * width,
               beside([chunk(data.steps, 0, 0, replica.rows)] * width), np.int32(0), config=config,
               axis=sharded.AXIS if replica.mesh else None)
        traced(_decode, ('vae',), state.x, config=config, tile=replica.tile)
        self.text, self.encode, self.advance, self.decode = (  # when all are compiled
            functools.partial(program.call, given[0]) for program, given in self.parts)


def _parts(data):
    """Inputs of a picture -> what `encode_text` reads, and the rest, without its table."""
    words = {name: getattr(data, name) for name in (*WORDS, 'adapters')}
    nothing = Inputs(*[None] * len(Inputs._fields))
    first = jax.tree.map(lambda a: a[:1], data.steps._replace(noise=None))
    return nothing._replace(**words), data._replace(steps=first, **dict.fromkeys(WORDS))


# The programs. Beside pipeline's functions they only take slots together and apart.


def _encode_text(params, data, *, config):
    return pipeline.encode_text(params, config, data)


def _encode(params, data, *, config, height, width, tile=None):
    encoded, x = pipeline.encode(params, config, data, None, height, width, tile)
    return encoded, pipeline.start(x, data.steps, config)


def _advance(params, slots, steps, count, *, config, axis=None):
    """Run `count` rows -> the slots' states, and bool [S]: who has steps to go, where the sampler
    chooses them. axis: of a mesh over whose devices the slots are dealt out."""
    encoded, state = jax.tree.map(lambda *parts: jnp.concatenate(parts), *slots)
    if axis is not None:
        # All devices gather weights together: none may leave out a row that another computes.
        sigma = steps.row.sigma
        idle = (sigma > 0).any(1, keepdims=True) & (sigma == 0)
        steps = steps._replace(row=steps.row._replace(sigma=jnp.where(idle, 1, sigma)))
        each = len(slots) // lax.axis_size(axis)
        first = lax.axis_index(axis) * each
        encoded, state = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, first, each),
                                      (encoded, state))
        steps = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, first, each, 1), steps)
    state, _ = pipeline.advance(params, config, state, encoded, steps, count)
    if axis is not None:
        state = jax.tree.map(lambda a: lax.all_gather(a, axis, tiled=True), state)
    free = sampling.free(steps.row)
    going = sampling.going(state, steps.row) if free else jnp.ones(len(slots), bool)
    return [jax.tree.map(lambda a, i=i: a[i:i + 1], state) for i in range(len(slots))], going


def _decode(params, latents, *, config, tile=None):
    return pipeline.decode(params, config, latents, tile)


class _Only(NamedTuple):
    vae: object
    tiling: str = ''


def look(latents: jax.Array, vae: Network) -> Picture:
    """Latents [1,h,w,L], decoded by a small VAE (a Network) where they lie -> uint8 [H',W',3]."""
    latents = jax.device_put(latents, next(iter(latents.devices())))
    params = {'vae': jax.device_put(vae.params, latents.sharding)}
    decode = PROGRAMS.get(_decode, params, latents, config=_Only(vae.config))
    return np.asarray(decode.call(params, latents)[0])[0]


_placed = weakref.WeakKeyDictionary()  # {Model: {device: the Model there}}, for all Engines


def placed(model: Model, device: jax.Device | Mesh) -> Model:
    """A model on a device, with what is computed from its weights once."""
    found = _placed.setdefault(model, {})
    if device not in found:
        nets = jax.device_put({name: net.params for name, net in model.controlnets.items()},
                              _here(device))
        if isinstance(device, Mesh):
            params = sharded.place(model.params, device)
        else:
            away = {part for part, tree in model.params.items() if part != 'unet' and on_host(tree)}
            params = {part: tree if part in away else jax.device_put(tree, device)
                      for part, tree in model.params.items()}
            params = params | {'unet': _once(params['unet'])}
            nets = {name: _once(net) for name, net in nets.items()}
        pictures = {name: IPAdapter(net.config, jax.device_put(net.params, _here(device)))
                    for name, net in model.ip_adapters.items()}  # their encoders work elsewhere
        found[device] = model.replace(params=params, ip_adapters=pictures, controlnets={
            name: type(net)(net.config, nets[name]) for name, net in model.controlnets.items()})
    return found[device]


def _once(params):
    return jax.jit(prepared)(params) if jax.default_backend() == 'cpu' else params


def _here(device):
    """Where what a whole place has lies; device: or a Mesh."""
    return NamedSharding(device, PartitionSpec()) if isinstance(device, Mesh) else (
        SingleDeviceSharding(device))
