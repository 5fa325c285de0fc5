"""GFPGAN, the "clean" one of v1.2 to v1.4: a U-Net that steers a StyleGAN2 towards a face.

Wang et al. 2021 (https://arxiv.org/abs/2101.04061), Karras et al. 2020
(https://arxiv.org/abs/1912.04958). Parameter names are those of the files; a file's config is read
off its tensors. The noise of the generator is what the file holds, so that a face's pixels are the
same each time; TencentARC's own program draws it anew.
"""

import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxsd.config import GFPGANConfig
from jaxsd.models import shapes
from jaxsd.models.layers import children, conv, linear
from jaxsd.typing import Params, Shapes


def apply(params: Params, cfg: GFPGANConfig,
          image: Float[Array, 'B S S 3']) -> Float[Array, 'B S S 3']:
    """An aligned face in [-1,1], S = cfg.size pixels -> the face restored, about [-1,1], float32.
    Raises ValueError for other sizes."""
    if image.shape[1:] != (cfg.size, cfg.size, 3):
        raise ValueError(f'faces of {image.shape[1:]}: expected {cfg.size}x{cfg.size} pixels')
    p, B = params, len(image)
    x = _lrelu(conv(p['conv_body_first'], image.astype(p['final_conv']['weight'].dtype), padding=0))
    skips = []
    for block in children(p['conv_body_down']):
        x = _block(block, x, 0.5)
        skips.append(x)
    x = _lrelu(conv(p['final_conv'], x))
    styles = linear(p['final_linear'], x.transpose(0, 3, 1, 2).reshape(B, -1))
    styles = styles.reshape(B, -1, cfg.style).swapaxes(0, 1)  # one for each layer, [2*levels,B,W]

    scales, shifts = [], []
    for block, scale, shift in zip(children(p['conv_body_up']), children(p['condition_scale']),
                                   children(p['condition_shift'])):
        x = _block(block, x + skips.pop(), 2)
        scales.append(conv(scale['2'], _lrelu(conv(scale['0'], x))))
        shifts.append(conv(shift['2'], _lrelu(conv(shift['0'], x))))
    return _generated(p['stylegan_decoder'], styles, scales, shifts).astype(jnp.float32)


def _generated(p, styles, scales, shifts):
    """StyleGAN2's picture, in which half of the channels of each size are scaled and shifted."""
    noise = [p['noises'][f'noise{i}'].reshape(1, *p['noises'][f'noise{i}'].shape[:2], 1)
             for i in range(len(p['noises']))]
    constant = p['constant_input']['weight']  # [4,4,C,1]
    x = jnp.broadcast_to(constant[..., 0], (styles.shape[1], *constant.shape[:3]))
    x = _style_conv(p['style_conv1'], x, styles[0], noise[0])
    picture = _to_rgb(p['to_rgb1'], x, styles[1])
    layers = children(p['style_convs'])
    for i, (rgb, scale, shift) in enumerate(zip(children(p['to_rgbs']), scales, shifts)):
        k = 2 * i + 1
        x = _style_conv(layers[k - 1], _resized(x, 2), styles[k], noise[k])
        same, steered = jnp.split(x, 2, -1)
        x = jnp.concatenate([same, steered * scale + shift], -1)
        x = _style_conv(layers[k], x, styles[k + 1], noise[k + 1])
        picture = _to_rgb(rgb, x, styles[k + 2]) + _resized(picture, 2)
    return picture


def _style_conv(p, x, style, noise):
    x = _modulated(p['modulated_conv'], x, style, True) * math.sqrt(2)
    return _lrelu(x + p['weight'] * noise + p['bias'].reshape(-1))


def _to_rgb(p, x, style):
    return _modulated(p['modulated_conv'], x, style, False) + p['bias'].reshape(-1)


def _modulated(p, x, style, demodulate):
    """A convolution whose weights a style scales by input channel, and if demodulate to length 1
    by output channel: the same as scaled inputs and outputs, so that a batch shares the weights."""
    w = p['weight'][0]  # [O,I,K,K]
    scale = linear(p['modulation'], style)  # [B,I]
    y = conv({'weight': w.transpose(2, 3, 1, 0)}, x * scale[:, None, None], 1, w.shape[-1] // 2)
    if demodulate:
        power = jnp.square(w.astype(jnp.float32)).sum((2, 3))  # [O,I]
        length = jnp.square(scale.astype(jnp.float32)) @ power.T
        y = y * jax.lax.rsqrt(length + 1e-8).astype(y.dtype)[:, None, None]
    return y


def _block(p, x, ratio):
    """A residual block that makes its picture `ratio` times as large."""
    h = _resized(_lrelu(conv(p['conv1'], x)), ratio)
    return _lrelu(conv(p['conv2'], h)) + conv(p['skip'], _resized(x, ratio), padding=0)


def _resized(x, ratio):
    """Bilinear, of pixels as squares; half the size: the mean of four."""
    B, H, W, C = x.shape
    return jax.image.resize(x, (B, int(H * ratio), int(W * ratio), C), 'linear', antialias=False)


def _lrelu(x):
    return jnp.where(x > 0, x, 0.2 * x)


def names(c: GFPGANConfig) -> Shapes:
    """Names and shapes of the parameters, see shapes.py."""
    widths, levels = c.channels, len(c.channels)

    def block(at, i, o):
        return (shapes.conv(f'{at}.conv1', i, i) | shapes.conv(f'{at}.conv2', i, o)
                | shapes.conv(f'{at}.skip', i, o, 1, bias=False))

    def modulated(at, i, o, k):
        return ({f'{at}.modulated_conv.weight': (1, o, i, k, k), f'{at}.bias': (1, o, 1, 1)}
                | shapes.linear(f'{at}.modulated_conv.modulation', c.style, i))

    def style_conv(at, i, o):
        return modulated(at, i, o, 3) | {f'{at}.weight': (1,)}

    table = shapes.conv('conv_body_first', 3, widths[-1], 1)
    table |= shapes.conv('final_conv', widths[0], widths[0])
    table |= shapes.linear('final_linear', 16 * widths[0], 2 * levels * c.style)
    at, first = 'stylegan_decoder', 2 * widths[0]
    table[f'{at}.constant_input.weight'] = (1, first, 4, 4)
    table |= style_conv(f'{at}.style_conv1', first, first)
    table |= modulated(f'{at}.to_rgb1', first, 3, 1)
    for k in range(2 * levels - 1):
        side = 2 ** ((k + 5) // 2)
        table[f'{at}.noises.noise{k}'] = (1, 1, side, side)
    for k, (i, o) in enumerate(zip(widths, widths[1:])):
        table |= block(f'conv_body_down.{levels - 2 - k}', o, i)
        table |= block(f'conv_body_up.{k}', i, o)
        for name in ('condition_scale', 'condition_shift'):
            table |= shapes.conv(f'{name}.{k}.0', o, o) | shapes.conv(f'{name}.{k}.2', o, o)
        table |= style_conv(f'{at}.style_convs.{2 * k}', 2 * i, 2 * o)
        table |= style_conv(f'{at}.style_convs.{2 * k + 1}', 2 * o, 2 * o)
        table |= modulated(f'{at}.to_rgbs.{k}', 2 * o, 3, 1)
    return table


# What training needed: pictures of the U-Net's sizes, and styles of random vectors.
_UNUSED = re.compile(r'toRGB\.|stylegan_decoder\.style_mlp\.')


def renamed(stored: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """{name of a parameter: its name in a file}, from the names there."""
    if any(name.startswith('params_ema.') for name in stored):  # the averaged ones beside others
        stored = {name: () for name in stored if name.startswith('params_ema.')}
    found = {re.sub(r'^(params_ema|params)\.', '', name): name for name in stored}
    return {name: inner for name, inner in found.items() if not _UNUSED.match(name)}


def config_of(stored: Mapping[str, tuple[int, ...]]) -> GFPGANConfig:
    """The config of a file's tensors: {name, as `renamed`: shape}. Raises ValueError or KeyError
    for those of no such network."""
    if 'conv_body_first.0.weight' in stored:
        raise ValueError('the GFPGAN of v1, of CUDA operations of its own')
    if 'stylegan_decoder.style_conv1.modulated_conv.modulation.weight' not in stored:
        raise ValueError('not GFPGAN v1.2, v1.3 or v1.4')
    levels = 1 + sum(bool(re.fullmatch(r'conv_body_up\.\d+\.conv2\.weight', name))
                     for name in stored)
    return GFPGANConfig(
        channels=(stored['final_conv.weight'][0], *(
            stored[f'conv_body_up.{i}.conv2.weight'][0] for i in range(levels - 1))),
        style=stored['stylegan_decoder.style_conv1.modulated_conv.modulation.weight'][1])
