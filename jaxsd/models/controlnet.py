"""ControlNet (Zhang et al. 2023, https://arxiv.org/abs/2302.05543): diffusers' ControlNetModel.

A copy of the U-Net's first half that reads a picture, the hint, and gives what to add to the
U-Net's skip connections and middle block, through 1x1 convolutions that start at zero.

ControlNet-Union and ProMax (xinsir's ControlNet++, diffusers' ControlNetUnionModel): one such
network for several modes, kinds of hints, of which a picture may have several at once.
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
from jaxsd.models.clip import ACTIVATIONS
from jaxsd.models.layers import (
    children,
    conv,
    layer_norm,
    linear,
    pointwise,
    timestep_embedding,
)
from jaxsd.typing import Params

# How much the outputs count in guess mode, from the finest to the coarsest; with `soft` for the
# negative prompt as well (sd-webui-controlnet: My prompt is more important).
GUESS_MODES = {'diffusers': lambda count: np.logspace(-1, 0, count),
               'original': lambda count: 0.825 ** np.arange(count - 1, -1, -1)}
GUESS_MODES['soft'] = GUESS_MODES['original']
# The kinds of hints of ControlNet-Union as it was published, diffusers' control_mode. The last two
# are ProMax's: a picture to draw in more detail, and one that is black where it is to be filled.
MODES = {'openpose': 0, 'depth': 1, **dict.fromkeys(('hed', 'pidi', 'scribble', 'ted'), 2),
         **dict.fromkeys(('canny', 'lineart', 'anime_lineart', 'mlsd'), 3), 'normal': 4,
         'segment': 5, 'tile': 6, 'repaint': 7}


def embed(params: Params, hint: Float[Array, '*B H W 3']) -> Float[Array, '*B h w C']:
    """A hint in [0,1], h = H / 8; independent of time, so it runs once a picture."""
    p, batch = params['controlnet_cond_embedding'], hint.shape[:-3]
    x = hint.reshape(-1, *hint.shape[-3:]).astype(p['conv_in']['weight'].dtype)
    x = jax.nn.silu(conv(p['conv_in'], x))
    for i, layer in enumerate(children(p['blocks'])):
        x = jax.nn.silu(conv(layer, x, stride=1 + i % 2))  # every other one halves height and width
    x = conv(p['conv_out'], x)
    return x.reshape(*batch, *x.shape[1:])


def apply(params: Params, cfg: ControlNetConfig, x: Float[Array, 'B h w L'], t: Num[Array, ' B'],
          context: Float[Array, 'B T D'], hint: Float[Array, 'B *K h w C'],
          added: Float[Array, 'B A'] | None = None,
          class_labels: Int[Array, ' B'] | None = None, modes: Int[Array, 'B K'] | None = None,
          scales: Float[Array, 'B K'] | None = None) -> list[Array]:
    """What to add to the U-Net's states, unscaled: a list of [B,H_i,W_i,C_i] as unet.encode gives.

    hint: from `embed`, of ControlNet-Union K for each picture. modes: what each of these is, below
    cfg.num_control_type, or -1: none; scales: how much each counts. The other arguments are the
    U-Net's; cfg: ControlNetConfig, where global_pool_conditions makes it [B,1,1,C_i]. Computes in
    the parameters' dtype.
    """
    time = unet.embed_time(params, t, added, class_labels)
    if cfg.num_control_type:
        kinds = jax.nn.one_hot(modes, cfg.num_control_type).max(1)  # [B,T], 1: there is such a hint
        sinusoids = timestep_embedding(kinds, cfg.added_time_dim).reshape(len(kinds), -1)
        time = time + unet.embed_vector(params['control_add_embedding'],
                                        sinusoids.astype(time.dtype))
        hint = _fused(params, hint, modes, scales)
    states = unet.encode(params, cfg, x, time, context.astype(time.dtype), hint)
    zeros = [*children(params['controlnet_down_blocks']), params['controlnet_mid_block']]
    residuals = [pointwise(p, state) for p, state in zip(zeros, states, strict=True)]
    if cfg.global_pool_conditions:
        return [r.mean((1, 2), keepdims=True) for r in residuals]
    return residuals


def _fused(params, hints, modes, scales):
    """K hints [B,K,h,w,C] as one [B,h,w,C]: their sum, each with a shift of its channels, which a
    transformer predicts from its mean and its mode.

    Each hint attends to itself alone. So it is in the authors' code, ComfyUI and diffusers: there
    attention goes along the batch, whose pictures have the same hint, or has one hint to see.
    """
    scales = jnp.where(modes >= 0, scales, 0).astype(hints.dtype)
    x = hints.mean((2, 3)) + params['task_embedding'][jnp.maximum(modes, 0)]  # [B,K,C]
    x = x * scales[..., None]
    for layer in children(params['transformer_layes']):
        p = layer['attn']
        h = layer_norm(layer['ln_1'], x) @ p['in_proj_weight'] + p['in_proj_bias']
        x = x + linear(p['out_proj'], jnp.split(h, 3, -1)[2])  # the values
        h = linear(layer['mlp']['c_fc'], layer_norm(layer['ln_2'], x))
        x = x + linear(layer['mlp']['c_proj'], ACTIVATIONS['quick_gelu'](h))
    shifts = linear(params['spatial_ch_projs'], x)
    return jnp.einsum('bkhwc,bk->bhwc', hints + shifts[:, :, None, None], scales)


def mode_number(cfg: ControlNetConfig, mode: str | int | None) -> int:
    """The number of a mode of a ControlNet-Union, from one of MODES or as it is; ValueError for
    None and for one that it has not."""
    number = MODES.get(mode, -1) if isinstance(mode, str) else -1 if mode is None else mode
    if not 0 <= number < cfg.num_control_type:
        raise ValueError(f'mode={mode!r}: expected what the hint is, of this ControlNet one of '
                         f'{", ".join(map(str, modes_of(cfg)))}')
    return number


def modes_of(cfg: ControlNetConfig) -> list[str | int]:
    """The modes that a ControlNet-Union has, by their names, or numbers beyond those of MODES."""
    return [*(name for name, number in MODES.items() if number < cfg.num_control_type),
            *range(max(MODES.values()) + 1, cfg.num_control_type)]


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
