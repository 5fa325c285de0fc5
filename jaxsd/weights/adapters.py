"""Adapters (LoRA, LyCORIS): read from files, merged into a model, or kept beside its weights.

Everything is linear in an adapter's weight: a parameter W becomes W + sum of weight * delta(W),
each delta taken of the model's own W.
"""

import dataclasses
import functools
import json
import logging
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.config import KUNetConfig, ModelConfig
from jaxsd.config_files import read_config
from jaxsd.models import quantized
from jaxsd.models.spec import from_jax, spec
from jaxsd.typing import Device, Params, Path
from jaxsd.weights import adapter_formats, adapter_names, names
from jaxsd.weights.adapter_formats import Delta
from jaxsd.weights.embeddings import bundled, in_lora, is_bundled
from jaxsd.weights.files import LazyArray, Reader, open_tensors, printable
from jaxsd.weights.model import Model
from jaxsd.weights.reading import CANDIDATES

log = logging.getLogger('jaxsd')
Weight = float | tuple[float, float]  # of all, or of the U-Net and of the text encoders


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA or one of its kin: deltas {component: {parameter's dotted name: Delta}}.

    metadata: what the file's header says (kohya's ss_* ...). device: as of `load_adapter`.
    embeddings: {name: Embedding}, textual inversions in the file, for the prompts of requests that
        name the adapter.
    parts: {component: {layer: {part: array}}} of one that was trained; config: of the model that it
        was trained for. Both are for `save_adapter`.
    """

    deltas: dict
    metadata: dict = dataclasses.field(default_factory=dict)
    device: object = None
    embeddings: dict = dataclasses.field(default_factory=dict)
    parts: dict = dataclasses.field(default_factory=dict)
    config: ModelConfig | None = None


class Description(NamedTuple):
    """What a file of an adapter holds, by its header.

    layers: {layer as the file writes it: {part: key}}, parts as of adapter_formats; version: the
    one that most of them fit, 'sd15', or None; fitting: so many do; targets: {layer: (component,
    its name there)}, of any size; lacks: {layer: a part that is missing}; embeddings: names of the
    textual inversions in it.
    """

    layers: dict
    version: str | None
    fitting: int
    targets: dict
    lacks: dict
    embeddings: list

    @property
    def family(self) -> str | None:
        """What the version is called in messages."""
        return self.version and _family(self.version)


class SidePath(NamedTuple):
    """What several adapters add to one layer's output, or to a norm's parameters.

    down [I,R] or [K,K,I,R], up [R,O], owner int [R]: the adapter that a rank belongs to, scale
    [A,O]: factors of the layer's own output, weight and bias [A,O]: added; None: nothing.
    """

    down: jax.Array | None = None
    up: jax.Array | None = None
    owner: jax.Array | None = None
    scale: jax.Array | None = None
    weight: jax.Array | None = None
    bias: jax.Array | None = None


def load_adapter(path: Path, model: Model, device: 'Device | None' = None,
                 strays: bool = False) -> Adapter:
    """Read an adapter for a model from a file -> Adapter.

    path: a file (.safetensors, or torch's pickles) with names of kohya, LyCORIS, diffusers or PEFT.
        An adapter_config.json beside PEFT's adapter_model.safetensors is read too.
    device: a jax Device or Sharding for its side paths; None: where the model's weights are.
    strays: leave out layers that are not the model's, by name or by size, with a warning.
    Formats that depend on the weights that they change (DoRA, GLoRA, OFT ...) take the model's.
    Raises ValueError of one line for a file that is no adapter for this model, which names the
    version that it is for; ValueError or FileNotFoundError for one that cannot be read.
    """
    if isinstance(model.config.unet, KUNetConfig):
        raise ValueError(f'{path}: the x2 latent upscaler takes no adapters')
    file = open_tensors(pathlib.Path(path).expanduser())
    what, _, name = names.kind(file.shapes)
    if what not in ('a LoRA', 'something else'):
        raise ValueError(printable(f'{path}: is {what}, by its tensor {name}; expected a LoRA'))
    layers = _layers(file)
    if not layers:
        raise ValueError(f'{path}: has {len(file.shapes)} tensors and no layers; expected a LoRA '
                         'or LyCORIS file; jaxsd.load_embedding reads embeddings')
    for layer, lack in _lacks(layers).items():
        raise ValueError(printable(
            f'{path}: {layer} has {next(iter(layers[layer].values()))} but no {lack}; the file is '
            'incomplete, download it again'))
    targets = _fit(layers, file.shapes, model.config)
    if targets.keys() != layers.keys() or not targets:
        _complain(file, layers, targets, model.config, strays)
    shapes, settings, deltas = spec(model.config), _settings(file), {}
    for layer, (component, target) in targets.items():
        parts = {part: _finite(file, key) for part, key in layers[layer].items()}
        if 'down' in parts:
            parts.setdefault('alpha', _alpha(settings, component, target, len(parts['down'])))
        found = deltas.setdefault(component, {})
        form = adapter_formats.kind(parts.keys())
        if form:
            name = f'{target}.weight'
            shape = shapes[component][name]
            get = functools.partial(own_matrix, model.params[component], name, np)
            try:
                found[name] = adapter_formats.weight_delta(form, parts, name, shape, get)
            except ValueError as error:  # numpy's, or of a Delta of another shape
                sizes = ', '.join(f'{key} {list(file.shapes[key])}'
                                  for key in layers[layer].values())
                raise ValueError(printable(
                    f'{path}: the tensors of {layer} do not fit together ({error}): {sizes}; for '
                    f'a weight {list(shape)}; the file is damaged, download it again')) from None
            _fits_dtype(path, layer, found[name],
                        quantized.compute_dtype(model.params[component]))
        if 'diff_b' in parts:
            found[f'{target}.bias'] = Delta(dense=parts['diff_b'].reshape(-1))
    embeddings = bundled(file, model.config)
    return Adapter(deltas, dict(file.metadata), device, embeddings)


def describe(file: Reader) -> Description:
    """The Description of a file.open_tensors; also of one that is incomplete."""
    layers = _layers(file)
    fits = {version: len(_fit(layers, file.shapes, read_config(version)))
            for version in CANDIDATES}
    best = max(fits, key=lambda version: fits[version])
    targets = _targets(layers, read_config(best))
    return Description(layers, best if fits[best] else None, fits[best], targets, _lacks(layers),
                       list(in_lora(file)))


def merge(model: Model,
          adapters: Mapping[Adapter, Weight] | Iterable[tuple[Adapter, Weight]]) -> Model:
    """A Model whose weights hold adapters, summed in float32 and cast back.

    adapters: {adapter: weight}, or pairs of them; weight: a number, or (U-Net's, text encoders').
    Embeddings in their files become the model's.
    """
    pairs = list(adapters.items() if isinstance(adapters, Mapping) else adapters)
    quantized.refuse(model.params, 'merge')
    params = dict(model.params)
    for component in sorted({c for adapter, _ in pairs for c in adapter.deltas}):
        changes = {}
        for adapter, weight in pairs:
            for name, delta in adapter.deltas.get(component, {}).items():
                changes.setdefault(name, []).append((_weight(weight, component), delta))
        params[component] = _changed(params[component], changes)
    inside = {name: e for adapter, _ in pairs for name, e in adapter.embeddings.items()}
    return model.replace(params=params, embeddings=inside | model.embeddings)


def factors(model: Model, chosen: Iterable[str]) -> dict[str, Any]:
    """The side paths of model.adapters of these names -> {component: nested dict of SidePaths}.

    Ranks are padded, so that other adapters of like shapes make arrays of the same shapes.
    """
    devices = {part: (quantized.compute_dtype(tree), _where(leaf)) for part, tree
               in model.params.items() for leaf in jax.tree.leaves(tree)[:1]}
    return _factors(tuple(_named(model, name) for name in chosen), tuple(devices.items()))


def _named(model, name):
    """A model's adapter; '/NAME': the LoRA of the IP-Adapter of this name."""
    if name in model.adapters:
        return model.adapters[name]
    from jaxsd.weights.ip_adapters import lora
    return lora(model.ip_adapters[name.removeprefix('/')], model.config.unet)


def attach(params: Params, factors: Any, weights: jax.Array) -> Params:
    """The params of one component with `factors` of it, for layers.py; traceable.

    weights [B,A]: of the A adapters in each of the B rows that the layers see.
    """
    if not isinstance(factors, SidePath):
        return params | {key: attach(params[key], below, weights)
                         for key, below in factors.items()}
    path = {}
    if factors.down is not None:
        gate = weights[:, factors.owner].astype(factors.down.dtype)
        path = {'down': factors.down, 'up': factors.up, 'gate': gate}  # gate [B,R]
    for name in ('scale', 'weight', 'bias'):
        value = getattr(factors, name)
        if value is not None:  # [B,A] x [A,O] -> [B,O]
            mixed = jnp.matmul(weights, value, precision='highest')
            # A quantized layer has no weight, and nothing but a scale beside `up`.
            like: Any = params.get('weight', factors.up)
            path[name] = mixed.astype(like.dtype)
    return params | {'adapter': path}


def _settings(file):
    """PEFT's config of an adapter, from where diffusers or PEFT keep it; else {}."""
    beside = file.path.with_name('adapter_config.json')
    if file.path.stem == 'adapter_model' and beside.exists():
        path, text = beside, beside.read_text()
    else:
        path, text = file.path, file.metadata.get('lora_adapter_metadata', '{}')
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        raise ValueError(f"{path}: PEFT's settings of the adapter are no JSON object; download it "
                         'again') from None


def _alpha(settings, component, layer, rank):
    """The alpha that PEFT's settings give a layer, as kohya writes it; without any, the rank."""
    def get(key):  # diffusers keeps the settings of several networks in one dict
        return settings.get(f'{component}.{key}', settings.get(key))

    alpha = next((alpha for pattern, alpha in (get('alpha_pattern') or {}).items()
                  if re.fullmatch(rf'(.*\.)?({pattern})', layer)), get('lora_alpha') or rank)
    return alpha * math.sqrt(rank) if get('use_rslora') else alpha


def _fits_dtype(path, layer, delta, dtype):
    """ValueError where what a Delta adds is not finite in a model's dtype."""
    for array in delta:
        with np.errstate(over='ignore'):
            if array is not None and not np.isfinite(array.astype(dtype)).all():
                raise ValueError(printable(f'{path}: what {layer} adds is too large for {dtype}; '
                                           'load the model in float32 or bfloat16'))


def _layers(file):
    """{layer as the file writes it: {part: key}}."""
    layers = {}
    for key in file.shapes:
        found = None if is_bundled(key) else adapter_names.split(key)
        if found:
            layers.setdefault(found[0], {})[found[1]] = key
    return layers


def _lacks(layers):
    """{layer: a part that is missing beside the others}."""
    forms = {layer: adapter_formats.kind(parts.keys()) for layer, parts in layers.items()}
    found = {layer: form.lacks(layers[layer].keys()) for layer, form in forms.items() if form}
    return {layer: lack for layer, lack in found.items() if lack}


def _fit(layers, stored, config):
    """Those of `_targets` whose parts have the layer's sizes."""
    shapes = spec(config)
    return {layer: (part, name) for layer, (part, name) in _targets(layers, config).items()
            if _has_size(layers[layer], stored, shapes[part], name)}


def _targets(layers, config):
    """{layer: (component, name)} of those that are a config's layers, by their names."""
    found = {layer: adapter_names.find(layer, config) for layer in layers}
    return {layer: target for layer, target in found.items() if target}


def _has_size(parts, stored, shapes, name):
    """Whether the parts make a change of the weight or bias of this name."""
    form = adapter_formats.kind(parts.keys())
    found = {part: stored[key] for part, key in parts.items()}
    if 'diff_b' in parts and shapes.get(f'{name}.bias') != found['diff_b']:
        return False
    if not form or form.lacks(parts.keys()):
        return not form and 'diff_b' in parts
    shape = shapes[f'{name}.weight']
    return all(size in (None, expected) for size, expected in zip(
        form.size(found), (shape[0], math.prod(shape[1:]))))


FAMILIES = {'sd1': '1.x', 'sd2': '2.x', 'sdxl_refiner': "SDXL's refiner", 'sdxl': 'SDXL',
            'x4': 'the x4 upscaler'}


def _family(version):
    return next((name for start, name in FAMILIES.items() if version.startswith(start)), version)


def _complain(file, layers, targets, config, strays):
    """ValueError for a file that does not fit a model; with strays a warning, if a part does."""
    best, ours = describe(file), _family(config.version)
    if best.fitting > len(targets) and best.family != ours:
        raise ValueError(f'{file.path}: is a LoRA for {best.family}; this model is {ours}; give a '
                         'model that it was made for')
    unfit = [layer for layer in layers if layer not in targets]
    keys = [key for layer in unfit for key in layers[layer].values()]
    first = ', '.join(f'{key} {list(file.shapes[key])}' for key in keys[:3]) or 'nothing'
    said = (f'{len(unfit)} of its {len(layers)} layers are none of this model\'s ({ours}), such '
            f'as {first}')
    if not (strays and targets):
        more = ', or strays=True (--strays) to leave them out' * bool(targets)
        raise ValueError(printable(f'{file.path}: {said}; expected a LoRA or LyCORIS file for it'
                                   f'{more}'))
    log.warning('%s', printable(f'{file.path}: left out, {said}'))


def _finite(file, key):
    """A tensor in float32; ValueError where it is not finite."""
    array = np.asarray(file.read(key), np.float32)
    if not np.isfinite(array).all():
        raise ValueError(printable(f'{file.path}: {key} has values that are not finite (NaN or '
                                   'infinity); the file is damaged, look for another copy'))
    return array


def _own(params, name):
    for key in name.split('.'):
        params = params[key]
    return params


def made_like(array: Any, compute: Callable[[], np.ndarray], lazy: bool) -> Any:
    """What compute() gives, of an array's shape and dtype: where that lies, or lazily."""
    if lazy:
        return LazyArray(array.shape, array.dtype, compute)
    return jax.device_put(compute(), _where(array))


def _where(array):
    """A device for what is to go with an array; None where it follows what it is used with."""
    return array.sharding if getattr(array, 'committed', False) else None


def own_matrix(params: Params, name: str, module: Any = jnp) -> Any:
    """A component's weight by its dotted name -> [O,N] in torch's order, float32, an array of
    jax.numpy, traced ones too, or of numpy."""
    layer = _own(params, name.removesuffix('.weight'))
    if 'weight' not in layer:
        return module.asarray(quantized.matrix(layer))
    weight = from_jax(name, module.asarray(layer['weight'], np.float32))
    return weight.reshape(len(weight), -1)


def _weight(weight, component):
    pair = weight if isinstance(weight, tuple | list) else (weight, weight)
    return pair[component != 'unet']


def _changed(tree, changes, at=''):
    """A nested dict with some of its arrays changed: {name: [(weight, Delta), ...]}."""
    if not isinstance(tree, dict):
        def compute():
            own = np.asarray(tree, np.float32)
            change = sum(np.float32(weight) * delta.of(own) for weight, delta in changes[at])
            return (own + change).astype(tree.dtype)

        return made_like(tree, compute, isinstance(tree, LazyArray))
    found = dict(tree)
    for key in {name.removeprefix(at).lstrip('.').split('.')[0] for name in changes}:
        name = f'{at}.{key}' if at else key
        inner = {n: c for n, c in changes.items() if n == name or n.startswith(f'{name}.')}
        found[key] = _changed(tree[key], inner, name)
    return found


@functools.lru_cache(4)  # generate asks for them in every call
def _factors(adapters, devices):
    found = {}
    for component, (dtype, sharding) in devices:
        layers = {}
        for owner, adapter in enumerate(adapters):
            for name, delta in adapter.deltas.get(component, {}).items():
                layer, _, kind = name.rpartition('.')
                layers.setdefault(layer, []).append((owner, kind, delta))
        for layer, deltas in layers.items():
            path = _side_path(deltas, len(adapters), dtype)
            tree = found.setdefault(component, {})
            *above, last = layer.split('.')
            for key in above:
                tree = tree.setdefault(key, {})
            tree[last] = jax.device_put(path, adapters[0].device or sharding)
    return found


def _side_path(deltas, count, dtype):
    """[(owner, 'weight' or 'bias', Delta), ...] of one layer -> SidePath of numpy arrays."""
    downs, ups, owners, rows = [], [], [], {}
    for owner, kind, delta in deltas:
        down, up = delta.down, delta.up
        if delta.dense is not None and delta.dense.ndim > 1:
            down, up = _split(delta.dense)
        elif delta.dense is not None:
            rows.setdefault(kind, np.zeros((count, delta.dense.size), np.float32))
            rows[kind][owner] = delta.dense
        if delta.scale is not None:
            rows.setdefault('scale', np.zeros((count, delta.scale.size), np.float32))
            rows['scale'][owner] = delta.scale
        if down is not None:
            downs.append(down)
            ups.append(up)
            owners += [owner] * len(up)
    if not downs:
        return SidePath(**rows)
    more = _bucket(len(owners)) - len(owners)
    down = np.concatenate([*downs, np.zeros((*downs[0].shape[:-1], more))], -1)
    up = np.concatenate([*ups, np.zeros((more, ups[0].shape[1]))])
    return SidePath(down.astype(dtype), up.astype(dtype), np.int32(owners + [0] * more), **rows)


def _split(dense):
    """A weight [I,O] or [K,K,I,O] as a product of the smallest rank that always does."""
    if dense[..., 0].size < dense.shape[-1]:
        one = np.eye(dense[..., 0].size, dtype=np.float32)
        return one.reshape(*dense.shape[:-1], -1), dense.reshape(-1, dense.shape[-1])
    return dense, np.eye(dense.shape[-1], dtype=np.float32)


def _bucket(rank):
    """A rank rounded up: to a power of two, from 64 on to a multiple of 64."""
    return max(4, 2 ** (rank - 1).bit_length()) if rank <= 64 else -(-rank // 64) * 64
