"""Names and shapes of every parameter of a model: for init, strict checking and sharding.

Names and shapes are those of the files (the diffusers / transformers folder layout, torch's axis
order); `to_jax` and `from_jax` turn one array from and into that order.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from jaxsd import config as c
from jaxsd.config import TEXT_ENCODERS, ModelConfig
from jaxsd.models import (
    codeformer,
    detector,
    dpt,
    gfpgan,
    ip_adapter,
    kunet,
    shapes,
    t2i_adapter,
    upscaler,
)
from jaxsd.typing import Params, Shapes

NAMES: dict[type, Callable[..., Shapes]] = {
    c.UNetConfig: shapes.unet, c.KUNetConfig: kunet.names,
    c.ControlNetConfig: shapes.controlnet, c.VAEConfig: shapes.vae,
    c.TinyVAEConfig: shapes.tiny_vae, c.TextConfig: shapes.text, c.DPTConfig: shapes.dpt,
    c.T2IAdapterConfig: t2i_adapter.names, c.UpscalerConfig: upscaler.names,
    c.VisionConfig: shapes.vision, c.ImageNormalizerConfig: shapes.image_normalizer,
    c.IPAdapterConfig: ip_adapter.names, c.DetectorConfig: detector.names,
    c.DepthAnythingConfig: dpt.depth_anything_names, c.GFPGANConfig: gfpgan.names,
    c.CodeFormerConfig: codeformer.names}


def spec(config: ModelConfig) -> dict[str, Shapes]:
    """ModelConfig -> {component: {dotted name: shape}}, e.g. ['unet']['conv_in.weight']."""
    parts = ('unet', 'vae', *TEXT_ENCODERS, 'depth_estimator', 'image_encoder', 'image_normalizer')
    return {part: names(getattr(config, part)) for part in parts if getattr(config, part)}


def names(config: c.Checked) -> Shapes:
    """The config of one network -> {dotted name: shape}."""
    return NAMES[type(config)](config)


def count(table: Shapes | dict[str, Shapes]) -> int:
    """Number of parameters of one component, or of all components."""
    return sum(count(s) if isinstance(s, dict) else math.prod(s) for s in table.values())


def to_jax(name: str, array: np.ndarray) -> np.ndarray:
    """An array from a file to our axis order: linear [O,I] -> [I,O], conv OIHW -> HWIO."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if _is_linear(name, array) else array


def from_jax(name: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_jax`."""
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    return array.T if _is_linear(name, array) else array


def _is_linear(name, array):
    return array.ndim == 2 and name.endswith('weight') and not name.endswith('embedding.weight')


def init(seed: int, config: ModelConfig, dtype: DTypeLike = jnp.float32) -> dict[str, Params]:
    """Random parameters: {component: nested dict of arrays}, as large as torch's defaults.

    Weights: uniform in +-1/sqrt(fan in), embeddings normal with deviation 0.02, norms 1, biases 0.
    seed: an int. Drawn by numpy: one program for each of hundreds of shapes would take minutes.
    """
    rng = np.random.default_rng(seed)
    return {part: init_part(rng, table, dtype) for part, table in sorted(spec(config).items())}


def init_part(rng: np.random.Generator, table: Shapes, dtype: DTypeLike = jnp.float32) -> Params:
    """Random parameters of one component, from its {dotted name: shape} and a numpy generator."""
    arrays = {}
    for name, shape in table.items():
        if name.endswith('embedding.weight'):
            array = 0.02 * rng.standard_normal(shape, np.float32)
        elif len(shape) > 1:
            array = (2 * rng.random(shape, np.float32) - 1) / math.sqrt(math.prod(shape[1:]))
        else:
            array = np.full(shape, name.endswith(('weight', 'running_var')), np.float32)
        arrays[name] = jnp.asarray(to_jax(name, array), dtype)
    return traverse_util.unflatten_dict(arrays, sep='.')
