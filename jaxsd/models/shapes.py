"""Names and shapes of the parameters of each network, as in its files: {dotted name: shape}.

The order of axes is torch's. Every function takes the network's config.
"""

from jaxsd.config import (
    ControlNetConfig,
    DPTConfig,
    ImageNormalizerConfig,
    TextConfig,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
    VisionConfig,
)
from jaxsd.typing import Shapes


def affine(name: str, channels: int) -> Shapes:
    """A norm."""
    return {f'{name}.weight': (channels,), f'{name}.bias': (channels,)}


def linear(name: str, i: int, o: int, bias: bool = True) -> Shapes:
    """A linear layer of i inputs and o outputs."""
    return {f'{name}.weight': (o, i)} | ({f'{name}.bias': (o,)} if bias else {})


def conv(name: str, i: int, o: int, k: int = 3, bias: bool = True) -> Shapes:
    """A k x k convolution."""
    return {f'{name}.weight': (o, i, k, k)} | ({f'{name}.bias': (o,)} if bias else {})


def text(c: TextConfig) -> Shapes:
    """CLIPTextModel (WithProjection), c: TextConfig."""
    d, names = c.hidden_size, Shapes()
    names['text_model.embeddings.token_embedding.weight'] = (c.vocab_size, d)
    names['text_model.embeddings.position_embedding.weight'] = (c.max_position_embeddings, d)
    names |= clip_layers('text_model', c) | affine('text_model.final_layer_norm', d)
    if c.projection_dim:
        names |= linear('text_projection', d, c.projection_dim, bias=False)
    return names


def clip_layers(at: str, c: TextConfig | VisionConfig) -> Shapes:
    """The transformer of either side of CLIP."""
    d, names = c.hidden_size, Shapes()
    for i in range(c.num_hidden_layers):
        layer = f'{at}.encoder.layers.{i}'
        for proj in ('q_proj', 'k_proj', 'v_proj', 'out_proj'):
            names |= linear(f'{layer}.self_attn.{proj}', d, d)
        names |= affine(f'{layer}.layer_norm1', d) | affine(f'{layer}.layer_norm2', d)
        names |= linear(f'{layer}.mlp.fc1', d, c.intermediate_size)
        names |= linear(f'{layer}.mlp.fc2', c.intermediate_size, d)
    return names


def vision(c: VisionConfig) -> Shapes:
    """CLIPVisionModelWithProjection, c: VisionConfig."""
    d, at = c.hidden_size, 'vision_model'
    names: Shapes = {f'{at}.embeddings.class_embedding': (d,)}
    names |= conv(f'{at}.embeddings.patch_embedding', 3, d, c.patch_size, bias=False)
    names[f'{at}.embeddings.position_embedding.weight'] = (c.tokens, d)
    names |= affine(f'{at}.pre_layrnorm', d) | clip_layers(at, c)  # so it is spelt in the files
    names |= affine(f'{at}.post_layernorm', d)
    return names | linear('visual_projection', d, c.projection_dim, bias=False)


def image_normalizer(c: ImageNormalizerConfig) -> Shapes:
    """StableUnCLIPImageNormalizer, c: ImageNormalizerConfig."""
    return dict.fromkeys(('mean', 'std'), (1, c.embedding_dim))


def resnet(at: str, i: int, o: int, time: int = 0) -> Shapes:
    """A residual block; time: width of the time embedding, 0: it takes none."""
    names = affine(f'{at}.norm1', i) | conv(f'{at}.conv1', i, o)
    names |= affine(f'{at}.norm2', o) | conv(f'{at}.conv2', o, o)
    if time:
        names |= linear(f'{at}.time_emb_proj', time, o)
    return names | (conv(f'{at}.conv_shortcut', i, o, 1) if i != o else {})


def transformer(at: str, c: UNetConfig, level: int, layers: int, crossed: bool) -> Shapes:
    """The transformer blocks of a U-Net's level; crossed: both attentions see the text."""
    d, context = c.block_out_channels[level], c.cross_attention_dim
    names = affine(f'{at}.norm', d)
    for proj in ('proj_in', 'proj_out'):
        names |= (linear(f'{at}.{proj}', d, d) if c.use_linear_projection
                  else conv(f'{at}.{proj}', d, d, 1))
    for i in range(layers):
        block = f'{at}.transformer_blocks.{i}'
        for attn, source in (('attn1', context if crossed else d),
                             ('attn2', context)):
            names |= linear(f'{block}.{attn}.to_q', d, d, bias=False)
            names |= linear(f'{block}.{attn}.to_k', source, d, bias=False)
            names |= linear(f'{block}.{attn}.to_v', source, d, bias=False)
            names |= linear(f'{block}.{attn}.to_out.0', d, d)
        for norm in ('norm1', 'norm2', 'norm3'):
            names |= affine(f'{block}.{norm}', d)
        names |= linear(f'{block}.ff.net.0.proj', d, 8 * d)
        names |= linear(f'{block}.ff.net.2', 4 * d, d)
    return names


def unet_encoder(c: UNetConfig) -> tuple[Shapes, list[int]]:
    """The half of a U-Net that a ControlNet copies -> its names, and the widths of its skips."""
    channels, levels = c.block_out_channels, len(c.block_out_channels)
    time = 4 * channels[0]
    names = conv('conv_in', c.in_channels, channels[0])
    for name, width in (('time_embedding', channels[0]), ('add_embedding', c.added_dim)):
        if width:
            names |= linear(f'{name}.linear_1', width, time)
            names |= linear(f'{name}.linear_2', time, time)
    if c.time_cond_proj_dim:
        names |= linear('time_embedding.cond_proj', c.time_cond_proj_dim, channels[0], bias=False)
    if c.num_class_embeds:
        names['class_embedding.weight'] = (c.num_class_embeds, time)
    if c.class_proj_dim:
        names |= linear('class_embedding.linear_1', c.class_proj_dim, time)
        names |= linear('class_embedding.linear_2', time, time)

    skips = [channels[0]]
    for level, o in enumerate(channels):
        at = f'down_blocks.{level}'
        for i in range(c.layers_per_block):
            names |= resnet(f'{at}.resnets.{i}', o if i else skips[-1], o, time)
            if depth := c.depth('down', level, i):
                names |= transformer(f'{at}.attentions.{i}', c, level, depth,
                                     c.only_cross_attention[level])
            skips.append(o)
        if level < levels - 1:
            names |= conv(f'{at}.downsamplers.0.conv', o, o)
            skips.append(o)

    o, depth = channels[-1], c.mid_transformer_layers
    if depth > -2:
        names |= resnet('mid_block.resnets.0', o, o, time)
    if depth > 0:
        names |= resnet('mid_block.resnets.1', o, o, time)
        names |= transformer('mid_block.attentions.0', c, levels - 1, depth, False)
    return names, skips


def unet(c: UNetConfig) -> Shapes:
    """UNet2DConditionModel, c: UNetConfig."""
    channels, time = c.block_out_channels, 4 * c.block_out_channels[0]
    names, skips = unet_encoder(c)
    below = channels[-1]
    for up, level in enumerate(reversed(range(len(channels)))):
        at, o = f'up_blocks.{up}', channels[level]
        for i in range(c.layers_per_block + 1):
            names |= resnet(f'{at}.resnets.{i}', below + skips.pop(), o, time)
            if depth := c.depth('up', level, i):
                names |= transformer(f'{at}.attentions.{i}', c, level, depth,
                                     c.only_cross_attention[level])
            below = o
        if level > 0:
            names |= conv(f'{at}.upsamplers.0.conv', o, o)
    return names | affine('conv_norm_out', channels[0]) | conv('conv_out', channels[0],
                                                               c.out_channels)


def controlnet(c: ControlNetConfig) -> Shapes:
    """ControlNetModel, or with num_control_type ControlNetUnionModel; c: ControlNetConfig."""
    names, skips = unet_encoder(c)
    at, widths = 'controlnet_cond_embedding', c.conditioning_embedding_out_channels
    names |= conv(f'{at}.conv_in', c.conditioning_channels, widths[0])
    for level, (i, o) in enumerate(zip(widths, widths[1:])):
        names |= conv(f'{at}.blocks.{2 * level}', i, i) | conv(f'{at}.blocks.{2 * level + 1}', i, o)
    names |= conv(f'{at}.conv_out', widths[-1], c.block_out_channels[0])
    for i, width in enumerate(skips):
        names |= conv(f'controlnet_down_blocks.{i}', width, width, 1)
    if c.num_control_type:
        d, sinusoids = skips[0], c.num_control_type * c.added_time_dim
        names['task_embedding'] = (c.num_control_type, d)
        for i in range(c.num_trans_layer):
            block = f'transformer_layes.{i}'  # so the files spell it
            names |= {f'{block}.attn.in_proj_weight': (3 * d, d),
                      f'{block}.attn.in_proj_bias': (3 * d,)}
            names |= linear(f'{block}.attn.out_proj', d, d)
            names |= affine(f'{block}.ln_1', d) | affine(f'{block}.ln_2', d)
            names |= linear(f'{block}.mlp.c_fc', d, 4 * d) | linear(f'{block}.mlp.c_proj', 4 * d, d)
        names |= linear('spatial_ch_projs', d, d)
        names |= linear('control_add_embedding.linear_1', sinusoids, 4 * d)
        names |= linear('control_add_embedding.linear_2', 4 * d, 4 * d)
    return names | conv('controlnet_mid_block', skips[-1], skips[-1], 1)


def vae(c: VAEConfig) -> Shapes:
    """AutoencoderKL, c: VAEConfig."""
    channels, levels, names = c.block_out_channels, len(c.block_out_channels), Shapes()
    for side, order, layers, first, last in (
            ('encoder', channels, c.layers_per_block, c.in_channels, 2 * c.latent_channels),
            ('decoder', channels[::-1], c.layers_per_block + 1, c.latent_channels, c.out_channels)):
        names |= conv(f'{side}.conv_in', first, order[0])
        blocks, sampler = (('down_blocks', 'downsamplers') if side == 'encoder'
                           else ('up_blocks', 'upsamplers'))
        below = order[0]
        for level, o in enumerate(order):
            at = f'{side}.{blocks}.{level}'
            for i in range(layers):
                names |= resnet(f'{at}.resnets.{i}', below, o)
                below = o
            if level < levels - 1:
                names |= conv(f'{at}.{sampler}.0.conv', o, o)
        mid = f'{side}.mid_block'
        d = channels[-1]
        names |= resnet(f'{mid}.resnets.0', d, d) | resnet(f'{mid}.resnets.1', d, d)
        names |= affine(f'{mid}.attentions.0.group_norm', d)
        for proj in ('to_q', 'to_k', 'to_v', 'to_out.0'):
            names |= linear(f'{mid}.attentions.0.{proj}', d, d)
        names |= affine(f'{side}.conv_norm_out', order[-1]) | conv(f'{side}.conv_out', order[-1],
                                                                     last)
    d = c.latent_channels
    return names | conv('quant_conv', 2 * d, 2 * d, 1) | conv('post_quant_conv', d, d, 1)


def tiny_vae(c: TinyVAEConfig) -> Shapes:
    """AutoencoderTiny, c: TinyVAEConfig; a layer without arrays counts where torch counts it."""
    def block(w):
        return conv('.conv.0', w, w) | conv('.conv.2', w, w) | conv('.conv.4', w, w)

    def resample(w):
        return conv('', w, w, bias=False)

    widths = c.encoder_block_out_channels
    encoder = [conv('', c.in_channels, widths[0])]
    for level, (w, n) in enumerate(zip(widths, c.num_encoder_blocks)):
        encoder += [resample(w)] * (level > 0) + [block(w)] * n
    encoder.append(conv('', widths[-1], c.latent_channels))

    widths = c.decoder_block_out_channels
    decoder = [conv('', c.latent_channels, widths[0]), {}]
    for level, (w, n) in enumerate(zip(widths, c.num_decoder_blocks)):
        decoder += [block(w)] * n + [{}, resample(w)] * (level < len(widths) - 1)
    decoder.append(conv('', widths[-1], c.out_channels))
    return {f'{side}.layers.{i}{name}': shape
            for side, layers in (('encoder', encoder), ('decoder', decoder))
            for i, layer in enumerate(layers) for name, shape in layer.items()}


def dpt(c: DPTConfig) -> Shapes:
    """DPTForDepthEstimation with is_hybrid, c: DPTConfig."""
    d, at = c.hidden_size, 'dpt.embeddings'
    names: Shapes = {f'{at}.cls_token': (1, 1, d),
                     f'{at}.position_embeddings': (1, (c.image_size // c.patch_size) ** 2 + 1, d)}
    names |= conv(f'{at}.projection', c.hidden_sizes[-1], d, 1)
    at += '.backbone.bit'
    below = c.embedding_size
    names |= conv(f'{at}.embedder.convolution', 3, below, 7, bias=False)
    names |= affine(f'{at}.embedder.norm', below)
    for stage, (depth, o) in enumerate(zip(c.depths, c.hidden_sizes)):
        for i in range(depth):
            block = f'{at}.encoder.stages.{stage}.layers.{i}'
            narrow = o // 4
            for n, (a, b, k) in enumerate(((below, narrow, 1), (narrow, narrow, 3),
                                           (narrow, o, 1)), 1):
                names |= conv(f'{block}.conv{n}', a, b, k, bias=False)
                names |= affine(f'{block}.norm{n}', b)
            if i == 0:
                names |= conv(f'{block}.downsample.conv', below, o, 1, bias=False)
                names |= affine(f'{block}.downsample.norm', o)
            below = o

    for i in range(c.num_hidden_layers):
        at = f'dpt.encoder.layer.{i}'
        for proj in ('attention.query', 'attention.key', 'attention.value', 'output.dense'):
            names |= linear(f'{at}.attention.{proj}', d, d)
        names |= linear(f'{at}.intermediate.dense', d, c.intermediate_size)
        names |= linear(f'{at}.output.dense', c.intermediate_size, d)
        names |= affine(f'{at}.layernorm_before', d) | affine(f'{at}.layernorm_after', d)
    names |= affine('dpt.layernorm', d)  # in every file, and of no effect on the depth

    at, f = 'neck.reassemble_stage', c.fusion_hidden_size
    for i in (2, 3):  # the first two maps are the stem's, as they are
        names |= linear(f'{at}.readout_projects.{i}.0', 2 * d, d)
        names |= conv(f'{at}.layers.{i}.projection', d, c.neck_hidden_sizes[i], 1)
    names |= conv(f'{at}.layers.3.resize', c.neck_hidden_sizes[3], c.neck_hidden_sizes[3])
    for i, width in enumerate(c.neck_hidden_sizes):
        names |= conv(f'neck.convs.{i}', width, f, bias=False)
        layer = f'neck.fusion_stage.layers.{i}'
        names |= conv(f'{layer}.projection', f, f, 1)
        for unit in ('residual_layer1', 'residual_layer2'):
            names |= conv(f'{layer}.{unit}.convolution1', f, f)
            names |= conv(f'{layer}.{unit}.convolution2', f, f)
    return (names | conv('head.head.0', f, f // 2) | conv('head.head.2', f // 2, 32)
            | conv('head.head.4', 32, 1, 1))
