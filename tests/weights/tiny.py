"""Tiny models with the structure of each released version, for tests of reading and writing."""

import dataclasses
import json
import math

import jax
import numpy as np
from flax import traverse_util

from jaxsd.config import TEXT_ENCODERS, DPTConfig
from jaxsd.config_files import VERSIONS, read_config
from jaxsd.models.spec import spec, to_jax
from jaxsd.prompt.tokenizer import Tokenizer
from jaxsd.weights import Model


def tiny_config(version, vocab_size=99):
    """A released version's config with all widths shrunk; names and ranks stay."""
    config = read_config(version)
    unet = config.unet
    parts = {'unet': dataclasses.replace(
        unet, block_out_channels=tuple(8 * min(i + 1, 2) for i in range(len(unet.heads))),
        heads=(2,) * len(unet.heads), norm_num_groups=4, cross_attention_dim=12,
        transformer_layers=tuple(min(n, 2) for n in unet.transformer_layers),
        mid_transformer_layers=min(unet.mid_transformer_layers, 2), sample_size=8,
        added_dim=20 if unet.added_dim else 0, added_time_dim=4 if unet.added_dim else 256)}
    if unet.added_dim:  # the last level's number is also the middle block's
        parts['unet'] = dataclasses.replace(
            parts['unet'], mid_transformer_layers=max(parts['unet'].transformer_layers))
    levels = len(config.vae.block_out_channels)
    parts['vae'] = dataclasses.replace(config.vae, block_out_channels=(4, 4, 8, 8)[-levels:],
                                       norm_num_groups=2)
    for name in TEXT_ENCODERS:
        if getattr(config, name):
            parts[name] = dataclasses.replace(
                getattr(config, name), vocab_size=vocab_size, hidden_size=12, intermediate_size=24,
                num_hidden_layers=3, num_attention_heads=2,
                projection_dim=6 if getattr(config, name).projection_dim else 0)
    if config.depth_estimator:
        parts['depth_estimator'] = DPTConfig(
            image_size=64, hidden_size=12, intermediate_size=24, num_hidden_layers=4,
            num_attention_heads=2, backbone_out_indices=(0, 1, 2, 3),
            neck_hidden_sizes=(32, 64, 12, 10), fusion_hidden_size=8, depths=(2, 1, 1),
            embedding_size=8, hidden_sizes=(32, 64, 96), num_groups=2)
    return config.replace(**parts, version='custom')


def small_config(version, vocab_size=99):
    """`tiny_config` with fewer layers: its U-Net compiles in seconds."""
    config = tiny_config(version, vocab_size)
    texts = {name: dataclasses.replace(getattr(config, name), num_hidden_layers=1)
             for name in TEXT_ENCODERS if getattr(config, name)}
    unet = dataclasses.replace(
        config.unet, block_out_channels=(8, 16), heads=(2, 2), transformer_layers=(1, 0),
        only_cross_attention=(False, False), layers_per_block=1)
    vae = dataclasses.replace(config.vae, layers_per_block=1)
    return config.replace(**texts, unet=unet, vae=vae)


def random_model(version, dtype='float32', tokenizers=False):
    """A random Model of `tiny_config(version)`; with CLIP's tokenizers on request."""
    config, rng = tiny_config(version, 49408 if tokenizers else 99), np.random.default_rng(0)
    params = {part: random_params(rng, shapes, dtype) for part, shapes in spec(config).items()}
    names = {'text_encoder': 'tokenizer', 'text_encoder_2': 'tokenizer_2'}
    found = {part: Tokenizer.from_folder(VERSIONS / version / names[part])
             for part in names if tokenizers and getattr(config, part)}
    return Model(config, params, found)


def random_params(rng, shapes, dtype='float32'):
    """Params of these {name: shape}, all random, so that no two arrays are alike."""
    # From numpy: init would compile a program for each shape.
    return traverse_util.unflatten_dict(
        {name: jax.device_put(to_jax(name, rng.standard_normal(shape).astype(dtype)))
         for name, shape in shapes.items()}, sep='.')


def flat(params):
    """{path: numpy array} of a params tree."""
    return {jax.tree_util.keystr(path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def same(a, b):
    """Whether two dicts of arrays have the same names, dtypes and bytes."""
    return a.keys() == b.keys() and all(
        np.asarray(a[k]).dtype == np.asarray(b[k]).dtype
        and np.asarray(a[k]).tobytes() == np.asarray(b[k]).tobytes() for k in a)


def sparse_file(path, shapes, kind='F32', metadata=None):
    """A safetensors file with these shapes whose data are a hole in the file."""
    header, end = {'__metadata__': metadata} if metadata else {}, 0
    for name, shape in shapes.items():
        dtype = ('I64' if name.endswith('position_ids') else
                 'I32' if name.endswith('num_updates') else kind)
        size = math.prod(shape) * {'I64': 8, 'F16': 2}.get(dtype, 4)
        header[name] = {'dtype': dtype, 'shape': list(shape), 'data_offsets': [end, end + size]}
        end += size
    head = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'wb') as file:
        file.write(len(head).to_bytes(8, 'little') + head)
        file.truncate(8 + len(head) + end)
