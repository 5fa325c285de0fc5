"""The x4 upscaler and depth to image against diffusers' pipelines, from pictures to latents."""

import diffusers
import numpy as np
import pytest
import torch
from pipelines import (
    BOUND,
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
from test_dpt_parity import TINY as DPT
from test_dpt_parity import lively
from test_models import arrays

from jaxsd import read_config, sampling
from jaxsd.run.pipeline import LOW_RES

pytestmark = pytest.mark.parity


def test_upscaler(tokenizer_folder, tmp_path):
    """Noise levels, which are classes too, the noise on the small picture, and the prompts."""
    config = tiny('sd2', levels=3, in_channels=7, num_class_embeds=1000,
                  only_cross_attention=(True, False)).replace(
                      low_res=read_config('x4_upscaler').low_res)
    model = random_model(config, tokenizer_folder)
    pipe = pipeline(diffusers.StableDiffusionUpscalePipeline, model, tmp_path / 'model')
    levels, noise = (None, 0, 350), normal(3)
    found = ours(model, [request(image=picture(i, 8), class_label=level, seed=i)
                         for i, level in enumerate(levels)], noise)
    for i, level in enumerate(levels):
        on_picture = np.asarray(sampling.draw(sampling.keys([i]), LOW_RES, (8, 8, 3)))
        wanted = theirs(pipe, 'euler', [on_picture, noise[i:i + 1]], image=picture(i, 8),
                        **({} if level is None else {'noise_level': level}))
        assert far(found[i:i + 1], wanted) <= BOUND, level


def test_depth_to_image(tokenizer_folder, tmp_path):
    """Depth that MiDaS sees in the picture, and a map that is given."""
    config = tiny('sd2', in_channels=5).replace(depth_estimator=DPT)
    model = random_model(config, tokenizer_folder)
    model = model.replace(params=model.params | {'depth_estimator': arrays(lively(DPT))})
    pipe = pipeline(diffusers.StableDiffusionDepth2ImgPipeline, model, tmp_path / 'model')
    given = np.random.default_rng(3).gamma(2, 0.1, (64, 64)).clip(0, 1).astype(np.float32)
    cases = [('ddim', 0.8, None), ('euler', 0.4, None), ('dpmpp_2m', 0.99, given)]
    noise = normal(len(cases))
    found = ours(model, [request(sampler=sampler, image=picture(i, 64), strength=strength,
                                 depth=depth)
                         for i, (sampler, strength, depth) in enumerate(cases)], noise)
    for i, (sampler, strength, depth) in enumerate(cases):
        wanted = theirs(pipe, sampler, [noise[i:i + 1]], image=picture(i, 64), strength=strength,
                        depth_map=None if depth is None else torch.tensor(depth)[None])
        assert far(found[i:i + 1], wanted) <= BOUND, (i, far(found[i:i + 1], wanted))
