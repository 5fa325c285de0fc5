"""What is trained: a whole model, an adapter, the vectors of a word, a network beside the U-Net.

METHODS holds them by name: each takes a Model, its settings (train.config) and a numpy generator,
and gives a Method. All are the same to the loop, which sees arrays to change and arrays that stay.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxsd.config import TEXT_ENCODERS, ControlNetConfig, ModelConfig, T2IAdapterConfig
from jaxsd.models import controlnet, spec
from jaxsd.train.config import AdapterConfig, ControlConfig, EmbeddingConfig, FullConfig
from jaxsd.typing import Params
from jaxsd.weights import (
    Adapter,
    Embedding,
    Model,
    Network,
    adapter_formats,
    load_controlnet,
    load_t2i_adapter,
    merge,
)
from jaxsd.weights.adapters import own_matrix


class Method(NamedTuple):
    """What is trained.

    trainable: the arrays that change, {component: nested or flat dict}, float32.
    frozen: those that stay. config: of the loss.
    apply(frozen, trainable) -> the params that the loss takes; traceable.
    model(trainable) -> a Model that draws with what was trained.
    result(trainable) -> what is saved: a Model, Adapter, Embedding or Network.
    embeddings: {name: Embedding} of words that captions may have.
    """

    config: ModelConfig
    trainable: Params
    frozen: Params
    apply: Callable[[Params, Params], Params]
    model: Callable[[Params], Model]
    result: Callable[[Params], Any]
    embeddings: Mapping[str, Embedding] = {}


LAYERS = {  # of adapters, by name: expressions for names of layers, the U-Net's, text encoders'
    # kohya sd-scripts: all in transformers.
    'transformer': r'\.attentions\.|\.self_attn\.|\.mlp\.',
    # diffusers' scripts: projections of attention.
    'attention': r'\.to_[qkv]$|\.to_out\.0$|\.(q|k|v|out)_proj$',
    'all': '',
}


def full(model: Model, c: FullConfig, rng: np.random.Generator) -> Method:
    """Train weights of the model."""
    chosen, rest = {}, dict(model.params)
    for part in _components(model, c.components):
        flat = traverse_util.flatten_dict(model.params[part], sep='.')
        chosen[part] = {k: a for k, a in flat.items() if re.search(c.layers, k)}
        rest[part] = {k: a for k, a in flat.items() if k not in chosen[part]}
        if not chosen[part]:
            raise ValueError(f'layers={c.layers!r}: no parameter of {part} has such a name, as '
                             f'{next(iter(flat))!r} is one')

    def apply(frozen, trainable):
        return frozen | {part: traverse_util.unflatten_dict(frozen[part] | arrays, sep='.')
                         for part, arrays in trainable.items()}

    def result(trainable):
        return model.replace(params=apply(rest, trainable))

    return Method(model.config, _float32(chosen), rest, apply, result, result)


def lora(model: Model, c: AdapterConfig, rng: np.random.Generator) -> Method:
    """Train an adapter. trainable: {component: {layer: {part: array}}}, with the parts and axes of
    files, see weights.adapter_formats."""
    shapes, trainable, fixed = spec.spec(model.config), {}, {}
    pattern = LAYERS.get(c.layers, c.layers)
    for part in _components(model, c.components):
        for name, shape in shapes[part].items():
            layer = name.removesuffix('.weight')
            if layer == name or len(shape) not in (2, 4) or name.endswith('embedding.weight') or (
                    not re.search(pattern, layer)):
                continue
            rank, alpha = ((c.rank, c.alpha) if shape[2:] in ((), (1, 1))
                           else (c.conv_rank, c.conv_alpha))
            if rank:
                parts = KINDS[c.kind](rng, shape, rank, c)
                if c.kind == 'dora':
                    weight = own_matrix(model.params[part], name)
                    parts['magnitude'] = jnp.linalg.norm(weight, axis=1)
                trainable.setdefault(part, {})[layer] = parts
                fixed.setdefault(part, {})[layer] = {'alpha': np.float32(alpha or rank)}
        if part not in trainable:
            raise ValueError(f'layers={c.layers!r}: no layer of {part} has such a name; expected '
                             f'one of {", ".join(LAYERS)}, or an expression for names such as '
                             f'{next(iter(shapes[part])).rpartition(".")[0]!r}')

    def deltas(params, trainable):
        """{component: {name: Delta}} of what was trained."""
        return {part: {f'{layer}.weight': adapter_formats.weight_delta(
            adapter_formats.kind(arrays.keys()), arrays | fixed[part][layer], f'{layer}.weight',
            shapes[part][f'{layer}.weight'],
            lambda part=part, layer=layer: own_matrix(params[part], f'{layer}.weight'))
            for layer, arrays in layers.items()} for part, layers in trainable.items()}

    def apply(frozen, trainable):
        changed = {part: _with_deltas(frozen[part], found)
                   for part, found in deltas(frozen, trainable).items()}
        return frozen | changed

    def result(trainable):
        arrays = jax.tree.map(np.asarray, trainable)
        return Adapter(deltas(model.params, arrays), parts={
            part: {layer: arrays[part][layer] | fixed[part][layer] for layer in layers}
            for part, layers in arrays.items()}, config=model.config)

    return Method(model.config, _float32(trainable), model.params, apply,
                  lambda trainable: merge(model, {result(trainable): 1.0}), result)


def textual_inversion(model: Model, c: EmbeddingConfig, rng: np.random.Generator) -> Method:
    """Train the vectors of a word. trainable: {'embeddings': {text encoder: [E,D]}}."""
    vectors, word = {}, c.token.strip('<>')
    for name, tokenizer in model.tokenizers.items():
        ids = tokenizer.ids(c.initial)
        table = model.params[name]['text_model']['embeddings']['token_embedding']['weight']
        vectors[name] = table[np.resize(ids, c.vectors)]

    def result(trainable):
        found = {k: np.asarray(a, np.float32) for k, a in trainable['embeddings'].items()}
        return Embedding(word, found)

    def with_embedding(trainable):
        return model.replace(embeddings=model.embeddings | {word: result(trainable)})

    return Method(model.config, _float32({'embeddings': vectors}), model.params,
                  lambda frozen, trainable: frozen | trainable, with_embedding, result,
                  {word: Embedding(word, vectors)})


def control(model: Model, c: ControlConfig, rng: np.random.Generator,
            adapter: bool = False) -> Method:
    """Train a ControlNet (Zhang et al. 2023), or with adapter a T2I-Adapter (Mou et al. 2023)."""
    if c.start:
        network = (load_t2i_adapter if adapter else load_controlnet)(c.start)
        config, params = _plain(network.config), network.params
    elif adapter:
        config = adapter_config(model.config, c)
        params = spec.init_part(rng, spec.names(config))
    else:
        config = _plain(control_config(model.config, c))
        params = controlnet.init_from_unet(model.params['unet'], config, rng)
        params['controlnet_cond_embedding'] = jax.tree.map(
            lambda a: c.gain * a if a.ndim == 4 else a, params['controlnet_cond_embedding'])

    def result(trainable):
        return Network(config, trainable['controlnet']['hint'])

    def with_network(trainable):
        return model.replace(controlnets=model.controlnets | {'hint': result(trainable)})

    return Method(model.config.replace(controlnets=(('hint', config),)),
                  _float32({'controlnet': {'hint': params}}), model.params,
                  lambda frozen, trainable: frozen | trainable, with_network, result)


def _plain(config):
    """A network's config; ValueError for a ControlNet-Union."""
    if getattr(config, 'num_control_type', 0):
        raise ValueError('method=controlnet: training a ControlNet-Union is not implemented; give '
                         'a plain ControlNet as start, and no num_control_type in network')
    return config


def control_config(config: ModelConfig, c: ControlConfig) -> ControlNetConfig:
    """The config of a new ControlNet for a model: its U-Net's sizes but for `c.network`."""
    sizes = dataclasses.asdict(config.unet)
    del sizes['out_channels'], sizes['sample_size']
    sizes['in_channels'] = config.unet.out_channels
    return ControlNetConfig(**sizes | {'conditioning_channels': c.channels} | dict(c.network))


def adapter_config(config: ModelConfig, c: ControlConfig) -> T2IAdapterConfig:
    """The config of a new T2I-Adapter for a model."""
    xl, widths = config.unet.added_dim > 0, config.unet.block_out_channels
    if dict(c.network).get('adapter_type') == 'light_adapter':
        widths = widths[:-1]
    settings: dict[str, Any] = {
        'in_channels': c.channels, 'channels': (*widths, widths[-1]) if xl else widths,
        'downscale_factor': 16 if xl else 8,
        'adapter_type': 'full_adapter_xl' if xl else 'full_adapter'}
    return T2IAdapterConfig(**settings | dict(c.network))


METHODS: dict[str, Callable[..., Method]] = {
    'full': full, 'lora': lora, 'textual_inversion': textual_inversion, 'controlnet': control,
    't2i_adapter': functools.partial(control, adapter=True)}


def _lora_parts(rng, shape, rank, c):
    """As torch starts linear layers, and 0: the change is 0 at first, as in all of these."""
    (O, *N), one = shape, [1] * (len(shape) - 2)
    bound = 1 / np.sqrt(np.prod(N))
    return {'down': rng.uniform(-bound, bound, (rank, *N)), 'up': np.zeros((O, rank, *one))}


def _loha_parts(rng, shape, rank, c):
    """LyCORIS' initial values: deviations 0.1, 1, 0, 1."""
    O, N = shape[0], int(np.prod(shape[1:]))
    return {'hada_w1_a': 0.1 * rng.standard_normal((O, rank)),
            'hada_w1_b': rng.standard_normal((rank, N)),
            'hada_w2_a': np.zeros((O, rank)), 'hada_w2_b': rng.standard_normal((rank, N))}


def _lokr_parts(rng, shape, rank, c):
    """LyCORIS': a small matrix, whole, and a large one, a product where that is smaller."""
    (O, I, *K), pixels = shape, int(np.prod(shape[2:]))
    (o1, o2), (i1, i2) = _divide(O, c.factor), _divide(I, c.factor)

    def draw(*size):
        bound = 1 / np.sqrt(np.prod(size[1:]))
        return rng.uniform(-bound, bound, size)

    parts = {'lokr_w1': draw(o1, i1)}
    if rank < max(o2, i2) / 2:
        return parts | {'lokr_w2_a': np.zeros((o2, rank)), 'lokr_w2_b': draw(rank, i2 * pixels)}
    return parts | {'lokr_w2': np.zeros((o2, i2, *K))}


def _divide(n, most):
    """n as a product: the largest divisor up to `most`, and the other factor."""
    first = next(k for k in range(min(most, int(np.sqrt(n))), 0, -1) if n % k == 0)
    return first, n // first


KINDS = {'lora': _lora_parts, 'dora': _lora_parts, 'loha': _loha_parts, 'lokr': _lokr_parts}


def _with_deltas(params, deltas):
    """A component's params with {name: Delta} beside its layers, traceable."""
    flat = traverse_util.flatten_dict(params, sep='.')
    for name, delta in deltas.items():
        layer = name.removesuffix('.weight')
        if delta.dense is not None:
            flat[name] = flat[name] + delta.dense.astype(flat[name].dtype)
            flat.pop(f'{layer}.tiles', None)  # of the weight before
        for part in ('down', 'up'):
            if getattr(delta, part) is not None:
                flat[f'{layer}.adapter.{part}'] = getattr(delta, part).astype(flat[name].dtype)
        if delta.scale is not None:
            flat[f'{layer}.adapter.scale'] = delta.scale[None].astype(flat[name].dtype)
    return traverse_util.unflatten_dict(flat, sep='.')


def _components(model, names):
    known = [part for part in ('unet', *TEXT_ENCODERS) if part in model.params]
    for name in names:
        if name not in known:
            raise ValueError(f'components: this model has no {name!r} to train; expected some of '
                             f'{", ".join(known)}')
    return [part for part in known if part in names]


def _float32(tree):
    return jax.tree.map(lambda a: jnp.array(a, jnp.float32), tree)
