"""Every network against diffusers and transformers, on tiny random weights in float32."""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxsd.config import TextConfig, UNetConfig, VAEConfig
from jaxsd.config_files import _text, _unet, _vae
from jaxsd.models import clip, shapes, spec, unet, vae

pytestmark = pytest.mark.parity
TOLERANCE = 1e-5  # of outputs of unit scale

UNETS = {
    'sd1': {'attention_head_dim': 4, 'cross_attention_dim': 32},
    'sd2': {'attention_head_dim': (2, 4), 'cross_attention_dim': 48, 'use_linear_projection': True},
    'inpainting': {'attention_head_dim': 4, 'cross_attention_dim': 32, 'in_channels': 9},
    'depth': {'attention_head_dim': (2, 4), 'cross_attention_dim': 48, 'in_channels': 5,
              'use_linear_projection': True},
    'sdxl': {'attention_head_dim': (2, 4), 'cross_attention_dim': 48, 'use_linear_projection': True,
             'down_block_types': ('DownBlock2D', 'CrossAttnDownBlock2D'),
             'up_block_types': ('CrossAttnUpBlock2D', 'UpBlock2D'),
             'transformer_layers_per_block': (1, 2), 'addition_embed_type': 'text_time',
             'addition_time_embed_dim': 8, 'projection_class_embeddings_input_dim': 80},
    'refiner': {'attention_head_dim': (2, 4, 4), 'cross_attention_dim': 48,
                'block_out_channels': (32, 64, 64), 'use_linear_projection': True,
                'down_block_types': ('DownBlock2D', 'CrossAttnDownBlock2D', 'DownBlock2D'),
                'up_block_types': ('UpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'),
                'transformer_layers_per_block': 2, 'addition_embed_type': 'text_time',
                'addition_time_embed_dim': 8, 'projection_class_embeddings_input_dim': 72},
    'SSD-1B': {'attention_head_dim': [2, 4], 'cross_attention_dim': 48,  # its blocks, in miniature
               'use_linear_projection': True, 'layers_per_block': 2,
               'down_block_types': ('DownBlock2D', 'CrossAttnDownBlock2D'),
               'up_block_types': ('CrossAttnUpBlock2D', 'UpBlock2D'),
               'transformer_layers_per_block': [1, [2, 1]],
               'reverse_transformer_layers_per_block': [[1, 2, 3], 1],
               'mid_block_type': 'UNetMidBlock2D', 'addition_embed_type': 'text_time',
               'addition_time_embed_dim': 8, 'projection_class_embeddings_input_dim': 80},
    'BK-SDM tiny': {'attention_head_dim': 4, 'cross_attention_dim': 32, 'mid_block_type': None,
                    'down_block_types': ('CrossAttnDownBlock2D',) * 2,
                    'up_block_types': ('CrossAttnUpBlock2D',) * 2},
    'upscaler': {'attention_head_dim': 4, 'cross_attention_dim': 48, 'in_channels': 7,
                 'use_linear_projection': True, 'num_class_embeds': 10,
                 'only_cross_attention': (True, False)},
}


def arrays(module):
    """A torch module's parameters as our nested dict."""
    from flax import traverse_util
    return traverse_util.unflatten_dict(
        {k: jnp.asarray(spec.to_jax(k, v.detach().numpy())) for k, v in module.state_dict().items()
         if not k.endswith('position_ids')}, sep='.')


def shapes_of(module):
    return {k: tuple(v.shape) for k, v in module.state_dict().items()
            if not k.endswith('position_ids')}


def close(ours, theirs):
    """Maximal absolute difference at the scale where `theirs` has unit deviation."""
    theirs = theirs.detach().numpy()
    scale = theirs.std()
    assert ours.shape == theirs.shape and scale > 1e-3
    assert np.abs(np.asarray(ours) - theirs).max() / max(scale, 1) <= TOLERANCE


def excite(module, seed):
    """Random biases and norms too: torch's defaults of 0 and 1 would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return module.eval()


def nchw(x):
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


@pytest.mark.parametrize('name', UNETS)
@pytest.mark.parametrize('size', [(16, 16), (9, 14)])
def test_unet(name, size):
    torch.manual_seed(0)
    settings = {'block_out_channels': (32, 64), 'layers_per_block': 1, 'norm_num_groups': 8,
                'down_block_types': ('CrossAttnDownBlock2D', 'DownBlock2D'),
                'up_block_types': ('UpBlock2D', 'CrossAttnUpBlock2D'), **UNETS[name]}
    module = excite(diffusers.UNet2DConditionModel(**settings), 1)
    cfg = _unet(dict(module.config))
    assert shapes.unet(cfg) == shapes_of(module)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, cfg.in_channels)).astype(np.float32)
    context = rng.normal(size=(2, 7, cfg.cross_attention_dim)).astype(np.float32)
    t, more, theirs = np.array([3, 801.5], np.float32), {}, {}
    if cfg.added_dim:
        ids = rng.integers(0, 100, (2, 5 if name == 'refiner' else 6)).astype(np.float32)
        pooled = rng.normal(size=(2, 32)).astype(np.float32)
        theirs['added_cond_kwargs'] = {'text_embeds': torch.tensor(pooled),
                                       'time_ids': torch.tensor(ids)}
        from jaxsd.models.layers import timestep_embedding
        more['added'] = jnp.concatenate(
            [pooled, timestep_embedding(ids, cfg.added_time_dim).reshape(2, -1)], -1)
    if cfg.num_class_embeds:
        more['class_labels'] = jnp.array([2, 7])
        theirs['class_labels'] = torch.tensor([2, 7])
    ours = jax.jit(unet.apply, static_argnums=1)(arrays(module), cfg, x, t, context, **more)
    with torch.no_grad():
        out = module(nchw(x), torch.tensor(t), torch.tensor(context), **theirs).sample
    close(ours, out.permute(0, 2, 3, 1))


@pytest.mark.parametrize('levels', [(32, 64), (16, 32, 32, 64)])
def test_vae_both_ways(levels):
    torch.manual_seed(0)
    module = excite(diffusers.AutoencoderKL(
        block_out_channels=levels, norm_num_groups=8, latent_channels=4, layers_per_block=2,
        down_block_types=('DownEncoderBlock2D',) * len(levels),
        up_block_types=('UpDecoderBlock2D',) * len(levels)), 2)
    cfg = _vae(dict(module.config))
    assert shapes.vae(cfg) == shapes_of(module)
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (2, 48, 32, 3)).astype(np.float32)
    latent = rng.normal(size=(2, 6, 4, 4)).astype(np.float32)
    mean, logvar = jax.jit(vae.encode, static_argnums=1)(arrays(module), cfg, image)
    with torch.no_grad():
        posterior = module.encode(nchw(image)).latent_dist
        close(mean, posterior.mean.permute(0, 2, 3, 1))
        close(logvar, posterior.logvar.permute(0, 2, 3, 1))
        close(jax.jit(vae.decode, static_argnums=1)(arrays(module), cfg, latent),
              module.decode(nchw(latent)).sample.permute(0, 2, 3, 1))


@pytest.mark.parametrize('tower', ['vit_l', 'vit_h', 'xl_l', 'xl_bigg'])
def test_text(tower):
    torch.manual_seed(0)
    xl, projected = tower.startswith('xl'), tower == 'xl_bigg'
    config = transformers.CLIPTextConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=16, projection_dim=24,
        hidden_act='quick_gelu' if tower in ('vit_l', 'xl_l') else 'gelu', eos_token_id=2)
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    module = excite(kind(config), 3)
    cfg = _text(config.to_dict(), kind.__name__, xl)
    tree = arrays(module)
    tree = tree if 'text_model' in tree else {'text_model': tree}
    assert spec.count(shapes.text(cfg)) == sum(p.numel() for p in module.parameters())
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 98, (2, 16))
    tokens[0, 5:], tokens[1, 12] = 99, 99  # end of text, padded with itself and with others
    found = jax.jit(clip.encode, static_argnums=1)(tree, cfg, jnp.asarray(tokens))
    with torch.no_grad():
        out = module(torch.tensor(tokens), output_hidden_states=True)
    close(found.hidden, out.hidden_states[-2] if xl else out.last_hidden_state)
    close(found.pooled, out.text_embeds if projected else out.pooler_output)


def test_attention_by_blocks_equals_torch():
    """Above 128 x 128 scores, attention goes head by head and block by block."""
    from jaxsd.models.layers import attention
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, 48)).astype(np.float32) for n in (1030, 77, 77))
    heads = [torch.tensor(a).reshape(2, -1, 3, 16).transpose(1, 2) for a in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(q.shape)
    close(jax.jit(attention, static_argnums=3)(q, k, v, 3), out)


def test_config_defaults_are_version_one():
    """The dataclasses' defaults are 1.x, field by field."""
    from jaxsd import read_config
    config = read_config('sd15')
    for ours, default in ((config.unet, UNetConfig()), (config.vae, VAEConfig()),
                          (config.text_encoder, TextConfig())):
        assert dataclasses.asdict(ours) == dataclasses.asdict(default)
