"""SDXL's base and refiner as an ensemble of experts, and the refiner alone, against diffusers."""

import diffusers
import numpy as np
import pytest
from pipelines import (
    BOUND,
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

from jaxsd import sampling

pytestmark = pytest.mark.parity
SIZE, STEPS = 16, 8
# Where the refiner takes over; a sampler with a memory starts anew there. Timesteps are 999, 874,
# 749, ...: at 0.5 and 0.25 one lies just below the border. Not unipc, whose order falls to 1 at the
# end of each part as in ComfyUI, in diffusers at the end of the whole.
CASES = [('euler', 0.8), ('euler', 0.5), ('dpmpp_2m', 0.6), ('ddim', 0.25)]


SAID = {'num_inference_steps': STEPS, 'original_size': (20, 30),
        'crops_coords_top_left': (1, 2), 'target_size': (40, 24)}
# diffusers' refiner has a crop of its own for the negative prompt, (0, 0) unless given; the base,
# like Stability AI's code and ours, has one for both.
SCORED = SAID | {'negative_crops_coords_top_left': (1, 2), 'aesthetic_score': 6.5,
                 'negative_aesthetic_score': 2.0}
ASKED = {'steps': STEPS, 'original_size': (20, 30), 'crop': (1, 2), 'target_size': (40, 24),
         'aesthetic': 6.5, 'negative_aesthetic': 2.0}
STRENGTHS = [('euler', 0.3), ('dpmpp_2m', 0.55), ('ddim', 0.8)]


@pytest.fixture(scope='module')
def models(tokenizer_folder, tmp_path_factory):
    """Base and refiner, ours and diffusers'."""
    folder = tmp_path_factory.mktemp('ensemble')
    base = random_model(tiny('sdxl', levels=2), tokenizer_folder)
    refiner = random_model(tiny('refiner', levels=2), tokenizer_folder, seed=1)
    return base, refiner, (
        pipeline(diffusers.StableDiffusionXLPipeline, base, folder / 'base'),
        pipeline(diffusers.StableDiffusionXLImg2ImgPipeline, refiner, folder / 'refiner'))


@pytest.fixture(scope='module')
def sampled(models):
    """Our latents where the refiner takes over, and at the end, of all the cases."""
    base, refiner, _ = models
    requests = [request(sampler=sampler, switch=switch, **ASKED) for sampler, switch in CASES]
    middle = ours(base, requests, normal(len(CASES)), 'base')
    return middle, ours(refiner, requests, middle, 'refiner')


@pytest.mark.parametrize('i', range(len(CASES)), ids=[f'{s}-{switch}' for s, switch in CASES])
def test_ensemble(models, sampled, i):
    base, _, pipes = models
    sampler, switch = CASES[i]
    middle, last = (found[i:i + 1] for found in sampled)
    noise = normal(len(CASES))[i:i + 1]
    if sampler in UNIT:
        sigmas = sampling.schedule('simple', STEPS, base.config.schedule)
        t = sampling.sigma_to_t(sigmas[:-1], base.config.schedule)
        noise = noise / np.float32(np.hypot(1, 1 / sigmas[0]))
        middle = middle / np.float32(np.hypot(1, sigmas[(t >= 1000 - 1000 * switch).sum()]))
    handed = theirs(pipes[0], sampler, [noise], height=SIZE, width=SIZE, denoising_end=switch,
                    **SAID)
    assert far(middle, handed) <= BOUND
    assert far(last, theirs(pipes[1], sampler, [], image=nchw(handed), denoising_start=switch,
                            **SCORED)) <= BOUND


def test_image_to_image(models):
    _, refiner, (_, pipe) = models
    noise = normal(len(STRENGTHS))
    found = ours(refiner, [request(sampler=sampler, strength=strength, image=picture(i, SIZE),
                                   **ASKED) for i, (sampler, strength) in enumerate(STRENGTHS)],
                 noise)
    for i, (sampler, strength) in enumerate(STRENGTHS):
        wanted = theirs(pipe, sampler, [noise[i:i + 1]], image=picture(i, SIZE),
                        strength=strength, **SCORED)
        assert far(found[i:i + 1], wanted) <= BOUND, sampler
