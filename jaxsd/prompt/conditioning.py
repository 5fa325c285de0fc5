"""What the U-Net is told besides the latent and the time: text features and SDXL's size ids."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd.config import TEXT_ENCODERS
from jaxsd.models import clip
from jaxsd.models.layers import timestep_embedding


class Conditioning(NamedTuple):
    """context [B,P,T,D]: text features of the negative prompt, the prompt, and perhaps further
    negatives; added [B,P,A]: SDXL's vector.

    `added` is None for models that take none. The P texts have an axis of its own, so that a batch
    sharded over devices stays where it is.
    """

    context: jax.Array
    added: jax.Array | None


def tokens(tokenizers, texts):
    """texts(text encoder): P lists of B texts, the negative prompts first -> {text encoder: int32
    [B,P,T]}."""
    return {name: np.stack([tokenizer(some) for some in texts(name)], 1)
            for name, tokenizer in tokenizers.items()}


def time_ids(original, crop, target):
    """SDXL base: (height, width) of the original, (top, left) of the crop, (height, width) aimed
    at -> float32 [2,6], the same for both prompts."""
    return np.array([[*original, *crop, *target]] * 2, np.float32)


def aesthetic_ids(original, crop, score=6.0, negative_score=2.5):
    """SDXL refiner: original size, crop and aesthetic score -> float32 [2,5]."""
    return np.array([[*original, *crop, negative_score], [*original, *crop, score]], np.float32)


def encode(params, config, tokens, ids=None, zero=None):
    """Run the text encoders -> Conditioning.

    tokens: {text encoder: int [B,P,T]}; ids [B,P,N]: time ids, for models with `added`;
    zero, bool [B]: images whose negative conditioning is zeros (SDXL base, no negative prompt).
    SDXL: features are concatenated; `added` is the last encoder's pooled vector ++ sinusoids of
    the time ids (Podell et al. 2023, section 2.2).
    """
    features = []
    for name in TEXT_ENCODERS:
        if name in tokens:
            pairs = tokens[name]  # [B,P,T]
            found = clip.encode(params[name], getattr(config, name),
                                pairs.reshape(-1, pairs.shape[-1]))
            features.append(jax.tree.map(lambda a, s=pairs.shape[:2]: a.reshape(*s, *a.shape[1:]),
                                         found))
    context = jnp.concatenate([f.hidden for f in features], -1)  # [B,P,T,D]
    pooled = features[-1].pooled  # [B,P,E]
    if zero is not None:
        others = [jnp.ones_like(zero)] * (pooled.shape[1] - 1)
        keep = jnp.stack([~zero, *others], 1)[..., None]  # [B,P,1]
        context = jnp.where(keep[..., None], context, 0)
        pooled = jnp.where(keep, pooled, 0)
    if not config.unet.added_dim:
        return Conditioning(context, None)
    sinusoids = timestep_embedding(ids, config.unet.added_time_dim)  # [B,P,N,256]
    sinusoids = sinusoids.reshape(*ids.shape[:2], -1).astype(pooled.dtype)
    return Conditioning(context, jnp.concatenate([pooled, sinusoids], -1))
