"""The x2 latent upscaler against diffusers': its U-Net, and the whole from pictures to latents."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch
from pipelines import (
    BOUND,
    STEPS,
    far,
    normal,
    ours,
    picture,
    pipeline,
    random_model,
    request,
    theirs,
    tiny,
)
from test_models import arrays, excite, nchw

import jaxsd
from jaxsd import config as jc
from jaxsd import config_files as jcf
from jaxsd import sampling
from jaxsd.models import kunet

pytestmark = pytest.mark.parity


@pytest.fixture(scope='module')
def module():
    torch.manual_seed(0)
    return excite(diffusers.UNet2DConditionModel(
        act_fn='gelu', attention_head_dim=16, norm_num_groups=None, layers_per_block=2,
        block_out_channels=[32, 32, 64, 64], time_cond_proj_dim=160, conv_in_kernel=1,
        conv_out_kernel=1, cross_attention_dim=32, in_channels=8, out_channels=5,
        mid_block_type=None, resnet_time_scale_shift='scale_shift', time_embedding_type='fourier',
        timestep_post_act='gelu',
        down_block_types=['KDownBlock2D', *['KCrossAttnDownBlock2D'] * 3],
        up_block_types=[*['KCrossAttnUpBlock2D'] * 3, 'KUpBlock2D']), 1)


def test_network(module):
    cfg, rng = jcf._unet(dict(module.config)), np.random.default_rng(0)
    assert {name: tuple(a.shape) for name, a in module.state_dict().items()} == kunet.names(cfg)
    x, context, added = (rng.normal(size=shape).astype(np.float32) for shape in (
        (2, 16, 24, 8), (2, 7, 32), (2, 160)))
    t = np.array([0.6, -0.4], np.float32)
    ours = jax.jit(kunet.apply, static_argnums=1)(arrays(module), cfg, x, t, context, added)
    with torch.no_grad():
        theirs = module(nchw(x), torch.tensor(t), torch.tensor(context),
                        timestep_cond=torch.tensor(added)).sample[:, :4]
    theirs = theirs.permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - theirs).max() <= 1e-5 * max(1, np.abs(theirs).max())


def test_enlarged(tokenizer_folder, tmp_path):
    """From the folder that we write: with guidance, and with the prompt alone."""
    config = tiny('sd1')
    config = config.replace(schedule=jcf.K_SCHEDULE, text_encoder=dataclasses.replace(
        config.text_encoder, final_norm=False), unet=jc.KUNetConfig(
            block_out_channels=(32, 32, 64, 64), layers_per_block=2, attention_head_dim=16,
            cross_attention_dim=32, time_cond_dim=160))
    model = random_model(config, tokenizer_folder)
    jaxsd.save(model, tmp_path / 'model')
    model = jaxsd.load(tmp_path / 'model')
    assert model.config == config and config.task == 'latent_upscaler'
    pipe = pipeline(diffusers.StableDiffusionLatentUpscalePipeline, model, tmp_path / 'model')
    levels = tuple(sampling.schedule('simple', STEPS, jc.ScheduleConfig()))
    noise, scales = normal(2, 16), (5.0, 1.0)
    for i, scale in enumerate(scales):
        found = ours(model, [request(image=picture(i, 64), guidance=scale, schedule=levels)],
                     noise[i:i + 1])
        wanted = theirs(pipe, 'euler', [noise[i:i + 1]], image=picture(i, 64), guidance_scale=scale)
        assert far(found, wanted) <= BOUND, (scale, far(found, wanted))
