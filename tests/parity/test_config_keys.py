"""Every key of diffusers' and transformers' config classes, changed from its default on a tiny
network: the output is theirs, or loading stops; nothing is ignored."""

import inspect
import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from test_dpt_parity import TOLERANCE, enliven, error, picture
from test_models import arrays, close, excite, nchw, shapes_of

from jaxsd import config_files as jcf
from jaxsd import sampling
from jaxsd.models import clip, controlnet, shapes, t2i_adapter, unet, vae
from jaxsd.models.layers import timestep_embedding
from jaxsd.prompt.tokenizer import Tokenizer

pytestmark = pytest.mark.parity

CROSS, PLAIN = 'CrossAttnDownBlock2D', 'DownBlock2D'
TEXT_TIME = {'addition_embed_type': 'text_time', 'addition_time_embed_dim': 8,
             'projection_class_embeddings_input_dim': 80}
# A tiny network that has no default but those that are swept.
BASE = {
    'UNet2DConditionModel': {
        'block_out_channels': [32, 64], 'norm_num_groups': 8, 'attention_head_dim': 4,
        'layers_per_block': 1, 'cross_attention_dim': 32, 'down_block_types': [CROSS, PLAIN],
        'up_block_types': ['UpBlock2D', 'CrossAttnUpBlock2D']},
    'ControlNetModel': {
        'block_out_channels': [32, 64], 'norm_num_groups': 8, 'attention_head_dim': 4,
        'layers_per_block': 1, 'cross_attention_dim': 32, 'down_block_types': [CROSS, PLAIN],
        'conditioning_embedding_out_channels': [8, 16]},
    'ControlNetUnionModel': {
        'block_out_channels': [32, 64], 'norm_num_groups': 8, 'attention_head_dim': 4,
        'layers_per_block': 1, 'cross_attention_dim': 32, 'down_block_types': [CROSS, PLAIN],
        'conditioning_embedding_out_channels': [8, 16], 'addition_time_embed_dim': 8,
        'num_trans_channel': 32, 'num_proj_channel': 32},
    'AutoencoderKL': {
        'block_out_channels': [16, 32], 'norm_num_groups': 8,
        'down_block_types': ['DownEncoderBlock2D'] * 2, 'up_block_types': ['UpDecoderBlock2D'] * 2},
    'AutoencoderTiny': {
        'encoder_block_out_channels': [8, 8], 'decoder_block_out_channels': [8, 8],
        'num_encoder_blocks': [1, 1], 'num_decoder_blocks': [1, 1]},
    'T2IAdapter': {'channels': [16, 32], 'num_res_blocks': 1},
    'CLIPTextConfig': {'vocab_size': 100, 'hidden_size': 32, 'intermediate_size': 48,
                       'num_hidden_layers': 2, 'num_attention_heads': 4, 'eos_token_id': 99,
                       'max_position_embeddings': 16},
    'CLIPVisionConfig': {'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2,
                         'num_attention_heads': 4, 'image_size': 96},
}
# {key: settings that give their output}; a setting alone is the value of the key.
SHARED_SAME = {
    'in_channels': [5], 'act_fn': ['swish'],
    'block_out_channels': [[16, 48]], 'layers_per_block': [2], 'norm_num_groups': [4],
    'norm_eps': [0.01], 'cross_attention_dim': [24], 'attention_head_dim': [2, [2, 8]],
    'only_cross_attention': [True, [True, False]],
    'mid_block_type': ['UNetMidBlock2D'],
    'transformer_layers_per_block': [2, [2, 1], [1, 2]], 'use_linear_projection': [True],
    'addition_embed_type': [TEXT_TIME], 'addition_time_embed_dim': [
        8, TEXT_TIME | {'addition_time_embed_dim': 4,
                        'projection_class_embeddings_input_dim': 56}],
    'projection_class_embeddings_input_dim': [80], 'num_class_embeds': [10],
    'upcast_attention': [True], 'addition_embed_type_num_heads': [32],
}
SHARED_REFUSED = {
    'flip_sin_to_cos': [False], 'freq_shift': [1], 'mid_block_type': ['MidBlock'],
    'downsample_padding': [0], 'mid_block_scale_factor': [2], 'act_fn': ['mish', 7],
    'encoder_hid_dim': [16], 'encoder_hid_dim_type': ['text_proj'],
    'class_embed_type': ['timestep', 'identity'], 'addition_embed_type': ['text', 'image'],
    'resnet_time_scale_shift': ['scale_shift'], 'layers_per_block': [[1, 2], 10**6, 0],
    'transformer_layers_per_block': [[[1, 2], [1]], [1, 2, 3]], 'cross_attention_dim': [[32, 48]],
    'norm_eps': ['x', 0, -1], 'norm_num_groups': [7, None], 'block_out_channels': [[], [33, 64], 8],
    'attention_head_dim': [5, [4, 4, 4], 0], 'down_block_types': [[CROSS, 'SkipDownBlock2D'], []],
}
SAME = {
    'UNet2DConditionModel': SHARED_SAME | {
        'sample_size': [16, [16, 16]], 'layers_per_block': [2, [2, 2]], 'time_cond_proj_dim': [16],
        'mid_block_type': ['UNetMidBlock2D', None],
        'reverse_transformer_layers_per_block': [[1, 2], {
            'transformer_layers_per_block': [[2], 3],
            'reverse_transformer_layers_per_block': [1, [2, 1]]}],
        'cross_attention_dim': [24, [24, 24]],
        'down_block_types': [{'down_block_types': [PLAIN, CROSS],
                              'up_block_types': ['CrossAttnUpBlock2D', 'UpBlock2D']}],
        'only_cross_attention': [True, [True, False], {
            'only_cross_attention': [False, True], 'down_block_types': [CROSS, CROSS],
            'up_block_types': ['CrossAttnUpBlock2D'] * 2, 'cross_attention_dim': 64}],
        'out_channels': [3], 'dropout': [0.5], 'mid_block_only_cross_attention': [False]},
    'ControlNetModel': SHARED_SAME | {
        'down_block_types': [[PLAIN, CROSS]],
        'conditioning_channels': [2], 'conditioning_embedding_out_channels': [[8, 8, 16]],
        'global_pool_conditions': [True], 'num_attention_heads': [2]},
    'ControlNetUnionModel': {k: v for k, v in SHARED_SAME.items() if k != 'mid_block_type'} | {
        'block_out_channels': [{'block_out_channels': [16, 48], 'num_trans_channel': 16,
                                'num_proj_channel': 16}],
        'down_block_types': [[PLAIN, CROSS]],
        'conditioning_channels': [2], 'conditioning_embedding_out_channels': [[8, 8, 16]],
        'global_pool_conditions': [True], 'num_attention_heads': [2], 'num_control_type': [2, 9],
        'num_trans_head': [4], 'num_trans_layer': [2]},
    'AutoencoderKL': {
        'in_channels': [4], 'out_channels': [4], 'block_out_channels': [[16, 48]],
        'layers_per_block': [2], 'act_fn': ['swish'], 'latent_channels': [3],
        'norm_num_groups': [4], 'sample_size': [64, [64, 64]], 'scaling_factor': [0.5],
        'shift_factor': [0.25], 'latents_mean': [[0.5, -1.0, 2.0, 0.0]],
        'latents_std': [[0.5, 1.0, 2.0, 3.0]], 'force_upcast': [False]},
    'AutoencoderTiny': {
        'in_channels': [4], 'out_channels': [4], 'latent_channels': [3],
        'encoder_block_out_channels': [[6, 6]], 'decoder_block_out_channels': [[6, 6]],
        'num_encoder_blocks': [[1, 2]], 'num_decoder_blocks': [[2, 1]], 'scaling_factor': [0.5],
        'shift_factor': [0.25], 'latent_magnitude': [2], 'latent_shift': [0.25],
        'force_upcast': [True]},
    'T2IAdapter': {'in_channels': [1], 'channels': [[16, 48]], 'num_res_blocks': [2],
                   'downscale_factor': [4], 'adapter_type': ['light_adapter']},
    'CLIPTextConfig': {
        'vocab_size': [110], 'hidden_size': [64], 'intermediate_size': [40], 'projection_dim': [24],
        'num_hidden_layers': [3], 'num_attention_heads': [2], 'max_position_embeddings': [20],
        'hidden_act': ['gelu'], 'layer_norm_eps': [0.01], 'attention_dropout': [0.5],
        'eos_token_id': [2, 50], 'pad_token_id': [0], 'bos_token_id': [0],
        'initializer_range': [0.5], 'initializer_factor': [0.5]},
    'CLIPVisionConfig': {
        'hidden_size': [64], 'intermediate_size': [40], 'projection_dim': [24],
        'num_hidden_layers': [1, 3], 'num_attention_heads': [2], 'image_size': [64, 99],
        'patch_size': [16, 25], 'hidden_act': ['gelu'], 'layer_norm_eps': [0.01],
        'attention_dropout': [0.5], 'initializer_range': [0.5], 'initializer_factor': [0.5]},
}
REFUSED = {
    'UNet2DConditionModel': SHARED_REFUSED | {
        'up_block_types': [['UpBlock2D', 'AttnUpBlock2D']], 'center_input_sample': [True],
        'dual_cross_attention': [True],
        'reverse_transformer_layers_per_block': [[2, 1, 1], [[1, 2, 3], 1]],
        'resnet_skip_time_act': [True], 'resnet_out_scale_factor': [2.0],
        'time_embedding_type': ['fourier'], 'time_embedding_dim': [64],
        'time_embedding_act_fn': ['silu'], 'timestep_post_act': ['silu'],
        'conv_in_kernel': [1], 'conv_out_kernel': [5],
        'attention_type': ['gated'], 'class_embeddings_concat': [True],
        'mid_block_only_cross_attention': [True], 'cross_attention_norm': ['layer_norm']},
    'ControlNetModel': SHARED_REFUSED | {'controlnet_conditioning_channel_order': ['bgr']},
    'ControlNetUnionModel': {k: v for k, v in SHARED_REFUSED.items() if k != 'mid_block_type'} | {
        'controlnet_conditioning_channel_order': ['bgr'], 'num_trans_channel': [64],
        'num_proj_channel': [64], 'num_control_type': ['x'], 'num_trans_head': [3],
        'num_trans_layer': [0]},
    'AutoencoderKL': {
        'down_block_types': [['AttnDownEncoderBlock2D', 'DownEncoderBlock2D'],
                             ['DownEncoderBlock2D']],
        'up_block_types': [['UpDecoderBlock2D', 'AttnUpDecoderBlock2D']], 'act_fn': ['mish'],
        'use_quant_conv': [False], 'use_post_quant_conv': [False],
        'mid_block_add_attention': [False], 'scaling_factor': [0, -1, 'x'],
        'latents_std': [[1, 1, 1, 0], [1, 1], 2], 'sample_size': [[64, 32]]},
    'AutoencoderTiny': {'act_fn': ['silu'], 'upsample_fn': ['bilinear'],
                        'upsampling_scaling_factor': [4],
                        'encoder_block_out_channels': [[6, 8]]},
    'T2IAdapter': {'adapter_type': ['light'], 'channels': ['x', []]},
    'CLIPTextConfig': {'hidden_act': ['relu'], 'hidden_size': ['32', 33], 'vocab_size': [0]},
    'CLIPVisionConfig': {'hidden_act': ['relu'], 'hidden_size': ['32', 33], 'num_channels': [4],
                         'model_type': ['siglip_vision_model']},
}
# diffusers has the key, and stops at any value of it.
THEY_REFUSE = {'UNet2DConditionModel': {'num_attention_heads'}}
# Of transformers' own classes: what every PretrainedConfig has, and no network of ours uses.
GENERIC = set(transformers.PretrainedConfig().to_dict()) | {
    'return_dict', 'output_hidden_states', 'id2label', 'label2id', 'problem_type', 'dtype',
    'chunk_size_feed_forward', 'is_encoder_decoder', 'architectures', 'output_attentions',
    'transformers_version', '_name_or_path', 'model_type'}

READERS = jcf.NETWORKS | {'UNet2DConditionModel': jcf._unet,
                         'CLIPTextConfig': lambda c: jcf._text(c, 'CLIPTextModelWithProjection', 0),
                         'CLIPVisionConfig': jcf._vision}
# transformers' classes, and the networks that they describe.
CLIP = {'CLIPTextConfig': transformers.CLIPTextModelWithProjection,
        'CLIPVisionConfig': transformers.CLIPVisionModelWithProjection}


def jit(network):
    return jax.jit(network, static_argnums=1)


def keys(kind):
    if kind in CLIP:
        return set(getattr(transformers, kind)().to_dict()) - GENERIC
    return set(inspect.signature(getattr(diffusers, kind).__init__).parameters) - {'self'}


def cases(table):
    return [pytest.param(kind, value if isinstance(value, dict) else {key: value},
                         id=f'{kind}-{key}-{i}')
            for kind, decided in table.items() for key, values in decided.items()
            for i, value in enumerate(values)]


@pytest.mark.parametrize('kind', BASE)
def test_every_key_is_decided(kind):
    decided = SAME[kind].keys() | REFUSED[kind].keys() | THEY_REFUSE.get(kind, set())
    assert decided - GENERIC == keys(kind)


@pytest.mark.parametrize('kind, changed', cases(REFUSED))
def test_refused(kind, changed):
    with pytest.raises((ValueError, TypeError)) as error:
        READERS[kind](json.loads(json.dumps(BASE[kind] | changed)))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('kind, changed', cases({
    kind: dict.fromkeys(found, [4]) for kind, found in THEY_REFUSE.items()}))
def test_they_refuse(kind, changed):
    with pytest.raises(ValueError, match='num_attention_heads'):
        getattr(diffusers, kind)(**BASE[kind] | changed)


@pytest.mark.parametrize('kind, changed', cases(SAME))
def test_same(kind, changed):
    settings = json.loads(json.dumps(BASE[kind] | changed))
    cfg = READERS[kind](settings)
    torch.manual_seed(0)
    if kind in CLIP:
        module = CLIP[kind](getattr(transformers, kind)(**settings))
    else:
        module = getattr(diffusers, kind)(**settings)
    module = excite(module, 1)
    CHECKS[kind](module, cfg, np.random.default_rng(0))


def added(cfg, rng):
    """SDXL's further inputs and class labels, for us and for diffusers."""
    ours, theirs = {}, {}
    if cfg.added_dim:
        ids = rng.integers(0, 100, (2, 6)).astype(np.float32)
        pooled = rng.normal(size=(2, cfg.added_dim - 6 * cfg.added_time_dim)).astype(np.float32)
        sinusoids = timestep_embedding(ids, cfg.added_time_dim).reshape(2, -1)
        ours['added'] = jnp.concatenate([pooled, sinusoids], -1)
        theirs['added_cond_kwargs'] = {'text_embeds': torch.tensor(pooled),
                                       'time_ids': torch.tensor(ids)}
    if cfg.num_class_embeds:
        ours['class_labels'] = jnp.array([2, 7])
        theirs['class_labels'] = torch.tensor([2, 7])
    return ours, theirs


def inputs(cfg, rng):
    x = rng.normal(size=(2, 8, 8, cfg.in_channels)).astype(np.float32)
    context = rng.normal(size=(2, 5, cfg.cross_attention_dim)).astype(np.float32)
    return x, np.array([3, 801.5], np.float32), context


def check_unet(module, cfg, rng):
    assert shapes.unet(cfg) == shapes_of(module)
    x, t, context = inputs(cfg, rng)
    ours, theirs = added(cfg, rng)
    if cfg.time_cond_proj_dim:
        ours['guidance'] = jnp.array([1.5, 8.0])
        theirs['timestep_cond'] = torch.tensor(np.asarray(unet.guidance_embedding(
            ours['guidance'], cfg.time_cond_proj_dim)))
    out = jit(unet.apply)(arrays(module), cfg, x, t, context, **ours)
    with torch.no_grad():
        close(out, module(nchw(x), torch.tensor(t), torch.tensor(context),
                          **theirs).sample.permute(0, 2, 3, 1))


def check_controlnet(module, cfg, rng):
    assert shapes.controlnet(cfg) == shapes_of(module)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim > 1 and not p.any():
                p.normal_(std=p[0].numel() ** -0.5)
    x, t, context = inputs(cfg, rng)
    ours, theirs = added(cfg, rng)
    size = 8 * 2 ** (len(cfg.conditioning_embedding_out_channels) - 1)
    hint = rng.uniform(size=(2, size, size, cfg.conditioning_channels)).astype(np.float32)
    if count := cfg.num_control_type:  # one hint for both: theirs attends along the batch
        hint = hint[[0, 0]]
    given = nchw(hint)
    with torch.no_grad():
        if count:
            ours |= {'modes': np.full((2, 1), count - 1), 'scales': np.ones((2, 1), np.float32)}
            given = [given]
            theirs |= {'control_type': torch.eye(count)[[-1, -1]], 'control_type_idx': [count - 1]}
        down, mid = module(nchw(x), torch.tensor(t), torch.tensor(context), given,
                           return_dict=False, **theirs)
    params = arrays(module)
    hint = jax.jit(controlnet.embed)(params, hint[:, None] if count else hint)
    found = jit(controlnet.apply)(params, cfg, x, t, context, hint, **ours)
    for out, expected in zip(found, [*down, mid], strict=True):
        out = jnp.broadcast_to(out, np.broadcast_shapes(out.shape, expected.permute(
            0, 2, 3, 1).shape))
        close(out, expected.permute(0, 2, 3, 1).expand(out.shape))


def check_vae(module, cfg, rng):
    """Encoder, decoder, and what diffusers' SDXL pipelines make of latents."""
    image = rng.uniform(-1, 1, (2, 16, 16, cfg.in_channels)).astype(np.float32)
    size = 16 // cfg.factor
    latent = rng.normal(size=(2, size, size, cfg.latent_channels)).astype(np.float32)
    mean, std = (None if found is None else torch.tensor(found).reshape(1, -1, 1, 1)
                 for found in (module.config.get('latents_mean'), module.config.get('latents_std')))
    shift, scale = module.config.get('shift_factor') or 0, module.config.scaling_factor
    with torch.no_grad():
        encoded = module.encode(nchw(image))
        encoded = encoded.latents if hasattr(encoded, 'latents') else encoded.latent_dist.mean
        there = (encoded - shift - (0 if mean is None else mean)) * scale / (
            1 if std is None else std)
        back = nchw(latent) * (1 if std is None else std) / scale + shift + (
            0 if mean is None else mean)
        decoded = module.decode(back).sample
    params = arrays(module)
    close(vae.scale(cfg, jit(vae.encode)(params, cfg, image)[0]), there.permute(0, 2, 3, 1))
    close(jit(vae.decode)(params, cfg, vae.unscale(cfg, latent)), decoded.permute(0, 2, 3, 1))


def check_adapter(module, cfg, rng):
    hint = rng.uniform(size=(2, 64, 64, cfg.in_channels)).astype(np.float32)
    with torch.no_grad():
        expected = module(nchw(hint))
    found = jit(t2i_adapter.apply)(arrays(module), cfg, hint)
    for out, there in zip(found, expected, strict=True):
        close(out, there.permute(0, 2, 3, 1))


def check_text(module, cfg, rng):
    tokens = rng.integers(3, 98, (2, 16))
    tokens[0, 5:], tokens[1, 12] = 99, 99
    tokens[:, 9] = cfg.eos_token_id if cfg.eos_token_id > 2 else tokens[:, 9]
    found = jit(clip.encode)(arrays(module), cfg, jnp.asarray(tokens))
    with torch.no_grad():
        out = module(torch.tensor(tokens))
    close(found.hidden, out.last_hidden_state)
    close(found.pooled, out.text_embeds)


def check_vision(module, cfg, rng):
    assert shapes.vision(cfg) == shapes_of(module)
    pixels = rng.normal(size=(2, cfg.image_size, cfg.image_size, 3)).astype(np.float32)
    found = jit(clip.encode_image)(arrays(module), cfg, pixels)
    with torch.no_grad():
        out = module(nchw(pixels), output_hidden_states=True)
    close(found.hidden, out.hidden_states[-2])
    close(found.embeds, out.image_embeds)


CHECKS = {'UNet2DConditionModel': check_unet, 'ControlNetModel': check_controlnet,
          'ControlNetUnionModel': check_controlnet,
          'AutoencoderKL': check_vae, 'AutoencoderTiny': check_vae, 'T2IAdapter': check_adapter,
          'CLIPTextConfig': check_text, 'CLIPVisionConfig': check_vision}


# Schedulers: what a model was trained on is read; how a sampler steps, and which timesteps it
# takes, is the request's to say, whichever scheduler's file it is.
SCHEDULERS = [name + 'Scheduler' for name in (*jcf.BETAS_OF, *jcf.EDM_SCHEDULERS)]
TRAINED = {
    'num_train_timesteps': [500], 'beta_start': [0.002], 'beta_end': [0.015],
    'beta_schedule': ['linear', 'scaled_linear', 'squaredcos_cap_v2'],
    'trained_betas': [[0.01 + 1e-5 * i for i in range(1000)]],
    'prediction_type': ['v_prediction', 'sample'], 'rescale_betas_zero_snr': [True],
    'sigma_min': [0.01], 'sigma_max': [120.0], 'sigma_data': [1.0],
}
UNTRAINED = {
    'beta_schedule': ['laplace', 'exponential', 'sigmoid', 7], 'prediction_type': ['flow', 3],
    'use_flow_sigmas': [True], 'flow_shift': [3.0], 'timestep_type': ['continuous'],
    'thresholding': [True], 'variance_type': ['learned', 'learned_range'],
    'use_dynamic_shifting': [True], 'shift_terminal': [0.1], 'beta_start': [-1, 'x', 0],
    'beta_end': [2], 'num_train_timesteps': [0, 1.5, 10**9], 'trained_betas': [[0.1, -1], 3],
    'sigma_data': [0], 'sigma_max': [0.001], 'rescale_betas_zero_snr': ['yes'],
}
REQUESTED = {
    'clip_sample', 'clip_sample_range', 'sample_max_value', 'dynamic_thresholding_ratio',
    'set_alpha_to_one', 'steps_offset', 'timestep_spacing', 'solver_order', 'algorithm_type',
    'solver_type', 'lower_order_final', 'euler_at_final', 'use_karras_sigmas',
    'use_exponential_sigmas', 'use_beta_sigmas', 'use_lu_lambdas', 'lambda_min_clipped',
    'final_sigmas_type', 'interpolation_type', 'skip_prk_steps', 'original_inference_steps',
    'timestep_scaling', 'predictor_order', 'corrector_order', 'tau_func', 'predict_x0',
    'disable_corrector', 'solver_p', 'sigma_schedule', 'rho', 'time_shift_type',
    'noise_sampler_seed',
}


def scheduler_keys(name):
    found = inspect.signature(getattr(diffusers, name).__init__).parameters
    return set(found) - {'self', 'args', 'kwargs'}




def real(name):
    return not hasattr(getattr(diffusers, name), '_backends')


@pytest.mark.parametrize('name', filter(real, SCHEDULERS))
def test_every_scheduler_key_is_decided(name):
    assert scheduler_keys(name) <= TRAINED.keys() | UNTRAINED.keys() | REQUESTED


def test_other_schedulers_are_refused():
    """All that diffusers has, but for those that sample a discrete-time or EDM model."""
    others = [name for name in dir(diffusers.schedulers)
              if name.endswith('Scheduler') and name not in SCHEDULERS]
    assert len(others) > 25
    for name in others:
        with pytest.raises(ValueError, match='_class_name=.* is not implemented'):
            jcf.schedule_config({'_class_name': name})


@pytest.mark.parametrize('name', filter(real, SCHEDULERS))
def test_what_a_scheduler_says_of_training(name):
    """Its alphas_cumprod, or an EDM scheduler's levels, inputs and outputs, for each key."""
    cls, known = getattr(diffusers, name), scheduler_keys(name)
    for key, value in [(None, None), *((k, v) for k, vs in TRAINED.items() for v in vs)]:
        if key is not None and key not in known:
            continue
        settings = {key: value} if key else {}
        edm = name.removesuffix('Scheduler') in jcf.EDM_SCHEDULERS
        if edm and value == 'sample':
            with pytest.raises(ValueError, match='sample'):
                jcf.schedule_config({'_class_name': name} | settings)
            continue
        theirs = cls(**settings)
        ours = jcf.schedule_config({'_class_name': name} | settings)
        assert ours.prediction_type == theirs.config.prediction_type and ours.edm == edm
        if not edm:
            found = sampling.alphas_cumprod(ours)
            expected = theirs.alphas_cumprod.double().numpy()
            at = slice(None, -1) if ours.rescale_betas_zero_snr else slice(None)
            np.testing.assert_allclose(found[at], expected[at], rtol=2e-4, atol=1e-7)
            continue
        check_edm(theirs, ours)


def check_edm(theirs, ours):
    theirs.set_timesteps(8)
    np.testing.assert_allclose(sampling.schedule('karras', 8, ours), theirs.sigmas, rtol=1e-4)
    x, out = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    sigma, seen = theirs.sigmas[2], []

    def net(x_in, t, i):
        seen.append((x_in, t))
        return jnp.asarray(out.numpy())

    found = sampling.denoiser(net, ours)(jnp.asarray(x.numpy()), jnp.float32(sigma))
    np.testing.assert_allclose(found, theirs.precondition_outputs(x, out, sigma), rtol=1e-4,
                               atol=1e-5)
    np.testing.assert_allclose(seen[0][0], theirs.precondition_inputs(x, sigma), rtol=1e-5)
    np.testing.assert_allclose(seen[0][1], np.broadcast_to(theirs.precondition_noise(sigma), 2),
                               rtol=1e-5)


@pytest.mark.parametrize('name', filter(real, SCHEDULERS))
def test_what_a_scheduler_may_not_say(name):
    edm = name.removesuffix('Scheduler') in jcf.EDM_SCHEDULERS
    for key, values in UNTRAINED.items():
        if key == 'sigma_max' and not edm:  # of Euler and UniPC it is an end of a schedule
            continue
        for value in values if key in scheduler_keys(name) else ():
            with pytest.raises(ValueError) as error:
                jcf.schedule_config({'_class_name': name, key: value})
            assert '\n' not in str(error.value)


# Of tokenizer_config.json; what it does with the text is the same whatever the first four say.
TOKENIZER = {
    'do_lower_case': [False], 'add_prefix_space': [True], 'errors': ['strict'],
    'clean_up_tokenization_spaces': [True], 'tokenizer_class': ['CLIPTokenizerFast'],
    'model_max_length': [20], 'bos_token': ['<|endoftext|>'], 'eos_token': ['<|startoftext|>'],
    'unk_token': ['<|startoftext|>'], 'pad_token': ['<|startoftext|>']}


@pytest.mark.parametrize('key', TOKENIZER)
def test_tokenizer(key, tokenizer_folder, tmp_path):
    shutil.copytree(tokenizer_folder, tmp_path / 'a')
    (tmp_path / 'a' / 'special_tokens_map.json').unlink(missing_ok=True)
    file = tmp_path / 'a' / 'tokenizer_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: TOKENIZER[key][0]}))
    texts = ['A red Apple', '', 'a b c d e f g', '\u00e9 x']
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / 'a')
    expected = theirs(texts, padding='max_length', truncation=True,
                      max_length=theirs.model_max_length).input_ids
    found = Tokenizer.from_folder(tmp_path / 'a')(texts)
    assert found.tolist() == expected


DPT_BASE = {
    'is_hybrid': True, 'image_size': 64, 'hidden_size': 24, 'intermediate_size': 48,
    'num_hidden_layers': 4, 'num_attention_heads': 3, 'backbone_out_indices': [0, 1, 2, 3],
    'neck_hidden_sizes': [32, 64, 24, 20], 'fusion_hidden_size': 16, 'readout_type': 'project',
    'reassemble_factors': [1, 1, 1, 0.5], 'neck_ignore_stages': [0, 1],
    'backbone_featmap_shape': [1, 96, 4, 4], 'backbone_config': {
        'model_type': 'bit', 'layer_type': 'bottleneck', 'global_padding': 'same',
        'embedding_dynamic_padding': True, 'out_features': ['stage1', 'stage2', 'stage3'],
        'depths': [2, 1, 2], 'embedding_size': 16, 'hidden_sizes': [32, 64, 96],
        'num_groups': 2}}
DPT_SAME = {
    'image_size': [32], 'hidden_size': [36], 'intermediate_size': [40], 'num_hidden_layers': [5],
    'num_attention_heads': [2], 'backbone_out_indices': [[0, 1, 1, 2]], 'layer_norm_eps': [0.01],
    'neck_hidden_sizes': [[32, 64, 20, 16]], 'fusion_hidden_size': [8],
    'hidden_dropout_prob': [0.5], 'attention_probs_dropout_prob': [0.5], 'initializer_range': [0.5],
    'use_bias_in_fusion_residual': [True], 'use_auxiliary_head': [False],
    'auxiliary_loss_weight': [0.1], 'semantic_loss_ignore_index': [3],
    'semantic_classifier_dropout': [0.5], 'pooler_output_size': [12], 'pooler_act': ['relu'],
    'backbone_config': [DPT_BASE['backbone_config'] | {'num_groups': 4},
                        DPT_BASE['backbone_config'] | {'depths': [1, 1, 1]}],
    'patch_size': [16], 'backbone_featmap_shape': [[1, 96, 4, 4]]}
DPT_REFUSED = {
    'is_hybrid': [False], 'readout_type': ['add'], 'hidden_act': ['relu'], 'qkv_bias': [False],
    'reassemble_factors': [[4, 2, 1, 0.5]], 'num_channels': [1], 'neck_ignore_stages': [[]],
    'head_in_index': [0], 'add_projection': [True], 'use_batch_norm_in_fusion_residual': [True],
    'use_bias_in_fusion_residual': [False], 'image_size': ['x', 65], 'num_attention_heads': [5],
    'backbone_config': [DPT_BASE['backbone_config'] | {'layer_type': 'preactivation'},
                        DPT_BASE['backbone_config'] | {'width_factor': 2},
                        DPT_BASE['backbone_config'] | {'depths': [1] * 9}]}


def each(table):
    return [pytest.param({key: value}, id=f'{key}-{i}') for key, values in table.items()
            for i, value in enumerate(values)]


def test_every_depth_key_is_decided():
    assert DPT_SAME.keys() | DPT_REFUSED.keys() == set(
        transformers.DPTConfig().to_dict()) - GENERIC


@pytest.mark.parametrize('changed', each(DPT_REFUSED))
def test_depth_refused(changed):
    with pytest.raises(ValueError):
        jcf._depth(DPT_BASE | changed)


@pytest.mark.parametrize('changed', each(DPT_SAME))
def test_depth_same(changed):
    settings = DPT_BASE | changed
    cfg = jcf._depth(json.loads(json.dumps(settings)))
    module = enliven(transformers.DPTForDepthEstimation(transformers.DPTConfig(**settings)))
    pixels = picture(2, cfg.image_size, cfg.image_size)
    with torch.no_grad():
        expected = module(nchw(pixels)).predicted_depth
    assert error(module, cfg, pixels, expected) <= TOLERANCE
