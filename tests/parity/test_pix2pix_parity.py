"""InstructPix2Pix against diffusers' pipelines, 1.x and SDXL, from pictures to latents."""

import diffusers
import numpy as np
import pytest
from pipelines import (
    BOUND,
    STEPS,
    TEXTS,
    UNIT,
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
from test_models import nchw

import jaxsd
from jaxsd import sampling
from jaxsd.config import ScheduleConfig

pytestmark = pytest.mark.parity
SIZE = 16  # pixels; a cell of the latents is two
# All in one batch of ours, each alone in diffusers' pipeline: sampler, scales, rescale (SDXL's has
# it alone; the deviation is that of the prompt's picture, which sees the image).
CASES = [('ddim', 5.0, 1.5, 0.0), ('euler', 7.5, 1.0, 0.0), ('dpmpp_2m', 3.0, 2.2, 0.0),
         ('euler', 5.0, 2.0, 0.7)]
SIDES = {'sd1': diffusers.StableDiffusionInstructPix2PixPipeline,
         'sdxl': diffusers.StableDiffusionXLInstructPix2PixPipeline}


@pytest.mark.parametrize('family', SIDES)
def test_edited(family, tokenizer_folder, tmp_path):
    model = random_model(tiny(family, levels=2, in_channels=8), tokenizer_folder)
    pipe, cases = pipeline(SIDES[family], model, tmp_path / 'model'), CASES
    if family == 'sd1':
        cases = CASES[:-1]
    noise = normal(len(cases))
    found = ours(model, [request(sampler=sampler, image=picture(i, SIZE), guidance=scale,
                                 image_guidance=image, seed=i,
                                 guidance_options={'rescale': phi} if phi else {})
                         for i, (sampler, scale, image, phi) in enumerate(cases)], noise)
    sigma = sampling.schedule('simple', STEPS, model.config.schedule)[0]
    for i, (sampler, scale, image, phi) in enumerate(cases):
        start = noise[i:i + 1] / np.float32(np.hypot(1, 1 / sigma) if sampler in UNIT else 1)
        more = {} if family == 'sd1' else {'height': SIZE, 'width': SIZE, 'guidance_rescale': phi}
        wanted = theirs(pipe, sampler, [start], image=picture(i, SIZE), guidance_scale=scale,
                        image_guidance_scale=image, **more)
        assert far(found[i:i + 1], wanted) <= BOUND, (sampler, far(found[i:i + 1], wanted))


def test_cosxl_edit(tokenizer_folder, tmp_path):
    """An EDM model that sees scaled latents, as CosXL Edit."""
    config = tiny('sdxl', levels=2, in_channels=8)
    model = random_model(config.replace(schedule=ScheduleConfig(
        edm=True, prediction_type='v_prediction', sigma_data=1.0, sigma_max=120.0)),
        tokenizer_folder)
    jaxsd.save(model, tmp_path / 'model')
    pipe = SIDES['sdxl'].from_pretrained(tmp_path / 'model', is_cosxl_edit=True)
    pipe.set_progress_bar_config(disable=True)
    noise, look = normal(1), picture(0, SIZE)
    sigmas = sampling.schedule('karras', STEPS, model.config.schedule)
    start = noise * np.float32(sigmas[0] / np.hypot(sigmas[0], 1))  # theirs is wider than ours
    wanted = pipe(**TEXTS, num_inference_steps=STEPS, image=look, height=SIZE, width=SIZE,
                  guidance_scale=5.0, image_guidance_scale=1.5, latents=nchw(start),
                  output_type='latent').images
    found = ours(model, [request(schedule='karras', image=look, image_guidance=1.5)], noise)
    assert far(found, wanted.permute(0, 2, 3, 1).numpy()) <= BOUND
