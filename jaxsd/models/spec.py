"""Names and shapes of every parameter of a model: for init, strict checking and sharding.

Names and shapes are those of the files (the diffusers / transformers folder layout, torch's axis
order); `to_jax` and `from_jax` turn one array from and into that order.
"""

import math

import jax.numpy as jnp
import numpy as np
from flax import traverse_util


def spec(config):
    """ModelConfig -> {component: {dotted name: shape}}, e.g. ['unet']['conv_in.weight']."""
    parts = {'unet': _unet(config.unet), 'vae': _vae(config.vae)}
    for name in ('text_encoder', 'text_encoder_2'):
        if getattr(config, name) is not None:
            parts[name] = _text(getattr(config, name))
    return parts


def count(shapes):
    """Number of parameters of one component, or of all components."""
    return sum(count(s) if isinstance(s, dict) else math.prod(s) for s in shapes.values())


def to_jax(name, array):
    """An array from a file to our axis order: linear [O,I] -> [I,O], conv OIHW -> HWIO."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if _is_linear(name, array) else array


def from_jax(name, array):
    """The inverse of `to_jax`."""
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    return array.T if _is_linear(name, array) else array


def _is_linear(name, array):
    return array.ndim == 2 and name.endswith('weight') and not name.endswith('embedding.weight')


def init(seed, config, dtype=jnp.float32):
    """Random parameters: {component: nested dict of arrays}, as large as torch's defaults.

    Weights: uniform in +-1/sqrt(fan in), embeddings normal with deviation 0.02, norms 1, biases 0.
    seed: an int. Drawn by numpy: one program for each of hundreds of shapes would take minutes.
    """
    rng = np.random.default_rng(seed)
    return {part: init_part(rng, shapes, dtype) for part, shapes in sorted(spec(config).items())}


def init_part(rng, shapes, dtype=jnp.float32):
    """Random parameters of one component, from its {dotted name: shape} and a numpy generator."""
    arrays = {}
    for name, shape in shapes.items():
        if name.endswith('embedding.weight'):
            array = 0.02 * rng.standard_normal(shape, np.float32)
        elif len(shape) > 1:
            array = (2 * rng.random(shape, np.float32) - 1) / math.sqrt(math.prod(shape[1:]))
        else:
            array = np.full(shape, name.endswith('weight'), np.float32)
        arrays[name] = jnp.asarray(to_jax(name, array), dtype)
    return traverse_util.unflatten_dict(arrays, sep='.')


def _affine(name, channels):
    return {f'{name}.weight': (channels,), f'{name}.bias': (channels,)}


def _linear(name, i, o, bias=True):
    return {f'{name}.weight': (o, i)} | ({f'{name}.bias': (o,)} if bias else {})


def _conv(name, i, o, k=3):
    return {f'{name}.weight': (o, i, k, k), f'{name}.bias': (o,)}


def _text(c):
    d, names = c.hidden_size, {}
    names['text_model.embeddings.token_embedding.weight'] = (c.vocab_size, d)
    names['text_model.embeddings.position_embedding.weight'] = (c.max_position_embeddings, d)
    for i in range(c.num_hidden_layers):
        at = f'text_model.encoder.layers.{i}'
        for proj in ('q_proj', 'k_proj', 'v_proj', 'out_proj'):
            names |= _linear(f'{at}.self_attn.{proj}', d, d)
        names |= _affine(f'{at}.layer_norm1', d) | _affine(f'{at}.layer_norm2', d)
        names |= _linear(f'{at}.mlp.fc1', d, c.intermediate_size)
        names |= _linear(f'{at}.mlp.fc2', c.intermediate_size, d)
    names |= _affine('text_model.final_layer_norm', d)
    if c.projection_dim:
        names |= _linear('text_projection', d, c.projection_dim, bias=False)
    return names


def _resnet(at, i, o, time=0):
    names = _affine(f'{at}.norm1', i) | _conv(f'{at}.conv1', i, o)
    names |= _affine(f'{at}.norm2', o) | _conv(f'{at}.conv2', o, o)
    if time:
        names |= _linear(f'{at}.time_emb_proj', time, o)
    return names | (_conv(f'{at}.conv_shortcut', i, o, 1) if i != o else {})


def _transformer(at, c, level, layers):
    d, context = c.block_out_channels[level], c.cross_attention_dim
    names = _affine(f'{at}.norm', d)
    for proj in ('proj_in', 'proj_out'):
        names |= (_linear(f'{at}.{proj}', d, d) if c.use_linear_projection
                  else _conv(f'{at}.{proj}', d, d, 1))
    for i in range(layers):
        block = f'{at}.transformer_blocks.{i}'
        for attn, source in (('attn1', context if c.only_cross_attention[level] else d),
                             ('attn2', context)):
            names |= _linear(f'{block}.{attn}.to_q', d, d, bias=False)
            names |= _linear(f'{block}.{attn}.to_k', source, d, bias=False)
            names |= _linear(f'{block}.{attn}.to_v', source, d, bias=False)
            names |= _linear(f'{block}.{attn}.to_out.0', d, d)
        for norm in ('norm1', 'norm2', 'norm3'):
            names |= _affine(f'{block}.{norm}', d)
        names |= _linear(f'{block}.ff.net.0.proj', d, 8 * d)
        names |= _linear(f'{block}.ff.net.2', 4 * d, d)
    return names


def _unet(c):
    channels, levels = c.block_out_channels, len(c.block_out_channels)
    time = 4 * channels[0]
    names = _conv('conv_in', c.in_channels, channels[0])
    for name, width in (('time_embedding', channels[0]), ('add_embedding', c.added_dim)):
        if width:
            names |= _linear(f'{name}.linear_1', width, time)
            names |= _linear(f'{name}.linear_2', time, time)
    if c.num_class_embeds:
        names['class_embedding.weight'] = (c.num_class_embeds, time)

    skips = [channels[0]]
    for level, o in enumerate(channels):
        at = f'down_blocks.{level}'
        for i in range(c.layers_per_block):
            names |= _resnet(f'{at}.resnets.{i}', o if i else skips[-1], o, time)
            if c.transformer_layers[level]:
                names |= _transformer(f'{at}.attentions.{i}', c, level, c.transformer_layers[level])
            skips.append(o)
        if level < levels - 1:
            names |= _conv(f'{at}.downsamplers.0.conv', o, o)
            skips.append(o)

    o = channels[-1]
    names |= _resnet('mid_block.resnets.0', o, o, time) | _resnet('mid_block.resnets.1', o, o, time)
    names |= _transformer('mid_block.attentions.0', c, levels - 1, c.mid_transformer_layers)

    below = o
    for up, level in enumerate(reversed(range(levels))):
        at, o = f'up_blocks.{up}', channels[level]
        for i in range(c.layers_per_block + 1):
            names |= _resnet(f'{at}.resnets.{i}', below + skips.pop(), o, time)
            if c.transformer_layers[level]:
                names |= _transformer(f'{at}.attentions.{i}', c, level, c.transformer_layers[level])
            below = o
        if level > 0:
            names |= _conv(f'{at}.upsamplers.0.conv', o, o)
    return names | _affine('conv_norm_out', channels[0]) | _conv('conv_out', channels[0],
                                                                 c.out_channels)


def _vae(c):
    channels, levels, names = c.block_out_channels, len(c.block_out_channels), {}
    for side, order, layers, first, last in (
            ('encoder', channels, c.layers_per_block, c.in_channels, 2 * c.latent_channels),
            ('decoder', channels[::-1], c.layers_per_block + 1, c.latent_channels, c.out_channels)):
        names |= _conv(f'{side}.conv_in', first, order[0])
        blocks, sampler = (('down_blocks', 'downsamplers') if side == 'encoder'
                           else ('up_blocks', 'upsamplers'))
        below = order[0]
        for level, o in enumerate(order):
            at = f'{side}.{blocks}.{level}'
            for i in range(layers):
                names |= _resnet(f'{at}.resnets.{i}', below, o)
                below = o
            if level < levels - 1:
                names |= _conv(f'{at}.{sampler}.0.conv', o, o)
        mid = f'{side}.mid_block'
        d = channels[-1]
        names |= _resnet(f'{mid}.resnets.0', d, d) | _resnet(f'{mid}.resnets.1', d, d)
        names |= _affine(f'{mid}.attentions.0.group_norm', d)
        for proj in ('to_q', 'to_k', 'to_v', 'to_out.0'):
            names |= _linear(f'{mid}.attentions.0.{proj}', d, d)
        names |= _affine(f'{side}.conv_norm_out', order[-1]) | _conv(f'{side}.conv_out', order[-1],
                                                                     last)
    d = c.latent_channels
    return names | _conv('quant_conv', 2 * d, 2 * d, 1) | _conv('post_quant_conv', d, d, 1)
