"""The x4 upscaler in miniature against diffusers' pipeline, read from the folder that we write."""

import diffusers
import jax
import numpy as np
import pytest
import torch
from test_models import close, nchw
from test_weights import random_model

import jaxsd
from jaxsd import sampling
from jaxsd.models import spec, unet, vae

pytestmark = pytest.mark.parity


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    """Our model with weights of a network's scale, norms and biases too, and the pipeline."""
    model, rng = random_model('x4_upscaler', tokenizers=True), np.random.default_rng(0)
    lively = jax.tree.map(
        lambda a: a + 0.2 * rng.standard_normal(a.shape, np.float32) if a.ndim == 1 else a,
        spec.init(0, model.config))
    lively['unet']['class_embedding']['weight'] *= 50  # as wide as torch's
    model = model.replace(params=lively)
    folder = tmp_path_factory.mktemp('upscaler') / 'model'
    jaxsd.save(model, folder)
    return model, diffusers.DiffusionPipeline.from_pretrained(folder)


def test_what_the_folder_says(pair):
    model, pipeline = pair
    assert type(pipeline) is diffusers.StableDiffusionUpscalePipeline
    assert pipeline.config.max_noise_level == model.config.max_noise_level == 350
    assert pipeline.vae.config.scaling_factor == model.config.vae.scaling_factor == 0.08333
    assert pipeline.vae_scale_factor == model.config.vae.factor == 4
    assert pipeline.scheduler.config.prediction_type == 'v_prediction'
    for schedule, theirs in ((model.config.schedule, pipeline.scheduler),
                             (model.config.low_res, pipeline.low_res_scheduler)):
        # theirs is a float32 product of a thousand factors
        np.testing.assert_allclose(sampling.alphas_cumprod(schedule), theirs.alphas_cumprod,
                                   rtol=1e-5)


def test_unet_and_vae(pair):
    model, pipeline = pair
    cfg, rng = model.config.unet, np.random.default_rng(1)
    assert cfg.only_cross_attention == (True, True, True, False) and cfg.num_class_embeds == 1000
    x = rng.normal(size=(2, 16, 24, 7)).astype(np.float32)
    context = rng.normal(size=(2, 7, cfg.cross_attention_dim)).astype(np.float32)
    t, labels = np.array([3, 801], np.float32), np.array([20, 350])
    latent = rng.normal(size=(1, 6, 8, 4)).astype(np.float32)

    @jax.jit
    def ours(params, labels):
        return unet.apply(params, cfg, x, t, context, class_labels=labels)

    out = ours(model.params['unet'], labels)
    with torch.no_grad():
        theirs = pipeline.unet(nchw(x), torch.tensor(t), torch.tensor(context),
                               class_labels=torch.tensor(labels)).sample
        decoded = pipeline.vae.decode(nchw(latent)).sample
    close(out, theirs.permute(0, 2, 3, 1))
    other = ours(model.params['unet'], labels[::-1])
    assert np.std(other - out) > 0.05 * np.std(out)  # the noise levels are heard
    image = jax.jit(vae.decode, static_argnums=1)(model.params['vae'], model.config.vae, latent)
    assert image.shape == (1, 24, 32, 3)
    close(image, decoded.permute(0, 2, 3, 1))
