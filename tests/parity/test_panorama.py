"""MultiDiffusion against diffusers' StableDiffusionPanoramaPipeline, from prompts to latents."""

import functools

import diffusers
import numpy as np
import pytest
from pipelines import (
    BOUND,
    STEPS,
    UNIT,
    far,
    ours,
    pipeline,
    random_model,
    request,
    theirs,
    tiny,
)

from jaxsd import sampling

pytestmark = pytest.mark.parity


def test_windows(tokenizer_folder, tmp_path):
    """Latents of 8 x 16 in windows of 8, whose size diffusers has fixed at 64."""
    model = random_model(tiny('sd1'), tokenizer_folder)
    pipe = pipeline(diffusers.StableDiffusionPanoramaPipeline, model, tmp_path / 'model')
    views = functools.partial(pipe.get_views, window_size=8, stride=4)
    pipe.get_views = lambda *size, circular_padding=False: views(*size)
    samplers, size = ('ddim', 'euler', 'dpmpp_2m'), {'height': 64, 'width': 128}
    noise = np.random.default_rng(1).standard_normal((len(samplers), 8, 16, 4), np.float32)
    found = ours(model, [request(sampler=sampler, seed=i, window=64, window_stride=32, **size)
                         for i, sampler in enumerate(samplers)], noise)
    whole = ours(model, [request(sampler=sampler, **size) for sampler in samplers], noise)
    sigma = sampling.schedule('simple', STEPS, model.config.schedule)[0]
    for i, sampler in enumerate(samplers):
        start = noise[i:i + 1] / np.float32(np.hypot(1, 1 / sigma) if sampler in UNIT else 1)
        wanted = theirs(pipe, sampler, [start], **size)
        assert far(found[i:i + 1], wanted) <= BOUND, (sampler, far(found[i:i + 1], wanted))
        assert far(whole[i:i + 1], wanted) > 100 * BOUND
