"""Depth maps: estimated from pictures by MiDaS or Depth Anything, and as the 2.x depth model's
U-Net sees them."""

import jax
import numpy as np
from jaxtyping import Float, Float32, UInt8, UInt16

from jaxsd.config import DepthAnythingConfig, ModelConfig
from jaxsd.images import cubic
from jaxsd.models import dpt
from jaxsd.models.detector import MEAN, STD
from jaxsd.weights import Model, Network

_midas = jax.jit(dpt.apply, static_argnums=1)
_depth_anything = jax.jit(dpt.depth_anything, static_argnums=1)


def estimate(model: Model | Network, images: UInt8[np.ndarray, 'B H W 3'],
             size: tuple[int, int] | None = None) -> Float32[np.ndarray, 'B h w']:
    """Pictures uint8 [B,H,W,3] -> inverse depth float32 [B,h,w], near is large, of any scale.

    model: a Model with a depth estimator, or a Network that is one.
    size: (h, w) at which to look at the pictures, multiples of 32 (Depth Anything: of 14); None:
        the square that the network was trained on (Depth Anything: one side as long as its, in the
        proportions of the pictures). Raises ValueError for other sizes, and without a depth
        estimator.
    """
    config, params = model.config, model.params
    if isinstance(config, ModelConfig):
        config = config.depth_estimator
        if config is None:
            raise ValueError(f'{model.config.version}: this model has no depth estimator; give '
                             'depth maps, or a folder of 2.x depth with its depth_estimator')
        params = params['depth_estimator']
    if isinstance(config, DepthAnythingConfig):
        looked = pixels(images, size or _near(images.shape[1:3], config), MEAN, STD)
        return np.asarray(_depth_anything(params, config, looked))
    return np.asarray(_midas(params, config, pixels(images, size or (config.image_size,) * 2)))


def _near(size, config):
    """(h, w) in multiples of the patches, one side about as long as the network's: the one that
    changes least, as transformers' DPTImageProcessor with keep_aspect_ratio."""
    scale = min((config.image_size / side for side in size), key=lambda scale: abs(1 - scale))
    return tuple(round(scale * side / config.patch_size) * config.patch_size for side in size)


def pixels(images: UInt8[np.ndarray, 'B H W 3'], size: tuple[int, int],
           mean: tuple[float, ...] = (0.5,) * 3,
           std: tuple[float, ...] = (0.5,) * 3) -> Float32[np.ndarray, 'B h w 3']:
    """uint8 [B,H,W,3] -> float32 [B,h,w,3] about 0, by mean and deviation of values from 0 to 1:
    transformers' DPTImageProcessor."""
    from PIL import Image
    resized = [np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
               for image in np.asarray(images)]
    values = np.stack(resized).astype(np.float32) / 255
    return (values - np.array(mean, np.float32)) / np.array(std, np.float32)


def condition(depth: Float[np.ndarray, 'B H W'], height: int,
              width: int) -> Float32[np.ndarray, 'B h w 1']:
    """Depth maps [B,H,W] of any scale -> float32 [B,height,width,1] in [-1,1], near is 1.

    height, width: of the latents. Raises as `resized` does. As in diffusers'
    StableDiffusionDepth2ImgPipeline.
    """
    return (2 * resized(depth, height, width) - 1).astype(np.float32)[..., None]


def gray16(depth: Float[np.ndarray, 'B H W'], height: int,
           width: int) -> UInt16[np.ndarray, 'B h w']:
    """Depth maps [B,H,W] of any scale -> uint16 [B,height,width], near is white; raises as
    `resized` does."""
    return np.rint(65535 * resized(depth, height, width)).astype(np.uint16)


def resized(depth: Float[np.ndarray, 'B H W'], height: int,
            width: int) -> Float[np.ndarray, 'B h w']:
    """Depth maps [B,H,W] -> float64 [B,height,width], each with lowest value 0 and highest 1.

    Bicubic, without antialiasing, as torch.nn.functional.interpolate. Raises ValueError for a map
    that is not finite or has one value only.
    """
    depth = np.asarray(depth, np.float64)
    if depth.ndim != 3:
        raise ValueError(f'depth map: expected [B,H,W], found {list(depth.shape)}')
    if not np.isfinite(depth).all():
        raise ValueError('depth map: expected finite values, found NaN or infinity')
    depth = cubic(depth, height, width)
    low, high = depth.min((1, 2), keepdims=True), depth.max((1, 2), keepdims=True)
    flat = high - low <= 1e-9 * np.maximum(abs(low), abs(high))  # rounding is 1e-16 of the values
    if flat.any():
        raise ValueError(f'depth map: expected differing values, found only {low[flat][0]:g}; '
                         'give a map in which some things are nearer than others')
    return (depth - low) / (high - low)
