"""Two passes are the same as the two steps by hand."""

import numpy as np
import pytest
from mains import ROOT
from PIL import Image

import jaxsd
from jaxsd.run import Engine, hires, inputs, latents, networks, pipeline


@pytest.fixture(scope='module')
def model():
    return jaxsd.load(ROOT / 'checkpoints' / 'emoji', 'float32')


FIELDS = {'prompt': 'red apple', 'seed': 7, 'steps': 6, 'guidance': 4, 'sampler': 'euler_ancestral'}


@pytest.mark.slow
@pytest.mark.parametrize('upscaler, by_hand', [
    ('lanczos', Image.Resampling.LANCZOS), ('nearest', Image.Resampling.NEAREST)])
def test_of_pixels(model, upscaler, by_hand):
    own = {'steps': 8, 'sampler': 'heun', 'guidance': 5.0, 'prompt': 'a red apple'}
    [found] = jaxsd.generate(model, jaxsd.Request(**FIELDS, hires={
        'scale': 1.5, 'strength': 0.6, 'upscaler': upscaler, **own}))
    [first] = jaxsd.generate(model, jaxsd.Request(**FIELDS))
    large = Image.fromarray(first).resize((96, 96), by_hand)
    [expected] = jaxsd.generate(model, jaxsd.Request(
        **FIELDS | own, image=large, strength=0.6, width=96, height=96))
    assert found.shape == (96, 96, 3)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_of_latents(model):
    """By hand through the pure functions; and 'comfyui' makes all steps of the second pass."""
    fields = FIELDS | {'schedule_options': {'convention': 'comfyui'}}
    [request] = Engine(model).resolve([jaxsd.Request(**fields, hires=jaxsd.Hires(
        width=96, height=96, strength=0.5))])
    seen = []
    [found] = jaxsd.generate(model, request, on_step=lambda done, total: seen.append(
        (done, total)))
    first, second = hires.passes(request)
    data = inputs(model, [first])
    params, config = networks(model, data)
    small = np.asarray(latents(params, data, config, 64, 64))
    data = hires.second(inputs(model, [second]), 'latent', small)
    assert data.init_latents.shape == (1, 12, 12, small.shape[-1])
    [expected], _ = pipeline(params, data, config, 96, 96)
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1
    assert seen[-1] == (12, 12)


@pytest.mark.slow
def test_passes_beside_other_pictures(model):
    """Each is what it is alone."""
    requests = [jaxsd.Request(**FIELDS | {'seed': seed}, hires=two) for seed, two in enumerate((
        None, jaxsd.Hires(scale=1.5, strength=0.5), jaxsd.Hires(scale=1.5, upscaler='lanczos'),
        None))]
    together = jaxsd.generate(model, requests)
    assert [image.shape[0] for image in together] == [64, 96, 96, 64]
    for request, image in zip(requests, together):
        np.testing.assert_array_equal(image, jaxsd.generate(model, request)[0])


@pytest.mark.slow
def test_with_a_refiner(tiny_model):
    """In both passes."""
    base, refiner = tiny_model('sdxl'), tiny_model('refiner')
    fields = {'prompt': 'red apple', 'seed': 1, 'steps': 6, 'guidance': 3, 'switch': 0.5}
    [found] = jaxsd.generate(base, jaxsd.Request(**fields, hires=jaxsd.Hires(
        scale=1.5, upscaler='lanczos', strength=0.9)), refiner=refiner)
    [first] = jaxsd.generate(base, jaxsd.Request(**fields), refiner=refiner)
    large = Image.fromarray(first).resize((96, 96), Image.Resampling.LANCZOS)
    [expected] = jaxsd.generate(base, jaxsd.Request(
        **fields, image=large, strength=0.9, width=96, height=96), refiner=refiner)
    [alone] = jaxsd.generate(base, jaxsd.Request(
        **fields, image=large, strength=0.9, width=96, height=96))
    np.testing.assert_array_equal(found, expected)
    assert (found != alone).any()


def test_previews_of_both_passes(model):
    seen = []
    preview = jaxsd.Preview(jaxsd.Network(model.config.vae, model.params['vae']),
                            lambda done, total, images: seen.append((total, images.shape)), every=2)
    jaxsd.generate(model, [jaxsd.Request(**FIELDS, hires={'scale': 1.5}), jaxsd.Request(**FIELDS)],
                   preview=preview)
    assert seen[0] == (16, (2, 64, 64, 3)) and seen[-1] == (16, (2, 96, 96, 3))


@pytest.mark.parametrize('upscaler, mode', [
    ('latent', Image.Resampling.BILINEAR), ('latent_bicubic_antialiased', Image.Resampling.BICUBIC),
    ('latent_nearest', Image.Resampling.NEAREST)])
@pytest.mark.parametrize('size', [(16, 10), (13, 17)])
def test_latents_are_enlarged_as_by_pillow(upscaler, mode, size):
    """Which filters numbers as torch does with antialiasing; linearly they are the same."""
    array = np.random.default_rng(0).standard_normal((5, 8, 2)).astype(np.float32)
    found = hires.enlarge(array, *size, upscaler)
    scale = max(size[0] / 8, size[1] / 5)
    left, top = (8 - size[0] / scale) / 2, (5 - size[1] / scale) / 2
    for channel in range(2):
        expected = Image.fromarray(array[..., channel]).resize(size, mode, (
            left, top, 8 - left, 5 - top))
        np.testing.assert_allclose(found[..., channel], expected, atol=1e-5)


@pytest.mark.parametrize('fields, message', [
    ({'hires': {'scal': 2}}, "unknown field of hires 'scal': did you mean 'scale'"),
    ({'hires': {'scale': 0.5}}, 'hires scale'),
    ({'hires': {'upscaler': 2}}, 'hires upscaler=2: expected a name'),
    ({'hires': {'sampler': 'eule'}}, "did you mean 'euler'"), ({'hires': 2}, 'jaxsd.Hires'),
    ({'hires': {'steps': 0}}, 'steps=0'), ({'hires': {'strength': 2}}, 'hires strength'),
    ({'hires': {}, 'image': 'a.png', 'mask': 'b.png'}, 'hires and mask')])
def test_what_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        jaxsd.Request('cat', **fields)


def test_sizes(model):
    assert jaxsd.Hires(scale=1.6).size(64, 40) == (96, 64)  # 102.4 x 64
    assert jaxsd.Hires(width=128).size(64, 48) == (128, 96)
    with pytest.raises(ValueError, match='32x32, expected at least the 64x64'):
        jaxsd.generate(model, jaxsd.Request('cat', hires={'width': 32}))
