"""Image to image and inpainting against diffusers' pipelines: strengths, pictures, masks, texts."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import (
    BOUND,
    STEPS,
    cells,
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

# All of them in one batch of ours, so in one program; each alone in diffusers' pipelines.
CASES = {
    'img2img 0.2': {'strength': 0.2, 'sampler': 'euler'},
    'img2img 0.5': {'strength': 0.5, 'sampler': 'unipc'},  # int(2.5) steps
    'img2img 0.6': {'strength': 0.6, 'sampler': 'ddim'},
    'img2img 0.99': {'strength': 0.99, 'sampler': 'dpmpp_2m'},
    'img2img 1': {'strength': 1.0, 'sampler': 'euler'},
    'inpaint 0.4': {'strength': 0.4, 'sampler': 'euler', 'mask': cells(0, SIZE)},
    'inpaint 0.6': {'strength': 0.6, 'sampler': 'unipc', 'mask': cells(1, SIZE)},
    'inpaint 0.8': {'strength': 0.8, 'sampler': 'ddim', 'mask': cells(2, SIZE)},
    'inpaint 0.95': {'strength': 0.95, 'sampler': 'dpmpp_2m', 'mask': cells(3, SIZE)},
    'inpaint 1': {'strength': 1.0, 'sampler': 'euler', 'mask': cells(4, SIZE)},
}
# An inpainting model's own: the last mask is gray, which counts as white from the middle on.
SEEN = {
    'seen 0.6': {'strength': 0.6, 'sampler': 'dpmpp_2m', 'mask': cells(0, SIZE)},
    'seen 1': {'strength': 1.0, 'sampler': 'euler', 'mask': cells(1, SIZE)},
    'seen gray': {'strength': 0.8, 'sampler': 'ddim',
                  'mask': Image.fromarray(np.asarray(cells(2, SIZE)) // 255 * 128 + 64)},
}


def sampled(model, cases, start):
    """{case: our latents}."""
    found = ours(model, [request(image=picture(i, SIZE), **fields)
                         for i, fields in enumerate(cases.values())], start)
    return {name: found[i:i + 1] for i, name in enumerate(cases)}


def expected(pipe, cases, name, start):
    """diffusers' latents of a case."""
    i, fields = list(cases).index(name), dict(cases[name])
    more = {'image': picture(i, SIZE), 'strength': fields['strength']}
    if 'mask' in fields:
        more |= {'mask_image': fields['mask'], 'height': SIZE, 'width': SIZE}
    return theirs(pipe, fields['sampler'], [start], **more)


@pytest.fixture(scope='module')
def sides(tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp('img2img') / 'model'
    model = random_model(tiny('sd1', levels=2), tokenizer_folder)
    pipes = {'img2img': pipeline(diffusers.StableDiffusionImg2ImgPipeline, model, folder)}
    pipes['inpaint'] = diffusers.StableDiffusionInpaintPipeline(**pipes['img2img'].components)
    pipes['inpaint'].set_progress_bar_config(disable=True)
    return model, pipes, sampled(model, CASES, normal(len(CASES)))


def start(name, cases=CASES):
    return normal(len(cases))[list(cases).index(name)][None]


@pytest.mark.parametrize('name', [name for name in CASES if not name.endswith(' 1')])
def test_part_of_the_way(sides, name):
    _, pipes, found = sides
    wanted = expected(pipes[name.split()[0]], CASES, name, start(name))
    assert far(found[name], wanted) <= BOUND


def test_image_to_image_at_full_strength(sides):
    """Ours is text to image; diffusers leaves a rest of the picture below the noise."""
    model, pipes, found = sides
    name = 'img2img 1'
    sigma = sampling.schedule('simple', STEPS, model.config.schedule)[0]
    pipe, image = pipes['img2img'], picture(list(CASES).index(name), SIZE)
    with torch.no_grad():
        known = pipe.vae.encode(pipe.image_processor.preprocess(image)).latent_dist.mean
    rest = pipe.vae.config.scaling_factor * known.permute(0, 2, 3, 1).numpy() / np.float32(sigma)
    wanted = expected(pipes['img2img'], CASES, name, start(name) - rest)
    assert far(found[name], wanted) <= BOUND
    wanted = expected(pipes['img2img'], CASES, name, start(name))
    assert BOUND < far(found[name], wanted) < 0.05


def test_blending_at_full_strength(sides):
    """diffusers' first call sees noise alone outside of the mask, ours the noised picture."""
    _, pipes, found = sides
    name = 'inpaint 1'
    wanted = expected(pipes['inpaint'], CASES, name, start(name))
    assert BOUND < far(found[name], wanted) < 0.05


@pytest.fixture(scope='module', params=['sd1', 'sdxl'])
def seeing(request, tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp('inpainting') / 'model'
    model = random_model(tiny(request.param, levels=2, in_channels=9), tokenizer_folder)
    kind = {'sd1': diffusers.StableDiffusionInpaintPipeline,
            'sdxl': diffusers.StableDiffusionXLInpaintPipeline}[request.param]
    return pipeline(kind, model, folder), sampled(model, SEEN, normal(len(SEEN)))


@pytest.mark.parametrize('name', SEEN)
def test_model_that_sees_the_mask(seeing, name):
    pipe, found = seeing
    wanted = expected(pipe, SEEN, name, start(name, SEEN))
    assert far(found[name], wanted) <= BOUND
