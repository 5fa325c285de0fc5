"""Control-LoRAs (stabilityai/control-lora): a ControlNet as what it differs by from a U-Net.

Of a weight that both have, a file holds factors of the difference as `name.up` and `name.down`:
W = W_unet + up.flatten(1) @ down.flatten(1); biases and norms, and what the U-Net has not, are
whole. Names are the original ones, without a prefix; the tensor `lora_controlnet` is empty. The
formula is ComfyUI's (comfy/controlnet.py, ControlLora).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from jaxsd.config import ControlNetConfig, UNetConfig
from jaxsd.models.spec import names as names_of
from jaxsd.weights import names
from jaxsd.weights.adapters import own_matrix
from jaxsd.weights.model import Model

MARK = 'lora_controlnet'


def is_control_lora(stored: Mapping[str, Any]) -> bool:
    """Whether tensors of these names are a Control-LoRA's."""
    return MARK in stored or 'time_embed.0.up' in stored


def config_for(unet: UNetConfig, stored: Mapping[str, tuple[int, ...]]) -> ControlNetConfig:
    """The config of what a file makes of a U-Net. stored: {name: shape}."""
    sizes = {name: value for name, value in vars(unet).items()
             if name not in ('out_channels', 'sample_size')}
    widths, channels = [], ControlNetConfig.conditioning_channels
    if first := stored.get('input_hint_block.0.weight'):
        channels = first[1]
    for i in range(0, 1000, 4):  # of the layers that read the hint every other one is wider
        if f'input_hint_block.{i + 2}.weight' not in stored:
            break
        widths.append(stored[f'input_hint_block.{i}.weight'][0])
    return ControlNetConfig(**sizes | {'in_channels': unet.out_channels,
                                       'conditioning_channels': channels} | (
        {'conditioning_embedding_out_channels': tuple(widths)} if widths else {}))


class MergedFile:
    """The tensors of a ControlNet, from a Control-LoRA's file and a model's U-Net, with
    files.TensorFile's interface: under their original names, and what fits nothing as it is."""

    def __init__(self, file: Any, config: ControlNetConfig, base: Model) -> None:
        self.path, self.metadata, self._file = file.path, file.metadata, file
        self._unet, table, shared = base.params['unet'], names_of(config), names_of(
            base.config.unet)
        self._base, self._factors = {}, {}
        self.shapes = {name: shape for name, shape in file.shapes.items() if name != MARK}
        self.dtypes = {name: file.dtypes[name] for name in self.shapes}
        for name, place in names.network_places('controlnet', config, table).items():
            if place.name in self.shapes or name not in shared:
                continue
            self._base[place.name] = name, table[name]
            self.shapes[place.name] = table[name]
            self.dtypes[place.name] = np.dtype(np.float32)
            factors = [f'{place.name.removesuffix(".weight")}.{side}' for side in ('up', 'down')]
            if all(factor in file.shapes for factor in factors):
                self._check(factors, table[name])
                self._factors[place.name] = factors
                for factor in factors:
                    del self.shapes[factor], self.dtypes[factor]

    def _check(self, factors, shape):
        up, down = (self._file.shapes[factor] for factor in factors)
        rest, rank = math.prod(shape[1:]), down[0]
        if math.prod(up) != shape[0] * rank or math.prod(down) != rank * rest:
            raise ValueError(f'{self.path}: {factors[0]} {list(up)} and {factors[1]} {list(down)} '
                             f'do not make a weight {list(shape)} of this model; give the '
                             'Control-LoRA of the model, or the model that it is for')

    def read(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        """As TensorFile.read; what the U-Net has comes in float32."""
        if name not in self._base:
            return self._file.read(name, rows)
        inner, shape = self._base[name]
        if len(shape) == 1:
            weight = np.asarray(traverse_util.flatten_dict(self._unet, sep='.')[inner], np.float32)
        else:  # of a U-Net that sees a mask or depth beside the latents the first channels
            weight = own_matrix(self._unet, inner, np)
            weight = weight.reshape(len(weight), -1, *shape[2:])[:, :shape[1]]
        if name in self._factors:
            up, down = (self._file.read(factor).astype(np.float32) for factor in
                        self._factors[name])
            weight = weight + (up.reshape(shape[0], -1) @ down.reshape(len(down), -1)
                               ).reshape(shape)
        return weight if rows is None else weight[slice(*rows)]
