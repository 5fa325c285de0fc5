"""The config.json files of a diffusers folder -> the configs of config.py, and released ones."""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxsd.config import (
    BETAS,
    TEXT_ENCODERS,
    ControlNetConfig,
    DepthAnythingConfig,
    DPTConfig,
    ImageNormalizerConfig,
    KUNetConfig,
    ModelConfig,
    ScheduleConfig,
    T2IAdapterConfig,
    TextConfig,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
    VisionConfig,
)
from jaxsd.typing import Path

VERSIONS = pathlib.Path(__file__).parent / 'versions'


def versions() -> list[str]:
    """Names of the released versions whose configs ship inside the package."""
    return sorted(p.name for p in VERSIONS.iterdir() if (p / 'model_index.json').exists())


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig that a diffusers folder's config.json files describe, of any sizes.

    folder: a path, or the name of a released version (`versions()`).
    Every key that diffusers 0.42 knows is read, of no effect on pictures, or refused unless it has
    the one value that is implemented; what a file leaves out has diffusers' default.
    Raises FileNotFoundError that names the missing component, ValueError of one line for a file
    that is damaged or asks for something that jaxsd does not implement.
    """
    folder = VERSIONS / folder if str(folder) in versions() else pathlib.Path(folder)
    index = read_json(folder / 'model_index.json', _index)
    unet = read_json(folder / 'unet' / 'config.json', _unet)
    parts = {
        'unet': unet,
        'vae': read_network_config(folder / 'vae', ('AutoencoderKL', 'AutoencoderTiny')),
        'schedule': read_json(folder / 'scheduler' / 'scheduler_config.json',
                              _k_schedule if isinstance(unet, KUNetConfig) else schedule_config),
        'aesthetic': index['requires_aesthetics_score'],
        'zero_negative': (unet.added_dim > 0 if index['force_zeros_for_empty_prompt'] is None
                          else index['force_zeros_for_empty_prompt']),
    }
    for name in TEXT_ENCODERS:
        if index[name]:
            build = functools.partial(_text, kind=index[name], xl=unet.added_dim > 0)
            parts[name] = read_json(folder / name / 'config.json', build)
            if isinstance(unet, KUNetConfig):
                parts[name] = dataclasses.replace(parts[name], final_norm=False)
    if index['low_res_scheduler']:
        parts['low_res'] = read_json(folder / 'low_res_scheduler' / 'scheduler_config.json',
                                     schedule_config)
        parts['max_noise_level'] = index['max_noise_level']
        if 'force_upcast' not in read_json(folder / 'vae' / 'config.json', dict):
            # The release is older than the key, which diffusers takes for true; only its
            # pipelines of upscalers and of SDXL look at it.
            parts['vae'] = dataclasses.replace(parts['vae'], force_upcast=True)
    if index['image_encoder']:
        for name, kind in (('image_encoder', 'CLIPVisionModelWithProjection'),
                           ('image_normalizer', 'StableUnCLIPImageNormalizer')):
            parts[name] = read_network_config(folder / name, [kind])
        parts['image_noise'] = read_json(
            folder / 'image_noising_scheduler' / 'scheduler_config.json', schedule_config)
    if index['depth_estimator']:
        parts['depth_estimator'] = read_json(folder / 'depth_estimator' / 'config.json', _depth)
    scheduler = read_json(folder / 'scheduler' / 'scheduler_config.json', _distilled_for)
    config = ModelConfig(**parts, defaults=index['_jaxsd'] | scheduler)
    if folder.parent == VERSIONS:
        return config.replace(version=folder.name)
    # Backwards: of 1.4 and 1.5, and of 2.0 and 2.1, which are alike, the later one.
    return config.replace(version=next(
        (v for v in reversed(versions()) if _same(config, read_config(v))), 'custom'))


def read_network_config(folder: Path, classes: Sequence[str] | None = None) -> Any:
    """The config of the single network whose config.json a folder holds, such as a ControlNet's.

    classes: the names of classes that are expected; None: any of NETWORKS.
    Raises FileNotFoundError, and ValueError for a kind or a setting that jaxsd does not implement.
    """
    classes = classes or tuple(NETWORKS)

    def network(content):
        kind = content.get('_class_name') or (content.get('architectures') or [None])[0]
        if kind not in classes:
            raise ValueError(f'describes a {kind or "network of no name"}; '
                             f'expected {" or ".join(classes)}')
        return NETWORKS[kind](content)

    return read_json(pathlib.Path(folder) / 'config.json', network)


def _same(config, released):
    """Whether a config has a release's networks and prediction type; VAEs get swapped, and a
    depth estimator may be left out where depth maps are given."""
    same = released.replace(vae=config.vae, aesthetic=config.aesthetic,
                            zero_negative=config.zero_negative,
                            depth_estimator=config.depth_estimator)
    return same == config and released.vae.factor == config.vae.factor


def read_json(path: pathlib.Path, build: Callable[[dict], Any]) -> Any:
    """build(content) of a JSON file that holds an object; errors name the file, in one line."""
    if not path.exists():
        part = path.parent.name if path.name != 'model_index.json' else 'model_index.json'
        raise FileNotFoundError(
            f'{path}: no such file. A diffusers folder needs its {part!r} component; '
            'download the whole folder, or give a single .safetensors file instead.')
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path}: not valid JSON ({error})') from None
    if not isinstance(content, dict):
        raise ValueError(f'{path}: expected an object of settings, found {content!r:.100}')
    try:
        return build(content)
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(f'{path}: a setting is not of the kind that diffusers writes '
                         f'({type(error).__name__}: {error})') from None
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


# What diffusers' and transformers' classes take a setting for that a file leaves out.
_DOWN = ('CrossAttnDownBlock2D',) * 3 + ('DownBlock2D',)
_DEFAULTS = {
    'unet': {'cross_attention_dim': 1280, 'down_block_types': _DOWN,
             'up_block_types': tuple(k.replace('Down', 'Up') for k in reversed(_DOWN))},
    'kunet': {'layers_per_block': 2, 'attention_head_dim': 8, 'cross_attention_dim': 1280,
              'block_out_channels': (320, 640, 1280, 1280), 'out_channels': 4},
    'controlnet_union': {'conditioning_embedding_out_channels': (48, 96, 192, 384),
                         'num_control_type': 6},
    'vae': {'block_out_channels': (64,), 'layers_per_block': 1, 'sample_size': 32,
            'down_block_types': ('DownEncoderBlock2D',), 'up_block_types': ('UpDecoderBlock2D',)},
    'text': {'hidden_size': 512, 'intermediate_size': 2048, 'num_attention_heads': 8,
             'eos_token_id': 49407, 'projection_dim': 512},
    'vision': {'hidden_size': 768, 'intermediate_size': 3072, 'num_hidden_layers': 12,
               'num_attention_heads': 12, 'patch_size': 32, 'hidden_act': 'quick_gelu',
               'projection_dim': 512},
    'dpt': {'is_hybrid': False, 'neck_hidden_sizes': (96, 192, 384, 768),
            'reassemble_factors': [4, 2, 1, 0.5]},
}

# Settings with the values that are implemented. A file that leaves one out means the first.
_FIXED = {
    'unet': {
        '_class_name': ('UNet2DConditionModel', 'ControlNetModel', 'ControlNetUnionModel'),
        'act_fn': ('silu', 'swish'), 'flip_sin_to_cos': (True,), 'freq_shift': (0,),
        'center_input_sample': (False,), 'downsample_padding': (1,), 'mid_block_scale_factor': (1,),
        'dual_cross_attention': (False,), 'resnet_time_scale_shift': ('default',),
        'mid_block_type': ('UNetMidBlock2DCrossAttn', 'UNetMidBlock2D', None),
        'time_embedding_type': ('positional',),
        'time_embedding_dim': (None,), 'class_embed_type': (None, 'projection'),
        'attention_type': ('default',),
        'addition_embed_type': (None, 'text_time'), 'encoder_hid_dim': (None,),
        'encoder_hid_dim_type': (None,), 'class_embeddings_concat': (False,),
        'cross_attention_norm': (None,), 'conv_in_kernel': (3,), 'conv_out_kernel': (3,),
        'timestep_post_act': (None,), 'time_embedding_act_fn': (None,),
        'resnet_skip_time_act': (False,), 'resnet_out_scale_factor': (1.0,),
        'mid_block_only_cross_attention': (None, False),
        'controlnet_conditioning_channel_order': ('rgb',),
    },
    'kunet': {
        '_class_name': ('UNet2DConditionModel',), 'act_fn': ('gelu',), 'flip_sin_to_cos': (True,),
        'center_input_sample': (False,), 'mid_block_type': (None,), 'norm_num_groups': (None,),
        'time_embedding_type': ('fourier',), 'time_embedding_dim': (None,),
        'timestep_post_act': ('gelu',), 'conv_in_kernel': (1,), 'conv_out_kernel': (1,),
        'class_embed_type': (None,), 'addition_embed_type': (None,), 'encoder_hid_dim': (None,),
        'encoder_hid_dim_type': (None,), 'time_embedding_act_fn': (None,),
    },
    'vae': {'act_fn': ('silu', 'swish'), 'use_quant_conv': (True,), 'use_post_quant_conv': (True,),
            'mid_block_add_attention': (True,)},
    'tiny_vae': {'act_fn': ('relu',), 'upsample_fn': ('nearest',),
                 'upsampling_scaling_factor': (2,)},
    'text': {'model_type': ('clip_text_model', 'clip')},
    'vision': {'model_type': ('clip_vision_model', 'clip'), 'num_channels': (3,)},
    'dpt': {
        'is_hybrid': (True,), 'readout_type': ('project',), 'hidden_act': ('gelu',),
        'qkv_bias': (True,), 'reassemble_factors': ([1, 1, 1, 0.5],), 'num_channels': (3,),
        'neck_ignore_stages': ([0, 1],), 'head_in_index': (-1,), 'add_projection': (False,),
        'use_batch_norm_in_fusion_residual': (False,), 'use_bias_in_fusion_residual': (None, True),
    },
    'dpt_backbone': {
        'model_type': ('bit',), 'layer_type': ('bottleneck',), 'global_padding': ('same', 'SAME'),
        'embedding_dynamic_padding': (True,), 'hidden_act': ('relu',), 'output_stride': (32, None),
        'width_factor': (1,), 'num_channels': (3,),
    },
    'scheduler': {
        'use_flow_sigmas': (False,), 'timestep_type': ('discrete',), 'thresholding': (False,),
        'variance_type': ('fixed_small', 'fixed_small_log', 'fixed_large', 'fixed_large_log', None),
        'use_dynamic_shifting': (False,), 'shift_terminal': (None,), 'flow_shift': (1.0,),
    },
    'model_index': {  # classes of components; (None, None): there is none
        'unet': (('diffusers', 'UNet2DConditionModel'),),
        **dict.fromkeys(TEXT_ENCODERS, ((None, None), ('transformers', 'CLIPTextModel'),
                                        ('transformers', 'CLIPTextModelWithProjection'))),
        **dict.fromkeys(('tokenizer', 'tokenizer_2'),
                        ((None, None), ('transformers', 'CLIPTokenizer'),
                         ('transformers', 'CLIPTokenizerFast'))),
        'low_res_scheduler': ((None, None), ('diffusers', 'DDPMScheduler')),
        'depth_estimator': ((None, None), ('transformers', 'DPTForDepthEstimation')),
        'image_encoder': ((None, None), ('transformers', 'CLIPVisionModelWithProjection')),
    },
}

# Settings of which null is what diffusers takes them for where a file leaves them out.
_NULL = ('sample_size', 'num_class_embeds', 'addition_time_embed_dim', 'num_attention_heads',
         'time_cond_proj_dim', 'projection_class_embeddings_input_dim', 'shift_factor',
         'latents_mean', 'latents_std', 'trained_betas', 'sigma_min', 'sigma_max',
         'backbone_config', 'low_res_scheduler', 'depth_estimator', 'image_encoder',
         'force_zeros_for_empty_prompt', *TEXT_ENCODERS, 'tokenizer', 'tokenizer_2', '_class_name')

# Schedulers of diffusers whose models jaxsd samples: (beta_start, beta_end, beta_schedule) that
# they take where a file does not say. How they step and space timesteps is a request's to say.
BETAS_OF = {
    **dict.fromkeys((
        'DDIM', 'DDIMInverse', 'DDIMParallel', 'DDPM', 'DDPMParallel', 'DEISMultistep',
        'DPMSolverMultistep', 'DPMSolverMultistepInverse', 'DPMSolverSinglestep', 'PNDM',
        'SASolver', 'EulerAncestralDiscrete', 'EulerDiscrete', 'LMSDiscrete', 'UniPCMultistep'),
        (0.0001, 0.02, 'linear')),
    **dict.fromkeys(('DPMSolverSDE', 'HeunDiscrete', 'KDPM2AncestralDiscrete', 'KDPM2Discrete'),
                    (0.00085, 0.012, 'linear')),
    **dict.fromkeys(('LCM', 'TCD'), (0.00085, 0.012, 'scaled_linear')),
}
EDM_SCHEDULERS = ('EDMEuler', 'EDMDPMSolverMultistep')
_PIPELINE = re.compile(r'(StableDiffusion(XL)?|LatentConsistencyModel)(ControlNet|Adapter)?'
                       r'(Img2Img|Inpaint|Depth2Img|InstructPix2Pix|Upscale|LatentUpscale)?'
                       r'Pipeline(Legacy)?'
                       r'|StableUnCLIPImg2ImgPipeline')


# Settings that are taken apart before a config class checks them.
_LEVELS: tuple[Any, str] = (list, tuple), 'a list of one entry per level'
_KINDS = {'block_out_channels': _LEVELS, 'down_block_types': _LEVELS, 'up_block_types': _LEVELS,
          'backbone_config': (dict, 'an object of settings')}


def _settings(kind, content):
    """A config.json's settings over diffusers' defaults; ValueError for what is not implemented."""
    given = {k: v for k, v in content.items() if v is not None or k not in _NULL}
    settings = {**_DEFAULTS.get(kind, {}), **given}
    for key, (kinds, what) in _KINDS.items():
        if key in settings and not isinstance(settings[key], kinds):
            raise ValueError(f'{key}: expected {what}, found {settings[key]!r:.100}')
    for key, values in _FIXED[kind].items():
        found = settings.get(key, values[0])
        found = tuple(found) if isinstance(found, list) and isinstance(values[0], tuple) else found
        if not any(found == v and isinstance(found, bool) == isinstance(v, bool) for v in values):
            raise ValueError(f'{key}={found!r:.100} is not implemented; expected '
                             f'{" or ".join(map(repr, values))}')
    return settings


def _pick(cls, settings, **renamed):
    """Build `cls` from the settings that carry its fields' names."""
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{**{k: v for k, v in settings.items() if k in names}, **renamed})


def _index(content):
    """What model_index.json says -> {component: its class or None; setting: value}."""
    index = _settings('model_index', content)
    pipeline = index.get('_class_name', 'StableDiffusionPipeline')
    if not isinstance(pipeline, str) or not _PIPELINE.fullmatch(pipeline):
        raise ValueError(f'_class_name={pipeline!r:.100} is not implemented; expected a pipeline '
                         'of Stable Diffusion 1.x, 2.x or XL such as StableDiffusionXLPipeline')
    found = {}
    for part in (*TEXT_ENCODERS, 'low_res_scheduler', 'depth_estimator', 'image_encoder'):
        found[part] = index.get(part, (None, None))[1]
    if bool(found['image_encoder']) != pipeline.startswith('StableUnCLIP'):
        raise ValueError(f'image_encoder={found["image_encoder"]!r} of a {pipeline}: expected one '
                         'with StableUnCLIPImg2ImgPipeline alone; IP-Adapters have their own')
    for name, default in (('requires_aesthetics_score', False),
                          ('force_zeros_for_empty_prompt', None)):
        found[name] = index.get(name, default)
        if not isinstance(found[name], (bool, type(default))):
            raise ValueError(f'{name}: expected true or false, found {found[name]!r:.100}')
    found['_jaxsd'] = sampling_defaults(index.get('_jaxsd', {}))
    found['max_noise_level'] = level = index.get('max_noise_level', 350)
    if not isinstance(level, int) or not 0 <= level < 1000:
        raise ValueError(f'max_noise_level: expected a whole number from 0 to 999, found {level!r}')
    return found


def schedule_config(content: Mapping[str, Any]) -> ScheduleConfig:
    """What a scheduler_config.json says of the forward diffusion."""
    settings = _settings('scheduler', content)
    kind = str(settings.get('_class_name', 'DDIMScheduler')).removesuffix('Scheduler')
    if kind in EDM_SCHEDULERS:
        return _pick(ScheduleConfig, settings, edm=True)
    if kind not in BETAS_OF:
        raise ValueError(f'_class_name={kind + "Scheduler"!r:.100} is not implemented; expected '
                         f'one of {", ".join(sorted([*BETAS_OF, *EDM_SCHEDULERS]))}')
    defaults = dict(zip(('beta_start', 'beta_end', 'beta_schedule'), BETAS_OF[kind]))
    settings = {**defaults, **settings}
    edm = ('edm', 'sigma_min', 'sigma_max', 'sigma_data')  # others' sigmas are ends of a schedule
    return _pick(ScheduleConfig, {k: v for k, v in settings.items() if k not in edm})


def _distilled_for(content):
    """{'scheduler': its settings} of a scheduler that a model needs: LCM's and TCD's, and timesteps
    that begin with the last one, as of models distilled to few steps or trained to zero terminal
    SNR. Others, as 1.x's PNDM, are what was usual when the folder was written: {}."""
    name = str(content.get('_class_name')).removesuffix('Scheduler')
    if name not in ('LCM', 'TCD') and content.get('timestep_spacing') != 'trailing':
        return {}
    known = ('_diffusers_version', 'num_train_timesteps', 'prediction_type', *BETAS)
    return {'scheduler': {k: v for k, v in content.items() if k not in known}}


def sampling_defaults(given: Any) -> dict[str, Any]:
    """What a model says of how it is sampled, checked: arguments of a Request, and `scheduler`.

    A schedule is a name or a list of levels, and no file. Raises ValueError.
    """
    if not isinstance(given, dict):
        raise ValueError(f'_jaxsd: expected an object such as {{"steps": 4}}, found {given!r:.100}')
    kinds: dict[str, Any] = {
        'sampler': str, 'schedule': (str, list), 'steps': int, 'guidance': (int, float),
        'sampler_options': dict, 'schedule_options': dict, 'scheduler': dict}
    for name, value in given.items():
        if name not in kinds:
            raise ValueError(f'_jaxsd: {name!r:.100} is unknown; expected some of '
                             f'{", ".join(kinds)}')
        if not isinstance(value, kinds[name]) or isinstance(value, bool):
            raise ValueError(f'_jaxsd: {name}={value!r:.100} is of the wrong kind')
        if name == 'schedule' and isinstance(value, str) and not value.isidentifier():
            raise ValueError(f'_jaxsd: schedule={value!r:.100}: expected a name, or a list of '
                             'noise levels')
    return given


def _text(content, kind, xl):
    settings = _settings('text', content)
    projected = kind == 'CLIPTextModelWithProjection'
    return _pick(TextConfig, settings, skip=int(xl), final_norm=not xl,
                 projection_dim=settings['projection_dim'] if projected else 0)


def _vision(content):
    return _pick(VisionConfig, _settings('vision', content))


def _image_normalizer(content):
    return _pick(ImageNormalizerConfig, content)


def _controlnet(content):
    down = content.get('down_block_types') or _DOWN
    up = [kind.replace('Down', 'Up') for kind in reversed(down)]
    found = _unet(content | {'up_block_types': up}, ControlNetConfig)
    if found.num_control_type:  # the first files of ControlNet-Union say that they are a ControlNet
        for key in ('num_trans_channel', 'num_proj_channel'):
            if (width := content.get(key, 320)) != found.block_out_channels[0]:
                raise ValueError(f'{key}={width!r:.100} is not implemented; expected the first of '
                                 f'block_out_channels, {found.block_out_channels[0]}')
    return found


def _controlnet_union(content):
    return _controlnet(_DEFAULTS['controlnet_union'] | content)


def _k_schedule(content):
    """That of the x2 latent upscaler. Its scheduler has 1.x's betas and says 'original_sample',
    which its pipeline makes of what the network says, as of an EDM model."""
    found = schedule_config({**content, 'prediction_type': 'epsilon'})
    if found != ScheduleConfig() or content.get('prediction_type') != 'original_sample':
        raise ValueError("expected 1.x's betas and prediction_type='original_sample', as of the x2 "
                         'latent upscaler')
    return K_SCHEDULE


# Of k-diffusion: the noise levels of 1.x's betas.
K_SCHEDULE = ScheduleConfig(edm=True, sigma_data=1.0, sigma_min=0.029167532920837402,
                            sigma_max=14.614642143249512)


def _kunet(content):
    settings = _settings('kunet', content)
    levels = len(settings['block_out_channels'])
    for key, side in (('down_block_types', 'Down'), ('up_block_types', 'Up')):
        kinds = [f'K{side}Block2D', *[f'KCrossAttn{side}Block2D'] * (levels - 1)]
        if list(settings[key]) != (kinds if side == 'Down' else kinds[::-1]):
            raise ValueError(f'{key}={settings[key]!r:.100}: expected one without attention at the '
                             'finest level, as of the x2 latent upscaler')
    single = {key: _alike(settings, key) for key in (
        'layers_per_block', 'cross_attention_dim', 'sample_size', 'attention_head_dim')
        if settings.get(key) is not None}
    return _pick(KUNetConfig, settings | single, out_channels=settings['out_channels'] - 1,
                 time_cond_dim=settings['time_cond_proj_dim'])


def _unet(content, cls=UNetConfig):
    if isinstance(content.get('down_block_types'), list | tuple) and (
            'KDownBlock2D' in content['down_block_types']):
        return _kunet(content)
    settings = _settings('unet', content)
    channels = settings.get('block_out_channels', UNetConfig.block_out_channels)
    levels = len(channels)
    layers, depths = _depths(settings, levels)
    kinds = settings['down_block_types'], settings['up_block_types']
    if any(len(found) != levels for found in kinds):
        raise ValueError(f'block_out_channels has {levels} levels, down_block_types and '
                         f'up_block_types have {len(kinds[0])} and {len(kinds[1])}')
    for kind, up in zip(kinds[0], reversed(kinds[1])):
        if (kind.replace('Down', 'Up') != up
                or kind not in ('DownBlock2D', 'CrossAttnDownBlock2D')):
            raise ValueError(f'blocks {kind!r} and {up!r} at one level are not implemented; '
                             'expected (CrossAttn)DownBlock2D and its Up twin')
    attention = [kind.startswith('CrossAttn') for kind in kinds[0]]
    heads = 'num_attention_heads' if settings.get('num_attention_heads') else 'attention_head_dim'
    added = settings.get('addition_embed_type') == 'text_time'
    projected = settings.get('class_embed_type') == 'projection'
    if (added or projected) and 'projection_class_embeddings_input_dim' not in settings:
        raise ValueError(f'{"addition_embed" if added else "class_embed"}_type='
                         f'{"text_time" if added else "projection"!r}: expected '
                         'projection_class_embeddings_input_dim as well')
    single = {key: _alike(settings, key) for key in
              ('layers_per_block', 'cross_attention_dim', 'sample_size') if key in settings}
    mid = {'UNetMidBlock2D': -1, None: -2}.get(
        settings.get('mid_block_type', 'UNetMidBlock2DCrossAttn'), layers[-1])
    if depths:
        each = single.get('layers_per_block', UNetConfig.layers_per_block)
        counts = [each] * levels + [each + 1] * levels
        depths = tuple(n * a for found, count, a in zip(depths, counts, attention + attention[::-1])
                       for n in _several(found, count))
    return _pick(
        cls, settings | single,
        transformer_layers=tuple(n * a for n, a in zip(layers, attention)),
        mid_transformer_layers=mid, transformer_depths=depths,
        heads=_per_level(settings, heads, 8, levels),
        only_cross_attention=_per_level(settings, 'only_cross_attention', False, levels),
        added_dim=settings['projection_class_embeddings_input_dim'] if added else 0,
        class_proj_dim=settings['projection_class_embeddings_input_dim'] if projected else 0,
        added_time_dim=settings.get('addition_time_embed_dim', 256))


def _depths(settings, levels):
    """transformer_layers_per_block of each level, and of the blocks of both halves, each one number
    or a list, in the order of the blocks; () where the levels say all."""
    down, up = (settings.get(f'{kind}transformer_layers_per_block') for kind in ('', 'reverse_'))
    if up is None:
        return _per_level(settings, 'transformer_layers_per_block', 1, levels), ()
    down, up = ([found] * levels if isinstance(found, int) else found
                for found in (1 if down is None else down, up))
    for name, found in (('', down), ('reverse_', up)):
        if not isinstance(found, list) or len(found) != levels:
            raise ValueError(f'{name}transformer_layers_per_block={found!r:.100}: expected one '
                             f'entry for each of the {levels} levels')
    return tuple(n[0] if isinstance(n, list) and n else n for n in down), (*down, *up)


def _several(value, count):
    """One number for each of `count` blocks."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise ValueError(f'transformer_layers_per_block: expected {count} numbers for the blocks '
                         f'of a level, found {value!r:.100}')
    return value


def _vae(content):
    settings = _settings('vae', content)
    levels = len(settings['block_out_channels'])
    for key, kind in (('down_block_types', 'DownEncoderBlock2D'),
                      ('up_block_types', 'UpDecoderBlock2D')):
        if list(settings[key]) != [kind] * levels:
            raise ValueError(f'{key}={settings[key]!r:.100} is not implemented; expected {kind!r} '
                             f'for each of the {levels} levels of block_out_channels')
    size = {'sample_size': _alike(settings, 'sample_size')}
    return _pick(VAEConfig, settings | size)


def _tiny_vae(content):
    return _pick(TinyVAEConfig, _settings('tiny_vae', content))


def _depth(content):
    settings = _settings('dpt', content)
    backbone = _settings('dpt_backbone', settings.get('backbone_config') or {})
    found = _pick(DPTConfig, backbone | settings)
    return dataclasses.replace(found, hidden_sizes=found.hidden_sizes[:len(found.depths)])


def _depth_anything(content):
    backbone = content.get('backbone_config') or {}
    for where, key, known in (
            (content, 'depth_estimation_type', ('relative',)), (content, 'head_in_index', (-1,)),
            (content, 'reassemble_factors', ([4, 2, 1, 0.5],)),
            (backbone, 'model_type', ('dinov2',)), (backbone, 'use_swiglu_ffn', (False,)),
            (backbone, 'hidden_act', ('gelu',)), (backbone, 'apply_layernorm', (True,)),
            (backbone, 'layer_norm_eps', (1e-6,)), (backbone, 'qkv_bias', (True,))):
        if where.get(key, known[0]) not in known:
            raise ValueError(f'{key}={where[key]!r:.100} is not implemented; expected {known[0]!r}')
    width, ratio = backbone.get('hidden_size', 768), backbone.get('mlp_ratio', 4)
    dinov2 = {'hidden_size': width, 'intermediate_size': int(width * ratio),
              'image_size': backbone.get('image_size', 224),
              'num_attention_heads': backbone.get('num_attention_heads', 12),
              'num_hidden_layers': backbone.get('num_hidden_layers', 12)}
    if 'out_indices' not in backbone:
        raise ValueError('backbone_config: expected out_indices in it')
    return _pick(DepthAnythingConfig, content | dinov2 | {'out_indices': backbone['out_indices']})


def _t2i_adapter(content):
    return _pick(T2IAdapterConfig, content)


# By diffusers' and transformers' names.
NETWORKS = {'AutoencoderKL': _vae, 'AutoencoderTiny': _tiny_vae,
            'ControlNetModel': _controlnet, 'ControlNetUnionModel': _controlnet_union,
            'T2IAdapter': _t2i_adapter,
            'DPTForDepthEstimation': _depth,
            'DepthAnythingForDepthEstimation': _depth_anything,
            'CLIPVisionModelWithProjection': _vision,
            'StableUnCLIPImageNormalizer': _image_normalizer}


def _per_level(settings, key, default, levels):
    """A setting that is one value, or a list of one per level."""
    value = settings.get(key, default)
    if not isinstance(value, (list, tuple)):
        return (value,) * levels
    if len(value) != levels or any(isinstance(v, (list, tuple)) for v in value):
        raise ValueError(f'{key}={value!r:.100} is not implemented; expected one value, or one '
                         f'for each of the {levels} levels')
    return tuple(value)


def _alike(settings, key):
    """A setting that is one value, or a list of one value again and again."""
    value = settings[key]
    if isinstance(value, (list, tuple)):
        if not value or any(v != value[0] for v in value):
            raise ValueError(f'{key}={value!r:.100} is not implemented; expected one value')
        return value[0]
    return value
