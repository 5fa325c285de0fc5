"""Conditioning by pictures as prompts: what IP-Adapters read, and as the loop needs it.

On the host a picture becomes features of the image encoder, which is run here, once for each
picture, so that features that are given are as good as pictures. In the programs features become
the keys and values of all cross-attentions, once before the loop; weights are rows, see Steps.
"""

import hashlib
import math
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsd import images
from jaxsd.config import ModelConfig, UNetConfig
from jaxsd.images.reading import Picture
from jaxsd.models import clip, ip_adapter, unet
from jaxsd.models.layers import attention
from jaxsd.run.request import BLOCKS, Request
from jaxsd.run.steps import fractions, over_rows, span
from jaxsd.sampling.choice import check_number, unknown
from jaxsd.typing import Params
from jaxsd.weights import Model, Network
from jaxsd.weights.ip_adapters import GIVES

KEPT = 64  # features of pictures that are remembered for an image encoder


class Prompted(NamedTuple):
    """What one IP-Adapter reads for B pictures: features of J prompts of M pictures each, those
    for the negative prompt first. A prompt that is not there has the weight 0; where there are
    fewer pictures they stand there again, all as often, which changes no attention."""

    image: Any  # [B,J,M,2,...]: of the image encoder; None: it sees none
    face: Any  # [B,J,M,2,E]: embeddings of faces, or None
    positive: Any  # int32 [B,P]: 1 for parts of the guidance that follow the pictures, 0: negative
    masks: Any = None  # for each level of the U-Net [B,J,T], T its cells; None: everywhere


class Keys(NamedTuple):
    """The same as the denoise loop needs it. keys: {place: (keys, values)}, [B,2,J,S,C] each."""

    keys: Any
    positive: Any
    masks: Any = None


def inputs(model: Model, requests: Sequence[Request], sigmas: Sequence[np.ndarray], rows: Any,
           prompts: np.ndarray) -> tuple[dict[str, Prompted] | None, dict[str, np.ndarray] | None]:
    """What resolved requests ask of IP-Adapters -> {name: Prompted}, and the weights of their
    prompts at the U-Net's L cross-attentions, {name: float32 [rows,B,J,L]}; None where there are
    none.

    sigmas, rows, prompts: as of `image_conditioning.inputs`. Raises ValueError for requests that
    the model or its adapters cannot serve.
    """
    used = sorted({prompt.net for r in requests for prompt in r.image_prompts})
    found, weights = {}, {}
    for name in used:
        if name not in model.ip_adapters:
            raise unknown('IP-Adapter', name, model.ip_adapters) if model.ip_adapters else (
                ValueError(f'image prompt net={name!r}: the model has no IP-Adapters; expected '
                           'model.replace(ip_adapters={name: jaxsd.load_ip_adapter(path, '
                           'image_encoder=path)})'))
        net, config = model.ip_adapters[name], model.config
        ip_adapter.check(net.config, config.unet)
        mine = [[prompt for prompt in r.image_prompts if prompt.net == name] for r in requests]
        most, layers = max(map(len, mine)), len(net.config.widths)
        features = [[_features(net, prompt) for prompt in some] for some in mine]
        pictures = math.lcm(*(count for some in features for _, _, count in some))
        image, face = (_stacked([[one[i] for one in some] for some in features], most, pictures)
                       for i in range(2))
        positive = np.broadcast_to(prompts.astype(np.int32), (len(requests), len(prompts)))
        found[name] = Prompted(image, face, positive, _masks(requests, mine, most, config))
        scales = []
        for some, levels in zip(mine, sigmas):
            before = fractions(levels)
            scale = np.zeros((len(before), most, layers), np.float32)
            for j, prompt in enumerate(some):
                on = span(before, prompt.start, prompt.end)
                scale[:, j] = prompt.weight * on[:, None] * _blocks(prompt.blocks, config.unet)
            scales.append(scale)
        weights[name] = over_rows(
            scales, sigmas, rows, f'image prompt {name!r} with start or end',
            [any((prompt.start, prompt.end) != (0, 1) for prompt in some) for some in mine])
    return found or None, weights or None


def encode(params: Params, config: ModelConfig, prompted: dict[str, Prompted] | None
           ) -> dict[str, Keys] | None:
    """{name: Prompted} -> {name: Keys}. params['ip_adapter']: {name: as of ip_adapter.by_place}."""
    if prompted is None:
        return None
    found = {}
    for name, cfg in config.ip_adapters:
        p, given = params['ip_adapter'][name], prompted[name]
        B, J, M = (given.face if given.image is None else given.image).shape[:3]
        image, face = (None if a is None else a.reshape(B * J * M * 2, *a.shape[4:])
                       for a in (given.image, given.face))
        tokens = ip_adapter.project(p, cfg, image, face)  # [B*J*M*2,K,D]
        tokens = tokens.reshape(B, J, M, 2, *tokens.shape[1:]).transpose(0, 3, 1, 2, 4, 5)
        keys = ip_adapter.keys(p, tokens.reshape(B, 2, J, -1, tokens.shape[-1]))
        found[name] = Keys(keys, given.positive, given.masks)
    return found


def attend(config: UNetConfig, prompted: dict[str, Keys], weights: dict[str, Array],
           which: np.ndarray) -> Callable[..., Array]:
    """A cross-attention for unet.Hook: the text's, and those of all image prompts times weights.

    weights: {name: [B,J,L]}; which: int [P'], the parts of the guidance that the U-Net is called
    for; pictures and parts are one axis, picture after picture.
    """
    places = {place: i for i, place in enumerate(unet.cross_attentions(config))}

    def chosen(a, positive):  # [B,2,...] -> [B*P',...]
        return jax.vmap(lambda a, side: a[side])(a, positive[:, which]).reshape(-1, *a.shape[2:])

    def beside(a):  # [B,...] -> [B*P',...]
        return jnp.repeat(a, len(which), 0)

    def attend(place, heads, q, k, v):
        out = attention(q, k, v, heads)
        for name, given in prompted.items():
            k, v = (chosen(a, given.positive).astype(q.dtype) for a in given.keys[place])
            weight = beside(weights[name][..., places[place]])[..., None, None]  # [B*P',J,1,1]
            if given.masks is not None:
                mask = next(mask for mask in given.masks if mask.shape[-1] == q.shape[1])
                weight = weight * beside(mask)[..., None]  # [B*P',J,T,1]
            for j in range(k.shape[1]):
                out = out + weight[:, j].astype(out.dtype) * attention(q, k[:, j], v[:, j], heads)
        return out

    return attend


def look_at(encoder: Network, image: Picture | None) -> clip.ImageFeatures:
    """Features of a picture uint8 [H,W,3], or of an image that is 0 (None), float32 [T,D] and [P].

    As transformers' CLIPImageProcessor: the shorter side is brought to the encoder's size, by
    Pillow's bicubic filter, and the square in the middle is seen. Those looked at last are kept.
    """
    size = encoder.config.image_size
    pixels = None if image is None else clip.normalised(square(image, size))
    key = b'' if pixels is None else hashlib.sha256(pixels.data).digest()
    kept = _seen.setdefault(encoder, {})
    found = kept.pop(key, None)
    if found is None:
        pixels = np.zeros((size, size, 3), np.float32) if pixels is None else pixels
        found = jax.tree.map(lambda a: np.asarray(a[0], np.float32),
                             _program(encoder.params, encoder.config, pixels[None]))
    kept[key] = found
    for old in list(kept)[:-KEPT]:
        kept.pop(old, None)
    return found


_seen = weakref.WeakKeyDictionary()  # {Network: {hash of pixels: ImageFeatures}}
_program = jax.jit(clip.encode_image, static_argnums=1)


def square(image: Picture, size: int) -> np.ndarray:
    """The square in the middle of a picture uint8 [H,W,3], at size x size."""
    from PIL import Image
    rows, columns = image.shape[:2]
    short = min(rows, columns)
    height, width = (int(size * n / short) for n in (rows, columns))
    image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return image[top:top + size, left:left + size]


def _features(net, prompt):
    """What an adapter reads for one prompt of M pictures -> [M,2,...] of the image encoder, or
    None, [M,2,E] of faces, or None, and M."""
    cfg, encoder, name = net.config, net.image_encoder, prompt.net
    face = image = None
    if cfg.face:
        face = _given(prompt, (cfg.face,), 'the embedding of a face, insightface\'s')
        if not cfg.features and prompt.image is not None:
            raise ValueError(f'image prompt {name!r}: a FaceID sees no picture; expected embeds='
                             'alone, the embedding of a face')
    if cfg.features and (cfg.face or prompt.embeds is None):
        if not prompt.pictures:
            raise ValueError(f'image prompt {name!r}: expected image= beside embeds=, the face as '
                             'a picture')
        if encoder is None:
            raise ValueError(f'image prompt {name!r}: this IP-Adapter has no image encoder; '
                             'expected jaxsd.load_ip_adapter(path, image_encoder=path) '
                             '(--image_encoder=PATH), or embeds=')
        kind = GIVES[cfg.kind]
        found = np.stack([getattr(look_at(encoder, images.read(picture)), kind)
                          for picture in prompt.pictures])
        image = np.stack([np.broadcast_to(_nothing(net), found.shape), found], 1)
    elif cfg.features:
        if prompt.image is not None:
            raise ValueError(f'image prompt {name!r}: expected image= or embeds=, not both')
        shape = (cfg.features,) if cfg.kind == 'base' else (None, cfg.features)
        image = _given(prompt, shape, 'features of the image encoder', net)
    counts = {len(a) for a in (image, face) if a is not None}
    if len(counts) > 1:
        raise ValueError(f'image prompt {name!r}: {len(image)} images and {len(face)} embeddings; '
                         'expected one for each')
    return image, face, counts.pop()


def _nothing(net):
    """Features for the negative prompt, as in diffusers: zeros, or those of an image that is 0."""
    if net.config.kind == 'base' or not net.config.features:
        return np.float32(0)
    if net.image_encoder is None:
        raise ValueError('image prompt: expected negative_embeds= beside embeds=, the features of '
                         'an image that is 0, as the IP-Adapter has no image encoder')
    return look_at(net.image_encoder, None).hidden


def _given(prompt, shape, what, net=None):
    """embeds and negative_embeds of a prompt -> float32 [M,2,*shape]; None in a shape: any."""
    def read(name):
        source = array = getattr(prompt, name)
        if array is None:
            raise ValueError(f'image prompt {prompt.net!r}: expected {name}=, {what}')
        try:
            if isinstance(source, (str, os.PathLike)):
                array = np.load(source, allow_pickle=False)
            array = np.asarray(array, np.float32)
        except (ValueError, TypeError, EOFError) as error:
            raise ValueError(f'image prompt {prompt.net!r}: {name}={source!r:.100}: expected an '
                             f'array of numbers, or a .npy file of one ({error})') from None
        found = array[None] if array.ndim == len(shape) else array
        if found.ndim != len(shape) + 1 or not len(found) or any(
                n not in (None, m) for n, m in zip(shape, found.shape[1:])):
            raise ValueError(f'image prompt {prompt.net!r}: {name} {list(array.shape)}: expected '
                             f'{what}, {["any" if n is None else n for n in shape]}')
        if not np.isfinite(found).all():
            raise ValueError(f'image prompt {prompt.net!r}: {name}: expected finite numbers')
        return found

    positive = read('embeds')
    negative = read('negative_embeds') if prompt.negative_embeds is not None else (
        np.float32(0) if net is None else _nothing(net))
    try:
        negative = np.broadcast_to(negative, positive.shape)
    except ValueError:
        raise ValueError(f'image prompt {prompt.net!r}: negative features {list(negative.shape)} '
                         f'for embeds {list(positive.shape)}: expected the same shape') from None
    return np.stack([negative, positive], 1)


def _stacked(some, most, pictures):
    """Per request arrays [M,2,...] of its prompts -> [B,J,M,2,...]; None where they are None."""
    like = next((a for row in some for a in row if a is not None), None)
    if like is None:
        return None
    shapes = {a.shape[2:] for row in some for a in row}
    if len(shapes) > 1:
        raise ValueError(f'image prompts: embeds of shapes {sorted(shapes)} in one batch; expected '
                         'the same number of tokens')
    found = np.zeros((len(some), most, pictures, *like.shape[1:]), np.float32)
    for row, into in zip(some, found):
        for a, one in zip(row, into):
            one[:] = np.tile(a, (pictures // len(a), *[1] * (a.ndim - 1)))
    return found


def _masks(requests, mine, most, config):
    """Masks at the sizes of the U-Net's levels, a list of [B,J,T]; None where there are none. As
    diffusers' IPAdapterMaskProcessor, which makes black and white of gray before."""
    if not any(prompt.mask is not None for some in mine for prompt in some):
        return None
    height, width = requests[0].height, requests[0].width
    masks = np.ones((len(requests), most, height, width), np.float32)
    for r, some, into in zip(requests, mine, masks):
        for j, prompt in enumerate(some):
            if prompt.mask is not None:
                into[j] = images.fit(images.read_gray(prompt.mask), width, height, r.resize)
    h, w = height // config.vae.factor, width // config.vae.factor
    levels = []
    for _ in config.unet.block_out_channels:
        levels.append(images.cubic(masks, h, w).reshape(*masks.shape[:2], -1).astype(np.float32))
        h, w = (h + 1) // 2, (w + 1) // 2
    return levels


def _blocks(blocks, config):
    """Weights of the U-Net's cross-attentions, [L], as diffusers' _maybe_expand_lora_scales has
    them for a dict."""
    places = list(unet.cross_attentions(config))
    if blocks is None:
        return np.ones(len(places), np.float32)
    blocks = BLOCKS[blocks] if isinstance(blocks, str) else blocks
    counts = {}  # {('down', 1): attentions of the block}
    for place in places:
        side, block, i = _block_of(place)
        counts[side, block] = i + 1

    def number(what, value):
        check_number(f'image prompt blocks: {what}', value)
        return float(value)

    table = {}
    for side in ('down', 'mid', 'up'):
        given = blocks.get(side, 0)
        for name in given if isinstance(given, dict) else ():
            if (side, name) not in counts:
                raise ValueError(f'image prompt blocks: {side}.{name}: this model has attentions '
                                 f'in {", ".join(f"{s}.{b}" for s, b in counts if b)}, and mid')
        for (where, block), count in counts.items():
            if where != side:
                continue
            value = given.get(block, 0) if isinstance(given, dict) else given
            what = f'{side}.{block}' if block else side
            values = list(value) if isinstance(value, (tuple, list)) else [value]
            if len(values) not in (1, count):
                raise ValueError(f'image prompt blocks: {what}={value}: expected a weight, or '
                                 f'{count} for its attentions')
            values *= count // len(values)
            table |= {(side, block, i): number(what, v) for i, v in enumerate(values)}
    return np.array([table[_block_of(place)] for place in places], np.float32)


def _block_of(place):
    """'up_blocks.0.attentions.1. ...' -> ('up', 'block_0', 1); of the middle block ('mid', '', 0).
    """
    side, number, *rest = place.split('.')
    if side == 'mid_block':
        return 'mid', '', 0
    return side.removesuffix('_blocks'), f'block_{number}', int(rest[1])

