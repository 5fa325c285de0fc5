"""Read IP-Adapters, pictures as prompts: h94's files and their like."""

import pathlib
import re
import weakref

import numpy as np
from jax.typing import DTypeLike

from jaxsd.config import IPAdapterConfig, UNetConfig, VisionConfig
from jaxsd.models import ip_adapter, spec, unet
from jaxsd.typing import Device, Path
from jaxsd.weights import names
from jaxsd.weights.adapter_formats import Delta
from jaxsd.weights.adapters import Adapter
from jaxsd.weights.files import as_dtype, open_tensors, printable
from jaxsd.weights.model import IPAdapter, Network
from jaxsd.weights.parts import load_image_encoder
from jaxsd.weights.reading import Source, network_tensors

GIVES = {'base': 'embeds', 'plus': 'hidden', 'full': 'hidden', 'faceid_plus': 'hidden'}


def load_ip_adapter(path: Path, image_encoder: Path | Network | None = None,
                    dtype: DTypeLike | None = 'float32', device: 'Device | None' = None,
                    shortcut: bool | None = None) -> IPAdapter:
    """Read an IP-Adapter of 1.x or SDXL: base, light, plus, plus face, full face, FaceID, FaceID
    plus; its tensors say which. -> IPAdapter, for `model.replace(ip_adapters={name: ...})`.

    path: a file (.safetensors, or a pickle of torch.save) with h94's names, image_proj.* and
        ip_adapter.*; the LoRA in FaceID's files is read with them. image_encoder: the CLIP that it
        was trained with, as `load_image_encoder` reads it, or a Network that several adapters
        share; None: requests give embeddings instead of pictures.
    dtype, device: as of `load`. shortcut: of FaceID plus, whether it is the second version, which
        adds the face's own tokens; None: its name says so ('plusv2'), its tensors do not.
    Raises ValueError that lists everything that is wrong with the tensors, of one line for a file
    that is no IP-Adapter and for an image encoder that does not go with it; FileNotFoundError.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f'{path}: is a folder; expected the file of an IP-Adapter, such as '
                         'ip-adapter_sd15.safetensors')
    file = open_tensors(path)
    if shortcut is None:
        shortcut = bool(re.search('plus_?v2', path.name, re.I))
    try:
        config = ip_adapter.detect(file.shapes, shortcut)
    except (KeyError, ValueError, IndexError, ArithmeticError) as error:
        what, reader, _ = names.kind(file.shapes)
        use = f'; read it with jaxsd.{reader}' if reader not in ('', 'load_ip_adapter') else ''
        raise ValueError(printable(
            f'{path}: not an IP-Adapter that jaxsd knows, by its {len(file.shapes)} tensors such '
            f'as {", ".join(list(file.shapes)[:3])} it is {what} ({error}); expected '
            f'image_proj.* and ip_adapter.*{use}')) from None
    encoder = image_encoder
    if encoder is not None and not isinstance(encoder, Network):
        encoder = load_image_encoder(encoder, dtype, device=device)
    check_encoder(path, config, encoder)
    table = spec.names(config)
    source = Source(path, config, {'ip_adapter': table}, network_tensors('ip_adapter', [file]),
                    {'ip_adapter': {name: names.Place(name) for name in table}}, [])
    params, _ = source.read(as_dtype(dtype), device)
    return IPAdapter(config, params['ip_adapter'], encoder)


def check_encoder(path: Path, config: IPAdapterConfig, encoder: Network | None) -> None:
    """ValueError where an image encoder does not give what an adapter reads."""
    if encoder is None or not config.features:
        return
    if not isinstance(encoder.config, VisionConfig):
        raise ValueError(f'image_encoder: expected one of jaxsd.load_image_encoder, found a '
                         f'{type(encoder.config).__name__}')
    if not fits(config, encoder.config):
        raise ValueError(
            f'{path}: reads image features of {config.features} ({GIVES[config.kind]}), the image '
            f'encoder gives {encoder.config.projection_dim} (embeds) and '
            f'{encoder.config.hidden_size} (hidden); give the encoder that it was trained with: '
            'of h94, models/image_encoder (1024, 1280) or sdxl_models/image_encoder (1280, 1664)')


def fits(config: IPAdapterConfig, encoder: VisionConfig) -> bool:
    """Whether an image encoder gives features of the width that an adapter reads."""
    given = {'embeds': encoder.projection_dim, 'hidden': encoder.hidden_size}
    return not config.features or given[GIVES[config.kind]] == config.features


_loras = weakref.WeakKeyDictionary()  # {IPAdapter: {UNetConfig: its Adapter}}


def lora(adapter: IPAdapter, unet_config: UNetConfig) -> Adapter:
    """The LoRA in the file of a FaceID for the attentions of a U-Net -> Adapter, always the same.
    """
    found = _loras.setdefault(adapter, {})
    if unet_config not in found:
        found[unet_config] = _lora(adapter, unet_config)
    return found[unet_config]


def _lora(adapter, unet_config):
    deltas = {}
    for i, cross in enumerate(unet.cross_attentions(unet_config)):
        for number, place in ((2 * i, cross[:-1] + '1'), (2 * i + 1, cross)):
            layers = adapter.params['ip_adapter'][str(number)]
            for name, target in ip_adapter.LORA.items():
                down, up = (np.asarray(layers[name][part]['weight'], np.float32)
                            for part in ('down', 'up'))
                deltas[f'{place}.{target}.weight'] = Delta(down=down, up=up)
    return Adapter({'unet': deltas})
