"""The transformers of CLIP (Radford et al. 2021) and OpenCLIP, for texts and for pictures: ViT-L,
ViT-H and bigG."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, UInt8

from jaxsd.config import TextConfig, VisionConfig
from jaxsd.models.layers import attention, children, conv, layer_norm, linear
from jaxsd.typing import Params

ACTIVATIONS = {
    'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
}


# Of the pixels that the pictures' transformers were trained on.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


class Features(NamedTuple):
    """hidden [B,T,D]: the layer the version uses; pooled [B,P]: the end-of-text token."""

    hidden: jax.Array
    pooled: jax.Array


def encode(params: Params, cfg: TextConfig, tokens: Int[Array, 'B T'],
           keep: Bool[Array, 'B T'] | None = None, extra: Float[Array, 'E D'] | None = None,
           skip: Int[Array, ' B'] | None = None) -> Features:
    """Tokens, T at most cfg.max_position_embeddings -> Features.

    keep: tokens that the others may see; extra: the vectors that stand for tokens -1, -2 ... -E;
    skip: more layers to leave out than the version does (clip skip).
    `cfg.skip` layers are left out of `hidden`, which passes the final norm if `cfg.final_norm`.
    `pooled` always comes from the last layer, normalised, and projected where the model has a
    text_projection.
    """
    p = params['text_model']
    table, positions = (p['embeddings'][n]['weight']
                        for n in ('token_embedding', 'position_embedding'))
    T = tokens.shape[1]
    if T > positions.shape[0]:
        raise ValueError(f'{T} tokens: this text encoder takes at most {positions.shape[0]}')
    x = table[tokens]  # [B,T,D]
    if extra is not None:
        vectors = extra[jnp.maximum(-1 - tokens, 0)].astype(x.dtype)
        x = jnp.where(tokens[..., None] < 0, vectors, x)
    x = x + positions[:T]
    layers = children(p['encoder']['layers'])
    hidden = x
    for i, layer in enumerate(layers):
        x = _block(layer, cfg, x, keep)
        left = len(layers) - 1 - cfg.skip - i  # layers from here to the one that the version uses
        if skip is not None:
            hidden = jnp.where((skip == left)[:, None, None], x, hidden)
        elif left == 0:
            hidden = x
    last = layer_norm(p['final_layer_norm'], x, cfg.layer_norm_eps)
    if cfg.final_norm:
        hidden = (last if cfg.skip == 0 and skip is None
                  else layer_norm(p['final_layer_norm'], hidden, cfg.layer_norm_eps))
    # Old config.json files say eos_token_id=2 for vocabularies whose end of text is the highest id.
    end = jnp.argmax(tokens if cfg.eos_token_id == 2 else tokens == cfg.eos_token_id, -1)
    pooled = jnp.take_along_axis(last, end[:, None, None], 1)[:, 0]  # [B,D]
    if 'text_projection' in params:
        pooled = linear(params['text_projection'], pooled)
    return Features(hidden, pooled)


class ImageFeatures(NamedTuple):
    """hidden [B,T,D]: what the last layer but one gives; embeds [B,P]: the projected class token.
    """

    hidden: jax.Array
    embeds: jax.Array


def encode_image(params: Params, cfg: VisionConfig,
                 pixels: Float[Array, 'B S S 3']) -> ImageFeatures:
    """Pictures of S = cfg.image_size, as `normalised` -> ImageFeatures, T = cfg.tokens.

    As transformers' CLIPVisionModelWithProjection, `hidden` its hidden_states[-2].
    """
    if pixels.shape[1:] != (cfg.image_size, cfg.image_size, 3):
        raise ValueError(f'pixels {pixels.shape}: expected [B,{cfg.image_size},{cfg.image_size},3]')
    p = params['vision_model']
    e = p['embeddings']
    x = conv(e['patch_embedding'], pixels.astype(e['class_embedding'].dtype),
             stride=cfg.patch_size, padding=0)
    B, _, _, D = x.shape
    first = jnp.broadcast_to(e['class_embedding'], (B, 1, D))
    x = jnp.concatenate([first, x.reshape(B, -1, D)], 1) + e['position_embedding']['weight']
    x = layer_norm(p['pre_layrnorm'], x, cfg.layer_norm_eps)
    *layers, last = children(p['encoder']['layers'])
    for layer in layers:
        x = _block(layer, cfg, x, causal=False)
    pooled = layer_norm(p['post_layernorm'], _block(last, cfg, x, causal=False)[:, 0],
                        cfg.layer_norm_eps)
    return ImageFeatures(x, linear(params['visual_projection'], pooled))


def normalised(images: UInt8[np.ndarray, '*B H W 3']) -> Float[np.ndarray, '*B H W 3']:
    """Pictures uint8 -> float32, as CLIP was trained on them."""
    return (images.astype(np.float32) / 255 - MEAN) / DEVIATION


def _block(p, cfg, x, keep=None, causal=True):
    """A pre-norm transformer block: [B,T,D] -> [B,T,D]."""
    h = layer_norm(p['layer_norm1'], x, cfg.layer_norm_eps)
    a, heads = p['self_attn'], cfg.num_attention_heads
    qkv = [linear(a[name], h) for name in ('q_proj', 'k_proj', 'v_proj')]
    x = x + linear(a['out_proj'], attention(*qkv, heads, causal=causal, keep=keep))
    h = layer_norm(p['layer_norm2'], x, cfg.layer_norm_eps)
    h = linear(p['mlp']['fc1'], h)
    return x + linear(p['mlp']['fc2'], ACTIVATIONS[cfg.hidden_act](h))
