"""What a training needs, without its weights: counted by jax.eval_shape and by the compiler."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from jaxsd.config import TEXT_ENCODERS, ModelConfig
from jaxsd.config_files import read_config, versions
from jaxsd.models.spec import spec, to_jax
from jaxsd.train import finetune, loop, methods, optimizers
from jaxsd.train.config import Settings
from jaxsd.typing import Params
from jaxsd.weights import Model
from jaxsd.weights.reading import open_source


class Memory(NamedTuple):
    """Bytes on one device.

    trainable: what is trained, float32; optimizer: its state and running averages; frozen: weights
    that stay; temporary: gradients and what the gradient needs of the network's states, by the
    compiled step; total: all of it. parameters: numbers that are trained, on all devices together.
    """

    trainable: int
    optimizer: int
    frozen: int
    temporary: int
    total: int
    parameters: int


def estimate(c: Settings) -> Memory:
    """The memory of a recipe's step on each of this machine's devices.

    c.base.model: a released version ('sd15', 'sdxl'), or a model whose weights are not read. The
    step is compiled, which takes minutes for large models; another backend than the one that will
    train has other temporary buffers.
    """
    name = c.base.model
    config = read_config(name) if name in versions() else open_source(name, None, False).config
    config = finetune.trainable_config(c, config)
    mesh, made = loop.make_mesh(c.train), {}

    def build(params):
        model = Model(config, params, made['tokenizers'])
        method = methods.METHODS[c.base.method](model, c.method, np.random.default_rng(0))
        loss, frozen = finetune.make_loss(c, method)
        made.update(loss=loss)
        return method.trainable, frozen

    made['tokenizers'] = _tokenizers(config)
    trainable, frozen = jax.eval_shape(build, abstract_params(
        config, 'float32' if c.base.method == 'full' else c.train.dtype))
    tx = optimizers.optimizer(c.optimizer, c.train.steps, trainable)
    state = jax.eval_shape(lambda p: loop.start(p, tx, c.train), trainable)
    state, frozen = (_placed(tree, loop.shardings(tree, mesh)) for tree in (state, frozen))
    rows = NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows),
                         abstract_batch(c, config))
    step = jax.jit(loop.make_step(made['loss'], tx, c.train), donate_argnums=0,
                   out_shardings=(jax.tree.map(lambda a: a.sharding, state), None))
    program = step.lower(state, frozen, batch, jax.eval_shape(lambda: jax.random.key(0))).compile()
    sizes = [_bytes(tree) for tree in (state.params, state, frozen)]
    analysis = program.memory_analysis()
    if analysis is None:
        raise ValueError(f'{jax.default_backend()}: this backend does not say what a program needs')
    temporary = analysis.temp_size_in_bytes
    return Memory(sizes[0], sizes[1] - sizes[0], sizes[2], temporary,
                  sizes[1] + sizes[2] + temporary,
                  sum(math.prod(a.shape) for a in jax.tree.leaves(trainable)))


def abstract_params(config: ModelConfig, dtype: Any) -> dict[str, Params]:
    """The shapes of a model's parameters, as jax.ShapeDtypeStructs."""
    def shape(name, shape):
        return jax.ShapeDtypeStruct(to_jax(name, np.broadcast_to(0, shape)).shape, jnp.dtype(dtype))

    return {part: traverse_util.unflatten_dict(
        {name: shape(name, s) for name, s in table.items()}, sep='.')
        for part, table in spec(config).items()}


def abstract_batch(c: Settings, config: ModelConfig) -> dict[str, Any]:
    """The shapes of a batch of the recipe's resolution."""
    B, (width, height) = c.train.batch_size, c.data.size
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    h, w = (n // config.vae.factor for n in (height, width))
    image = jax.ShapeDtypeStruct((B, height, width, 3), jnp.uint8)
    batch: dict[str, Any] = {'weight': struct((B,)), 'time_ids': struct((B, 6))}
    batch |= ({'moments': struct((B, h, w, 2 * config.vae.latent_channels))}
              if c.data.cache_latents else {'image': image})
    texts = {name: getattr(config, name) for name in TEXT_ENCODERS if getattr(config, name)}
    T = max(text.max_position_embeddings for text in texts.values())
    if c.data.cache_texts:
        last = list(texts.values())[-1]
        batch |= {'context': struct((B, c.base.blocks * T, config.unet.cross_attention_dim)),
                  'pooled': struct((B, last.projection_dim or last.hidden_size))}
    else:
        tokens = {name: jax.ShapeDtypeStruct((B, c.base.blocks, T), jnp.int32) for name in texts}
        batch |= {'tokens': tokens} | ({'uncond_tokens': tokens}
                                       if c.loss.objective == 'consistency' else {})
    hints = c.base.method in ('controlnet', 't2i_adapter') or c.loss.objective == 'preference'
    return batch | ({'hint': image} if hints else {})


def _tokenizers(config):
    """CLIP's, for textual inversion's initial words."""
    from jaxsd.prompt.tokenizer import CLIP, Tokenizer
    return {name: Tokenizer.from_folder(CLIP) for name in TEXT_ENCODERS if getattr(config, name)}


def _placed(tree, shardings):
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree,
                        shardings)


def _bytes(tree):
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
               for a in jax.tree.leaves(tree))
