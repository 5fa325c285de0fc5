"""IP-Adapter (Ye et al. 2023, https://arxiv.org/abs/2308.06721): pictures as prompts.

Features of a picture become tokens, to which the U-Net's cross-attentions attend beside the text's,
with keys and values of their own: out + weight * attention(q, k, v). The kinds differ in what makes
the tokens: a linear layer (base), a resampler (plus), two layers for each token of the image
encoder (full face), two layers for the embedding of a face (FaceID), or these and a resampler.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxsd.config import IPAdapterConfig, KUNetConfig, UNetConfig
from jaxsd.models import shapes, unet
from jaxsd.models.layers import attention, children, gelu, layer_norm, linear
from jaxsd.typing import Params, Shapes

HEAD = 64  # channels of a head of the resampler
LORA = {'to_q_lora': 'to_q', 'to_k_lora': 'to_k', 'to_v_lora': 'to_v', 'to_out_lora': 'to_out.0'}


def project(params: Params, cfg: IPAdapterConfig, image: Float[Array, 'B *T F'] | None,
            face: Float[Array, 'B E'] | None = None) -> Float[Array, 'B K D']:
    """Features of pictures -> K tokens each, D = cfg.cross_attention_dim.

    image: of clip.encode_image, `embeds` for the kind base, else `hidden`; None for FaceID. face:
    embeddings of faces, for FaceID's kinds.
    """
    p = params['image_proj']
    dtype = jax.tree.leaves(p)[0].dtype
    seen: Any = None if image is None else image.astype(dtype)
    whose: Any = None if face is None else face.astype(dtype)
    if cfg.kind == 'plus':
        latents = jnp.broadcast_to(p['latents'], (len(seen), *p['latents'].shape[1:]))
        return _resample(p, cfg, seen, latents)
    if cfg.kind == 'full':
        return layer_norm(p['proj']['3'], _mlp(p['proj'], seen))
    flat = linear(p['proj'], seen) if cfg.kind == 'base' else _mlp(p['proj'], whose)
    tokens = layer_norm(p['norm'], flat.reshape(len(flat), cfg.tokens, -1))
    if cfg.kind != 'faceid_plus':
        return tokens
    found = _resample(p['perceiver_resampler'], cfg, seen, tokens)
    return tokens + found if cfg.shortcut else found


def keys(params: Params, tokens: Float[Array, '*B K D']) -> dict[str, tuple[Array, Array]]:
    """What the U-Net's cross-attentions make of tokens -> {place: (keys, values)}, [...,K,C] each.
    params: with 'ip_adapter' as of `by_place`."""
    found = params['ip_adapter']
    return {place: (linear(found[place]['to_k_ip'], tokens), linear(found[place]['to_v_ip'], tokens)
                    ) for place in found}


def by_place(params: Params, unet_cfg: UNetConfig) -> Params:
    """An adapter's params for `project` and `keys`: its layers, of which files have the numbers,
    by their places in a U-Net."""
    places = unet.cross_attentions(unet_cfg)
    return {'image_proj': params['image_proj'], 'ip_adapter': {
        place: {name: params['ip_adapter'][str(2 * i + 1)][name] for name in ('to_k_ip', 'to_v_ip')}
        for i, place in enumerate(places)}}


def check(cfg: IPAdapterConfig, unet_cfg: UNetConfig | KUNetConfig) -> None:
    """ValueError unless an adapter fits a U-Net: its cross-attentions and the text's width."""
    if isinstance(unet_cfg, KUNetConfig):
        raise ValueError('the x2 latent upscaler takes no IP-Adapters')
    ours = tuple(unet.cross_attentions(unet_cfg).values())
    if (cfg.widths, cfg.cross_attention_dim) != (ours, unet_cfg.cross_attention_dim):
        made, model = (f'{unet.FAMILIES.get(width, "a model")} ({width}-wide text, {len(found)} '
                       'cross-attentions)' for width, found in (
                           (cfg.cross_attention_dim, cfg.widths),
                           (unet_cfg.cross_attention_dim, ours)))
        raise ValueError(f'this IP-Adapter is for {made}, the model is {model}; give an adapter '
                         'made for it')


def detect(found: Mapping[str, tuple[int, ...]], shortcut: bool = False) -> IPAdapterConfig:
    """The config of an adapter of which a file has these tensors, {name: shape}.

    Raises KeyError with the name of a tensor that all adapters have, or all of the kind. What else
    is wrong comes out when the names are compared with `names`.
    """
    def size(name, axis=0):
        return found[f'image_proj.{name}'][axis]

    count = next(i for i in itertools.count() if f'ip_adapter.{2 * i + 1}.to_k_ip.weight' not in
                 found)
    widths, rank = [], found.get('ip_adapter.0.to_q_lora.down.weight', (0,))[0]
    for i in range(max(count, 1)):
        width, context = found[f'ip_adapter.{2 * i + 1}.to_k_ip.weight']
        widths.append(width)
    made: dict[str, Any] = {'widths': tuple(widths), 'cross_attention_dim': context, 'rank': rank}

    def resampler(at: str) -> dict[str, Any]:
        inner = size(f'{at}layers.0.0.to_q.weight')
        depth = next(i for i in itertools.count()
                     if f'image_proj.{at}layers.{i}.0.to_q.weight' not in found)
        return {'features': size(f'{at}proj_in.weight', 1), 'heads': max(inner // HEAD, 1),
                'hidden_size': size(f'{at}proj_in.weight'), 'depth': depth}

    if 'image_proj.latents' in found:
        return IPAdapterConfig('plus', **made, tokens=size('latents', 1), **resampler(''))
    if 'image_proj.proj.3.weight' in found:
        return IPAdapterConfig('full', **made, features=size('proj.0.weight', 1), tokens=0)
    if 'image_proj.proj.0.weight' in found:
        made |= {'face': size('proj.0.weight', 1), 'tokens': size('proj.2.weight') // context}
        at = 'perceiver_resampler.'
        if f'image_proj.{at}proj_in.weight' in found:
            return IPAdapterConfig('faceid_plus', **made, **resampler(at), shortcut=shortcut)
        return IPAdapterConfig('faceid', **made, features=0)
    return IPAdapterConfig('base', **made, features=size('proj.weight', 1),
                           tokens=size('proj.weight') // context)


def names(c: IPAdapterConfig) -> Shapes:
    """Names and shapes of the parameters, see shapes.py."""
    d, f, at = c.cross_attention_dim, c.features, 'image_proj'
    if c.kind == 'base':
        table = shapes.linear(f'{at}.proj', f, c.tokens * d) | shapes.affine(f'{at}.norm', d)
    elif c.kind == 'full':
        table = shapes.linear(f'{at}.proj.0', f, f) | shapes.linear(f'{at}.proj.2', f, d)
        table |= shapes.affine(f'{at}.proj.3', d)
    elif c.kind == 'plus':
        table = {f'{at}.latents': (1, c.tokens, c.hidden_size)} | _resampler(at, c)
    else:
        table = shapes.linear(f'{at}.proj.0', c.face, 2 * c.face)
        table |= shapes.linear(f'{at}.proj.2', 2 * c.face, c.tokens * d)
        table |= shapes.affine(f'{at}.norm', d)
        if c.kind == 'faceid_plus':
            table |= _resampler(f'{at}.perceiver_resampler', c)
    for i, width in enumerate(c.widths):
        for name in ('to_k_ip', 'to_v_ip'):
            table |= shapes.linear(f'ip_adapter.{2 * i + 1}.{name}', d, width, bias=False)
        for number, source in ((2 * i, width), (2 * i + 1, d)) if c.rank else ():
            for name in LORA:
                reads = source if name in ('to_k_lora', 'to_v_lora') else width
                layer = f'ip_adapter.{number}.{name}'
                table |= shapes.linear(f'{layer}.down', reads, c.rank, bias=False)
                table |= shapes.linear(f'{layer}.up', c.rank, width, bias=False)
    return table


def _resampler(at, c):
    d, inner = c.hidden_size, c.heads * HEAD
    table = shapes.linear(f'{at}.proj_in', c.features, d)
    for i in range(c.depth):
        layer = f'{at}.layers.{i}'
        table |= shapes.affine(f'{layer}.0.norm1', d) | shapes.affine(f'{layer}.0.norm2', d)
        table |= shapes.linear(f'{layer}.0.to_q', d, inner, bias=False)
        table |= shapes.linear(f'{layer}.0.to_kv', d, 2 * inner, bias=False)
        table |= shapes.linear(f'{layer}.0.to_out', inner, d, bias=False)
        table |= shapes.affine(f'{layer}.1.0', d)
        table |= shapes.linear(f'{layer}.1.1', d, 4 * d, bias=False)
        table |= shapes.linear(f'{layer}.1.3', 4 * d, d, bias=False)
    return (table | shapes.linear(f'{at}.proj_out', d, c.cross_attention_dim)
            | shapes.affine(f'{at}.norm_out', c.cross_attention_dim))


def _mlp(p, x):
    return linear(p['2'], gelu(linear(p['0'], x)))


def _resample(p, cfg, x, latents):
    """Flamingo's resampler (Alayrac et al. 2022): latents [B,K,H] that attend to features x [B,T,F]
    and to each other -> [B,K,D]."""
    x = linear(p['proj_in'], x)
    for layer in children(p['layers']):
        a, n = layer['0'], layer_norm(layer['0']['norm2'], latents)
        seen = jnp.concatenate([layer_norm(a['norm1'], x), n], 1)
        k, v = jnp.split(linear(a['to_kv'], seen), 2, -1)
        latents = latents + linear(a['to_out'], attention(linear(a['to_q'], n), k, v, cfg.heads))
        f = layer['1']
        latents = latents + linear(f['3'], gelu(linear(f['1'], layer_norm(f['0'], latents))))
    return layer_norm(p['norm_out'], linear(p['proj_out'], latents))
