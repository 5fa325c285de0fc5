"""Networks that enlarge pictures: RRDBNet (ESRGAN, Real-ESRGAN), SRVGGNetCompact and SwinIR.

Wang et al. 2018 and 2021 (https://arxiv.org/abs/1809.00219, 2107.10833), Liang et al. 2021
(https://arxiv.org/abs/2108.10257). Parameter names are those of BasicSR and of SwinIR's files; a
file's config is read off its tensors.
"""

import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from jaxsd.config import UpscalerConfig
from jaxsd.models import shapes
from jaxsd.models.layers import children, conv, gelu, layer_norm, linear
from jaxsd.typing import Params, Shapes

MEAN = np.array([0.4488, 0.4371, 0.4040], np.float32)  # of SwinIR's pictures
SLOPE = 0.2  # below 0, of RRDBNet, and of SwinIR's upsampling


def apply(params: Params, cfg: UpscalerConfig,
          image: Float[Array, 'B H W 3']) -> Float[Array, 'B h w 3']:
    """image in [0,1] -> the picture cfg.scale times as high and wide, about [0,1], in float32."""
    B, H, W, _ = image.shape
    dtype = jax.tree.leaves(params)[0].dtype
    step = {'rrdb': cfg.unshuffle, 'swinir': cfg.window}.get(cfg.kind, 1)
    x = jnp.pad(image.astype(dtype), ((0, 0), (0, -H % step), (0, -W % step), (0, 0)), 'reflect')
    out = {'rrdb': _rrdb, 'compact': _compact, 'swinir': _swinir}[cfg.kind](params, cfg, x)
    return out[:, :H * cfg.scale, :W * cfg.scale].astype(jnp.float32)


def _rrdb(p, cfg, x):
    """Dense blocks within residual ones, at the small size; then doubled `ups` times."""
    def dense(p, x):
        found = [x]
        for k in range(1, 5):
            found.append(_lrelu(conv(p[f'conv{k}'], jnp.concatenate(found, -1))))
        return x + 0.2 * conv(p['conv5'], jnp.concatenate(found, -1))

    def block(x, p):
        return x + 0.2 * dense(p['rdb3'], dense(p['rdb2'], dense(p['rdb1'], x))), None

    x = conv(p['conv_first'], _unshuffle(x, cfg.unshuffle))
    deep, _ = lax.scan(block, x, jax.tree.map(lambda *a: jnp.stack(a), *children(p['body'])))
    return _doubled(p, cfg, x + conv(p['conv_body'], deep))


def _compact(p, cfg, x):
    first, *rest = children(p['body'])
    h = conv(first, x)
    for slope, layer in zip(rest[::2], rest[1::2]):
        h = conv(layer, jnp.where(h > 0, h, slope['weight'] * h))
    return _shuffle(h, cfg.scale) + _nearest(x, cfg.scale)


def _swinir(p, cfg, x):
    """Residual layers of transformer blocks, whose attention sees windows."""
    span = 255 if cfg.window == 7 else 1  # the networks for JPEG
    mean = jnp.asarray(MEAN, x.dtype)
    x = (x - mean) * span
    first = conv(p['conv_first'], x)
    h = layer_norm(p['patch_embed']['norm'], first)
    for layer, heads in zip(children(p['layers']), cfg.heads):
        deep = h
        for i, block in enumerate(children(layer['residual_group']['blocks'])):
            deep = _swin_block(block, cfg, deep, heads, cfg.window // 2 * (i % 2))
        h = h + _last(layer['conv'], deep)
    h = first + _last(p['conv_after_body'], layer_norm(p['norm'], h))
    if 'conv_before_upsample' in p:
        h = _lrelu(conv(p['conv_before_upsample']['0'], h), 0.01)
    if cfg.upsampler == 'nearest+conv':
        h = _doubled(p, cfg, h)
    elif cfg.upsampler == '':
        h = x + conv(p['conv_last'], h)
    else:
        for layer in children(p['upsample']):
            ratio = cfg.scale if cfg.scale == 3 or cfg.upsampler == 'pixelshuffledirect' else 2
            h = _shuffle(conv(layer, h), ratio)
        h = conv(p['conv_last'], h) if 'conv_last' in p else h
    return h / span + mean


def _swin_block(p, cfg, x, heads, shift):
    """Attention within windows, moved by `shift` pixels, and an MLP (Liu et al. 2021)."""
    (B, H, W, C), w = x.shape, cfg.window
    h = jnp.roll(layer_norm(p['norm1'], x), (-shift, -shift), (1, 2))
    h = _windows(h, w)  # [B,N,w*w,C]
    q, k, v = jnp.split(linear(p['attn']['qkv'], h), 3, -1)
    q, k, v = (a.reshape(*a.shape[:3], heads, -1) for a in (q, k, v))
    scores = jnp.einsum('bnqhd,bnkhd->bnhqk', q, k).astype(jnp.float32) / math.sqrt(C // heads)
    bias = p['attn']['relative_position_bias_table'][_relative(w)]  # [w*w,w*w,heads]
    scores = scores + bias.transpose(2, 0, 1).astype(jnp.float32)
    if shift:
        scores = scores + _apart(H, W, w, shift)[:, None]
    h = jnp.einsum('bnhqk,bnkhd->bnqhd', jax.nn.softmax(scores).astype(v.dtype), v)
    h = linear(p['attn']['proj'], h.reshape(B, -1, w * w, C))
    h = h.reshape(B, H // w, W // w, w, w, C).swapaxes(2, 3).reshape(B, H, W, C)
    x = x + jnp.roll(h, (shift, shift), (1, 2))
    h = linear(p['mlp']['fc1'], layer_norm(p['norm2'], x))
    return x + linear(p['mlp']['fc2'], gelu(h))


def _windows(x, w):
    """[B,H,W,C] -> its windows [B,N,w*w,C]."""
    B, H, W, C = x.shape
    return x.reshape(B, H // w, w, W // w, w, C).swapaxes(2, 3).reshape(B, -1, w * w, C)


def _relative(w):
    """The row of the bias table for each pair of a window's pixels, [w*w,w*w]."""
    y, x = (a.ravel() for a in np.indices((w, w)))
    down, across = (np.subtract.outer(a, a) + w - 1 for a in (y, x))
    return down * (2 * w - 1) + across


def _apart(H, W, w, shift):
    """-100 where moving brought pixels of opposite borders into a window, [N,w*w,w*w]."""
    part = [(np.arange(n) >= n - w).astype(int) + (np.arange(n) >= n - shift) for n in (H, W)]
    area = _windows((3 * part[0][:, None] + part[1])[None, :, :, None], w)[0, :, :, 0]
    return np.where(area[:, :, None] == area[:, None], 0, -100).astype(np.float32)


def _last(p, x):
    """A residual layer's convolution, or three of them through a quarter of the channels."""
    if 'weight' in p:
        return conv(p, x)
    x = _lrelu(conv(p['0'], x))
    return conv(p['4'], _lrelu(conv(p['2'], x, padding=0)))


def _doubled(p, cfg, x):
    """Nearest neighbour and a convolution for each doubling, and the last two."""
    for k in range(1, cfg.ups + 1):
        x = _lrelu(conv(p[f'conv_up{k}'], _nearest(x, 2)))
    return conv(p['conv_last'], _lrelu(conv(p['conv_hr'], x)))


def _lrelu(x, slope=SLOPE):
    return jnp.where(x > 0, x, slope * x)


def _nearest(x, ratio):
    return x.repeat(ratio, 1).repeat(ratio, 2)


def _shuffle(x, r):
    """[B,H,W,C*r*r] -> [B,H*r,W*r,C], torch's pixel_shuffle."""
    B, H, W, C = x.shape
    x = x.reshape(B, H, W, C // r**2, r, r)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(B, H * r, W * r, -1)


def _unshuffle(x, r):
    """The inverse of `_shuffle`."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // r, r, W // r, r, C)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(B, H // r, W // r, -1)


def names(c: UpscalerConfig) -> Shapes:
    """Names and shapes of the parameters, see shapes.py."""
    return {'rrdb': _rrdb_names, 'compact': _compact_names, 'swinir': _swinir_names}[c.kind](c)


def _rrdb_names(c):
    d, g = c.channels, c.growth
    table = shapes.conv('conv_first', 3 * c.unshuffle**2, d) | shapes.conv('conv_body', d, d)
    for i in range(c.blocks[0]):
        for j in (1, 2, 3):
            for k in range(1, 6):
                table |= shapes.conv(f'body.{i}.rdb{j}.conv{k}', d + (k - 1) * g, g if k < 5 else d)
    return table | _doubled_names(c, d)


def _doubled_names(c, d):
    table = shapes.conv('conv_hr', d, d) | shapes.conv('conv_last', d, 3)
    for k in range(1, c.ups + 1):
        table |= shapes.conv(f'conv_up{k}', d, d)
    return table


def _compact_names(c):
    table, d, n = shapes.conv('body.0', 3, c.channels), c.channels, c.blocks[0]
    for i in range(n + 1):
        table[f'body.{2 * i + 1}.weight'] = (d,)
        table |= shapes.conv(f'body.{2 * i + 2}', d, d if i < n else 3 * c.scale**2)
    return table


def _swinir_names(c):
    d, f = c.channels, c.growth

    def last(at):
        if not c.bottleneck:
            return shapes.conv(at, d, d)
        return (shapes.conv(f'{at}.0', d, d // 4) | shapes.conv(f'{at}.2', d // 4, d // 4, 1)
                | shapes.conv(f'{at}.4', d // 4, d))

    table = shapes.conv('conv_first', 3, d) | shapes.affine('patch_embed.norm', d)
    for i, (count, heads) in enumerate(zip(c.blocks, c.heads)):
        for j in range(count):
            at = f'layers.{i}.residual_group.blocks.{j}'
            table |= shapes.affine(f'{at}.norm1', d) | shapes.affine(f'{at}.norm2', d)
            table[f'{at}.attn.relative_position_bias_table'] = ((2 * c.window - 1)**2, heads)
            table |= shapes.linear(f'{at}.attn.qkv', d, 3 * d)
            table |= shapes.linear(f'{at}.attn.proj', d, d)
            table |= shapes.linear(f'{at}.mlp.fc1', d, c.hidden)
            table |= shapes.linear(f'{at}.mlp.fc2', c.hidden, d)
        table |= last(f'layers.{i}.conv')
    table |= shapes.affine('norm', d) | last('conv_after_body')
    if c.upsampler == '':
        return table | shapes.conv('conv_last', d, 3)
    if c.upsampler == 'pixelshuffledirect':
        return table | shapes.conv('upsample.0', d, 3 * c.scale**2)
    table |= shapes.conv('conv_before_upsample.0', d, f)
    if c.upsampler == 'nearest+conv':
        return table | _doubled_names(c, f)
    for k in range(1 if c.scale == 3 else c.ups):
        table |= shapes.conv(f'upsample.{2 * k}', f, f * (9 if c.scale == 3 else 4))
    return table | shapes.conv('conv_last', f, 3)


# Names of older files: ESRGAN's of 2018, and those of Real-ESRGAN's forerunners (BSRGAN).
_OLD = [(r'^(params_ema|params|module)\.', ''), (r'^model\.0\.', 'conv_first.'),
        (r'^model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.', r'body.\1.rdb\2.conv\3.'),
        (r'^model\.1\.sub\.\d+\.(weight|bias)', r'conv_body.\1'),
        (r'^RRDB_trunk\.(\d+)\.RDB(\d)\.', r'body.\1.rdb\2.'), (r'^trunk_conv\.', 'conv_body.'),
        (r'^upconv(\d)\.', r'conv_up\1.'), (r'^HRconv\.', 'conv_hr.')]
# Constants that SwinIR's files hold beside the parameters.
_BUFFERS = re.compile(r'.*\.(relative_position_index|attn_mask)')


def renamed(stored: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """{name of a parameter: its name in a file}, from the names there."""
    if any(name.startswith('params_ema.') for name in stored):  # the averaged ones beside others
        stored = {name: 0 for name in stored if name.startswith('params_ema.')}
    found = {}
    for name in stored:
        new = name
        for pattern, replacement in _OLD:
            new = re.sub(pattern, replacement, new)
        if not _BUFFERS.fullmatch(new):
            found[new] = name
    # ESRGAN's last layers are numbered: of each doubling, then two more.
    rest = sorted({int(m[1]) for name in found if (m := re.match(r'model\.(\d+)\.weight', name))})
    last = [*(f'conv_up{k}' for k in range(1, len(rest) - 1)), 'conv_hr', 'conv_last'][-len(rest):]
    for number, layer in zip(rest, last):
        for kind in ('weight', 'bias'):
            if f'model.{number}.{kind}' in found:
                found[f'{layer}.{kind}'] = found.pop(f'model.{number}.{kind}')
    return found


def config_of(stored: Mapping[str, tuple[int, ...]]) -> UpscalerConfig:
    """The config of a file's tensors: {name, as `renamed`: shape}. Raises ValueError or KeyError
    for those of no such network."""
    ups = sum(bool(re.fullmatch(r'conv_up\d\.weight', name)) for name in stored)
    if 'body.0.rdb1.conv1.weight' in stored:
        width, channels = stored['conv_first.weight'][:2]
        unshuffle = max(1, math.isqrt(channels // 3))
        return UpscalerConfig(
            kind='rrdb', scale=max(1, 2**ups // unshuffle), ups=ups, unshuffle=unshuffle,
            channels=width, growth=stored['body.0.rdb1.conv1.weight'][0],
            blocks=(_count(stored, r'body\.(\d+)\.'),))
    if len(stored.get('body.1.weight', ())) == 1:
        n = _count(stored, r'body\.(\d+)\.')
        return UpscalerConfig(
            kind='compact', scale=math.isqrt(stored[f'body.{n - 1}.weight'][0] // 3), ups=0,
            channels=stored['body.0.weight'][0], blocks=((n - 3) // 2,))
    at = 'layers.0.residual_group.blocks.0'
    if f'{at}.attn.relative_position_bias_table' not in stored:
        raise ValueError('none of RRDBNet (ESRGAN), SRVGGNetCompact and SwinIR')
    rows = stored[f'{at}.attn.relative_position_bias_table'][0]
    layers = range(_count(stored, r'layers\.(\d+)\.'))
    feature = stored.get('conv_before_upsample.0.weight', (UpscalerConfig.growth,))[0]
    steps = [stored[f'upsample.{2 * k}.weight'][0] for k in range(4)
             if f'upsample.{2 * k}.weight' in stored]
    if ups:
        upsampler, scale = 'nearest+conv', 2**ups
    elif not steps:
        upsampler, scale = '', 1
    elif 'conv_before_upsample.0.weight' in stored:
        scale, upsampler = (3 if steps[0] == 9 * feature else 2**len(steps)), 'pixelshuffle'
        ups = len(steps)
    else:
        upsampler, scale = 'pixelshuffledirect', math.isqrt(steps[0] // 3)
    return UpscalerConfig(
        kind='swinir', scale=scale, ups=ups, channels=stored['conv_first.weight'][0],
        growth=feature, upsampler=upsampler, window=(math.isqrt(rows) + 1) // 2,
        blocks=tuple(_count(stored, rf'layers\.{i}\.residual_group\.blocks\.(\d+)\.')
                     for i in layers),
        heads=tuple(stored[f'layers.{i}.residual_group.blocks.0.attn.relative_position_bias_table'
                           ][1] for i in layers),
        hidden=stored[f'{at}.mlp.fc1.weight'][0], bottleneck='conv_after_body.0.weight' in stored)


def _count(stored, pattern):
    return 1 + max((int(m[1]) for name in stored if (m := re.match(pattern, name))), default=-1)
