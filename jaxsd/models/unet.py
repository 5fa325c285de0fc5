"""The noise predictor: UNet2DConditionModel of 1.x, 2.x, SDXL base and refiner.

Rombach et al. 2022 (latent diffusion), Podell et al. 2023 (SDXL). The structure is read off the
parameters; the config adds what arrays cannot say (heads, groups, eps).
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int, Num

from jaxsd.config import UNetConfig
from jaxsd.models.layers import (
    attention,
    children,
    conv,
    gelu,
    group_norm,
    layer_norm,
    linear,
    pointwise,
    resnet,
    timestep_embedding,
    upsample,
)
from jaxsd.models.resample import resize
from jaxsd.typing import Params

FAMILIES = {768: '1.x', 1024: '2.x', 1280: 'the SDXL refiner', 2048: 'SDXL'}  # by width of the text
Cache = dict[str, Any]  # see `cross_attention_cache`
Hook = Callable[[str, int, Array, Array, Array], Array | None]  # see `apply`


class Deep(NamedTuple):
    """DeepCache (https://arxiv.org/abs/2312.00858): the features that the last `layers` layers of
    the way up begin with are those of the last call for the images [B] that take them `again`; if
    all do, nothing is computed but these layers and those whose skip connections they see.

    layers: the paper's branch + 1. features: of `deep_features`.
    """

    layers: int
    again: Array
    features: Array


def deep_features(cfg: UNetConfig, layers: int, height: int, width: int) -> tuple[int, ...]:
    """The shape [H,W,C] of the features of `Deep`; height, width: of the latents."""
    below, place = divmod(layers - 1, cfg.layers_per_block + 1)  # levels, and layers of the last
    widths = cfg.block_out_channels
    first = place == cfg.layers_per_block  # it sees what the level below gives
    return (*(-(-n // 2 ** below) for n in (height, width)),
            widths[min(below + first, len(widths) - 1)])


class DeepShrink(NamedTuple):
    """Kohya's deep shrink: features are smaller from a block of the way down to where the way up
    comes by again, so that a picture larger than those of the training is composed as one of them.

    block: as ComfyUI counts from 1, each residual block and downsampler on the way down is one.
    factor: by which its features are smaller. after_skip: the skip connection keeps their size.
    downscale_method, upscale_method: as of `resample.weights`.
    """

    block: int = 3
    factor: float = 2.0
    after_skip: bool = True
    downscale_method: str = 'bicubic'
    upscale_method: str = 'bicubic'


def apply(params: Params, cfg: UNetConfig, x: Float[Array, 'B H W C'], t: Num[Array, ' B'],
          context: Float[Array, 'B T D'] | Cache, added: Float[Array, 'B A'] | None = None,
          class_labels: Int[Array, ' B'] | Float[Array, 'B P'] | None = None,
          hook: Hook | None = None,
          freeu: Sequence[Array] | None = None, residuals: Sequence[Array] | None = None,
          features: Iterable[Array] = (), remat: bool = False,
          guidance: Float[Array, ' B'] | None = None,
          shrink: DeepShrink | None = None, deep: Deep | None = None) -> Any:
    """The network's output for x at the timesteps t, [B,H,W,O], O = cfg.out_channels; with `deep`
    that and the features of this call.

    context: features of the text, or their `cross_attention_cache` where they serve many times.
    t: training timesteps, 0 to 999, whole or not. added: SDXL's pooled text ++ sinusoids of
    the time ids. class_labels: rows of the class embedding, for models that have one; of unCLIP
    [B,P], an image's embedding and sinusoids of its noise level.
    hook(place, heads, q, k, v): called at every self-attention, place its name in the checkpoint
    ('mid_block.attentions.0.transformer_blocks.0.attn1'), and cross-attention ('... .attn2'),
    q [B,T,C], k, v [B,S,C]; returns the attention's output, or None to go on as usual.
    freeu: (b1, b2, s1, s2), each [] or [B]. residuals: a ControlNet's, added to what `encode`
    gives, one for one. features: a T2I-Adapter's, one per level, see `encode`. Both scaled, and
    summed over several networks.
    remat: the gradient computes what is inside of residual and transformer blocks again, instead
    of keeping it. guidance: the guidance scale, for models that take it as an input (LCM).
    shrink: a DeepShrink, which goes with neither residuals nor features. deep: a Deep.
    Computes in the parameters' dtype and returns x's.
    """
    time = embed_time(params, t, added, class_labels, guidance)
    decode = functools.partial(_decode, params, cfg, time=time, context=context, hook=hook,
                               freeu=freeu, remat=remat, shrink=shrink)

    def states(most=None):
        found = encode(params, cfg, x, time, context, hook=hook, features=features, remat=remat,
                       shrink=shrink, most=most)
        return found if residuals is None else [
            s + r.astype(s.dtype) for s, r in zip(found, residuals[:most], strict=True)]

    if deep is None:
        return decode(states()).astype(x.dtype)
    layers = sum(len(block['resnets']) for block in params['up_blocks'].values()) - deep.layers

    def whole():
        found = states()
        return found[:deep.layers], decode(found, last=layers)

    skips, fresh = lax.cond(deep.again.all(), lambda: (states(deep.layers), deep.features), whole)
    kept = jnp.where(deep.again[:, None, None, None], deep.features, fresh)
    return decode([*skips, kept], first=layers).astype(x.dtype), kept


def cross_attention_cache(params: Params, context: Float[Array, 'B T D']) -> Cache:
    """What cross-attention makes of a context, the same at all noise levels: {place: (keys,
    values)}, each [B,T,C], and the context itself at ''."""
    context = context.astype(params['conv_in']['weight'].dtype)
    cache = {'': context}

    def visit(p, place):
        if place.endswith('.attn2'):
            cache[place] = linear(p['to_k'], context), linear(p['to_v'], context)
        else:
            for name, part in p.items():
                if isinstance(part, dict):
                    visit(part, f'{place}.{name}'.lstrip('.'))

    visit(params, '')
    return cache


def cross_attentions(cfg: UNetConfig) -> dict[str, int]:
    """The cross-attentions of a U-Net -> {place, as `Hook` has it: its width}, in the order in
    which diffusers counts them: the middle block is last."""
    levels, each = list(enumerate(cfg.block_out_channels)), cfg.layers_per_block
    attentions = [(f'down_blocks.{level}.attentions.{i}', width, cfg.depth('down', level, i))
                  for level, width in levels for i in range(each)]
    attentions += [(f'up_blocks.{up}.attentions.{i}', width, cfg.depth('up', level, i))
                   for up, (level, width) in enumerate(reversed(levels)) for i in range(each + 1)]
    attentions.append(('mid_block.attentions.0', levels[-1][1], cfg.mid_transformer_layers))
    return {f'{place}.transformer_blocks.{k}.attn2': width
            for place, width, depth in attentions for k in range(depth)}


def embed_time(p: Params, t: Num[Array, ' B'], added: Float[Array, 'B A'] | None = None,
               class_labels: Int[Array, ' B'] | Float[Array, 'B P'] | None = None,
               guidance: Float[Array, ' B'] | None = None) -> Float[Array, 'B D']:
    """The time embedding that every residual block sees; arguments as of `apply`."""
    width, dtype = p['conv_in']['weight'].shape[-1], p['conv_in']['weight'].dtype
    embedding, sinusoids = p['time_embedding'], timestep_embedding(t, width).astype(dtype)
    if ('cond_proj' in embedding) != (guidance is not None):
        takes = 'cond_proj' in embedding
        raise ValueError(f'guidance: the scale is {"an" if takes else "no"} input of this network, '
                         f'so it must {"" if takes else "not "}be given')
    if guidance is not None:
        scale = guidance_embedding(guidance, embedding['cond_proj']['weight'].shape[0])
        sinusoids = sinusoids + linear(embedding['cond_proj'], scale.astype(dtype))
    time = embed_vector(embedding, sinusoids)
    for name, value in (('add_embedding', added), ('class_embedding', class_labels)):
        if (name in p) != (value is not None):
            kind = {'add_embedding': 'added', 'class_embedding': 'class_labels'}[name]
            raise ValueError(f'{kind}: this network has {"a" if name in p else "no"} {name}, '
                             f'so {kind} must {"" if name in p else "not "}be given')
    if added is not None:
        time = time + embed_vector(p['add_embedding'], added.astype(dtype))
    if class_labels is not None:
        classes = p['class_embedding']
        time = time + (classes['weight'][class_labels] if 'weight' in classes else
                       embed_vector(classes, class_labels.astype(dtype)))
    return time


def guidance_embedding(guidance: Float[Array, ' B'], dim: int) -> Float[Array, 'B D']:
    """Sinusoids of w = guidance - 1, times 1000, sines first; as of LCM (section 4.3 of
    https://arxiv.org/abs/2310.04378), diffusers' get_guidance_scale_embedding."""
    half = dim // 2
    frequency = np.exp(-np.log(10000.0) / max(half - 1, 1) * np.arange(half)).astype(np.float32)
    angle = 1000 * (guidance.astype(jnp.float32) - 1)[:, None] * frequency
    return jnp.pad(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1), ((0, 0), (0, dim % 2)))


def encode(p: Params, cfg: UNetConfig, x: Float[Array, 'B H W C'], time: Float[Array, 'B D'],
           context: Float[Array, 'B T E'] | Cache, hint: Float[Array, 'B H W F'] | None = None,
           hook: Hook | None = None, features: Iterable[Array] = (),
           remat: bool = False, shrink: DeepShrink | None = None,
           most: int | None = None) -> list[Array]:
    """The half that a ControlNet copies -> [skip connection, ..., the middle block's output], or
    the first `most` of them.

    time: from `embed_time`; context: as of `apply`. hint: added to what the first layer gives.
    features: added after the last attention of each level, or at its end where it has none; one
    too many is added at the very end (diffusers' down_intrablock_additional_residuals). remat,
    shrink: as of `apply`.
    """
    features = iter(features)
    residual, transformer = _blocks(cfg, time, context, hook, remat)

    def adapt(x):
        if (feature := next(features, None)) is not None:
            x = states[-1] = x + feature.astype(x.dtype)
        return x

    def keep(x):
        """A block's output becomes a skip connection -> what the next block sees."""
        states.append(x)
        if shrink is None or len(states) - 1 != shrink.block:
            return x
        x = resize(x, *(round(n / shrink.factor) for n in x.shape[1:3]), shrink.downscale_method)
        if not shrink.after_skip:
            states[-1] = x
        return x

    states: list[Array] = []
    x = conv(p['conv_in'], x.astype(time.dtype))
    if hint is not None:
        x = x + hint.astype(x.dtype)
    x = keep(x)
    for level, block in enumerate(children(p['down_blocks'])):
        for i, layer in enumerate(children(block['resnets'])):
            if len(states) == most:
                return states
            x = residual(layer, x)
            if 'attentions' in block:
                x = transformer(block['attentions'][str(i)], x, level,
                                f'down_blocks.{level}.attentions.{i}')
            x = keep(x)
        if 'attentions' in block:
            x = adapt(x)
        if len(states) == most:
            return states
        if 'downsamplers' in block:
            x = conv(block['downsamplers']['0']['conv'], x, stride=2)  # [B,H,W,C] -> [B,H/2,W/2,C]
            x = keep(x)
        if 'attentions' not in block:
            x = adapt(x)

    mid = p.get('mid_block', {'resnets': {}})  # distilled networks have less of it, or nothing
    for i, layer in enumerate(children(mid['resnets'])):
        if i == 1:  # not crossed whatever the last level does, as in diffusers
            x = transformer(mid['attentions']['0'], x, -1, 'mid_block.attentions.0', crossed=False)
        x = residual(layer, x)
    states.append(x)
    adapt(x)
    return states


def _decode(p, cfg, states, time, context, hook, freeu, remat, shrink, first=0, last=None):
    """The other half: what `encode` gives -> the output [B,H,W,cfg.out_channels]. first, last: only
    the layers from one to another, without the output's own if a last one is given."""
    *skips, x = states
    residual, transformer = _blocks(cfg, time, context, hook, remat)
    number = 0
    for level, block in enumerate(children(p['up_blocks'])):
        for i, layer in enumerate(children(block['resnets'])):
            number += 1
            if not first < number <= (last or number):
                continue
            skip = skips.pop()
            if shrink is not None and x.shape[1:3] != skip.shape[1:3]:
                x = resize(x, *skip.shape[1:3], shrink.upscale_method)
            if freeu is not None and level < 2:
                x, skip = _freeu(x, skip, freeu[level], freeu[level + 2])
            x = jnp.concatenate([x, skip], -1)
            x = residual(layer, x)
            if 'attentions' in block:
                x = transformer(block['attentions'][str(i)], x, -1 - level,
                                f'up_blocks.{level}.attentions.{i}')
        if 'upsamplers' in block and first < number <= (last or number):
            x = upsample(block['upsamplers']['0'], x, skips[-1].shape[1:3])

    if last is not None:
        return x
    x = jax.nn.silu(group_norm(p['conv_norm_out'], x, cfg.norm_num_groups, cfg.norm_eps))
    return conv(p['conv_out'], x)


def embed_vector(p: Params, x: Float[Array, 'B I']) -> Float[Array, 'B D']:
    """Two linear layers with a silu between them."""
    return linear(p['linear_2'], jax.nn.silu(linear(p['linear_1'], x)))


def _freeu(x, skip, b, s):
    """FreeU (https://arxiv.org/abs/2309.11497) as in diffusers: the first half of the channels of x
    times b, the lowest frequencies of the skip connection times s; b, s [] or [B].

    Lowest are 0 and -1 along each axis. Projecting on them takes two small matrices per axis and
    leaves the skip as it is, exactly, where s is 1.
    """
    b, s = (jnp.reshape(a, (-1, 1, 1, 1)) for a in (b, s))
    half = jnp.arange(x.shape[-1]) < x.shape[-1] // 2
    f, low = skip.astype(jnp.float32), 0
    for sign, wave in ((1, lambda angle: 1 + np.cos(angle)), (-1, np.sin)):
        rows, columns = (wave(2 * np.pi * np.subtract.outer(np.arange(n), np.arange(n)) / n) / n
                         for n in f.shape[1:3])
        low = low + sign * jnp.einsum(
            'ih,bhwc,jw->bijc', rows.astype(np.float32), f, columns.astype(np.float32),
            precision='highest')
    return (jnp.where(half, b, 1) * x).astype(x.dtype), (f + (s - 1) * low).astype(skip.dtype)


def _blocks(cfg, time, context, hook, remat):
    """residual(params, x) and transformer(params, x, level, place, crossed) for these arguments."""
    again = jax.checkpoint if remat else lambda f: f

    @again
    def residual(p, x):
        return resnet(p, x, cfg.norm_num_groups, cfg.norm_eps, time)

    def transformer(p, x, level, place, crossed=None):
        return _transformer(p, cfg, level, x, context, hook, place, again, crossed)

    return residual, transformer


def _transformer(p, cfg, level, x, context, hook, place, again, crossed=None):
    """Self-attention, cross-attention and a gated MLP over the pixels of x [B,H,W,C].

    crossed: whether what would be self-attention is cross-attention; None: as the level is.
    again: wraps each of its blocks, for rematerialisation.
    """
    B, H, W, C = x.shape
    crossed = cfg.only_cross_attention[level] if crossed is None else crossed
    heads = cfg.heads[level]

    def layer(block, here, h):
        n = layer_norm(block['norm1'], h)
        watch, cross = (None if hook is None else functools.partial(hook, f'{here}.{name}')
                        for name in ('attn1', 'attn2'))
        keys = _keys(block['attn1'], context if crossed else n, n.dtype)
        h = h + _attend(block['attn1'], heads, n, *keys, None if crossed else watch)
        n = layer_norm(block['norm2'], h)
        keys = _keys(block['attn2'], context, n.dtype, f'{here}.attn2')
        h = h + _attend(block['attn2'], heads, n, *keys, cross)
        n = linear(block['ff']['net']['0']['proj'], layer_norm(block['norm3'], h))
        value, gate = jnp.split(n, 2, -1)  # GEGLU (Shazeer 2020), exact gelu
        return h + linear(block['ff']['net']['2'], value * gelu(gate))

    h = group_norm(p['norm'], x, cfg.norm_num_groups, 1e-6)
    h = pointwise(p['proj_in'], h).reshape(B, H * W, C)
    for i, block in enumerate(children(p['transformer_blocks'])):
        here = f'{place}.transformer_blocks.{i}'
        h = again(functools.partial(layer, block, here))(h)
    return x + pointwise(p['proj_out'], h.reshape(B, H, W, C))


def _keys(p, context, dtype, place=None):
    """Keys and values [B,S,C] from a context [B,S,D], in a dtype, or those of this place in its
    cache."""
    if isinstance(context, dict):
        if place is not None:
            return context[place]
        context = context['']
    context = context.astype(dtype)
    return linear(p['to_k'], context), linear(p['to_v'], context)


def _attend(p, heads, x, k, v, hook=None):
    """Queries from x [B,T,C], keys and values [B,S,C] -> [B,T,C]."""
    q = linear(p['to_q'], x)
    out = None if hook is None else hook(heads, q, k, v)
    out = attention(q, k, v, heads) if out is None else out
    return linear(p['to_out']['0'], out)
