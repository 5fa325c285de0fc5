"""Guidance against diffusers: its pipelines on tiny random networks, and its guiders' formulas."""

from unittest import mock

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.guiders import adaptive_projected_guidance as apg
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from diffusers.guiders.guider_utils import rescale_noise_cfg
from pipelines import denoised
from test_models import arrays, excite, nchw

from jaxsd import config as jc
from jaxsd import config_files as jcf
from jaxsd import sampling
from jaxsd.models import unet
from jaxsd.prompt.conditioning import Conditioning
from jaxsd.sampling import guidance as guiding
from jaxsd.sampling.guidance import Guidance

pytestmark = pytest.mark.parity
STEPS, SCALE, SIZE = 8, 5.0, 8


def network(**settings):
    torch.manual_seed(0)
    return excite(diffusers.UNet2DConditionModel(**{
        'block_out_channels': (32, 64), 'layers_per_block': 1, 'norm_num_groups': 8,
        'sample_size': SIZE, 'attention_head_dim': 4, 'cross_attention_dim': 32,
        'down_block_types': ('CrossAttnDownBlock2D', 'DownBlock2D'),
        'up_block_types': ('UpBlock2D', 'CrossAttnUpBlock2D'), **settings}), 1)


def trajectories(pipeline, guidance, prediction='epsilon', prepare=None, size=SIZE, **call):
    """Both walks from one latent; -> the largest difference, in deviations of the result."""
    module = network()
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', clip_sample=False,
        timestep_spacing='trailing', prediction_type=prediction)
    vae = diffusers.AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, sample_size=SIZE)
    pipe = pipeline(vae=vae, text_encoder=None, tokenizer=None, unet=module, scheduler=scheduler,
                    safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    if prepare is not None:
        prepare(pipe)
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(2, size, size, 4)).astype(np.float32)
    context = rng.normal(size=(2, 2, 7, 32)).astype(np.float32)
    theirs = pipe(
        num_inference_steps=STEPS, guidance_scale=SCALE, height=size, width=size,
        latents=nchw(latent), output_type='latent', prompt_embeds=torch.tensor(context[:, 1]),
        negative_prompt_embeds=torch.tensor(context[:, 0]), **call
    ).images.permute(0, 2, 3, 1).numpy()
    config = jc.ModelConfig(jcf._unet(dict(module.config)), jc.VAEConfig(),
                            jc.ScheduleConfig(prediction_type=prediction))
    sigmas = sampling.schedule('simple', STEPS, config.schedule)
    rows = sampling.plan('ddim', sigmas)

    def sample(params, guidance):
        return np.asarray(denoised(
            {'unet': params}, config, latent * np.float32(np.hypot(sigmas[0], 1)),
            Conditioning(context, None), guidance, rows))

    params = arrays(module)  # of `module` as made: FreeU changes no parameter
    scale = max(1.0, theirs.std())
    assert np.abs(sample(params, Guidance(SCALE)) - theirs).max() / scale > 1e-2, 'no effect to see'
    return np.abs(sample(params, guidance) - theirs).max() / scale


@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction'])
def test_rescale(prediction):
    assert trajectories(diffusers.StableDiffusionPipeline, Guidance(SCALE, rescale=0.7), prediction,
                        guidance_rescale=0.7) <= 1e-4


def test_perturbed_attention():
    assert trajectories(diffusers.StableDiffusionPAGPipeline, Guidance(SCALE, pag=2.0),
                        pag_scale=2.0) <= 1e-4


def test_perturbed_attention_rescaled():
    assert trajectories(diffusers.StableDiffusionPAGPipeline, Guidance(SCALE, pag=2.0, rescale=0.5),
                        'v_prediction', pag_scale=2.0, guidance_rescale=0.5) <= 1e-4


@pytest.mark.parametrize('size', [SIZE, 16])
def test_self_attention(size):
    assert trajectories(diffusers.StableDiffusionSAGPipeline, Guidance(SCALE, sag=0.75),
                        size=size, sag_scale=0.75) <= 1e-4


def test_freeu():
    assert trajectories(
        diffusers.StableDiffusionPipeline, Guidance(SCALE, freeu=(1.3, 1.4, 0.9, 0.2)),
        prepare=lambda pipe: pipe.enable_freeu(b1=1.3, b2=1.4, s1=0.9, s2=0.2)) <= 1e-4


@pytest.mark.parametrize('size', [(16, 16), (9, 14)])
def test_freeu_of_one_evaluation(size):
    module = network()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, 4)).astype(np.float32)
    context = rng.normal(size=(2, 7, 32)).astype(np.float32)
    t = np.array([3, 801], np.float32)
    ours = jax.jit(unet.apply, static_argnums=1)(
        arrays(module), jcf._unet(dict(module.config)), x, t, context,
        freeu=(1.3, np.array([1.4, 1.4], np.float32), 0.9, 0.2))
    module.enable_freeu(b1=1.3, b2=1.4, s1=0.9, s2=0.2)
    with torch.no_grad():
        theirs = module(nchw(x), torch.tensor(t), torch.tensor(context)).sample
    assert np.abs(ours - theirs.permute(0, 2, 3, 1).numpy()).max() <= 1e-5


@pytest.mark.parametrize('how', [
    unet.DeepShrink(block=1, factor=1.5, after_skip=False, upscale_method='nearest'),
    unet.DeepShrink(block=1, downscale_method='bilinear'), unet.DeepShrink(block=2),
    unet.DeepShrink(block=2, after_skip=False, upscale_method='bilinear')])
def test_deep_shrink(how):
    """ComfyUI's PatchModelAddDownscale, by hooks on diffusers' U-Net, whose blocks it counts."""
    module, modes = network(), {'nearest': 'nearest-exact'}
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 12, 24, 4)).astype(np.float32)
    context = rng.normal(size=(2, 7, 32)).astype(np.float32)
    t, cat = np.array([3, 801], np.float32), torch.cat

    def at_size(x, size, kind):
        return torch.nn.functional.interpolate(x, size=size, mode=modes.get(kind, kind))

    def smaller(x):
        return at_size(x, [round(n / how.factor) for n in x.shape[2:]], how.downscale_method)

    def joined(tensors, dim=0):  # where the blocks of the way up take a skip connection
        if dim == 1 and tensors[0].shape[2:] != tensors[1].shape[2:]:
            tensors = [at_size(tensors[0], tensors[1].shape[2:], how.upscale_method), tensors[1]]
        return cat(tensors, dim)

    first, last = module.down_blocks
    after = [module.conv_in, first.attentions[0], first.downsamplers[0], last.resnets[0]]
    before = [None, first.downsamplers[0], last.resnets[0]]  # sees what the block before it gave
    if how.after_skip:
        before[how.block].register_forward_pre_hook(
            lambda module, args: (smaller(args[0]), *args[1:]))
    else:
        after[how.block].register_forward_hook(lambda module, args, out: (
            (smaller(out[0]),) if isinstance(out, tuple) else smaller(out)))
    with torch.no_grad(), mock.patch.object(torch, 'cat', joined):
        theirs = module(nchw(x), torch.tensor(t), torch.tensor(context)).sample
    ours = [np.asarray(jax.jit(unet.apply, static_argnums=1, static_argnames='shrink')(
        arrays(module), jcf._unet(dict(module.config)), x, t, context, shrink=shrink))
        for shrink in (how, None)]
    theirs = theirs.permute(0, 2, 3, 1).numpy()
    assert np.abs(ours[0] - theirs).max() <= 1e-5 * max(1, np.abs(theirs).max())
    assert np.abs(ours[1] - theirs).max() > 1e-2


def pictures(seed=0):
    rng = np.random.default_rng(seed)
    uncond = rng.normal(size=(2, 6, 5, 4)).astype(np.float32)
    return uncond, uncond + 0.5 * rng.normal(size=uncond.shape).astype(np.float32)


def test_rescale_formula():
    uncond, cond = pictures()
    theirs = rescale_noise_cfg(torch.tensor(3 * cond - 2 * uncond), torch.tensor(cond), 0.7)
    ours = guiding.rescale(0.7, 3 * cond - 2 * uncond, cond, 0)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_zero_star_formula():
    uncond, cond = pictures()
    best = cfg_zero_star_scale(*(torch.tensor(a).flatten(1) for a in (cond, uncond)))
    theirs = best.reshape(-1, 1, 1, 1).numpy() * uncond
    np.testing.assert_allclose(guiding.zero_star(1.0, uncond, cond, 0 * uncond), theirs, atol=1e-6)


def test_projected_formula_with_momentum():
    """diffusers' "original formulation", cond + s d, at s = scale - 1 is the paper's."""
    buffer = apg.MomentumBuffer(-0.5)
    memory = np.zeros((2, 6, 5, 4), np.float32)
    values = guiding.Projection(0.3, 4.0, -0.5)
    for seed in range(4):
        uncond, cond = pictures(seed)
        theirs = apg.normalized_guidance(torch.tensor(cond), torch.tensor(uncond), 4.0, buffer,
                                         0.3, 4.0, use_original_formulation=True)
        ours, memory = guiding.combine(Guidance(5.0, apg=values), uncond, cond, [], None, None,
                                       memory)
        np.testing.assert_allclose(ours, theirs, atol=2e-6 * np.abs(theirs.numpy()).max())
