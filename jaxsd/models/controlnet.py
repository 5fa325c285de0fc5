"""ControlNet (Zhang et al. 2023, https://arxiv.org/abs/2302.05543): diffusers' ControlNetModel.

A copy of the U-Net's first half that reads a picture, the hint, and gives what to add to the
U-Net's skip connections and middle block, through 1x1 convolutions that start at zero.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import Array
from jaxtyping import Float, Int, Num

from jaxsd.config import ControlNetConfig, UNetConfig
from jaxsd.models import shapes, spec, unet
from jaxsd.models.layers import children, conv, pointwise
from jaxsd.typing import Params

# How much the outputs count in guess mode, from the finest to the coarsest; with `soft` for the
# negative prompt as well (sd-webui-controlnet: My prompt is more important).
GUESS_MODES = {'diffusers': lambda count: np.logspace(-1, 0, count),
               'original': lambda count: 0.825 ** np.arange(count - 1, -1, -1)}
GUESS_MODES['soft'] = GUESS_MODES['original']


def embed(params: Params, hint: Float[Array, 'B H W 3']) -> Float[Array, 'B h w C']:
    """A hint in [0,1], h = H / 8; independent of time, so it runs once a picture."""
    p = params['controlnet_cond_embedding']
    x = jax.nn.silu(conv(p['conv_in'], hint.astype(p['conv_in']['weight'].dtype)))
    for i, layer in enumerate(children(p['blocks'])):
        x = jax.nn.silu(conv(layer, x, stride=1 + i % 2))  # every other one halves height and width
    return conv(p['conv_out'], x)


def apply(params: Params, cfg: ControlNetConfig, x: Float[Array, 'B h w L'], t: Num[Array, ' B'],
          context: Float[Array, 'B T D'], hint: Float[Array, 'B h w C'],
          added: Float[Array, 'B A'] | None = None,
          class_labels: Int[Array, ' B'] | None = None) -> list[Array]:
    """What to add to the U-Net's states, unscaled: a list of [B,H_i,W_i,C_i] as unet.encode gives.

    hint: from `embed`. The other arguments are the U-Net's; cfg: ControlNetConfig, where
    global_pool_conditions makes it [B,1,1,C_i]. Computes in the parameters' dtype.
    """
    time = unet.embed_time(params, t, added, class_labels)
    states = unet.encode(params, cfg, x, time, context.astype(time.dtype), hint)
    zeros = [*children(params['controlnet_down_blocks']), params['controlnet_mid_block']]
    residuals = [pointwise(p, state) for p, state in zip(zeros, states, strict=True)]
    if cfg.global_pool_conditions:
        return [r.mean((1, 2), keepdims=True) for r in residuals]
    return residuals


def check(cfg: ControlNetConfig, unet_cfg: UNetConfig) -> None:
    """ValueError unless a ControlNet fits a U-Net: what it is made for and what is needed."""
    needed = {name: getattr(unet_cfg, name) for name in (
        'cross_attention_dim', 'block_out_channels', 'layers_per_block', 'added_dim')}
    needed['in_channels'] = unet_cfg.out_channels  # it sees no mask that the U-Net may see
    differ = [f'{name} {getattr(cfg, name)} instead of {needed[name]}'
              for name in (f.name for f in dataclasses.fields(cfg))
              if name in needed and getattr(cfg, name) != needed[name]]
    if differ:
        raise ValueError(f'this ControlNet is for {_family(cfg)}, the model is '
                         f'{_family(unet_cfg)}: {", ".join(differ)}; give a ControlNet made for '
                         'the model')


def _family(cfg):
    width = cfg.cross_attention_dim
    return f'{unet.FAMILIES.get(width, "a model")} ({width}-wide text)'


def init_from_unet(unet_params: Params, cfg: ControlNetConfig, rng: np.random.Generator) -> Params:
    """Parameters to train from: the U-Net's first half copied, fresh layers for the hint, zeros.

    rng: a numpy generator. As diffusers' ControlNetModel.from_unet, but that of a U-Net's input it
    takes the first cfg.in_channels, the latents without the mask or depth beside them.
    """
    found = traverse_util.flatten_dict(unet_params, sep='.')
    table = shapes.controlnet(cfg)
    fresh = {name: shape for name, shape in table.items() if name.startswith('controlnet_')}
    arrays = {name: found[name] for name in table.keys() - fresh.keys()}
    arrays['conv_in.weight'] = arrays['conv_in.weight'][:, :, :cfg.in_channels]
    dtype = arrays['conv_in.weight'].dtype
    for name, array in traverse_util.flatten_dict(spec.init_part(rng, fresh, dtype),
                                                  sep='.').items():
        hint = name.startswith('controlnet_cond_embedding') and '.conv_out.' not in name
        arrays[name] = array if hint else jnp.zeros_like(array)
    return traverse_util.unflatten_dict(arrays, sep='.')
