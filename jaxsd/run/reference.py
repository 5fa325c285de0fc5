"""Conditioning by a reference picture: self-attention sees the reference's keys beside its own.

sd-webui-controlnet's reference_only (scripts/hook.py), and diffusers' community pipeline
stable_diffusion_reference: before each model call the U-Net sees the reference, noised to the same
level, and its self-attentions keep their keys and values; in the call itself these stand beside the
picture's own. The negative prompt's half sees them less by `fidelity`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxsd import images
from jaxsd.config import KUNetConfig, ModelConfig, UNetConfig
from jaxsd.models import unet
from jaxsd.models.layers import attention
from jaxsd.run.request import Request
from jaxsd.run.steps import fractions, over_rows, span

CALL = np.uint32(2**31 + 1)  # the first call number of the reference's noise

Bank = dict[str, tuple[Array, Array]]  # {place: (keys, values)}, [B,T,C] each


def self_attentions(config: UNetConfig) -> list[str]:
    """The places of a U-Net's self-attentions, as unet.Hook has them, the widest first, else in
    the order of the input, middle and output blocks: those that a small weight leaves out are
    last."""
    widths = {place.removesuffix('2') + '1': width
              for place, width in unet.cross_attentions(config).items()}
    order = {'down': 0, 'mid_': 1, 'up_b': 2}
    return sorted(widths, key=lambda place: (-widths[place], order[place[:4]]))


def inputs(config: ModelConfig, requests: Sequence[Request], sigmas: Sequence[np.ndarray],
           rows: Any, prompts: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    """What resolved requests say of references -> pictures uint8 [B,H,W,3], and how much each of
    the P parts of the guidance follows them at the L self-attentions, float32 [rows,B,P,L]; None
    where there are none.

    sigmas, rows, prompts: as of `image_conditioning.inputs`. Raises ValueError for requests that
    the model cannot serve.
    """
    if all(r.reference is None for r in requests):
        return None, None
    if isinstance(config.unet, KUNetConfig) or config.task not in ('', 'inpainting'):
        raise ValueError('reference: expected a model of text or inpainting, this one is of the '
                         f'kind {config.task}')
    for name in ('pag', 'sag', 'deep_shrink', 'deepcache', 'hypertile', 'token_merging'):
        if any(name in r.guidance_options for r in requests):
            raise ValueError(f'reference and {name}: expected one of them, as both change what '
                             'self-attention sees')
    if any(r.window is not None for r in requests):
        raise ValueError('reference and window: expected one of them, as the network never sees '
                         'the whole picture')
    count = len(self_attentions(config.unet))
    pictures = np.zeros((len(requests), requests[0].height, requests[0].width, 3), np.uint8)
    weights = []
    for r, picture, levels in zip(requests, pictures, sigmas):
        before = fractions(levels)
        found = np.zeros((len(before), len(prompts), count), np.float32)
        if one := r.reference:
            picture[:] = images.fit(images.read(one.image), r.width, r.height, r.resize)
            on = span(before, one.start, one.end)[:, None, None]
            sees = np.where(prompts, 1, 1 - one.fidelity)[:, None]
            found[:] = on * sees * (np.arange(count) < one.weight * count)
        weights.append(found)
    return pictures, over_rows(
        weights, sigmas, rows, 'reference with start or end',
        [r.reference is not None and (r.reference.start, r.reference.end) != (0, 1)
         for r in requests])


def write(network: Callable[[unet.Hook], Any], cross: unet.Hook | None, weights: Array) -> Bank:
    """Keys and values of the reference; zeros, without a call, where all weights are 0.

    network(hook): calls the U-Net with the reference. cross: the hook of cross-attentions in it, or
    None. weights: [B*P,L].
    """
    def look():
        bank: Bank = {}

        def keep(place, heads, q, k, v):
            if place.endswith('attn2'):
                return cross and cross(place, heads, q, k, v)
            bank[place] = k, v

        network(keep)
        return bank

    shapes = jax.eval_shape(look)
    return lax.cond((weights != 0).any(), look, lambda: jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), shapes))


def attend(config: UNetConfig, bank: Bank, weights: Array) -> Callable[..., Array]:
    """A self-attention for unet.Hook that sees the bank as much as weights [B*P,L] say; where they
    are 0 it is the plain one."""
    places = {place: i for i, place in enumerate(self_attentions(config))}

    def attend(place, heads, q, k, v):
        plain = attention(q, k, v, heads)
        both = (jnp.concatenate(pair, 1) for pair in zip((k, v), bank[place]))
        weight = weights[:, places[place], None, None].astype(plain.dtype)
        mixed = plain + weight * (attention(q, *both, heads) - plain)
        return jnp.where(weight == 0, plain, mixed)

    return attend
