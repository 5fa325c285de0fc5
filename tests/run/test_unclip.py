"""unCLIP: variations of a picture by its embedding."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import TINY
from test_generate import _far, compilations

import jaxsd
from jaxsd import Request
from jaxsd.config import ImageNormalizerConfig, ScheduleConfig, VisionConfig
from jaxsd.config_files import read_config
from jaxsd.models import spec
from jaxsd.run.inputs import inputs
from jaxsd.run.resolving import resolve
from jaxsd.weights import write_config

PICTURE, OTHER = np.random.default_rng(0).integers(0, 256, (2, 40, 64, 3), np.uint8)
VARY = Request(image=PICTURE, seed=1, steps=3)
CONFIG = TINY['sd2'].replace(
    unet=dataclasses.replace(TINY['sd2'].unet, class_proj_dim=16),
    image_encoder=VisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                               num_attention_heads=2, image_size=28, projection_dim=8),
    image_normalizer=ImageNormalizerConfig(8),
    image_noise=ScheduleConfig(beta_schedule='squaredcos_cap_v2'))


@pytest.fixture(scope='module')
def model(tiny_model):
    """A tiny unCLIP of which a picture makes much."""
    plain = tiny_model('sd2')
    params = spec.init(0, CONFIG)
    params['image_normalizer']['std'] += 2
    params['unet']['class_embedding']['linear_2']['weight'] *= 20
    return plain.replace(config=CONFIG, params=params)


@pytest.mark.slow
def test_pictures_and_noise_levels_are_data(model):
    batch = [VARY, VARY.replace(image=OTHER), VARY.replace(class_label=900),
             VARY.replace(strength=0.5), VARY.replace(prompt='cat', guidance=30)]
    images = jaxsd.generate(model, batch)
    with compilations() as count:
        again = jaxsd.generate(model, [batch[1], VARY])
    assert not count
    assert _far(again[0], images[1]) == _far(again[1], images[0]) == 0
    assert all(_far(image, images[0]) > 0 for image in images[1:])


def test_what_the_network_is_given(model):
    """Of prompts the embedding, at level 0 all but as it is, and sinusoids of the level."""
    [found] = resolve([VARY], CONFIG)
    data = inputs(model, [found])
    assert found.strength == 1 and not data.init_weight.any()
    assert data.labels.shape == (1, 2, 16) and not data.labels[0, 0].any()
    np.testing.assert_array_equal(data.labels[0, 1, 8:], [1] * 4 + [0] * 4)
    noisy = inputs(model, resolve([VARY.replace(class_label=999)], CONFIG)).labels[0, 1]
    assert np.abs(noisy - data.labels[0, 1])[:8].max() > 0.1


@pytest.mark.parametrize('fields, message', [
    ({'image': None}, 'image: expected one, the picture that this model makes variations of'),
    ({'class_label': 1000}, 'class_label=1000: expected a noise level of the image, 0 to 999'),
    ({'negative_class_label': 1}, 'negative_class_label: this model has no classes')])
def test_refused(model, fields, message):
    with pytest.raises(ValueError, match=message):
        inputs(model, resolve([VARY.replace(**fields)], CONFIG))


def test_config(model, tmp_path):
    write_config(CONFIG, tmp_path / 'a')
    assert read_config(tmp_path / 'a') == CONFIG and CONFIG.task == 'unclip'
    with pytest.raises(ValueError, match='class embeddings of 16, and an image encoder gives 0'):
        CONFIG.replace(image_encoder=None).check_fit()
    jaxsd.save(model, tmp_path / 'a.safetensors', layout='single-file')
    again = jaxsd.load(tmp_path / 'a.safetensors')
    assert again.config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    index = tmp_path / 'a' / 'model_index.json'
    index.write_text(json.dumps(json.loads(index.read_text()) | {
        '_class_name': 'StableDiffusionPipeline'}))
    with pytest.raises(ValueError, match='expected one with StableUnCLIPImg2ImgPipeline alone'):
        read_config(tmp_path / 'a')
