"""unCLIP's variations against diffusers' StableUnCLIPImg2ImgPipeline, from pictures to latents."""

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

import jaxsd
from jaxsd import sampling
from jaxsd.config import ImageNormalizerConfig, ScheduleConfig, VisionConfig
from jaxsd.run.unclip import NOISE

pytestmark = pytest.mark.parity
SIZE = 16  # pixels; a cell of the latents is two
CASES = [('ddim', None, 24), ('euler', 0, 40), ('dpmpp_2m', 600, 33)]  # and the picture's size


def test_variations(tokenizer_folder, tmp_path):
    """From the folder that we write; the noise of the embedding is ours, by the seed."""
    config = tiny('sd2', levels=2, class_proj_dim=2 * 20).replace(
        image_encoder=VisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                   num_attention_heads=4, image_size=28, patch_size=14,
                                   projection_dim=20),
        image_normalizer=ImageNormalizerConfig(20),
        image_noise=ScheduleConfig(beta_schedule='squaredcos_cap_v2'))
    model = random_model(config, tokenizer_folder)
    model.params['image_normalizer']['std'] = 1.5 + abs(model.params['image_normalizer']['std'])
    jaxsd.save(model, tmp_path / 'model')
    model = jaxsd.load(tmp_path / 'model')
    assert model.config == config
    pipe = pipeline(diffusers.StableUnCLIPImg2ImgPipeline, model, tmp_path / 'model')
    noise = normal(len(CASES))
    looks = [picture(i, size).crop((0, 0, size, size - 3)) for i, (*_, size) in enumerate(CASES)]
    found = ours(model, [request(sampler=sampler, image=look, class_label=level, seed=i,
                                 width=SIZE, height=SIZE)
                         for i, ((sampler, level, _), look) in enumerate(zip(CASES, looks))], noise)
    sigma = sampling.schedule('simple', STEPS, config.schedule)[0]
    for i, (sampler, level, _) in enumerate(CASES):
        start = noise[i:i + 1] / np.float32(np.hypot(1, 1 / sigma) if sampler in UNIT else 1)
        on_image = np.asarray(sampling.draw(sampling.keys([i]), NOISE, (20,)))
        wanted = theirs(pipe, sampler, [on_image, start], image=looks[i], height=SIZE, width=SIZE,
                        **({} if level is None else {'noise_level': level}))
        assert far(found[i:i + 1], wanted) <= BOUND, (sampler, far(found[i:i + 1], wanted))
