"""The static description of a model: what the config.json files of a diffusers folder say."""

import dataclasses
import json
import pathlib

VERSIONS = pathlib.Path(__file__).parent / 'versions'
TEXT_ENCODERS = ('text_encoder', 'text_encoder_2')


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """A CLIP text transformer. `skip` and `final_norm` say which hidden state the version uses."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = 'quick_gelu'  # or 'gelu', the exact one
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 2  # 2 is what old config.json files say when they mean "the highest id"
    projection_dim: int = 0  # 0: no text_projection
    skip: int = 0  # layers left out at the end: 1 is the "penultimate" of SDXL
    final_norm: bool = True  # whether the hidden state passes the final layer norm


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """A U-Net. Tuples have one entry per resolution level, from the finest to the coarsest."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    transformer_layers: tuple = (1, 1, 1, 0)  # transformer blocks per attention; 0: no attention
    mid_transformer_layers: int = 1
    heads: tuple = (8, 8, 8, 8)
    only_cross_attention: tuple = (False, False, False, False)
    cross_attention_dim: int = 768
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    num_class_embeds: int = 0  # rows of the class embedding table; 0: none
    added_dim: int = 0  # width of SDXL's `added` vector; 0: none
    added_time_dim: int = 256  # sinusoids per time id inside `added`
    sample_size: int = 64  # the native latent height and width


@dataclasses.dataclass(frozen=True)
class ControlNetConfig(UNetConfig):
    """A ControlNet: the first half of a U-Net, and how wide the layers are that read the hint."""

    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple = (16, 32, 96, 256)
    global_pool_conditions: bool = False  # what it adds is averaged over the pixels (shuffle)


@dataclasses.dataclass(frozen=True)
class T2IAdapterConfig:
    """A T2I-Adapter; `channels` has one entry per feature, from the finest to the coarsest."""

    in_channels: int = 3
    channels: tuple = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    downscale_factor: int = 8  # pixels along each side of the squares that are read first
    adapter_type: str = 'full_adapter'  # or full_adapter_xl

    @property
    def halved(self):
        """The features that are half as high and wide as the one before."""
        return (2,) if self.adapter_type == 'full_adapter_xl' else range(1, len(self.channels))


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """An AutoencoderKL. Latents seen by the U-Net are `(z - shift_factor) * scaling_factor`."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    force_upcast: bool = False  # float16 overflows: decode in float32 or bfloat16
    sample_size: int = 512  # the native picture height and width

    @property
    def factor(self):
        """Pixels per latent along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True)
class TinyVAEConfig:
    """An AutoencoderTiny (TAESD), a small stand-in for a VAE; entries as in VAEConfig."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    encoder_block_out_channels: tuple = (64, 64, 64, 64)
    decoder_block_out_channels: tuple = (64, 64, 64, 64)
    num_encoder_blocks: tuple = (1, 3, 3, 3)
    num_decoder_blocks: tuple = (3, 3, 3, 1)
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    force_upcast: bool = False

    @property
    def factor(self):
        """Pixels per latent along each side."""
        return 2 ** (len(self.encoder_block_out_channels) - 1)


@dataclasses.dataclass(frozen=True)
class DPTConfig:
    """The hybrid DPT that MiDaS is: a ResNet stem, a vision transformer, reassembly and fusion."""

    image_size: int = 384
    patch_size: int = 16
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    layer_norm_eps: float = 1e-12
    backbone_out_indices: tuple = (2, 5, 8, 11)
    neck_hidden_sizes: tuple = (256, 512, 768, 768)
    fusion_hidden_size: int = 256
    depths: tuple = (3, 4, 9)  # of the stem, bottlenecks per stage
    embedding_size: int = 64
    hidden_sizes: tuple = (256, 512, 1024)  # of the stem, channels per stage
    num_groups: int = 32


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The forward diffusion that the model was trained on."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = 'scaled_linear'  # linear, scaled_linear or squaredcos_cap_v2
    prediction_type: str = 'epsilon'  # epsilon, v_prediction or sample
    rescale_betas_zero_snr: bool = False


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything static about a model; hashable, so it can be a static argument of `jit`."""

    unet: UNetConfig
    vae: VAEConfig | TinyVAEConfig
    schedule: ScheduleConfig = ScheduleConfig()
    text_encoder: TextConfig | None = None
    text_encoder_2: TextConfig | None = None
    depth_estimator: DPTConfig | None = None
    low_res: ScheduleConfig | None = None  # upscalers: how the small picture is noised
    max_noise_level: int = 350  # upscalers: the last timestep of low_res that was trained on
    controlnets: tuple = ()  # (name, ControlNetConfig) of those at work in a program
    aesthetic: bool = False  # the SDXL refiner's time ids end in an aesthetic score
    zero_negative: bool = False  # an empty negative prompt is zeros, not an encoded '' (SDXL base)
    # The released version it equals, see versions(); a label, no part of what the config is.
    version: str = dataclasses.field(default='custom', compare=False)

    def replace(self, **parts):
        """A copy with some parts replaced, e.g. `replace(schedule=...)`."""
        return dataclasses.replace(self, **parts)

    def with_prediction(self, prediction_type):
        """A copy with another prediction type: epsilon, v_prediction or sample."""
        known = ('epsilon', 'v_prediction', 'sample')
        if prediction_type not in known:
            raise ValueError(f'prediction type {prediction_type!r}: expected one of {known}')
        schedule = dataclasses.replace(self.schedule, prediction_type=prediction_type)
        return self.replace(schedule=schedule)


def versions():
    """Names of the released versions whose configs ship inside the package."""
    return sorted(p.name for p in VERSIONS.iterdir() if (p / 'model_index.json').exists())


def read_config(folder):
    """The ModelConfig that a diffusers folder's config.json files describe, of any sizes.

    folder: a path, or the name of a released version (`versions()`).
    Raises FileNotFoundError that names the missing component, ValueError for a setting that
    jaxsd does not implement.
    """
    folder = VERSIONS / folder if str(folder) in versions() else pathlib.Path(folder)
    index = _read(folder / 'model_index.json')
    unet = _unet(_read(folder / 'unet' / 'config.json'))
    schedule = _read(folder / 'scheduler' / 'scheduler_config.json')
    parts = {
        'unet': unet,
        'vae': read_network_config(folder / 'vae', ('AutoencoderKL', 'AutoencoderTiny')),
        'schedule': _pick(ScheduleConfig, schedule),
        'aesthetic': bool(index.get('requires_aesthetics_score')),
        'zero_negative': bool(index.get('force_zeros_for_empty_prompt', unet.added_dim > 0)),
    }
    for name in TEXT_ENCODERS:
        if index.get(name, (None,))[0]:
            parts[name] = _text(_read(folder / name / 'config.json'), xl=unet.added_dim > 0)
    if index.get('low_res_scheduler', (None,))[0]:
        low_res = _read(folder / 'low_res_scheduler' / 'scheduler_config.json')
        parts['low_res'] = _pick(ScheduleConfig, low_res)
        parts['max_noise_level'] = index.get('max_noise_level', 350)
        if 'force_upcast' not in _read(folder / 'vae' / 'config.json'):
            # The release is older than the key, which diffusers takes for true; only its
            # pipelines of upscalers and of SDXL look at it.
            parts['vae'] = dataclasses.replace(parts['vae'], force_upcast=True)
    if index.get('depth_estimator', (None,))[0]:
        parts['depth_estimator'] = _depth(_read(folder / 'depth_estimator' / 'config.json'))
    config = ModelConfig(**parts)
    if folder.parent == VERSIONS:
        return config.replace(version=folder.name)
    # Backwards: of 1.4 and 1.5, and of 2.0 and 2.1, which are alike, the later one.
    return config.replace(version=next(
        (v for v in reversed(versions()) if _same(config, read_config(v))), 'custom'))


def read_network_config(folder, classes=None):
    """The config of the single network whose config.json a folder holds, such as a ControlNet's.

    classes: the names of classes that are expected; None: any of NETWORKS.
    Raises FileNotFoundError, and ValueError for a kind or a setting that jaxsd does not implement.
    """
    content, classes = _read(pathlib.Path(folder) / 'config.json'), classes or tuple(NETWORKS)
    kind = content.get('_class_name') or ''.join(content.get('architectures', ())[:1])
    if kind not in classes:
        raise ValueError(f'{folder}: config.json describes a {kind or "network of no name"}; '
                         f'expected {" or ".join(classes)}')
    return NETWORKS[kind](content)


def _same(config, released):
    """Whether a config has a release's networks and prediction type; VAEs get swapped, and a
    depth estimator may be left out where depth maps are given."""
    same = released.replace(vae=config.vae, aesthetic=config.aesthetic,
                            zero_negative=config.zero_negative,
                            depth_estimator=config.depth_estimator)
    return same == config and released.vae.factor == config.vae.factor


def _read(path):
    if not path.exists():
        part = path.parent.name if path.name != 'model_index.json' else 'model_index.json'
        raise FileNotFoundError(
            f'{path}: no such file. A diffusers folder needs its {part!r} component; '
            'download the whole folder, or give a single .safetensors file instead.')
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f'{path}: not valid JSON ({error})') from None


def _pick(cls, config, **renamed):
    """Build `cls` from the keys of a config.json that carry its fields' names."""
    names = {field.name for field in dataclasses.fields(cls)}
    picked = {k: tuple(v) if isinstance(v, list) else v
              for k, v in config.items() if k in names and v is not None}
    return cls(**{**picked, **renamed})


def _text(config, xl):
    projected = 'CLIPTextModelWithProjection' in config.get('architectures', ())
    return _pick(TextConfig, config, skip=int(xl), final_norm=not xl,
                 projection_dim=config.get('projection_dim', 512) if projected else 0)


def _controlnet(config):
    order = config.get('controlnet_conditioning_channel_order', 'rgb')
    if order != 'rgb':
        raise ValueError(f'controlnet/config.json: controlnet_conditioning_channel_order={order!r} '
                         'is not implemented; expected rgb')
    up = [kind.replace('Down', 'Up') for kind in reversed(config['down_block_types'])]
    return _unet(config | {'up_block_types': up}, ControlNetConfig, 'controlnet')


def _unet(config, cls=UNetConfig, part='unet'):
    known = {
        'act_fn': ('silu',), 'flip_sin_to_cos': (True,), 'freq_shift': (0,),
        'center_input_sample': (False,), 'downsample_padding': (1,), 'mid_block_scale_factor': (1,),
        'dual_cross_attention': (False,), 'resnet_time_scale_shift': ('default',),
        'mid_block_type': ('UNetMidBlock2DCrossAttn',), 'time_embedding_type': ('positional',),
        'class_embed_type': (None,), 'addition_embed_type': (None, 'text_time'),
        'encoder_hid_dim_type': (None,), 'class_embeddings_concat': (False,),
        'cross_attention_norm': (None,), 'time_cond_proj_dim': (None,),
        'conv_in_kernel': (3,), 'conv_out_kernel': (3,), 'timestep_post_act': (None,),
        'time_embedding_act_fn': (None,), 'resnet_skip_time_act': (False,),
        'mid_block_only_cross_attention': (None, False), 'resnet_out_scale_factor': (1.0,),
    }
    for key, values in known.items():
        if config.get(key, values[0]) not in values:
            raise ValueError(f'{part}/config.json: {key}={config[key]!r} is not implemented; '
                             f'expected one of {values}')
    channels = tuple(config['block_out_channels'])
    levels = len(channels)
    layers = _per_level(config.get('transformer_layers_per_block', 1), levels)
    attention = [kind.startswith('CrossAttn') for kind in config['down_block_types']]
    for kind, up in zip(config['down_block_types'], reversed(config['up_block_types'])):
        if (kind.replace('Down', 'Up') != up
                or kind not in ('DownBlock2D', 'CrossAttnDownBlock2D')):
            raise ValueError(f'{part}/config.json: blocks {kind!r} and {up!r} at one level are not '
                             'implemented; expected (CrossAttn)DownBlock2D and its Up twin')
    heads = config.get('num_attention_heads') or config.get('attention_head_dim', 8)
    return _pick(
        cls, config, transformer_layers=tuple(n * a for n, a in zip(layers, attention)),
        mid_transformer_layers=layers[-1], heads=_per_level(heads, levels),
        only_cross_attention=_per_level(config.get('only_cross_attention') or False, levels),
        added_dim=config.get('projection_class_embeddings_input_dim') or 0,
        added_time_dim=config.get('addition_time_embed_dim') or 256)


def _vae(config):
    if config.get('act_fn', 'silu') != 'silu':
        raise ValueError(f'vae/config.json: act_fn={config["act_fn"]!r}; expected silu')
    return _pick(VAEConfig, config)


def _tiny_vae(config):
    known = {'act_fn': 'relu', 'upsample_fn': 'nearest', 'upsampling_scaling_factor': 2}
    for key, value in known.items():
        if config.get(key, value) != value:
            raise ValueError(f'vae/config.json: {key}={config[key]!r} is not implemented; '
                             f'expected {value!r}')
    found = _pick(TinyVAEConfig, config)
    widths = found.encoder_block_out_channels, found.decoder_block_out_channels
    if len(widths[0]) != len(widths[1]) or any(len(set(w)) > 1 for w in widths):
        raise ValueError(f'vae/config.json: block_out_channels of {list(widths[0])} and '
                         f'{list(widths[1])} are not implemented; expected one width and '
                         'as many levels on both sides')
    return found


def _depth(config):
    backbone = config.get('backbone_config') or {}
    known = {
        'is_hybrid': (True,), 'readout_type': ('project',), 'hidden_act': ('gelu',),
        'qkv_bias': (True,), 'reassemble_factors': ([1, 1, 1, 0.5],),
        'neck_ignore_stages': ([0, 1],), 'head_in_index': (-1,), 'add_projection': (False,),
        'use_batch_norm_in_fusion_residual': (False,), 'use_bias_in_fusion_residual': (None, True),
    }
    known_backbone = {
        'model_type': ('bit',), 'layer_type': ('bottleneck',), 'global_padding': ('same', 'SAME'),
        'embedding_dynamic_padding': (True,), 'hidden_act': ('relu',), 'output_stride': (32, None),
        'width_factor': (1,),
    }
    for settings, expected in ((config, known), (backbone, known_backbone)):
        for key, values in expected.items():
            if settings.get(key, values[0]) not in values:
                raise ValueError(f'depth_estimator/config.json: {key}={settings[key]!r} is not '
                                 f'implemented; expected {values[0]!r}, as in dpt-hybrid-midas')
    found = _pick(DPTConfig, backbone | config)
    return dataclasses.replace(found, hidden_sizes=found.hidden_sizes[:len(found.depths)])


def _t2i_adapter(config):
    known = ('full_adapter', 'full_adapter_xl')
    if config.get('adapter_type', known[0]) not in known:
        raise ValueError(f'adapter_type={config["adapter_type"]!r} is not implemented; expected '
                         f'one of {known}')
    return _pick(T2IAdapterConfig, config)


# By diffusers' and transformers' names.
NETWORKS = {'AutoencoderKL': _vae, 'AutoencoderTiny': _tiny_vae,
            'ControlNetModel': _controlnet, 'T2IAdapter': _t2i_adapter,
            'DPTForDepthEstimation': _depth}


def _per_level(value, levels):
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels
