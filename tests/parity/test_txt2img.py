"""Whole trajectories against diffusers' own pipelines, from the same latent and embeddings."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch
from pipelines import TEXTS, denoised, normal, ours, pipeline, random_model, request, tiny
from test_models import UNETS, arrays, excite, nchw

import jaxsd
from jaxsd import config as jc
from jaxsd import config_files as jcf
from jaxsd import sampling
from jaxsd.models.layers import timestep_embedding
from jaxsd.prompt.conditioning import Conditioning
from jaxsd.run import decode
from jaxsd.sampling.guidance import Guidance

pytestmark = pytest.mark.parity
STEPS, GUIDANCE, SIZE = 10, 5.0, 8

# jaxsd's sampler and options, diffusers' scheduler and options; both on 'trailing' timesteps,
# which is our 'simple' where the steps divide 1000. `unit`: diffusers starts at unit variance.
SAMPLERS = {
    'ddim': ('ddim', {}, diffusers.DDIMScheduler, {'clip_sample': False}, True),
    'euler': ('euler', {}, diffusers.EulerDiscreteScheduler, {}, False),
    'dpmpp_2m': ('dpmpp_2m', {}, diffusers.DPMSolverMultistepScheduler,
                 {'lower_order_final': True, 'final_sigmas_type': 'zero'}, True),
    'unipc': ('unipc', {}, diffusers.UniPCMultistepScheduler,
              {'solver_order': 2, 'final_sigmas_type': 'zero'}, True),
}
MODELS = {'sd1': 'epsilon', 'sd2': 'v_prediction', 'sdxl': 'epsilon'}


def network(name):
    torch.manual_seed(0)
    settings = {'block_out_channels': (32, 64), 'layers_per_block': 1, 'norm_num_groups': 8,
                'sample_size': SIZE,
                'down_block_types': ('CrossAttnDownBlock2D', 'DownBlock2D'),
                'up_block_types': ('UpBlock2D', 'CrossAttnUpBlock2D'), **UNETS[name]}
    return excite(diffusers.UNet2DConditionModel(**settings), 1)


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('sampler', SAMPLERS)
def test_trajectory(name, sampler):
    module, kind = network(name), MODELS[name]
    ours, options, scheduler, settings, unit = SAMPLERS[sampler]
    scheduler = scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear',
                          prediction_type=kind, timestep_spacing='trailing', **settings)
    vae = diffusers.AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, sample_size=SIZE)
    cfg = jcf._unet(dict(module.config))
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(2, SIZE, SIZE, 4)).astype(np.float32)
    context = rng.normal(size=(2, 2, 7, cfg.cross_attention_dim)).astype(np.float32)
    embeds = {'prompt_embeds': torch.tensor(context[:, 1]),
              'negative_prompt_embeds': torch.tensor(context[:, 0])}
    common = {'vae': vae, 'text_encoder': None, 'tokenizer': None, 'unet': module,
              'scheduler': scheduler}
    added = None
    if cfg.added_dim:
        pooled = rng.normal(size=(2, 2, 32)).astype(np.float32)
        ids = np.array([8, 8, 0, 0, 8, 8], np.float32)
        sinusoids = np.asarray(timestep_embedding(ids, cfg.added_time_dim)).reshape(-1)
        added = np.concatenate([pooled, np.broadcast_to(sinusoids, (2, 2, sinusoids.size))], -1)
        embeds |= {'pooled_prompt_embeds': torch.tensor(pooled[:, 1]),
                   'negative_pooled_prompt_embeds': torch.tensor(pooled[:, 0]),
                   'original_size': (8, 8), 'target_size': (8, 8)}
        pipe = diffusers.StableDiffusionXLPipeline(
            **common, text_encoder_2=None, tokenizer_2=None, add_watermarker=False)
    else:
        pipe = diffusers.StableDiffusionPipeline(
            **common, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=SIZE, width=SIZE,
                  latents=torch.tensor(latent).permute(0, 3, 1, 2), output_type='latent',
                  **embeds).images.permute(0, 2, 3, 1).numpy()

    config = jc.ModelConfig(cfg, jc.VAEConfig(), jc.ScheduleConfig(prediction_type=kind))
    sigmas = sampling.schedule('simple', STEPS, config.schedule)
    start = latent * (np.hypot(sigmas[0], 1) if unit else float(scheduler.init_noise_sigma))
    rows = sampling.plan(ours, sigmas, **options)
    params = {'unet': arrays(module)}
    found = denoised(params, config, start, Conditioning(context, added), Guidance(GUIDANCE), rows)
    scale = max(1.0, theirs.std())
    assert np.abs(np.asarray(found) - theirs).max() / scale <= 1e-4


@pytest.mark.parametrize('kind, sampler, scheduler', [
    ('epsilon', 'euler', 'EDMEulerScheduler'),
    ('epsilon', None, 'EDMDPMSolverMultistepScheduler'),
    ('v_prediction', None, 'EDMEulerScheduler')])
def test_edm_with_latent_statistics(kind, sampler, scheduler, tokenizer_folder, tmp_path):
    """As Playground v2.5 and CosXL: from a prompt to pixels, from the folder that we write; as the
    scheduler's file says where no sampler is named."""
    config, cosxl = tiny('sdxl', levels=2), kind == 'v_prediction'
    model = random_model(config.replace(
        schedule=jc.ScheduleConfig(edm=True, prediction_type=kind, sigma_data=1.0 if cosxl else 0.5,
                                   sigma_max=120.0 if cosxl else 80.0),
        vae=dataclasses.replace(config.vae, scaling_factor=0.5, force_upcast=False,
                                latents_mean=(-1.6, 1.9, -1.4, 2.5),
                                latents_std=(8.5, 5.9, 6.5, 5.2))), tokenizer_folder)
    jaxsd.save(model, tmp_path / 'a')
    model = jaxsd.load(tmp_path / 'a')
    assert model.config.schedule.edm
    pipe = pipeline(diffusers.StableDiffusionXLPipeline, model, tmp_path / 'a')
    assert type(pipe.scheduler) is diffusers.EDMEulerScheduler
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    noise, size, schedule = normal(1), 2 * normal(1).shape[1], f'diffusers:{tmp_path}/b'
    pipe.scheduler.save_pretrained(tmp_path / 'b')
    start = noise
    if sampler is not None:
        schedule, last = 'karras', model.config.schedule.sigma_max
        start = noise * np.float32(last / np.hypot(last, 1))  # theirs is wider than ours
    expected = pipe(**TEXTS, num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=size,
                    width=size, latents=nchw(start), output_type='np').images
    latents = ours(model, [request(sampler=sampler, schedule=schedule, steps=STEPS,
                                   width=size, height=size)], noise)
    image, _ = jax.jit(decode, static_argnums=1)(model.params, model.config, latents)
    assert expected.std() > 0.05
    np.testing.assert_allclose(image / 255, expected, atol=0.6 / 255)
