"""The pictures that diffusers makes from a seed, from the same seed: torch's noise, drawn by us."""

import diffusers
import jax.numpy as jnp
import pytest
import torch
from pipelines import BOUND, STEPS, TEXTS, far, ours, pipeline, random_model, request, tiny

from jaxsd.run import inputs, resolve

pytestmark = pytest.mark.parity
SCHEDULERS = {'euler': diffusers.EulerDiscreteScheduler,
              'euler_ancestral': diffusers.EulerAncestralDiscreteScheduler}


@pytest.mark.parametrize('sampler', SCHEDULERS)
def test_a_batch_of_one_generator(sampler, tokenizer_folder, tmp_path):
    """Two pictures from one torch generator; the ancestral sampler draws in every step."""
    model = random_model(tiny('sd1', levels=2), tokenizer_folder)
    pipe = pipeline(diffusers.StableDiffusionPipeline, model, tmp_path / 'model',
                    safety_checker=None)
    kept = {k: v for k, v in pipe.scheduler.config.items()
            if k.startswith('beta') or k == 'prediction_type'}
    pipe.scheduler = SCHEDULERS[sampler](timestep_spacing='trailing', **kept)
    expected = pipe(**TEXTS, num_inference_steps=STEPS, guidance_scale=5.0, height=16, width=16,
                    num_images_per_prompt=2, generator=torch.manual_seed(2**40 + 7),
                    output_type='latent').images.permute(0, 2, 3, 1).numpy()
    asked = request(sampler=sampler, seed=2**40 + 7, noise='torch', width=16, height=16)
    found = ours(model, [asked.replace(noise_batch=(i, 2)) for i in range(2)], None)
    assert far(found, expected) < BOUND


def test_in_a_batch_with_our_own_noise(tokenizer_folder):
    """A picture from torch's noise beside others: each as it is alone."""
    model = random_model(tiny('sd1', levels=2), tokenizer_folder)
    batch = [request(sampler='euler_ancestral', seed=3, noise=noise, width=16, height=16)
             for noise in ('threefry', 'torch', 'philox')]
    mixed = ours(model, batch, None)
    for image, one in zip(mixed, batch):
        assert far(image, ours(model, [one], None)[0]) < 1e-5
    assert far(mixed[1], mixed[2]) > 0.1
    data = inputs(model, resolve(batch[:1], model.config))
    assert data.noise is None and data.steps.noise is None and data.given is None
    assert jnp.shape(inputs(model, resolve(batch, model.config)).steps.noise)[1:3] == (3, 8)
