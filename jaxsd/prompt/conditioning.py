"""What the U-Net is told besides the latent and the time: text features and SDXL's size ids."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxsd.config import TEXT_ENCODERS, KUNetConfig, ModelConfig
from jaxsd.models import clip
from jaxsd.models.layers import timestep_embedding
from jaxsd.prompt.blocks import Texts
from jaxsd.typing import Params

Arrays = jax.Array | np.ndarray  # of a program, or on the host


class Conditioning(NamedTuple):
    """What N texts of B pictures come to.

    context [B,N,T,D]: features, or several arrays, see unet.cross_attention_cache; added [B,N,A]:
    SDXL's vector, or None. The texts have an axis of their own, so that a batch sharded over
    devices stays where it is.
    """

    context: jax.Array
    added: jax.Array | None

    def of(self, parts: np.ndarray, texts: jax.Array | None = None) -> tuple[Any, jax.Array | None]:
        """What some parts of the guidance follow -> context [B*P',T,D], or several, added [B*P',A]
        or None, picture after picture. parts: numpy int [P']. texts: int [B,P], the text that each
        part follows; None: its own, N = P."""
        def choose(a):
            found = a[:, parts] if texts is None else (
                jax.vmap(lambda a, which: a[which])(a, texts[:, parts]))
            return found.reshape(-1, *a.shape[2:])

        return jax.tree.map(choose, self.context), jax.tree.map(choose, self.added)


def time_ids(original: Sequence[int], crop: Sequence[int],
             target: Sequence[int]) -> Float[np.ndarray, '2 6']:
    """SDXL base: (height, width) of the original, (top, left) of the crop, (height, width) aimed
    at -> float32 [2,6], the same for both prompts."""
    return np.array([[*original, *crop, *target]] * 2, np.float32)


def aesthetic_ids(original: Sequence[int], crop: Sequence[int], score: float = 6.0,
                  negative_score: float = 2.5) -> Float[np.ndarray, '2 5']:
    """SDXL refiner: original size, crop and aesthetic score -> float32 [2,5]."""
    return np.array([[*original, *crop, negative_score], [*original, *crop, score]], np.float32)


def encode(params: Params, config: ModelConfig, texts: Mapping[str, Texts],
           ids: Float[Arrays, 'B N I'] | None = None, zero: Bool[Arrays, 'B N'] | None = None,
           skip: Int[Arrays, ' B'] | None = None) -> Conditioning:
    """Run the text encoders -> Conditioning.

    texts: {text encoder: prompt.blocks.Texts}, of N texts of K blocks for B images; ids [B,N,I]:
    time ids, for models with `added`; zero, bool [B,N]: texts whose features are zeros (SDXL base,
    no negative prompt); skip, int [B]: layers to leave out beyond the version's own (clip skip).
    params['embeddings'] {text encoder: [E,D]}: vectors of textual inversion that the texts name.
    SDXL: features are concatenated; `added` is the last encoder's pooled vector of the first block
    ++ sinusoids of the time ids (Podell et al. 2023, section 2.2).
    The x2 latent upscaler: `added` is a noise level ++ the pooled vector.
    """
    vectors = params.get('embeddings', {})
    features = [_features(params[name], getattr(config, name), texts[name], vectors.get(name), skip)
                for name in TEXT_ENCODERS if name in texts]
    context = jnp.concatenate([f.hidden for f in features], -1)  # [B,N,K*T,D]
    pooled = features[-1].pooled  # [B,N,E]
    if zero is not None:
        context = jnp.where(zero[..., None, None], 0, context)
        pooled = jnp.where(zero[..., None], 0, pooled)
    if isinstance(config.unet, KUNetConfig):  # a noise level of 0 on the image, and the text
        level = jnp.broadcast_to(jnp.arange(128) < 64, (*pooled.shape[:2], 128))
        return Conditioning(context, jnp.concatenate([level.astype(pooled.dtype), pooled], -1))
    if not config.unet.added_dim or ids is None:
        return Conditioning(context, None)
    return Conditioning(context, with_time_ids(config, pooled, ids))


def with_time_ids(config: ModelConfig, pooled: Float[Array, '... E'],
                  ids: Float[Arrays, '... I']) -> Float[Array, '... A']:
    """SDXL's `added`: the pooled text ++ sinusoids of the time ids (Podell et al. 2023)."""
    sinusoids = timestep_embedding(ids, config.unet.added_time_dim)  # [...,I,256]
    sinusoids = sinusoids.reshape(*ids.shape[:-1], -1).astype(pooled.dtype)
    return jnp.concatenate([pooled, sinusoids], -1)


def _features(params, cfg, texts, vectors, skip):
    """One text encoder's hidden [B,N,K*T,D] and pooled [B,N,E] for its Texts."""
    B, R, T = texts.tokens.shape
    N, K = texts.restore.shape[1:]

    def rows(a):  # [B,...] -> [B*R,...]
        return None if a is None else jnp.repeat(a, R, 0)

    keep = None if texts.keep is None else texts.keep.reshape(-1, T)
    found = clip.encode(params, cfg, texts.tokens.reshape(-1, T), keep, vectors, rows(skip))
    hidden, pooled = (a.reshape(B, R, *a.shape[1:]) for a in found)  # [B,R,T,D], [B,R,E]
    mixed = jax.vmap(_mix)(hidden.astype(jnp.float32), texts).astype(hidden.dtype)
    return clip.Features(mixed.reshape(B, N, K * T, -1), pooled[:, :N * K:K])


def _mix(hidden, texts):
    """One image's rows [R,T,D] -> its blocks [N,K,T,D], weighted.

    A mean that is only rounding is not restored: A1111 divides by it, 0 by 0 if the final norm has
    no bias.
    """
    mixed = (hidden[texts.source] * texts.weight[..., None]).sum(2)
    own = hidden[:texts.restore.size].mean((1, 2)).reshape(texts.restore.shape)
    mean, size = mixed.mean((2, 3)), jnp.abs(mixed).mean((2, 3))
    scale = jnp.where(texts.restore & (jnp.abs(mean) > 1e-6 * size), own / mean, 1)
    return mixed * scale[..., None, None]
