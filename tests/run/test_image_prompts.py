"""Pictures as prompts: data of one program, what they do, and errors of one line."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_ip_adapters
from conftest import TINY
from test_generate import _far, compilations, on_devices

import jaxsd
from jaxsd import Engine, ImagePrompt, Request
from jaxsd.config_files import read_config
from jaxsd.images import cubic
from jaxsd.models import unet
from jaxsd.run import image_prompts
from jaxsd.run.inputs import inputs, lengthened, networks
from jaxsd.run.pipeline import pipeline
from jaxsd.run.resolving import resolve

RNG = np.random.default_rng(0)
PICTURE, OTHER, SMALL = (RNG.integers(0, 256, shape, np.uint8)
                         for shape in ((64, 64, 3), (40, 70, 3), (20, 12, 3)))
FACE = RNG.standard_normal(12).astype(np.float32)
HALF = np.zeros((64, 64), np.uint8)
HALF[:, 32:] = 255
KINDS = {'base': 'base', 'plus': 'plus', 'face': ('faceid', {'rank': 2}), 'both': 'faceid_plus'}
TEXT = Request('cat', seed=1, steps=4)


@pytest.fixture(scope='module')
def model(tiny_model, tmp_path_factory):
    """The tiny 1.x model with IP-Adapters of which each makes much of its pictures."""
    found = tiny_model('sd1')
    return found.replace(ip_adapters=tiny_ip_adapters.adapters(
        found.config.unet, tmp_path_factory.mktemp('adapters'), **KINDS))


def asked(*prompts, **fields):
    return TEXT.replace(image_prompts=prompts, **fields)


def prompt(net='base', image=PICTURE, **fields):
    return ImagePrompt(net, image, **fields)


EMBEDS = RNG.standard_normal(24).astype(np.float32)
# All of one kind: one prompt of `base`, of one picture, with a mask or the whole.
DATA = [asked(prompt()), asked(prompt(image=OTHER)), asked(prompt(weight=0.5)),
        asked(prompt(weight=-0.5)), asked(prompt(start=0.5)), asked(prompt(end=0.5)),
        asked(ImagePrompt('base', embeds=EMBEDS)),
        asked(ImagePrompt('base', embeds=EMBEDS, negative_embeds=-EMBEDS)),
        asked(prompt(blocks={'up': {'block_1': [1, 0]}})), asked(prompt(blocks={'mid': 1})),
        asked(prompt(), prompt='dog', sampler='heun', steps=3), asked(prompt(weight=0))]


@pytest.mark.slow
def test_image_prompts_are_data(model):
    first = jaxsd.generate(model, DATA[:1])
    with compilations() as count:
        images = jaxsd.generate(model, DATA)
        np.testing.assert_array_equal(jaxsd.generate(model, DATA[::-1]), images[::-1])
    assert not count
    np.testing.assert_array_equal(images[0], first[0])
    for i, j in np.ndindex(len(DATA), len(DATA)):
        assert i == j or _far(images[i], images[j]) > 0, (i, j)
    assert _far(images[-1], jaxsd.generate(model, [TEXT])[0]) <= 1  # of weight 0


_pipeline = jax.jit(pipeline, static_argnums=(2, 3, 4))


def batch(model, requests):
    requests = resolve(requests, model.config)
    data = lengthened(inputs(model, requests))
    params, config = networks(model, data)
    return np.asarray(_pipeline(params, data, config, 64, 64)[0])


# With and without, one and several prompts, of several adapters, with and without masks.
MIXED = [TEXT, asked(prompt('plus', weight=0.7), prompt(image=OTHER, end=0.5)),
         asked(prompt('plus', [PICTURE, SMALL])),
         asked(prompt('plus', OTHER, mask=HALF, weight=2), prompt('plus', SMALL, mask=255 - HALF)),
         asked(prompt('both', embeds=FACE)), asked(ImagePrompt('face', embeds=FACE, weight=0.5))]


@pytest.mark.slow
def test_a_mixed_batch_equals_its_solo_runs(model):
    images = jaxsd.generate(model, MIXED)  # each by the program of its kind
    for i, found in enumerate(batch(model, MIXED)):
        assert _far(found, images[i]) <= 1, i  # other programs: rounding
    for i, j in np.ndindex(len(MIXED), len(MIXED)):
        assert i == j or _far(images[i], images[j]) > 0, (i, j)


@pytest.mark.slow
def test_a_file_with_a_lora_brings_it(model):
    """FaceID's LoRA holds in the U-Net wherever the adapter is named, whatever the prompt's weight,
    as in diffusers."""
    silent = asked(ImagePrompt('face', embeds=FACE, weight=0))
    assert _far(jaxsd.generate(model, silent)[0], jaxsd.generate(model, TEXT)[0]) > 1


@pytest.mark.slow
def test_half_precision(model):
    half = model.replace(params=jax.tree.map(lambda a: a.astype('bfloat16'), model.params))
    found, whole = (jaxsd.generate(m, MIXED[3])[0].astype(int) for m in (half, model))
    assert 0 < np.abs(found - whole).mean() < 5


def test_keys_take_the_dtype_of_the_unet(model):
    """Adapters in float32 beside a U-Net in bfloat16 do not widen what comes after."""
    place, width = next(iter(unet.cross_attentions(model.config.unet).items()))
    keys = {place: [np.ones((1, 2, 1, 5, width), np.float32)] * 2}
    prompted = image_prompts.Keys(keys, np.array([[0, 1]]), [np.ones((1, 1, 9), np.float32)])
    attend = image_prompts.attend(model.config.unet, {'a': prompted},
                                  {'a': np.ones((1, 1, 4), np.float32)}, np.array([0, 1]))
    q, k = jnp.ones((2, 9, width), 'bfloat16'), jnp.ones((2, 7, width), 'bfloat16')
    assert attend(place, 4, q, k, k).dtype == 'bfloat16'


# With a LoRA and masks, for two devices.
SPREAD = [asked(prompt('plus', mask=HALF, end=0.5), ImagePrompt('face', embeds=FACE)),
          asked(prompt('plus', OTHER, mask=255 - HALF), ImagePrompt('face', embeds=-FACE), seed=2)]


@pytest.mark.slow
def test_several_devices_and_spread_weights(model, tmp_path):
    found = on_devices(2, tmp_path / 'a.npz', """
from test_image_prompts import KINDS, SPREAD, tiny_ip_adapters
model = model.replace(ip_adapters=tiny_ip_adapters.adapters(
    model.config.unet, path.parent, **KINDS))
images = jaxsd.generate(model, SPREAD)
with jaxsd.Engine(model, slots=1, spread=True) as engine:
    spread = engine.make(engine.resolve(SPREAD))
np.savez(path, images=images, spread=np.stack(spread))
""")
    images = jaxsd.generate(model, SPREAD)
    np.testing.assert_array_equal(found['images'], images)
    assert _far(found['spread'], images) <= 1


def test_a_second_pass_and_a_refiner(tiny_model, model, tmp_path):
    """Both passes follow the picture, and only a refiner's base model."""
    hires = asked(prompt('plus', mask=HALF), hires=jaxsd.Hires(scale=1.5, steps=2))
    with Engine(model, slots=1) as engine:
        first, second = (s.inputs for s in engine.prepare(*engine.resolve([hires]))[0])
    assert [m.shape[-1] for m in first.image_prompts['plus'].masks] == [64, 16]
    assert [m.shape[-1] for m in second.image_prompts['plus'].masks] == [144, 36]
    xl = tiny_model('sdxl').replace(ip_adapters=tiny_ip_adapters.adapters(
        tiny_model('sdxl').config.unet, tmp_path, base='base'))
    with Engine(xl, tiny_model('refiner'), slots=1) as engine:
        stages = engine.prepare(*engine.resolve([asked(prompt())]))[0]
    assert [bool(stage.inputs.image_prompts) for stage in stages] == [True, False]


def test_pictures_are_looked_at_once(model, monkeypatch):
    calls = []

    def look(*arguments):
        calls.append(arguments)
        return program(*arguments)

    program = image_prompts._program
    monkeypatch.setattr(image_prompts, '_program', look)
    image = RNG.integers(0, 256, (33, 44, 3), np.uint8)
    requests = resolve([asked(prompt('plus', image)), asked(prompt('base', image.copy()))],
                       model.config)
    for _ in range(2):
        inputs(model, requests)
    assert len(calls) <= 2  # the picture, and the image of zeros for the negative prompt
    for i in range(image_prompts.KEPT + 5):
        image_prompts.look_at(model.ip_adapters['base'].image_encoder, image + np.uint8(i))
    assert len(image_prompts._seen[model.ip_adapters['base'].image_encoder]) == image_prompts.KEPT


@pytest.mark.parametrize('name', ['sd1', 'sdxl'])
def test_blocks(name):
    cfg = dataclasses.replace(TINY[name].unet, transformer_layers=(1, 2), mid_transformer_layers=2)
    places = list(unet.cross_attentions(cfg))

    def weights(blocks):
        found = image_prompts._blocks(blocks, cfg)
        return {place: w for place, w in zip(places, found.tolist()) if w}

    assert set(weights(None)) == set(places) == set(weights({'down': 1, 'mid': 1, 'up': 1}))
    up = weights({'up': {'block_0': [0, 0.5]}, 'mid': 2})
    assert up == {f'up_blocks.0.attentions.1.transformer_blocks.{k}.attn2': 0.5 for k in (0, 1)} | {
        f'mid_block.attentions.0.transformer_blocks.{k}.attn2': 2 for k in (0, 1)}
    xl = read_config('sdxl').unet
    for name, block in (('style', 'up_blocks.0.attentions.1.'), (
            'layout', 'down_blocks.2.attentions.1.')):
        on = image_prompts._blocks(name, xl)
        assert [place.startswith(block) for place in unet.cross_attentions(xl)] == on.tolist()
    for wrong, message in (({'down': {'block_5': 1}}, r'down\.block_5: this model has attentions '
                            r'in down\.block_0, down\.block_1, up\.block_0'),
                           ({'up': {'block_0': [1, 2, 3]}}, 'expected a weight, or 2'),
                           ({'up': 'much'}, "up.block_0='much': expected a"),
                           ('style', 'up.block_0=.*: expected a weight, or 2')):
        with pytest.raises(ValueError, match=message):
            weights(wrong)


def test_masks_have_the_size_of_each_level(model):
    requests = resolve([asked(prompt(mask=HALF), width=72, height=56)], model.config)
    data = inputs(model, requests).image_prompts['base']
    assert [mask.shape for mask in data.masks] == [(1, 1, 7 * 9), (1, 1, 4 * 5)]
    left, right = data.masks[0].reshape(7, 9)[:, [0, -1]].T
    np.testing.assert_allclose([left, right], [[0] * 7, [1] * 7], atol=1e-6)
    assert cubic(np.ones((2, 5, 6)), 3, 4).shape == (2, 3, 4)


@pytest.mark.parametrize('fields, message', [
    (dict(net=3), 'net=3: expected the name of an IP-Adapter'),
    (dict(image=None), 'expected image= or embeds='), (dict(image=[]), 'at least one image'),
    (dict(weight='much'), "weight='much'"), (dict(start=0.5, end=0.5), 'expected start < end'),
    (dict(end=2), 'end=2'), (dict(blocks='stile'), "unknown blocks.*'stile'"),
    (dict(blocks={'left': 1}), "expected weights of 'down', 'mid' and 'up'")])
def test_bad_image_prompts(fields, message):
    with pytest.raises(ValueError, match=message):
        ImagePrompt(**{'net': 'plus', 'image': PICTURE, **fields})


@pytest.mark.parametrize('prompts, message', [
    (['plus'], 'expected a list of jaxsd.ImagePrompt'),
    ([prompt('plsu')], "unknown IP-Adapter 'plsu': did you mean 'plus'"),
    ([prompt(image='missing.png')], 'no such file: missing.png'),
    ([prompt(embeds=EMBEDS)], 'expected image= or embeds=, not both'),
    ([ImagePrompt('base', embeds=EMBEDS[:5])], r'embeds \[5\]: expected features .* \[24\]'),
    ([ImagePrompt('base', embeds=EMBEDS * np.nan)], 'expected finite numbers'),
    ([ImagePrompt('base', embeds=__file__)], 'expected an array of numbers, or a .npy file of one'),
    ([ImagePrompt('base', embeds=['a'])], 'expected an array of numbers'),
    ([ImagePrompt('base', embeds='missing.npy')], 'missing.npy'),
    ([ImagePrompt('plus', embeds=EMBEDS)], r'embeds \[24\]: expected .* \[.any., 32\]'),
    ([ImagePrompt('plus', embeds=np.zeros((7, 32)))], r'features \[10, 32\] for embeds \[1, 7, 32'),
    ([prompt('face')], 'expected embeds=, the embedding of a face'),
    ([prompt('face', embeds=FACE)], 'a FaceID sees no picture'),
    ([ImagePrompt('both', embeds=FACE)], 'expected image= beside embeds='),
    ([prompt('both', [PICTURE, OTHER], embeds=FACE)], '2 images and 1 embeddings'),
    ([prompt(blocks={'down': {'block_1': 1}})], 'down.block_1: this model has attentions in'),
    ([prompt(mask='missing.png')], 'no such file: missing.png'),
])
def test_bad_requests(model, prompts, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        jaxsd.generate(model, [TEXT.replace(image_prompts=prompts)])
    assert '\n' not in str(caught.value)


def test_what_does_not_fit_the_model(tiny_model, model):
    with pytest.raises(ValueError, match=r'no IP-Adapters; expected model.replace\(ip_adapters='):
        jaxsd.generate(tiny_model('sd1'), asked(prompt()))
    with pytest.raises(ValueError, match='this IP-Adapter is for a model .32-wide text, 4 cross'):
        jaxsd.generate(tiny_model('sdxl').replace(ip_adapters=model.ip_adapters), asked(prompt()))
    blind = model.replace(ip_adapters={name: dataclasses.replace(net, image_encoder=None)
                                       for name, net in model.ip_adapters.items()})
    with pytest.raises(ValueError, match=r'no image encoder; expected jaxsd.load_ip_adapter\(path'):
        jaxsd.generate(blind, asked(prompt()))
    with pytest.raises(ValueError, match='expected negative_embeds= beside embeds='):
        jaxsd.generate(blind, asked(ImagePrompt('plus', embeds=np.zeros((10, 32)))))
    with pytest.raises(ValueError, match="'base' with start or end: expected no change"):
        jaxsd.generate(model, asked(prompt(start=0.5), sampler='dpm_adaptive'))
    given = ImagePrompt('base', embeds=EMBEDS)
    assert _far(jaxsd.generate(blind, asked(given))[0], jaxsd.generate(model, asked(given))[0]) == 0
