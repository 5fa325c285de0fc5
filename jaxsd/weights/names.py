"""Names of the single-file layouts (LDM, SGM, OpenCLIP), derived from the folder layout's.

jaxsd names tensors as a diffusers folder does. `places` says for each of them where a single file
keeps it; reading looks a place up and writing fills it, so one table serves both directions.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from jaxsd.config import (
    TEXT_ENCODERS,
    Checked,
    DepthAnythingConfig,
    ModelConfig,
    TextConfig,
    TinyVAEConfig,
    UNetConfig,
    VisionConfig,
)
from jaxsd.models import shapes
from jaxsd.typing import Shapes
from jaxsd.weights import names_dpt


class Place(NamedTuple):
    """Where a single file keeps a tensor.

    how: '' as it is; '1x1' a linear kept as a 1x1 convolution; 'T' transposed; 'q', 'k', 'v' the
    first, second, last third of the rows.
    """

    name: str
    how: str = ''

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The stored shape, from the tensor's own."""
        if self.how == '1x1':
            return (*shape, 1, 1)
        if self.how == 'T':
            return shape[::-1]
        return (3 * shape[0], *shape[1:]) if self.how else shape


def places(config: ModelConfig, shapes: dict[str, Shapes],
           stored: Collection[str] = ()) -> dict[str, dict[str, Place]]:
    """{component: {folder name: Place}} for a ModelConfig and its models.spec.spec.

    stored: the names in a file; a Place is then the first of its tensor's spellings that is there.
    """
    return {part: network_places(part, getattr(config, part), shapes[part], prefix, stored)
            for part, prefix in prefixes(config).items()}


def network_places(part: str, config: Checked, shapes: Shapes, prefix: str = '',
                   stored: Collection[str] = ()) -> dict[str, Place]:
    """{folder name: Place} of one network: a ModelConfig's component, or another."""
    rules, found, missing, seen = _RULES[part](config), {}, [], collections.Counter()
    for name, shape in shapes.items():
        place = found[name] = _place(name, rules, prefix, part, shape)
        if stored and place.name not in stored:
            others = list(_spellings(name, prefix, part, shape, place))
            which = next((i for i, other in enumerate(others) if other.name in stored), None)
            if which is None:
                missing.append((name, others))
            else:
                seen[which] += 1
                found[name] = others[which]
    if seen and seen.most_common(1)[0][1] > len(shapes) / 2:  # it is missing under that spelling
        found |= {name: others[seen.most_common(1)[0][0]] for name, others in missing}
    return found


def _spellings(name, prefix, part, shape, place):
    """The other Places where files keep a tensor: under the folder's name, text encoders under the
    names of transformers or OpenCLIP, and all of that where the other one's would stand."""
    starts = [prefix]
    if part in TEXT_ENCODERS:
        stage = re.sub(r'(model|transformer)\.$', '', prefix)
        starts = [stage + 'transformer.', stage + 'model.']
    for start in starts:
        yield place._replace(name=start + place.name.removeprefix(prefix))
        if part in TEXT_ENCODERS:
            yield _place(name, _OPENCLIP, start, part, shape)
        yield Place(start + name)
    if prefix:
        yield Place(f'{part}.{name}')


def prefixes(config: ModelConfig) -> dict[str, str]:
    """{component: what its names start with in a single file}."""
    found = {'unet': 'model.diffusion_model.', 'vae': 'first_stage_model.'}
    encoders = [name for name in TEXT_ENCODERS if getattr(config, name)]
    for i, name in enumerate(encoders):
        stage = f'conditioner.embedders.{i}.' if config.unet.added_dim else 'cond_stage_model.'
        kind = 'model.' if is_openclip(getattr(config, name)) else 'transformer.'
        found[name] = stage + kind
    if config.depth_estimator:
        found['depth_estimator'] = 'depth_model.model.'
    if config.image_encoder:
        found |= {'image_encoder': 'embedder.model.visual.',
                  'image_normalizer': 'noise_augmentor.data_'}
    return found


def is_openclip(text: TextConfig) -> bool:
    """Whether a single file holds this TextConfig under OpenCLIP's names.

    OpenAI's CLIP has quick_gelu and is kept under transformers' names; the text transformers that
    OpenCLIP trained have the exact gelu and are kept under OpenCLIP's.
    """
    return text.hidden_act == 'gelu'


def is_extra(name: str, config: ModelConfig | Checked) -> bool:
    """Whether a single file may hold this tensor although the model does not use it.

    config: a ModelConfig, or that of one network.
    """
    layers = [getattr(config, part).num_hidden_layers for part in TEXT_ENCODERS
              if getattr(config, part, None)]
    if isinstance(config, VisionConfig) and re.match(
            r'text_(model|projection)\.|logit_scale$', name):
        return True  # of both towers of CLIP in one file
    if name.startswith('depth_model.') and not getattr(config, 'depth_estimator', None):
        return True
    last = re.fullmatch(r'cond_stage_model\.(?:model|transformer)\.(?:transformer\.resblocks'
                        r'|text_model\.encoder\.layers)\.(\d+)\..*', name)
    return is_buffer(name) or bool(last and layers and int(last[1]) == layers[0])


def is_buffer(name: str) -> bool:
    """Whether this tensor stands in single files but is no network's."""
    return bool(_EXTRA.fullmatch(name))


def is_ema(name: str) -> bool:
    """Whether this is a tensor of the second, averaged copy of the U-Net that some files hold."""
    return name.startswith('model_ema.') and not is_buffer(name)


def ema(name: str) -> str:
    """What the averaged copy of a U-Net's tensor is called: without its dots."""
    return 'model_ema.' + name.removeprefix('model.').replace('.', '')


def kind(found: Iterable[str]) -> tuple[str, str, str]:
    """What the tensors of these names are -> (what, the function that reads it or '', a name)."""
    return next(((what, reader, name) for pattern, (what, reader) in _TELLTALES.items()
                 for name in found if re.match(pattern, name)), ('something else', '', ''))


def in_folder(part: str, name: str) -> str:
    """A tensor's name as current diffusers folders have it, from any that was ever in use."""
    if part in TEXT_ENCODERS and not name.startswith(('text_model.', 'text_projection.')):
        return f'text_model.{name}'  # transformers >= 5 writes CLIPTextModel without its prefix
    if part == 'vae':
        return re.sub(r'(mid_block\.attentions\.0|mid\.attn_1)\.([a-z_]+(?:\.0)?)\.(?=weight|bias)',
                      lambda m: f'{m[1]}.{_attention(m[1], m[2])}.', name)
    return name


# The VAE's attention in folders, and its spellings before diffusers 0.18 and in single files.
_ATTENTION = {'to_q': ('query', 'q'), 'to_k': ('key', 'k'), 'to_v': ('value', 'v'),
              'to_out.0': ('proj_attn', 'proj_out', 'to_out'), 'group_norm': ('norm',)}
_IN_FOLDER = {old: new for new, olds in _ATTENTION.items() for old in (new, *olds)}
_IN_SINGLE = {'to_q': 'q', 'to_k': 'k', 'to_v': 'v', 'to_out.0': 'proj_out', 'group_norm': 'norm'}


def _attention(block, layer):
    """A layer's name in a VAE's attention block as that block's own layout has it."""
    new = _IN_FOLDER.get(layer, layer)
    return _IN_SINGLE.get(new, new) if block == 'mid.attn_1' else new


def in_single(name: str) -> str:
    """A tensor's name as the released single files have it; some 1.x files lack `text_model.`, a
    U-Net alone, as ComfyUI keeps it, its prefix; a VAE's attention has the names of any time."""
    name = re.sub(r'^(cond_stage_model\.transformer\.)(embeddings|encoder|final_layer_norm)\.',
                  r'\1text_model.\2.', name)
    if name.startswith(('first_stage_model.', 'vae.')):
        name = in_folder('vae', name)
    return re.sub(
        r'^((in|out)put_blocks|middle_block|time_embed|label_emb|out|down_blocks|up_blocks|mid_block'
        r'|conv_in|conv_norm_out|conv_out|time_embedding|add_embedding|class_embedding)\.',
        r'model.diffusion_model.\g<0>', name)


def renamed(names: Iterable[str], rename: Callable[[str], str]) -> dict[str, str]:
    """{rename(name): name}; what would be there twice keeps a name that no model has."""
    found = {}
    for name in names:
        new = rename(name)
        found[f'{name} (a second time)' if new in found else new] = name
    return found


# Schedule buffers, also those of an upscaler's small picture; counters of training and of the EMA;
# position_ids; a text encoder's logit_scale, and its text_projection where the model has none, as
# ComfyUI and others save them; the classes that MiDaS' transformer was trained on; the
# discriminator that some VAEs were trained with; what ComfyUI scales TAESD's latents by; of unCLIP
# CLIP's other tower, and the betas of its noise.
_EXTRA = re.compile(
    r'betas|(?:\w+_)?alphas_cumprod(?:_prev)?|posterior_\w+|logvar|lvlb_weights|scale_factor'
    r'|(?:global_)?step|epoch|iteration|model_ema\.(?:decay|num_updates)|denoiser\..*'
    r'|.*\.position_ids|(?:cond_stage_model|conditioner\.embedders\.\d)\.(?:(?:model|transformer)\.)*'
    r'(?:logit_scale|text_projection(?:\.weight)?|attn_mask)'
    r'|(?:depth_model\.model\.)?pretrained\.model\.head\..*|(?:first_stage_model\.)?loss\..*'
    r'|first_stage_model\.model_ema\..*|vae_scale|vae_shift|low_scale_model\..*'
    r'|embedder\.model\.(?!visual\.).*|noise_augmentor\.(?!data_).*'
    r'|(?:pretrained|backbone\.embeddings)\.mask_token')

# What files are, by what a name in them starts with; the first that fits, so that a ControlNet is
# seen beside the whole model that its first version came with.
_TELLTALES = {
    r'(image_proj|ip_adapter)\.': ('an IP-Adapter', 'load_ip_adapter'),
    r'(control_model\.)?(input_hint_block|zero_convs|controlnet_)':
        ('a ControlNet', 'load_controlnet'),
    r'model\.diffusion_model\.(?!.*lora[._])': ('a whole checkpoint', 'load'),
    r'(lora|lycoris)_|.*[._](lora|hada|lokr)[._]': ('a LoRA', 'load_adapter'),
    r'emb_params$|string_to_param\.|clip_[lg]$|text_encoders_[01]$|<.*>$':
        ('a textual inversion embedding', 'load_embedding'),
    r'(vision_model|visual)\.': ('an image encoder', 'load_image_encoder'),
    r'(text_model|embeddings)\.': ('a text encoder', ''),
    r'(module\.)?(model\d_?\d?\.)?M?conv\d_\d|block\d\.(convs|projection)\.|block23\.'
    r'|model2\.0\.conv_block\.|(module\.)?model\.model\.1\.model\.|encoder\.original_model\.':
        ('a detector for hints', 'load_detector'),
    r'(params(_ema)?\.)?(conv_body_first|stylegan_decoder|ft_layers)\.':
        ('a face restorer', 'load_face_restorer'),
    r'(first_stage_model\.)?(encoder|decoder)\.|taesd_': ('a VAE', 'load_vae'),
    r'(params(_ema)?\.)?(conv_body|RRDB_trunk|model\.1\.sub|body\.\d+\.(rdb\d|weight)'
    r'|layers\.0\.residual_group)\b': ('an upscaler', 'load_upscaler'),
    r'(adapter\.)?body\.': ('a T2I-Adapter', 'load_t2i_adapter'),
    r'(depth_model\.model\.)?pretrained\.|dpt\.|backbone\.embeddings\.':
        ('a depth estimator', 'load_depth_estimator'),
    r'(input|down)_blocks\.': ('a U-Net', 'load'),
    r'unet\.conv_in\.': ('a whole checkpoint', 'load'),
}

_OPENCLIP_LAYERS = [
    (r'self_attn\.[qkv]_proj\.', 'attn.in_proj_'),
    (r'self_attn\.', 'attn.'),
    (r'layer_norm', 'ln_'),
    (r'mlp\.fc1', 'mlp.c_fc'),
    (r'mlp\.fc2', 'mlp.c_proj'),
]

_OPENCLIP = [
    (r'^text_model\.embeddings\.position_embedding\.weight', 'positional_embedding'),
    (r'^text_model\.embeddings\.', ''),
    (r'^text_model\.encoder\.layers\.', 'transformer.resblocks.'),
    (r'^text_model\.final_layer_norm', 'ln_final'),
    (r'^text_projection\.weight', 'text_projection'),
    *_OPENCLIP_LAYERS,
]

# Behind `visual.`, see parts.py.
_OPENCLIP_VISION = [
    (r'^vision_model\.embeddings\.patch_embedding', 'conv1'),
    (r'^vision_model\.embeddings\.position_embedding\.weight', 'positional_embedding'),
    (r'^vision_model\.embeddings\.', ''),
    (r'^vision_model\.pre_layrnorm', 'ln_pre'),
    (r'^vision_model\.post_layernorm', 'ln_post'),
    (r'^vision_model\.encoder\.layers\.', 'transformer.resblocks.'),
    (r'^visual_projection\.weight', 'proj'),
    *_OPENCLIP_LAYERS,
]


def _unet_rules(c):
    per = c.layers_per_block + 1  # blocks per level: the layers, and a resampler or one more layer

    def block(side, first):
        def number(m):
            return f'{side}.{int(m[1]) * per + int(m[3]) + first}.{int(m[2] == "attentions")}'
        return number

    def upsampler(m):  # comes after the attention, if the level has one
        attends = c.transformer_layers[-1 - int(m[1])] > 0
        return f'output_blocks.{(int(m[1]) + 1) * per - 1}.{1 + attends}'

    return [
        (r'(resnets\.\d+)\.norm1', r'\1.in_layers.0'),
        (r'(resnets\.\d+)\.conv1', r'\1.in_layers.2'),
        (r'(resnets\.\d+)\.time_emb_proj', r'\1.emb_layers.1'),
        (r'(resnets\.\d+)\.norm2', r'\1.out_layers.0'),
        (r'(resnets\.\d+)\.conv2', r'\1.out_layers.3'),
        (r'(resnets\.\d+)\.conv_shortcut', r'\1.skip_connection'),
        (r'^conv_in', 'input_blocks.0.0'),
        (r'^down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)', block('input_blocks', 1)),
        (r'^down_blocks\.(\d+)\.downsamplers\.0\.conv',
         lambda m: f'input_blocks.{(int(m[1]) + 1) * per}.0.op'),
        (r'^mid_block\.resnets\.0', 'middle_block.0'),
        (r'^mid_block\.attentions\.0', 'middle_block.1'),
        (r'^mid_block\.resnets\.1', 'middle_block.2'),
        (r'^up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)', block('output_blocks', 0)),
        (r'^up_blocks\.(\d+)\.upsamplers\.0', upsampler),
        (r'^conv_norm_out', 'out.0'),
        (r'^conv_out', 'out.2'),
        (r'^time_embedding\.linear_1', 'time_embed.0'),
        (r'^time_embedding\.linear_2', 'time_embed.2'),
        (r'^time_embedding\.cond_proj', 'time_embed.cond_proj'),
        (r'^add_embedding\.linear_1', 'label_emb.0.0'),
        (r'^add_embedding\.linear_2', 'label_emb.0.2'),
        (r'^class_embedding\.linear_1', 'label_emb.0.0'),
        (r'^class_embedding\.linear_2', 'label_emb.0.2'),
        (r'^class_embedding', 'label_emb'),
    ]


def as_built(config: UNetConfig, stored: Shapes) -> UNetConfig:
    """A released U-Net's config, or one with the blocks that a single file has: SSD-1B, Vega,
    KOALA, BK-SDM and other distilled networks lack some. stored: {name in a single file: shape}.

    Of the same widths and heads; what is incomplete as such a network is not taken for one.
    """
    prefix = 'model.diffusion_model.'
    blocks: dict[str, int] = collections.defaultdict(int)  # transformer blocks of each block
    for name in stored:
        if found := re.match(r'((?:in|out)put_blocks\.\d+|middle_block)(?:\.\d+'
                             r'\.transformer_blocks\.(\d+))?\.', name.removeprefix(prefix)):
            blocks[found[1]] = max(blocks[found[1]], 1 + int(found[2] or -1))
    levels: list[list[str]] = [[]]
    for n in range(1, sum(block.startswith('input') for block in blocks)):
        if f'{prefix}input_blocks.{n}.0.op.weight' in stored:
            levels.append([])
        else:
            levels[-1].append(f'input_blocks.{n}')
    each, known = len(levels[0]), dict(zip(config.block_out_channels, config.heads))
    ups = [f'output_blocks.{n}' for n in range(len(levels) * (each + 1))]
    try:
        widths = tuple(stored[f'{prefix}{level[0]}.0.out_layers.3.weight'][0] for level in levels)
        depths = [[blocks[block] for block in level] for level in levels]
        built = dataclasses.replace(
            config, block_out_channels=widths, layers_per_block=each,
            heads=tuple(known[width] for width in widths),
            transformer_layers=tuple(level[0] for level in depths),
            transformer_depths=(*sum(depths, []), *(blocks[block] for block in ups)),
            mid_transformer_layers=blocks['middle_block'] or (
                -1 if f'{prefix}middle_block.0.in_layers.0.weight' in stored else -2),
            only_cross_attention=config.only_cross_attention[:len(levels)])
    except (LookupError, ValueError):
        return config
    plain = dataclasses.replace(built, transformer_depths=())
    table = shapes.unet(built)
    if table == shapes.unet(plain):
        built = plain
    places = network_places('unet', built, table, prefix)
    return built if all(place.name in stored for place in places.values()) else config


def _tiny_vae_rules(c):
    """TAESD's own names, as ComfyUI joins its two files; there the decoder's clamp is a layer."""
    return [(r'^encoder\.layers\.', 'taesd_encoder.'),
            (r'^decoder\.layers\.(\d+)', lambda m: f'taesd_decoder.{int(m[1]) + 1}')]


def _vae_rules(c):
    if isinstance(c, TinyVAEConfig):
        return _tiny_vae_rules(c)
    top = len(c.block_out_channels) - 1
    return [
        (r'conv_norm_out', 'norm_out'),
        (r'mid_block\.resnets\.0', 'mid.block_1'),
        (r'mid_block\.resnets\.1', 'mid.block_2'),
        (r'mid_block\.attentions\.0\.group_norm', 'mid.attn_1.norm'),
        (r'mid_block\.attentions\.0\.to_out\.0', 'mid.attn_1.proj_out'),
        (r'mid_block\.attentions\.0\.to_', 'mid.attn_1.'),
        (r'down_blocks\.', 'down.'),
        (r'up_blocks\.(\d+)', lambda m: f'up.{top - int(m[1])}'),  # counted from the other end
        (r'(down|up)samplers\.0', r'\1sample'),
        (r'resnets', 'block'),
        (r'conv_shortcut', 'nin_shortcut'),
    ]


def _controlnet_rules(c):
    if c.num_control_type:
        return []  # ControlNet-Union was published under diffusers' names
    return [
        (r'^controlnet_cond_embedding\.conv_in', 'input_hint_block.0'),
        (r'^controlnet_cond_embedding\.blocks\.(\d+)',
         lambda m: f'input_hint_block.{2 * int(m[1]) + 2}'),  # a silu stands between two layers
        (r'^controlnet_cond_embedding\.conv_out',
         f'input_hint_block.{4 * len(c.conditioning_embedding_out_channels) - 2}'),
        (r'^controlnet_down_blocks\.(\d+)', r'zero_convs.\1.0'),
        (r'^controlnet_mid_block', 'middle_block_out.0'),
        *_unet_rules(c),
    ]


def _t2i_adapter_rules(c):
    n = c.num_res_blocks
    if c.adapter_type == 'light_adapter':
        return [(r'^adapter\.', ''), (r'\.resnets\.', '.body.')]
    return [
        (r'^adapter\.', ''),
        (r'^body\.(\d+)\.in_conv', lambda m: f'body.{n * int(m[1])}.in_conv'),
        (r'^body\.(\d+)\.resnets\.(\d+)', lambda m: f'body.{n * int(m[1]) + int(m[2])}'),
    ]


def _text_rules(c):
    return _OPENCLIP if is_openclip(c) else []


_RULES = {'unet': _unet_rules, 'vae': _vae_rules, 'controlnet': _controlnet_rules,
          't2i_adapter': _t2i_adapter_rules,
          'depth_estimator': lambda c: names_dpt.DEPTH_ANYTHING if isinstance(
              c, DepthAnythingConfig) else names_dpt.RULES,
          'image_encoder': lambda c: _OPENCLIP_VISION,
          'image_normalizer': lambda c: [],
          'ip_adapter': lambda c: [],
          **dict.fromkeys(TEXT_ENCODERS, _text_rules)}


def _place(name, rules, prefix, part, shape):
    place = name
    for pattern, replacement in rules:
        place = re.sub(pattern, replacement, place)
    how = ''
    if part == 'vae' and 'attentions' in name and len(shape) == 2:
        how = '1x1'
    elif place != name and ('in_proj_' in place or '.qkv.' in place):
        how = re.search(r'\.([qkv])(?:_proj|uery|ey|alue)\.', name)[1]
    elif place in ('text_projection', 'proj'):
        how = 'T'
    return Place(prefix + place, how)
