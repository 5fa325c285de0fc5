"""Prompts for parts of a picture, and windows of it: what they do, data, and errors of one line."""

import json

import jax
import numpy as np
import pytest
from conftest import TINY
from PIL import Image

import jaxsd
from jaxsd import Control, ImagePrompt, Region, Request
from jaxsd.batch import plan
from jaxsd.run import (
    denoiser,
    encode,
    encode_text,
    inputs,
    latents,
    networks,
    picture,
    resolve,
)
from jaxsd.run.infotext import from_texts
from jaxsd.run.inputs import program
from jaxsd.run.regions import Windows
from jaxsd.sampling.guidance import Guidance

LEFT, GRAY = np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.uint8)
LEFT[:, :32], GRAY[:32, 16:] = 255, 51  # a fifth
PLAIN = Request('dog', negative_prompt='red', seed=1, steps=3)
REGIONS = (Region('cat', LEFT), Region('a green apple', GRAY, weight=2.0))


def drawn(model, requests, **fields):
    data = inputs(model, resolve([r.replace(**fields) for r in requests], model.config))
    params, config = networks(model, data)
    draw = jax.jit(latents, static_argnames=('config', 'height', 'width'))
    return np.asarray(draw(params, data, config=config, height=64, width=64))


def test_denoised_pictures_are_mixed_as_in_comfyui(tiny_model):
    """Each prompt's by weight times mask, over their sum; then guidance."""
    model = tiny_model('sd1')
    data = inputs(model, resolve([PLAIN.replace(regions=REGIONS, guidance=5)], model.config))
    params, config = networks(model, data)
    encoded, x = encode(params, config, data, encode_text(params, config, data), 64, 64)
    step = jax.tree.map(lambda a: a[0], data.steps)

    @jax.jit
    def denoised(encoded, step):
        return denoiser(params, config, encoded)(x, step.row.sigma, step)[0]

    def alone(text):  # the network sees one part of the guidance
        one = step._replace(guidance=Guidance(None), text_index=np.array([[text, text]]))
        return np.asarray(denoised(encoded._replace(regions=None), one))

    guided = denoised(encoded, step)

    uncond, *conds = (alone(text) for text in range(4))
    cells = np.stack([np.ones((8, 8)), *(
        np.kron(block, np.ones((4, 4))) for block in ([[1, 0], [1, 0]],)), np.zeros((8, 8))], -1)
    cells[:4, 2:, 2] = 0.2
    mult = cells * (1, 1, 2)
    cond = sum(mult[..., k, None] * c for k, c in enumerate(conds)) / mult.sum(-1)[..., None]
    wanted = uncond + 5 * (cond - uncond)
    assert np.abs(guided - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert np.abs(conds[0] - wanted).max() > 1e-2 * np.abs(wanted).max()


def test_regions_are_data_beside_pictures_without(tiny_model):
    """A picture does not see what is beside it; white masks are AND with these weights in sum 1."""
    model = tiny_model('sd1')
    white = Region('cat', box=(0, 0, 1, 1), weight=3.0)
    asked = [PLAIN.replace(regions=[white]), PLAIN.replace(prompt='dog :0.25 AND cat :0.75'),
             PLAIN, PLAIN.replace(prompt='', regions=[Region('dog', box=(0, 0, 0.5, 1)),
                                                      Region('dog', LEFT[:, ::-1].copy())])]
    found = drawn(model, asked)
    scale = np.abs(found).max()
    assert np.abs(found[0] - found[1]).max() <= 1e-5 * scale
    assert np.abs(drawn(model, [PLAIN])[0] - found[2]).max() <= 1e-5 * scale
    assert np.abs(found[3] - found[2]).max() <= 1e-5 * scale  # an empty prompt counts nowhere
    assert np.abs(found[0] - found[2]).max() > 1e-4 * scale
    kinds = {program(inputs(model, resolve([PLAIN.replace(regions=regions)], model.config)))
             for regions in ([white], [Region('dog', LEFT)])}
    assert len(kinds) == 1


def test_an_empty_prompt_fills_what_is_left(tiny_model):
    model = tiny_model('sd1')
    request = PLAIN.replace(prompt='', regions=[Region('cat AND dog :3', LEFT, weight=2)])
    data = inputs(model, resolve([request], model.config))
    assert data.regions[0, 0, [0, 7]].tolist() == [[0, 0.25, 0.75], [1, 0, 0]]
    assert data.steps.guidance.prompts[1].tolist() == [[1]] * 3


def test_windows():
    """They cover a picture whose size their stride does not divide, and are inside of it."""
    assert Windows(8, 4).places(8, 17).tolist() == [[0, 0], [0, 4], [0, 8], [0, 9]]
    assert Windows(8, 8).places(6, 8).tolist() == [[0, 0]]


def test_windows_choose_the_program(tiny_model):
    model = tiny_model('sd1')
    made = [PLAIN.replace(width=128, window=64, window_stride=stride) for stride in (None, 32, 64)]
    made.append(PLAIN.replace(width=128))
    half, same, whole, without = (program(inputs(model, resolve([r], model.config))) for r in made)
    assert half == same != whole and without not in (half, whole)
    assert inputs(model, resolve([PLAIN.replace(window=64)], model.config)).windows is None
    with pytest.raises(ValueError, match='windows of one batch: expected the same'):
        inputs(model, resolve(made, model.config))
    large = PLAIN.replace(width=512, height=512)
    with pytest.raises(ValueError, match='draws nothing but noise'):
        resolve([large], TINY['sd1'])
    resolve([large.replace(window=64)], TINY['sd1'])  # which the network never sees as one


@pytest.mark.slow
def test_all_that_has_a_place_is_cut(tiny_model):
    """A window of the whole picture's size, and one below that is cut from the same arrays."""
    model = tiny_model('sd1')
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    asked = PLAIN.replace(image=image, strength=0.8, mask=LEFT, regions=REGIONS,
                          guidance_options={'rescale': 0.5})
    [windows] = jaxsd.generate(model, [asked.replace(window=32)])
    [whole] = jaxsd.generate(model, [asked])
    np.testing.assert_array_equal(windows[:, 32:], whole[:, 32:])  # pasted back
    assert np.abs(windows.astype(int) - whole).max() > 0


def test_regions_are_recorded_and_planned(tmp_path):
    """Paths come back; an array is told; a plan's paths are beside it."""
    Image.fromarray(LEFT).save(tmp_path / 'left.png')
    asked = PLAIN.replace(regions=[Region('cat', str(tmp_path / 'left.png'), weight=0.5),
                                   {'prompt': 'dog', 'box': [0, 0, 1, 0.5]}, REGIONS[0]])
    past = from_texts('a', {'jaxsd': picture.record(asked)})
    assert [vars(region) for region in past.fields['regions']] == [
        vars(region) for region in asked.regions[:2]]
    assert past.notes == ["region 'cat': its mask was given as an array, which the record does not "
                          'hold']
    past.check_files()
    assert past.named()['regions'] == past.fields['regions']
    Image.fromarray(GRAY).save(tmp_path / 'left.png')
    with pytest.raises(ValueError, match='left.png has changed since'):
        past.check_files()
    (tmp_path / 'plan.jsonl').write_text(json.dumps({'prompt': 'x', 'regions': [
        {'prompt': 'cat', 'mask': 'left.png'}, {'prompt': 'dog', 'box': [0, 0, 1, 1]}]}))
    [item], bad = plan.read(tmp_path / 'plan.jsonl', {})
    assert not bad
    assert [region.mask for region in item.fields['regions']] == [
        str(tmp_path / 'left.png'), None]


def region(**fields):
    return {'regions': [{'prompt': 'cat', 'box': (0, 0, 1, 1), **fields}]}


@pytest.mark.parametrize('fields, message', [
    ({'regions': 'cat'}, 'regions=.cat.: expected a list of jaxsd.Region'),
    ({'regions': ['cat']}, 'regions: .cat.: expected a jaxsd.Region or a mapping of its fields'),
    (region(prompt=7), 'region prompt=7: expected a string'),
    (region(box=None), 'expected mask= or box=, where it lies'),
    (region(mask=LEFT), 'expected mask= or box=, where it lies'),
    (region(box=(0.5, 0, 0.5, 1)), 'expected left < right and top < bottom'),
    (region(box=(0, 0, 2, 1)), 'region box=2: expected a number from 0 to 1'),
    (region(weight=-1), 'region weight=-1: expected a number of at least 0'),
    (region(strength=1), 'unknown field of regions'),
    (region(prompt='<lora:ink:1>'), 'expected no LoRA'),
    ({**region(), 'prompt': 'dog AND cat :-1'}, 'regions: expected no weight below 0, found -1'),
    ({**region(), 'guidance_options': {'pag': 1}}, 'regions and pag: expected one of them'),
    ({'window': 60}, 'window=60, window_stride=None: expected multiples of 8 pixels'),
    ({'window_stride': 8}, 'window_stride=8: expected window= as well'),
    ({'window': 64, 'window_stride': 72}, 'expected at most the window of 64 pixels'),
    ({'window': 64, 'guidance_options': {'sag': 1}}, 'window and sag: expected one of them'),
    ({'window': 64, 'image_prompts': [ImagePrompt('a', LEFT, mask=LEFT)]},
     'window and masks of image_prompts'),
    ({'window': 8, 'window_stride': 8, 'width': 1024, 'height': 1024, 'force_size': True},
     '16384 windows in 1024x1024, expected at most 1024')])
def test_refused(tiny_model, fields, message):
    with pytest.raises(ValueError, match=message):
        inputs(tiny_model('sd1'), resolve([PLAIN.replace(**fields)], tiny_model('sd1').config))


def test_t2i_adapters_see_no_windows(tiny_model):
    config = jaxsd.config.T2IAdapterConfig(channels=(32, 64), downscale_factor=8, num_res_blocks=1)
    model = tiny_model('sd1')
    model = model.replace(controlnets={'t2i': jaxsd.Network(config, {})})
    hint = Control('t2i', np.zeros((8, 8, 3), np.uint8))
    asked = PLAIN.replace(width=128, window=64, controls=[hint])
    with pytest.raises(ValueError, match='window: expected no T2I-Adapter'):
        inputs(model, resolve([asked], model.config))


@pytest.mark.slow
def test_windows_and_regions_in_two_passes(tiny_model):
    """The second pass sees windows of the first one's size, and masks at its own."""
    asked = PLAIN.replace(regions=REGIONS, window=64, hires=jaxsd.Hires(upscaler='lanczos'))
    [found] = jaxsd.generate(tiny_model('sd1'), [asked])
    [whole] = jaxsd.generate(tiny_model('sd1'), [asked.replace(window=None)])
    assert found.shape == whole.shape == (128, 128, 3)
    assert np.abs(found.astype(int) - whole).max() > 0
