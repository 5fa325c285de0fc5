"""Small text encoders with CLIP's whole vocabulary, shared with goldens/make_prompt_features.py."""

import math
import pathlib

import numpy as np
from flax import traverse_util

from jaxsd.config import ModelConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from jaxsd.models import shapes, spec

PROMPTS = pathlib.Path(__file__).parents[1] / 'data' / 'prompts.txt'
STEPS = 20
TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
XL = dict(TINY, skip=1, final_norm=False)
FAMILIES = {  # {family: {text encoder: (config, seed)}}
    'sd15': {'text_encoder': (TextConfig(**TINY), 0)},
    'sdxl': {'text_encoder': (TextConfig(**XL), 0),
             'text_encoder_2': (TextConfig(**XL, hidden_act='gelu', projection_dim=24), 1)},
}
# Textual inversion: by name, the vectors of each text encoder. Names are tokens like any others.
VECTORS = {'easynegative': 3, 'verybadimagenegative_v1.3': 9, 'bad-hands-5': 2, 'sks': 1}


def weights(cfg, seed):
    """{name in a transformers folder: float32 array}, large enough to make every layer matter.

    Biases and norms have a mean: so have the features then, by which A1111 divides.
    """
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes.text(cfg).items():
        scale = (0.5 if name.endswith('embedding.weight')
                 else 1 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.2)
        array = scale * rng.standard_normal(shape, np.float32)
        if len(shape) == 1:
            array += 1 if name.endswith('weight') else 0.5
        found[name] = array
    return found


def tree(arrays):
    """`weights` as our nested dict."""
    return traverse_util.unflatten_dict(
        {name: spec.to_jax(name, array) for name, array in arrays.items()}, sep='.')


def model(family):
    """(params, ModelConfig) of the family's text encoders."""
    parts = FAMILIES[family]
    config = ModelConfig(unet=UNetConfig(added_dim=24 + 48 if family == 'sdxl' else 0,
                                         added_time_dim=8),
                         vae=VAEConfig(), schedule=ScheduleConfig(),
                         **{name: cfg for name, (cfg, _) in parts.items()})
    return {name: tree(weights(*part)) for name, part in parts.items()}, config


def vectors(name, seed):
    """The vectors [n,D] of an embedding of VECTORS, for the text encoder of that seed."""
    rng = np.random.default_rng([seed, list(VECTORS).index(name)])
    return rng.standard_normal((VECTORS[name], TINY['hidden_size']), np.float32)


def project(blocks):
    """Features of blocks [..., 77, D] -> 8 numbers each: random directions of unit length."""
    blocks = np.asarray(blocks, np.float64)
    size = math.prod(blocks.shape[-2:])
    directions = np.random.default_rng(2).standard_normal((size, 8)) / math.sqrt(size)
    return blocks.reshape(*blocks.shape[:-2], size) @ directions
