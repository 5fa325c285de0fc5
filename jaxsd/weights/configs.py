"""Write the config.json files of a diffusers folder: the inverse of jaxsd.read_config."""

import dataclasses
import json
import pathlib
from collections.abc import Collection

from jaxsd.config import (
    BETAS,
    TEXT_ENCODERS,
    Checked,
    ControlNetConfig,
    DepthAnythingConfig,
    DPTConfig,
    KUNetConfig,
    ModelConfig,
    ScheduleConfig,
    T2IAdapterConfig,
    TinyVAEConfig,
    VAEConfig,
    VisionConfig,
)
from jaxsd.config_files import VERSIONS, read_config, read_network_config, versions
from jaxsd.models import clip
from jaxsd.typing import Path

# The fields of a ScheduleConfig that say how an EDM model was trained, in BETAS' place.
EDM = ('edm', 'sigma_min', 'sigma_max', 'sigma_data')
TOKENIZERS = {'text_encoder': 'tokenizer', 'text_encoder_2': 'tokenizer_2'}


def write_config(config: ModelConfig, folder: Path,
                 tokenizers: Collection[str] = TEXT_ENCODERS) -> None:
    """Write model_index.json and each component's config.json, as diffusers reads them.

    tokenizers: the text encoders whose tokenizer the folder holds.
    Raises ValueError for a ModelConfig that these files cannot express.
    """
    folder = pathlib.Path(folder)
    _write(folder / 'model_index.json', _index(config, tokenizers))
    _write(folder / 'unet' / 'config.json', _released(config, 'unet') or _unet(config.unet))
    _write(folder / 'vae' / 'config.json',
           _released(config, 'vae') or _NETWORKS[type(config.vae)](config.vae))
    _write(folder / 'scheduler' / 'scheduler_config.json', _schedule(config))
    if config.low_res is not None:
        _write(folder / 'low_res_scheduler' / 'scheduler_config.json', _low_res(config.low_res))
    for part in TEXT_ENCODERS:
        if getattr(config, part) is not None:
            _write(folder / part / 'config.json',
                   _released(config, part) or _text(getattr(config, part)))
    if config.depth_estimator is not None:
        _write(folder / 'depth_estimator' / 'config.json',
               _released(config, 'depth_estimator') or _depth(config.depth_estimator))
        _write(folder / 'feature_extractor' / 'preprocessor_config.json',
               _preprocessor(config.depth_estimator))
    if config.image_encoder is not None:
        _write(folder / 'image_encoder' / 'config.json', _vision(config.image_encoder))
        _write(folder / 'image_normalizer' / 'config.json', {
            '_class_name': 'StableUnCLIPImageNormalizer', **_plain(config.image_normalizer)})
        _write(folder / 'image_noising_scheduler' / 'scheduler_config.json',
               _low_res(config.image_noise))
        _write(folder / 'feature_extractor' / 'preprocessor_config.json',
               _clip_preprocessor(config.image_encoder))
    written = read_config(folder)
    lost = [f'{field.name}.{part.name}' if dataclasses.is_dataclass(value) else field.name
            for field in dataclasses.fields(config) if field.name != 'version'
            for value in [getattr(config, field.name)]
            for part in (dataclasses.fields(value) if dataclasses.is_dataclass(value) else [field])
            if field.name != 'defaults' and _get(config, field, part) != _get(written, field, part)]
    if not config.defaults.items() <= written.defaults.items():
        lost.append('defaults')
    if lost:
        raise ValueError(f'the config.json files of a diffusers folder cannot express this '
                         f'{", ".join(lost)}')


def write_network_config(config: Checked, folder: Path) -> None:
    """Write the config.json of a single network, as diffusers reads it.

    Raises ValueError for a config that this file cannot express.
    """
    _write(pathlib.Path(folder) / 'config.json', _NETWORKS[type(config)](config))
    written = dataclasses.asdict(read_network_config(folder))
    lost = [k for k, v in dataclasses.asdict(config).items() if v != written[k]]
    if lost:
        raise ValueError(f'a config.json cannot express this {", ".join(lost)}')


def _get(config, field, part):
    value = getattr(config, field.name)
    return value if part is field else getattr(value, part.name, None)


def _released(config, part):
    """The released version's own config.json where it says the same.

    It also has what diffusers needs and jaxsd does not, such as 2.1's upcast_attention.
    """
    if (config.version in versions()
            and getattr(read_config(config.version), part) == getattr(config, part)):
        return json.loads((VERSIONS / config.version / part / 'config.json').read_text())
    return None


def _index(config, tokenizers):
    xl = config.unet.added_dim > 0
    latent = isinstance(config.unet, KUNetConfig)
    kind = 'LatentUpscalePipeline' if latent else {
        9: 'InpaintPipeline', 8: 'InstructPix2PixPipeline', 5: 'Depth2ImgPipeline'}.get(
            config.unet.in_channels, 'UpscalePipeline' if config.low_res else
            'Img2ImgPipeline' if xl and config.aesthetic else 'Pipeline')
    unclip = config.image_encoder is not None
    index = {'_class_name': 'StableUnCLIPImg2ImgPipeline' if unclip else
             f'StableDiffusion{"XL" * xl}{kind}',
             '_diffusers_version': '0.21.0'}  # the first to read everything written here
    if own := {k: v for k, v in config.defaults.items() if k != 'scheduler'}:
        index['_jaxsd'] = own
    if xl or config.aesthetic or config.zero_negative:
        index['force_zeros_for_empty_prompt'] = config.zero_negative
        index['requires_aesthetics_score'] = config.aesthetic
    if config.low_res:
        index['low_res_scheduler'] = ['diffusers', 'DDPMScheduler']
        index['max_noise_level'] = config.max_noise_level
    elif not (xl or unclip or latent):
        index['requires_safety_checker'] = False
    if unclip:
        index['image_encoder'] = ['transformers', 'CLIPVisionModelWithProjection']
        index['feature_extractor'] = ['transformers', 'CLIPImageProcessor']
        index['image_normalizer'] = ['stable_diffusion', 'StableUnCLIPImageNormalizer']
        index['image_noising_scheduler'] = ['diffusers', 'DDPMScheduler']
    elif not (xl or latent):
        index['feature_extractor'] = index['safety_checker'] = [None, None]
    for part in TEXT_ENCODERS if xl or config.text_encoder_2 else TEXT_ENCODERS[:1]:
        text = getattr(config, part)
        index[part] = ['transformers', _text_class(text)] if text else [None, None]
        index[TOKENIZERS[part]] = (['transformers', 'CLIPTokenizer']
                                   if text and part in tokenizers else [None, None])
    if config.unet.in_channels == 5:
        index['depth_estimator'] = index['feature_extractor'] = [None, None]
    if config.depth_estimator is not None:
        index['depth_estimator'] = ['transformers', 'DPTForDepthEstimation']
        index['feature_extractor'] = ['transformers', 'DPTImageProcessor']
    index['scheduler'] = ['diffusers', _schedule(config)['_class_name']]
    index['unet'] = ['diffusers', 'UNet2DConditionModel']
    index['vae'] = ['diffusers', _NETWORKS[type(config.vae)](config.vae)['_class_name']]
    return index


def _text_class(c):
    return 'CLIPTextModelWithProjection' if c.projection_dim else 'CLIPTextModel'


def _text(c):
    fields = _plain(c, 'skip', 'final_norm', 'projection_dim')
    # transformers loads in torch_dtype what diffusers loads in float32 beside it.
    return {'architectures': [_text_class(c)], 'model_type': 'clip_text_model', **fields,
            'projection_dim': c.projection_dim or c.hidden_size, 'bos_token_id': 0,
            'pad_token_id': 1, 'torch_dtype': 'float32'}


def _kunet(c):
    attends = ['KCrossAttn'] * (len(c.block_out_channels) - 1)
    return {
        '_class_name': 'UNet2DConditionModel', 'act_fn': 'gelu', 'flip_sin_to_cos': True,
        'freq_shift': 0, 'center_input_sample': False, 'mid_block_type': None,
        'norm_num_groups': None, 'time_embedding_type': 'fourier', 'timestep_post_act': 'gelu',
        'conv_in_kernel': 1, 'conv_out_kernel': 1, 'resnet_time_scale_shift': 'scale_shift',
        **_plain(c, 'time_cond_dim'), 'out_channels': c.out_channels + 1,
        'time_cond_proj_dim': c.time_cond_dim,
        'down_block_types': [f'{kind}DownBlock2D' for kind in ['K', *attends]],
        'up_block_types': [f'{kind}UpBlock2D' for kind in [*attends, 'K']]}


def _unet(c):
    if isinstance(c, KUNetConfig):
        return _kunet(c)
    levels = range(len(c.block_out_channels))
    attends = [c.transformer_layers[i] > 0 for i in levels]
    # A level without attention may say anything; the last one gives the middle block's number.
    layers = [c.transformer_layers[i] or 1 for i in levels]
    if c.mid_transformer_layers > 0:
        layers[-1] = c.mid_transformer_layers
    mid = {-1: 'UNetMidBlock2D', -2: None}.get(c.mid_transformer_layers, 'UNetMidBlock2DCrossAttn')
    if c.transformer_depths:
        each = c.layers_per_block
        layers = [[c.depth('down', i, k) for k in range(each)] if attends[i] else 1 for i in levels]
        if c.mid_transformer_layers > 0:
            layers[-1] = c.mid_transformer_layers
    return {
        '_class_name': 'UNet2DConditionModel', 'act_fn': 'silu', 'flip_sin_to_cos': True,
        'freq_shift': 0, 'center_input_sample': False, 'downsample_padding': 1,
        'mid_block_scale_factor': 1,
        **_plain(c, 'transformer_layers', 'mid_transformer_layers', 'heads', 'num_class_embeds',
                 'added_dim', 'added_time_dim', 'transformer_depths',
                 'time_cond_proj_dim', 'class_proj_dim'),
        'mid_block_type': mid,
        'down_block_types': ['CrossAttn' * a + 'DownBlock2D' for a in attends],
        'up_block_types': ['CrossAttn' * a + 'UpBlock2D' for a in reversed(attends)],
        'transformer_layers_per_block': layers,
        'reverse_transformer_layers_per_block': [
            [c.depth('up', i, k) for k in range(c.layers_per_block + 1)] if attends[i] else 1
            for i in reversed(levels)] if c.transformer_depths else None,
        'attention_head_dim': list(c.heads),  # diffusers' name for the number of heads
        'num_class_embeds': c.num_class_embeds or None,
        'time_cond_proj_dim': c.time_cond_proj_dim or None,
        'addition_embed_type': 'text_time' if c.added_dim else None,
        'addition_time_embed_dim': c.added_time_dim if c.added_dim else None,
        'class_embed_type': 'projection' if c.class_proj_dim else None,
        'projection_class_embeddings_input_dim': c.added_dim or c.class_proj_dim or None,
    }


def _controlnet(c):
    without = ['up_block_types', 'out_channels', 'sample_size', 'center_input_sample',
               'time_cond_proj_dim']
    without += (['mid_block_type', 'reverse_transformer_layers_per_block'] if c.num_control_type
                else ['num_control_type', 'num_trans_head', 'num_trans_layer'])
    found = {k: v for k, v in _unet(c).items() if k not in without} | {
        '_class_name': 'ControlNetModel', 'controlnet_conditioning_channel_order': 'rgb'}
    if c.num_control_type:
        width = c.block_out_channels[0]
        found |= {'_class_name': 'ControlNetUnionModel', 'num_trans_channel': width,
                  'num_proj_channel': width, 'addition_time_embed_dim': c.added_time_dim}
    return found


def _vae(c):
    levels = len(c.block_out_channels)
    return {'_class_name': 'AutoencoderKL', 'act_fn': 'silu', **_plain(c),
            'latents_mean': c.latents_mean or None, 'latents_std': c.latents_std or None,
            'down_block_types': ['DownEncoderBlock2D'] * levels,
            'up_block_types': ['UpDecoderBlock2D'] * levels}


def _tiny_vae(c):
    return {'_class_name': 'AutoencoderTiny', 'act_fn': 'relu', **_plain(c)}


def _depth(c):
    stem = ('depths', 'embedding_size', 'hidden_sizes', 'num_groups')
    patches = c.image_size // c.patch_size
    return {
        'architectures': ['DPTForDepthEstimation'], 'model_type': 'dpt', 'is_hybrid': True,
        'readout_type': 'project', 'reassemble_factors': [1, 1, 1, 0.5],
        'neck_ignore_stages': [0, 1], 'hidden_act': 'gelu', **_plain(c, *stem),
        'backbone_featmap_shape': [1, c.hidden_sizes[-1], patches, patches],
        'backbone_config': {
            'model_type': 'bit', 'layer_type': 'bottleneck', 'global_padding': 'same',
            'embedding_dynamic_padding': True, 'out_features': ['stage1', 'stage2', 'stage3'],
            **{name: getattr(c, name) for name in stem}},
        'torch_dtype': 'float32'}


def _depth_anything(c):
    return {'architectures': ['DepthAnythingForDepthEstimation'], 'model_type': 'depth_anything',
            'patch_size': c.patch_size, 'reassemble_hidden_size': c.hidden_size,
            **{name: getattr(c, name) for name in (
                'neck_hidden_sizes', 'fusion_hidden_size', 'head_hidden_size')},
            'backbone_config': {
                'model_type': 'dinov2', 'reshape_hidden_states': False, 'patch_size': c.patch_size,
                'mlp_ratio': c.intermediate_size // c.hidden_size, **{
                    name: getattr(c, name) for name in (
                        'hidden_size', 'image_size', 'num_hidden_layers', 'num_attention_heads',
                        'out_indices')}},
            'torch_dtype': 'float32'}


def _preprocessor(c):
    """What run.depth does to a picture, as transformers' DPTImageProcessor reads it."""
    return {'image_processor_type': 'DPTImageProcessor', 'do_resize': True,
            'size': {'height': c.image_size, 'width': c.image_size}, 'resample': 3,
            'ensure_multiple_of': 1, 'keep_aspect_ratio': False,
            'do_rescale': True, 'rescale_factor': 1 / 255,
            'do_normalize': True, 'image_mean': [0.5] * 3, 'image_std': [0.5] * 3}


def _clip_preprocessor(c):
    """What run.image_prompts.look_at does to a picture, as transformers' CLIPImageProcessor reads
    it."""
    return {'image_processor_type': 'CLIPImageProcessor', 'do_convert_rgb': True, 'resample': 3,
            'do_resize': True, 'size': {'shortest_edge': c.image_size}, 'do_center_crop': True,
            'crop_size': {'height': c.image_size, 'width': c.image_size}, 'do_rescale': True,
            'rescale_factor': 1 / 255, 'do_normalize': True, 'image_mean': clip.MEAN.tolist(),
            'image_std': clip.DEVIATION.tolist()}


def _vision(c):
    return {'architectures': ['CLIPVisionModelWithProjection'], 'model_type': 'clip_vision_model',
            'num_channels': 3, **_plain(c), 'torch_dtype': 'float32'}


def _t2i_adapter(c):
    return {'_class_name': 'T2IAdapter', **_plain(c)}


_NETWORKS = {VAEConfig: _vae, TinyVAEConfig: _tiny_vae,
             ControlNetConfig: _controlnet, T2IAdapterConfig: _t2i_adapter,
             DPTConfig: _depth, DepthAnythingConfig: _depth_anything, VisionConfig: _vision}


def _schedule(config):
    c = config.schedule
    if own := config.defaults.get('scheduler'):
        return own | _plain(c, *EDM)
    if config.version in versions() and read_config(config.version).schedule == c:
        path = VERSIONS / config.version / 'scheduler' / 'scheduler_config.json'
        return json.loads(path.read_text())
    if isinstance(config.unet, KUNetConfig):
        return {'_class_name': 'EulerDiscreteScheduler', **_plain(ScheduleConfig(), *EDM),
                'prediction_type': 'original_sample'}
    if c.edm:
        return {'_class_name': 'EDMEulerScheduler', 'sigma_schedule': 'karras', 'rho': 7.0,
                **_plain(c, *BETAS, 'edm')}
    return {'_class_name': 'EulerDiscreteScheduler' if config.unet.added_dim else 'DDIMScheduler',
            **_plain(c, *EDM), 'clip_sample': False, 'set_alpha_to_one': False, 'steps_offset': 1,
            'timestep_spacing': 'trailing' if c.rescale_betas_zero_snr else 'leading'}


def _low_res(c):
    return {'_class_name': 'DDPMScheduler', **_plain(c, *EDM), 'clip_sample': True,
            'variance_type': 'fixed_small'}


def _plain(c, *without):
    return {k: v for k, v in dataclasses.asdict(c).items() if k not in without}


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + '\n')
