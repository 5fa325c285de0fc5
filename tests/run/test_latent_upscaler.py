"""The x2 latent upscaler: sizes, data, and what it refuses."""

import dataclasses

import numpy as np
import pytest
from conftest import TINY
from test_generate import _far, compilations

import jaxsd
from jaxsd import Request
from jaxsd.config import KUNetConfig
from jaxsd.config_files import K_SCHEDULE
from jaxsd.models import spec
from jaxsd.run.inputs import inputs
from jaxsd.run.resolving import resolve

PICTURE, OTHER = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
ENLARGE = Request('cat', seed=1, steps=3, image=PICTURE)
CONFIG = TINY['sd1'].replace(
    schedule=K_SCHEDULE, text_encoder=dataclasses.replace(TINY['sd1'].text_encoder,
                                                          final_norm=False),
    unet=KUNetConfig(block_out_channels=(32, 64, 64), layers_per_block=1, attention_head_dim=16,
                     cross_attention_dim=32, time_cond_dim=160))


@pytest.fixture(scope='module')
def model(tiny_model):
    return tiny_model('sd1').replace(config=CONFIG, params=spec.init(0, CONFIG))


@pytest.mark.slow
def test_pictures_and_prompts_are_data(model):
    batch = [ENLARGE, ENLARGE.replace(image=OTHER), ENLARGE.replace(prompt='dog', seed=2)]
    images = jaxsd.generate(model, batch)
    assert images.shape == (3, 128, 128, 3)
    with compilations() as count:
        again = jaxsd.generate(model, [batch[1]])
    assert not count and _far(again[0], images[1]) == 0
    assert _far(images[0], images[1]) > 1


def test_what_a_request_leaves_open(model):
    """Twice the size, in whole units; the prompt alone, from noise."""
    [found] = resolve([ENLARGE.replace(image=PICTURE[:40])], CONFIG)
    assert (found.width, found.height, found.guidance, found.strength) == (128, 64, 1, 1)
    data = inputs(model, [found])
    assert data.low_res.shape == (1, 32, 64, 3) and data.steps.guidance.parts == 1


@pytest.mark.parametrize('fields, message', [
    ({'image': None}, 'image: expected one, the small picture that this model enlarges'),
    ({'width': 80, 'height': 64}, 'width=80: expected a multiple of 32 pixels, for example 64 or'),
    ({'strength': 0.5}, 'strength=0.5: expected 1 with an upscaler'),
    ({'mask': PICTURE[..., 0]}, 'mask: an upscaler follows its image and text alone'),
    ({'tiling': 'x'}, 'tiling: expected none, as this model enlarges across no edge'),
    ({'guidance_options': {'freeu': (1, 1, 1, 1)}}, 'freeu: this U-Net has no such blocks'),
    ({'guidance_options': {'deep_shrink': {}}}, 'deep_shrink: this U-Net has no such blocks'),
    ({'guidance_options': {'deepcache': {}}}, 'deepcache: this U-Net has no such blocks'),
    ({'guidance_options': {'hypertile': {}}}, 'hypertile: this U-Net has no such blocks'),
    ({'guidance_options': {'pag': 1}}, 'pag: expected a U-Net with attention in its middle')])
def test_refused(model, fields, message):
    with pytest.raises(ValueError, match=message):
        inputs(model, resolve([ENLARGE.replace(**fields)], CONFIG))


def test_other_files_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="expected 'diffusers' for the x2 latent upscaler"):
        jaxsd.save(model, tmp_path / 'a.safetensors', layout='single-file')
    with pytest.raises(ValueError, match='the x2 latent upscaler takes no adapters'):
        jaxsd.load_adapter(tmp_path / 'a.safetensors', model)
