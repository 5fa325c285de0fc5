"""Networks that find what a ControlNet is to follow in a picture, of lllyasviel/Annotators.

OpenPose's bodies, hands and faces (Cao et al. 2018, https://arxiv.org/abs/1812.08008), HED's edges
(Xie and Tu 2015, https://arxiv.org/abs/1504.06375), line drawings (Chan et al. 2022,
https://arxiv.org/abs/2203.12691, and of anime), M-LSD's straight lines (Gu et al. 2021,
https://arxiv.org/abs/2106.00186) and NormalBae's normals (Bae et al. 2021,
https://arxiv.org/abs/2109.09881). Parameter names are those of the files; a file's config is read
off its tensors. Depth is estimated by dpt.py.
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Num

from jaxsd.config import DetectorConfig
from jaxsd.models import shapes
from jaxsd.models.layers import children, conv, corners, pointwise
from jaxsd.typing import Params, Shapes

PARTS = {'openpose': 57, 'openpose_hand': 22, 'openpose_face': 71}  # maps that they give
# The sides of pictures are multiples of this, by kind; for lineart_anime of 2**halvings.
STEP = {'openpose': 8, 'openpose_hand': 8, 'openpose_face': 8, 'hed': 16, 'lineart': 4, 'mlsd': 16,
        'normal_bae': 32}
MEAN, STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's


def step(cfg: DetectorConfig) -> int:
    """What the sides of a network's pictures are multiples of, in pixels."""
    return STEP.get(cfg.kind) or 2 ** cfg.blocks[0]


def apply(params: Params, cfg: DetectorConfig,
          image: Num[Array, 'B H W 3']) -> Float[Array, 'B ...']:
    """A picture of 0 to 255, H and W multiples of `step` -> what the network sees, in float32.

    openpose: [B,H/8,W/8,57], 38 part affinity fields, 18 points, the background; its hands and
    faces: [B,H/8,W/8,22] and 71, points and the background. hed: edges [B,H,W] in [0,1]. lineart,
    lineart_anime: paper [B,H,W], 1, and lines, 0. mlsd: [B,H/2,W/2,5], of each segment its
    middle's logit and the way from there to both ends (x, y). normal_bae: normals [B,H,W,3].
    Raises ValueError for other sides.
    """
    _, H, W, _ = image.shape
    if H % step(cfg) or W % step(cfg):
        raise ValueError(f'a picture of {W}x{H}: expected sides that are multiples of {step(cfg)}')
    x = image.astype(jax.tree.leaves(params)[0].dtype)
    network = {'openpose': _body, 'openpose_hand': _part, 'openpose_face': _part, 'hed': _hed,
               'lineart': _lineart, 'lineart_anime': _anime, 'mlsd': _mlsd, 'normal_bae': _normal}
    return network[cfg.kind](params, cfg, x).astype(jnp.float32)


# The first layers of OpenPose's networks, VGG's; None halves.
_VGG = ['conv1_1', 'conv1_2', None, 'conv2_1', 'conv2_2', None, 'conv3_1', 'conv3_2', 'conv3_3',
        'conv3_4', None, 'conv4_1', 'conv4_2']
_TRUNK = {'openpose': [*_VGG, 'conv4_3_CPM', 'conv4_4_CPM']} | dict.fromkeys(
    ('openpose_hand', 'openpose_face'),
    [*_VGG, 'conv4_3', 'conv4_4', 'conv5_1', 'conv5_2', 'conv5_3_CPM'])
_FIRST = {'openpose': [f'conv5_{i}_CPM' for i in range(1, 6)]} | dict.fromkeys(
    ('openpose_hand', 'openpose_face'), ['conv6_1_CPM', 'conv6_2_CPM'])


def _stage(cfg, number, branch=''):
    """The names of a stage's layers, counted from 1."""
    if number == 1:
        return [name + branch for name in _FIRST[cfg.kind]]
    return [f'Mconv{i}_stage{number}{branch}' for i in range(1, 8)]


def _convolved(p, layers, x):
    """Convolutions with ReLUs between them: the last one is left to the caller."""
    for i, name in enumerate(layers):
        x = jax.nn.relu(x) if i and name else x
        x = _pool(jax.nn.relu(x)) if name is None else conv(p[name], x, 1, len(
            p[name]['weight']) // 2)
    return x


def _body(p, cfg, x):
    trunk = jax.nn.relu(_convolved(p, _TRUNK[cfg.kind], x[..., ::-1] / 256 - 0.5))  # BGR
    seen = trunk
    for number in range(1, cfg.blocks[0] + 1):
        fields, points = (_convolved(p, _stage(cfg, number, branch), seen)
                          for branch in ('_L1', '_L2'))
        seen = jnp.concatenate([fields, points, trunk], -1)
    # pytorch-openpose, and what comes from it, has a ReLU here; no peak is below 0.
    return jnp.concatenate([fields, jax.nn.relu(points) if number == 6 else points], -1)


def _part(p, cfg, x):
    trunk = jax.nn.relu(_convolved(p, _TRUNK[cfg.kind], x[..., ::-1] / 256 - 0.5))
    points = _convolved(p, _stage(cfg, 1), trunk)
    for number in range(2, cfg.blocks[0] + 1):
        points = _convolved(p, _stage(cfg, number), jnp.concatenate([points, trunk], -1))
    return points


def _hed(p, cfg, x):
    """The mean of the logits that five sizes show."""
    (_, H, W, _), total = x.shape, 0.0
    x = x - p['norm'].reshape(-1)
    for i in range(len(cfg.blocks)):
        block = p[f'block{i + 1}']
        x = _pool(x) if i else x
        for layer in children(block['convs']):
            x = jax.nn.relu(conv(layer, x))
        total = total + _linear(pointwise(block['projection'], x).astype(jnp.float32), H, W)
    return jax.nn.sigmoid(total[..., 0] / len(cfg.blocks))


def _lineart(p, cfg, x):
    """A generator of Johnson et al. 2016: halved twice, residual blocks, doubled twice."""
    relu = jax.nn.relu
    x = relu(_instance_norm(_reflected(p['model0']['1'], x / 255)))
    for name in ('0', '3'):
        x = relu(_instance_norm(conv(p['model1'][name], x, 2)))
    for block in children(p['model2']):
        h = relu(_instance_norm(_reflected(block['conv_block']['1'], x)))
        x = x + _instance_norm(_reflected(block['conv_block']['5'], h))
    for name in ('0', '3'):
        x = relu(_instance_norm(_transposed(p['model3'][name], x, (1, 2))))
    return jax.nn.sigmoid(_reflected(p['model4']['1'], x))[..., 0]


def _anime(p, cfg, x):
    """pix2pix' U-Net (Isola et al. 2016)."""
    def level(p, x, depth):
        """What stands below a level -> its own width, beside x."""
        last = depth == cfg.blocks[0] - 1
        h = conv(p['1'], jnp.where(x > 0, x, 0.2 * x), 2)
        if not last:
            h = level(p['3']['model'], _instance_norm(h), depth + 1)
        h = _transposed(p['3' if last else '5'], jax.nn.relu(h), (2, 2))
        return jnp.concatenate([x, _instance_norm(h)], -1)

    p = p['model']['model']
    x = level(p['1']['model'], conv(p['0'], x / 127.5 - 1, 2), 1)
    x = _transposed(p['3'], jax.nn.relu(x), (2, 2))
    return (jnp.tanh(x)[..., 0] + 1) / 2


def _mlsd(p, cfg, x):
    """MobileNetV2's first layers, and their maps put together from the coarsest to the finest."""
    x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1) / 127.5 - 1  # a fourth colour, of 1
    maps = []
    for i, layer in enumerate(children(p['backbone']['features'])):
        x = _relu6(_normed(layer['0'], layer['1'], x, 2, (0, 1))) if i == 0 else _mobile(
            layer['conv'], x, 2 if i in (2, 4, 7) else 1)
        if i in (1, 3, 6, 10, 13):
            maps.append(x)
    x = maps.pop()
    for number, beside in zip((15, 17, 19, 21), reversed(maps)):
        a, b = p[f'block{number}'], p[f'block{number + 1}']
        x = _sequence(a['conv1'], x)
        if number > 15:
            x = corners(x, 2 * x.shape[1], 2 * x.shape[2])
        x = jnp.concatenate([_sequence(a['conv2'], beside), x], -1)
        x = _sequence(b['conv2'], x + _sequence(b['conv1'], x))
    p = p['block23']
    x = jax.nn.relu(_batch_norm(p['conv1']['1'], _conv(p['conv1']['0'], x, 1, 5, dilation=5)))
    return pointwise(p['conv3'], _sequence(p['conv2'], x))[..., 7:12]


def _mobile(p, x, stride):
    """An inverted residual (Sandler et al. 2018); p: layers by their numbers."""
    h, (*wide, depthwise, last, norm) = x, children(p)
    if wide:
        h = _relu6(_normed(wide[0]['0'], wide[0]['1'], h, 1, 0))
    padding = (0, 1) if stride == 2 else 1  # as TensorFlow's
    h = _relu6(_normed(depthwise['0'], depthwise['1'], h, stride, padding, h.shape[-1]))
    h = _normed(last, norm, h, 1, 0)
    return x + h if stride == 1 and h.shape == x.shape else h


def _sequence(p, x):
    """A convolution, its norm and a ReLU."""
    return jax.nn.relu(_normed(p['0'], p['1'], x, 1, len(p['0']['weight']) // 2))


# NormalBae's EfficientNet-B5 (Tan and Le 2019): width, kernel and stride of each stage.
_STAGES = ((24, 3, 1), (40, 3, 2), (64, 5, 2), (128, 3, 2), (176, 5, 1), (304, 5, 2), (512, 3, 1))
_STEM, _HEAD = 48, 2048


def _normal(p, cfg, x):
    """An EfficientNet, and a decoder that refines the normals of each size by those before."""
    net, p = p['encoder']['original_model'], p['decoder']
    x = (x / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    x = jax.nn.silu(_batch_norm(net['bn1'], _conv(net['conv_stem'], x, 2, 'SAME'), 1e-3))
    maps = []
    for stage, (_, _, stride) in zip(children(net['blocks']), _STAGES):
        for i, block in enumerate(children(stage)):
            x = _efficient(block, x, 1 if i else stride)
        maps.append(x)
    x = pointwise(p['conv2'], _conv(net['conv_head'], x, 1, 0))
    seen = []
    for i, beside in enumerate((maps[4], maps[2], maps[1], maps[0])):
        up = p[f'up{i + 1}']['_net']
        x = jnp.concatenate([corners(x, *beside.shape[1:3]), beside], -1)
        for n in (0, 3):
            x = _batch_norm(up[str(n + 1)], conv(up[str(n)], x))
            x = jnp.where(x > 0, x, 0.01 * x)
        seen.append(x)
    normal = _unit(conv(p['out_conv_res8'], seen[1]))
    for x, size in zip(seen[1:], (4, 2, 1)):
        x = jnp.concatenate([x, normal], -1)
        x = corners(x, 2 * x.shape[1], 2 * x.shape[2])
        layers = children(p[f'out_conv_res{size}'])
        for i, layer in enumerate(layers):
            x = jax.nn.relu(x) if i else x
            x = x @ layer['weight'][..., 0].T + layer['bias']
        normal = _unit(x)
    return normal[..., :3]


def _efficient(p, x, stride):
    """A block with squeeze and excitation; the first stage's have no expansion."""
    def norm(name, x):
        return _batch_norm(p[name], x, 1e-3)

    h, names = x, ['bn1', 'bn2', 'bn3']
    if 'conv_pwl' in p:
        h = jax.nn.silu(norm(names.pop(0), _conv(p['conv_pw'], h, 1, 0)))
    h = jax.nn.silu(norm(names.pop(0), _conv(p['conv_dw'], h, stride, 'SAME', h.shape[-1])))
    gate = jax.nn.silu(pointwise(p['se']['conv_reduce'], h.mean((1, 2), keepdims=True)))
    h = h * jax.nn.sigmoid(pointwise(p['se']['conv_expand'], gate))
    h = norm(names.pop(0), _conv(p['conv_pwl' if 'conv_pwl' in p else 'conv_pw'], h, 1, 0))
    return x + h if stride == 1 and h.shape == x.shape else h


def _unit(x):
    """Normals of length 1, and how sure they are, above 0: [...,4]."""
    length = jnp.sqrt(jnp.square(x[..., :3]).sum(-1, keepdims=True)) + 1e-10
    return jnp.concatenate([x[..., :3] / length, jax.nn.elu(x[..., 3:]) + 1.01], -1)


def _conv(p, x, stride, padding, groups=1, dilation=1):
    """layers.conv with groups and dilation, padded as torch does by numbers, or 'SAME'."""
    if not isinstance(padding, str):
        padding = [(padding, padding) if isinstance(padding, int) else padding] * 2
    return lax.conv_general_dilated(
        x, p['weight'], (stride, stride), padding, rhs_dilation=(dilation, dilation),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=groups) + p.get('bias', 0)


def _transposed(p, x, padding):
    """torch's ConvTranspose2d of stride 2; weight [K,K,O,I], as spec.to_jax has it."""
    w = p['weight'][::-1, ::-1].swapaxes(2, 3)
    return lax.conv_general_dilated(x, w, (1, 1), [padding, padding], lhs_dilation=(2, 2),
                                    dimension_numbers=('NHWC', 'HWIO', 'NHWC')) + p.get('bias', 0)


def _reflected(p, x):
    n = len(p['weight']) // 2
    return conv(p, jnp.pad(x, ((0, 0), (n, n), (n, n), (0, 0)), 'reflect'), 1, 0)


def _normed(p, norm, x, stride, padding, groups=1):
    return _batch_norm(norm, _conv(p, x, stride, padding, groups))


def _batch_norm(p, x, eps=1e-5):
    """By the statistics of training (Ioffe and Szegedy 2015)."""
    scale = p['weight'] * lax.rsqrt(p['running_var'] + eps)
    return x * scale + (p['bias'] - p['running_mean'] * scale)


def _instance_norm(x, eps=1e-5):
    """Over the pixels of each channel (Ulyanov et al. 2016), in float32."""
    f = x.astype(jnp.float32)
    f = f - f.mean((1, 2), keepdims=True)
    return (f * lax.rsqrt(jnp.square(f).mean((1, 2), keepdims=True) + eps)).astype(x.dtype)


def _relu6(x):
    return jnp.clip(x, 0, 6)


def _pool(x):
    """The maximum of 2x2 pixels."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), 'VALID')


def _linear(x, height, width):
    """Bilinear, of pixels as squares."""
    return jax.image.resize(x, (x.shape[0], height, width, x.shape[-1]), 'linear', antialias=False)


def names(c: DetectorConfig) -> Shapes:
    """Names and shapes of the parameters, see shapes.py."""
    return {'hed': _hed_names, 'lineart': _lineart_names, 'lineart_anime': _anime_names,
            'mlsd': _mlsd_names, 'normal_bae': _normal_names}.get(c.kind, _pose_names)(c)


def _pose_names(c):
    d, table = c.channels, Shapes()
    widths = {'1': d, '2': 2 * d, '3': 4 * d, '4': 8 * d, '5': 8 * d}

    def add(layers, i, width, last, kernel, narrow):
        for n, name in enumerate(layers, 1):
            o = last if n == len(layers) else width(name)
            table.update(shapes.conv(name, i, o, 1 if n > len(layers) - narrow else kernel))
            i = o

    add([name for name in _TRUNK[c.kind] if name], 3, lambda name: 4 * d if name == 'conv4_3_CPM'
        else widths[name[4]], 2 * d, 3, 0)
    for branch, o in ({'_L1': 38, '_L2': 19} if c.kind == 'openpose' else
                      {'': PARTS[c.kind]}).items():
        add(_stage(c, 1, branch), 2 * d, lambda name: 8 * d if name.startswith(
            ('conv5_4', 'conv6_1')) else 2 * d, o, 3, 2)
        for number in range(2, c.blocks[0] + 1):
            add(_stage(c, number, branch), 2 * d + PARTS[c.kind], lambda _: 2 * d, o, 7, 2)
    return table


def _hed_names(c):
    table, i = Shapes(norm=(1, 3, 1, 1)), 3
    for n, layers in enumerate(c.blocks):
        o = c.channels * min(2**n, 8)
        for layer in range(layers):
            table |= shapes.conv(f'block{n + 1}.convs.{layer}', o if layer else i, o)
        table |= shapes.conv(f'block{n + 1}.projection', o, 1, 1)
        i = o
    return table


def _lineart_names(c):
    d, conv = c.channels, shapes.conv
    table = conv('model0.1', 3, d, 7) | conv('model1.0', d, 2 * d) | conv('model1.3', 2 * d, 4 * d)
    for i in range(c.blocks[0]):
        for name in ('1', '5'):
            table |= conv(f'model2.{i}.conv_block.{name}', 4 * d, 4 * d)
    return (table | _transposed_names('model3.0', 4 * d, 2 * d, 3)
            | _transposed_names('model3.3', 2 * d, d, 3) | conv('model4.1', d, 1, 7))


def _transposed_names(name, i, o, k):
    return {f'{name}.weight': (i, o, k, k), f'{name}.bias': (o,)}


def _anime_names(c):
    at, d, levels = 'model.model', c.channels, c.blocks[0]
    widths = [d * min(2**n, 8) for n in range(levels)]
    table = shapes.conv(f'{at}.0', 3, d, 4) | _transposed_names(f'{at}.3', 2 * d, 1, 4)
    at += '.1'
    for n in range(1, levels):
        outer, inner, last = widths[n - 1], widths[n], n == levels - 1
        table |= shapes.conv(f'{at}.model.1', outer, inner, 4)
        table |= _transposed_names(f'{at}.model.{3 if last else 5}', inner if last else 2 * inner,
                                   outer, 4)
        at += '.model.3'
    return table


def _norm_names(name, channels):
    return shapes.affine(name, channels) | {f'{name}.running_mean': (channels,),
                                            f'{name}.running_var': (channels,)}


def _mlsd_names(c):
    def both(at, norm, i, o, k, bias=False):
        return shapes.conv(at, i, o, k, bias) | _norm_names(norm, o)

    at = 'backbone.features'
    table, i = both(f'{at}.0.0', f'{at}.0.1', 4, 32, 3), 32
    outputs = [16, *[24] * 2, *[32] * 3, *[64] * 4, *[96] * 3]
    for n, o in enumerate(outputs, 1):
        layer, wide, k = f'{at}.{n}.conv', i if n == 1 else 6 * i, 0
        if n > 1:
            table |= both(f'{layer}.0.0', f'{layer}.0.1', i, wide, 1)
            k = 1
        table |= both(f'{layer}.{k}.0', f'{layer}.{k}.1', 1, wide, 3)
        table |= both(f'{layer}.{k + 1}', f'{layer}.{k + 2}', wide, o, 1)
        i = o
    below = 96
    for number, beside in zip((15, 17, 19, 21), (64, 32, 24, 16)):
        for name, i, o, k in ((f'block{number}.conv1', below, 64, 1),
                              (f'block{number}.conv2', beside, 64, 1),
                              (f'block{number + 1}.conv1', 128, 128, 3),
                              (f'block{number + 1}.conv2', 128, 64, 3)):
            table |= both(f'{name}.0', f'{name}.1', i, o, k, bias=True)
        below = 64
    for name in ('block23.conv1', 'block23.conv2'):
        table |= both(f'{name}.0', f'{name}.1', 64, 64, 3, bias=True)
    return table | shapes.conv('block23.conv3', 64, 16, 1)


def _normal_names(c):
    at, i = 'encoder.original_model', _STEM
    table = shapes.conv(f'{at}.conv_stem', 3, i, 3, bias=False) | _norm_names(f'{at}.bn1', i)
    for stage, (count, (o, k, _)) in enumerate(zip(c.blocks, _STAGES)):
        for n in range(count):
            block, wide = f'{at}.blocks.{stage}.{n}', 6 * i if stage else i
            norms = [wide, o]
            if stage:
                table |= shapes.conv(f'{block}.conv_pw', i, wide, 1, bias=False)
                norms.insert(0, wide)
            table |= shapes.conv(f'{block}.conv_dw', 1, wide, k, bias=False)
            table |= shapes.conv(f'{block}.se.conv_reduce', wide, i // 4, 1)
            table |= shapes.conv(f'{block}.se.conv_expand', i // 4, wide, 1)
            table |= shapes.conv(f'{block}.conv_pw{"l" if stage else ""}', wide, o, 1, bias=False)
            for number, width in enumerate(norms, 1):
                table |= _norm_names(f'{block}.bn{number}', width)
            i = o
    table |= shapes.conv(f'{at}.conv_head', i, _HEAD, 1, bias=False)
    table |= shapes.conv('decoder.conv2', _HEAD, _HEAD, 1)
    below = _HEAD
    for n, (beside, o) in enumerate(((176, 1024), (64, 512), (40, 256), (24, 128)), 1):
        net = f'decoder.up{n}._net'
        table |= shapes.conv(f'{net}.0', below + beside, o) | _norm_names(f'{net}.1', o)
        table |= shapes.conv(f'{net}.3', o, o) | _norm_names(f'{net}.4', o)
        below = o
    table |= shapes.conv('decoder.out_conv_res8', 512, 4)
    for size, width in ((4, 512), (2, 256), (1, 128)):
        widths = (width + 4, 128, 128, 128, 4)
        for n, (i, o) in enumerate(zip(widths, widths[1:])):
            name = f'decoder.out_conv_res{size}.{2 * n}'
            table |= {f'{name}.weight': (o, i, 1), f'{name}.bias': (o,)}
    return table


# Counters of training, and a norm that stands behind the last layer that is used.
_UNUSED = re.compile(r'.*\.num_batches_tracked|encoder\.original_model\.(bn2|classifier)\..*')


def renamed(stored: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """{name of a parameter: its name in a file}, from the names there."""
    found = {re.sub(r'^module\.|^model\d_\d\.(?=M?conv)|^model\d\.(?=M?conv)', '', name): name
             for name in stored}
    return {new: name for new, name in found.items() if not _UNUSED.fullmatch(new)}


def config_of(stored: Mapping[str, tuple[int, ...]]) -> DetectorConfig:
    """The config of a file's tensors: {name, as `renamed`: shape}. Raises ValueError or KeyError
    for those of no such network."""
    def count(pattern):
        return 1 + max((int(m[1]) for name in stored if (m := re.match(pattern, name))), default=-1)

    if 'conv1_1.weight' in stored:
        last = next(shape[0] for name, shape in stored.items()
                    if re.fullmatch(r'(Mconv7_stage2(_L2)?|conv6_2_CPM)\.weight', name))
        kind = {19: 'openpose', **{n: kind for kind, n in PARTS.items()}}[last]
        stages = count(r'Mconv7_stage(\d+)') - 1
        return DetectorConfig(kind, stored['conv1_1.weight'][0], (max(stages, 1),))
    if 'block1.projection.weight' in stored:
        return DetectorConfig('hed', stored['block1.convs.0.weight'][0], tuple(
            count(rf'block{n}\.convs\.(\d+)') for n in range(1, 6)))
    if 'model2.0.conv_block.1.weight' in stored:
        return DetectorConfig('lineart', stored['model0.1.weight'][0], (count(r'model2\.(\d+)'),))
    if 'model.model.1.model.1.weight' in stored:
        depth = max(name.count('.model.3') for name in stored)  # of the innermost, from the second
        return DetectorConfig('lineart_anime', stored['model.model.0.weight'][0], (depth + 1,))
    if 'block23.conv3.weight' in stored:
        return DetectorConfig('mlsd', stored['backbone.features.0.0.weight'][0], (1,))
    if 'decoder.out_conv_res8.weight' in stored:
        at = r'encoder\.original_model\.blocks'
        return DetectorConfig('normal_bae', stored['encoder.original_model.conv_stem.weight'][0],
                              tuple(count(rf'{at}\.{stage}\.(\d+)') for stage in range(7)))
    raise ValueError('none of OpenPose, HED, lineart, M-LSD and NormalBae')
