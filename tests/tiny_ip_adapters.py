"""Tiny IP-Adapters of every kind, and an image encoder for them, of random weights."""

import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from jaxsd.config import IPAdapterConfig, VisionConfig
from jaxsd.models import spec, unet
from jaxsd.weights import Network, load_ip_adapter

VISION = VisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                      num_attention_heads=4, image_size=30, patch_size=10, projection_dim=24)


def config(kind, unet_config, **more):
    """The IPAdapterConfig of a kind for a U-Net, which reads VISION's features or faces of 12."""
    d, face = unet_config.cross_attention_dim, 12 if kind.startswith('faceid') else 0
    if kind in ('plus', 'faceid_plus'):
        more = {'hidden_size': d if face else 40, 'heads': 2, 'depth': 4} | more
    return IPAdapterConfig(
        kind, widths=tuple(unet.cross_attentions(unet_config).values()), cross_attention_dim=d,
        features={'base': 24, 'faceid': 0}.get(kind, 32), face=face,
        tokens={'plus': 5, 'full': 0}.get(kind, 4), **more)


def tensors(config, seed):
    """An adapter as its file has it, {name: array}; biases and norms are random too."""
    rng = np.random.default_rng(seed)
    params = traverse_util.flatten_dict(spec.init_part(rng, spec.names(config)), sep='.')
    found = {name: spec.from_jax(name, np.asarray(a)) for name, a in params.items()}
    return {name: np.ascontiguousarray(a + 0.2 * rng.standard_normal(a.shape).astype(np.float32)
                                       if a.ndim == 1 else a) for name, a in found.items()}


def encoder(seed=0):
    """A Network of VISION."""
    rng = np.random.default_rng(seed)
    return Network(VISION, spec.init_part(rng, spec.names(VISION)))


def adapters(unet_config, folder, look=None, **kinds):
    """{name: IPAdapter}, read from files that are written there; kinds: {name: a kind, or a kind
    and other fields of its config}. look: the image encoder, None: one of random weights."""
    look, found = look or encoder(), {}
    for i, (name, kind) in enumerate(kinds.items()):
        kind, more = kind if isinstance(kind, tuple) else (kind, {})
        path = folder / f'{name}.safetensors'
        save_file(tensors(config(kind, unet_config, **more), i), path)
        found[name] = load_ip_adapter(path, look)
    return found
