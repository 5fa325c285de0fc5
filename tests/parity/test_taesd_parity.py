"""TAESD against diffusers' AutoencoderTiny, the released architecture and a smaller one."""

import diffusers
import jax
import numpy as np
import pytest
import torch
from test_models import arrays, close, nchw, shapes_of
from test_weights import flat, random_model, same

import jaxsd
from jaxsd.config_files import NETWORKS
from jaxsd.models import shapes, vae

pytestmark = pytest.mark.parity

SMALL = {'encoder_block_out_channels': (12, 12, 12), 'decoder_block_out_channels': (8, 8, 8),
         'num_encoder_blocks': (1, 2, 1), 'num_decoder_blocks': (2, 1, 1)}


def reference(**settings):
    """Random weights that keep the scale through the residual blocks, and biases that count."""
    torch.manual_seed(0)
    module = diffusers.AutoencoderTiny(**settings).eval()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.3 if p.ndim == 1 else (2 / p[0].numel()) ** 0.5 / 1.5)
    return module


@pytest.mark.parametrize('settings', [{}, SMALL], ids=['released', 'small'])
def test_both_ways(settings):
    module = reference(**settings)
    cfg, params = NETWORKS['AutoencoderTiny'](dict(module.config)), arrays(module)
    assert shapes.tiny_vae(cfg) == shapes_of(module)
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (2, 48, 32, 3)).astype(np.float32)
    latent = (2 * rng.normal(size=(2, 48 // cfg.factor, 32 // cfg.factor, 4))).astype(np.float32)
    with torch.no_grad():
        mean = module.encode(nchw(image)).latents
        decoded = module.decode(nchw(latent)).sample
    close(jax.jit(vae.encode, static_argnums=1)(params, cfg, image)[0], mean.permute(0, 2, 3, 1))
    close(jax.jit(vae.decode, static_argnums=1)(params, cfg, latent), decoded.permute(0, 2, 3, 1))


def test_folders_go_both_ways(tmp_path):
    module = reference(**SMALL)
    module.save_pretrained(tmp_path / 'theirs')
    network = jaxsd.load_vae(tmp_path / 'theirs')
    assert same(flat(network.params), flat(arrays(module)))
    jaxsd.save_network(network, tmp_path / 'ours')
    again = diffusers.AutoencoderTiny.from_pretrained(tmp_path / 'ours')
    for name, tensor in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_pipeline_with_it_goes_both_ways(tmp_path):
    model = random_model('sd15', tokenizers=True)
    module = reference(**SMALL | {k: v + (v[-1],) for k, v in SMALL.items()})  # a factor of 8
    module.save_pretrained(tmp_path / 'vae')
    model = model.with_vae(jaxsd.load_vae(tmp_path / 'vae'))
    jaxsd.save(model, tmp_path / 'model')
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / 'model')
    assert isinstance(pipeline.vae, diffusers.AutoencoderTiny)
    for name, tensor in module.state_dict().items():
        assert torch.equal(pipeline.vae.state_dict()[name], tensor), name
    pipeline.save_pretrained(tmp_path / 'again')
    again = jaxsd.load(tmp_path / 'again')
    assert again.config == model.config and same(flat(again.params), flat(model.params))
