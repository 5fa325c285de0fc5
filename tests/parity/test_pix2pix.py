"""InstructPix2Pix against diffusers' pipelines, 1.x and SDXL, from pictures to latents."""

import diffusers
import numpy as np
import pytest
from pipelines import (
    BOUND,
    STEPS,
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

from jaxsd import sampling

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
