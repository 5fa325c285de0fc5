"""diffusers itself loads checkpoints/emoji and draws the same pictures."""

import pathlib

import diffusers
import numpy as np
import pytest
import torch

import jaxsd
from jaxsd import sampling

pytestmark = pytest.mark.parity
FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'checkpoints' / 'emoji'
PROMPTS = ['red apple', 'rocket', 'woman firefighter: medium skin tone', 'flag: japan']


@pytest.mark.parametrize('sampler', ['euler', 'dpmpp_2m'])
def test_same_pictures_from_the_same_latent(sampler):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        FOLDER, safety_checker=None, requires_safety_checker=False)
    kind = {'euler': diffusers.EulerDiscreteScheduler,
            'dpmpp_2m': diffusers.DPMSolverMultistepScheduler}[sampler]
    pipe.scheduler = kind.from_config(pipe.scheduler.config, timestep_spacing='trailing')
    pipe.set_progress_bar_config(disable=True)
    model = jaxsd.load(FOLDER)
    size = model.config.unet.sample_size
    noise = np.random.default_rng(0).normal(
        size=(len(PROMPTS), size, size, model.config.vae.latent_channels)).astype(np.float32)
    theirs = pipe(PROMPTS, num_inference_steps=20, guidance_scale=3.0,
                  latents=torch.tensor(noise).permute(0, 3, 1, 2),
                  output_type='np').images  # [B,H,W,3] in [0,1]

    # diffusers' DPM-Solver starts at unit variance, jaxsd and diffusers' Euler at sigma_0.
    sigma = sampling.schedule('simple', 20, model.config.schedule)[0]
    start = noise * (np.hypot(sigma, 1) / sigma if sampler == 'dpmpp_2m' else 1)
    requests = [jaxsd.Request(prompt, seed=0, sampler=sampler, schedule='simple', steps=20,
                              guidance=3.0) for prompt in PROMPTS]
    ours = jaxsd.generate(model, requests, noise=start)
    difference = np.abs(ours.astype(np.float32) - 255 * theirs)
    assert difference.mean() < 0.5  # of 255; rounding alone makes it 0.25
    assert ours.std() > 40  # pictures, not grey
