"""Pictures enlarged by a network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd import images
from jaxsd.config import UpscalerConfig
from jaxsd.images.reading import Picture
from jaxsd.models import upscaler
from jaxsd.models.tiling import tiled
from jaxsd.sampling.choice import check_number
from jaxsd.typing import ImageLike
from jaxsd.weights.model import Network

TILE, OVERLAP = 256, 16


def upscale(network: Network, image: ImageLike, scale: float | None = None,
            tile: int = TILE) -> Picture:
    """A picture enlarged -> uint8 [H,W,3].

    network: of `load_upscaler`. image: a path, a PIL image or an array. scale: times its sides;
    None: as the network does; others by the network, as often as it takes, and then Lanczos. tile:
    pixels along the sides of the squares that the network sees at once, for less memory.
    Raises ValueError for another network or scale.
    """
    if not isinstance(network.config, UpscalerConfig):
        raise ValueError(f'expected a network of load_upscaler, found {network!r}')
    image = images.read(image)
    height, width = image.shape[:2]
    scale = network.config.scale if scale is None else scale
    check_number('scale', scale, 0.01, 64)
    return to_size(network, image, round(width * scale), round(height * scale), tile)


def to_size(network: Network, image: Picture, width: int, height: int,
            tile: int = TILE) -> Picture:
    """uint8 [H,W,3] by the network until it covers the size, then resized to it; what is too much
    of the proportions is cut off."""
    while True:
        image = _once(network, image, tile)
        if network.config.scale == 1 or (image.shape[0] >= height and image.shape[1] >= width):
            return images.fit(image, width, height, 'crop')


def _once(network, image, tile):
    found = _program(network.params, network.config, tile, image[None])
    return np.asarray(found)[0]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _program(params, config, tile, image):
    def apply(x):
        return upscaler.apply(params, config, x)

    found = tiled(apply, jnp.asarray(image, jnp.float32) / 255, tile, min(OVERLAP, tile // 4))
    return jnp.round(jnp.clip(found, 0, 1) * 255).astype(jnp.uint8)
