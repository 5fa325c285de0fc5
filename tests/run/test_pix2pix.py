"""InstructPix2Pix: a model that sees the picture that it edits, and the scale of that picture."""

import dataclasses

import numpy as np
import pytest
from conftest import TINY
from test_generate import _far, compilations

import jaxsd
from jaxsd import Request
from jaxsd.models import spec
from jaxsd.run import infotext, picture
from jaxsd.run.inputs import inputs
from jaxsd.run.resolving import resolve

PICTURE, OTHER = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
EDIT = Request('cat', seed=1, steps=3, image=PICTURE)


@pytest.fixture(scope='module')
def model(tiny_model):
    """The tiny 1.x model with eight input channels."""
    plain = tiny_model('sd1')
    config = plain.config.replace(unet=dataclasses.replace(plain.config.unet, in_channels=8))
    return plain.replace(config=config, params=plain.params | {
        'unet': spec.init(0, config)['unet']})


@pytest.mark.slow
def test_scales_pictures_and_strengths_are_data(model):
    """A request does not see what is beside it, and each value has an effect."""
    batch = [EDIT, EDIT.replace(image_guidance=(1.0, 2.0, 6.0)), EDIT.replace(image=OTHER),
             EDIT.replace(strength=0.5), EDIT.replace(guidance=1, image_guidance=1)]
    images = jaxsd.generate(model, batch)
    with compilations() as count:
        again = jaxsd.generate(model, [batch[1], EDIT.replace(image_guidance=1.5)])
    assert not count
    assert _far(again[0], images[1]) == _far(again[1], images[0]) == 0
    assert all(_far(image, images[0]) > 1 for image in images[1:])


def test_what_a_request_leaves_open(model):
    [found] = resolve([EDIT], model.config)
    assert (found.image_guidance, found.strength, found.guidance) == (1.5, 1, 7)
    data = inputs(model, [found])
    assert data.steps.guidance.parts == 3 and not data.init_weight.any()
    interval = {'interval': (0, 0.4)}
    [found] = resolve([EDIT.replace(guidance_options=interval)], model.config)
    np.testing.assert_array_equal(inputs(model, [found]).steps.guidance.image[:, 0], [1.5, 1, 1])
    assert {name: jaxsd.read_config(name).task for name in ('sd15_pix2pix', 'sdxl_pix2pix')} == {
        'sd15_pix2pix': 'pix2pix', 'sdxl_pix2pix': 'pix2pix'}
    suited = [resolve([EDIT.replace(force_size=True)], jaxsd.read_config(name))[0].guidance
              for name in ('sd15_pix2pix', 'sdxl_pix2pix')]
    assert suited == [7.5, 3.0]


@pytest.mark.parametrize('fields, message', [
    ({'image': None}, 'image: expected one, the picture that this model edits'),
    ({'sampler': 'dpm_adaptive', 'image_guidance': (1, 2, 3)},
     'image_guidance over the steps: expected a constant with dpm_adaptive'),
    ({'hires': {}}, 'hires: expected a model from text alone, found one for pix2pix')])
def test_refused(model, fields, message):
    with pytest.raises(ValueError, match=message):
        inputs(model, resolve([EDIT.replace(**fields)], model.config))


def test_refused_by_other_models():
    with pytest.raises(ValueError, match='image_guidance=1.5: expected an instruct-pix2pix model'):
        resolve([EDIT.replace(image_guidance=1.5)], TINY['sd1'])
    with pytest.raises(ValueError, match='image_guidance: expected a number or 3 of them'):
        EDIT.replace(image_guidance=(1, 2))


def test_written_and_read(model):
    """In A1111's words, which a model of another kind passes over with a note."""
    text = picture.parameters(EDIT.replace(image_guidance=1.25))
    assert 'Image CFG scale: 1.25' in text
    assert infotext.foreign(text).fields['image_guidance'] == 1.25
    assert 'Image CFG' not in picture.parameters(EDIT)
    asked = EDIT.replace(image_guidance=1.25)
    assert infotext.fit([asked], model.config) == ([asked], [])
    [passed], notes = infotext.fit([asked], TINY['sd1'])
    assert passed.image_guidance is None
    assert notes == ['Image CFG scale: 1.25: this model does not see the image']
