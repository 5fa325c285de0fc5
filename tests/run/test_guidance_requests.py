"""Guidance through `generate`: data, mixed batches, several devices, errors."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from run.test_generate import _far, compilations

import jaxsd
from jaxsd import Request, sampling
from jaxsd.run import picture
from jaxsd.run.inputs import _table, inputs, networks, program
from jaxsd.run.pipeline import latents
from jaxsd.run.resolving import resolve

KINDS = {
    'rescale': 0.7, 'threshold': {'mimic': 2.0}, 'cfg_zero_star': {},
    'apg': {'norm': 5.0, 'momentum': -0.3}, 'perp_neg': (('dog', 1.0), ('a red', 0.5)),
    'pag': 3.0, 'sag': 0.75, 'freeu': (1.3, 1.4, 0.9, 0.2),
    'easycache': {'threshold': 0.5, 'start': 0},
}
SHRINK = {'block': 1, 'factor': 4, 'start': 0.3, 'end': 1}  # from the second of three steps on
OTHER = {
    'rescale': (0.1, 0.2, 0.3), 'threshold': {'percentile': 0.9},
    'cfg_zero_star': {'init_steps': 0}, 'apg': {'eta': 0.5}, 'pag': 1.0, 'sag': 0.1,
    'perp_neg': (('apple', 2.0), ('', 1.0)), 'freeu': (1.1, 1.2, 0.8, (0.5, 0.6, 0.7)),
    'easycache': {'threshold': 0},
}
PLAIN = Request('cat', seed=1, steps=3)


@pytest.mark.slow
def test_a_mixed_batch_equals_solo_runs_and_values_are_data(tiny_model):
    """All kinds at once beside an image without any, which must not notice; then other values."""
    model = tiny_model('sd1')
    batch = [PLAIN, Request('red apple', seed=2, steps=3, guidance=(2.0, 5.0, 3.0),
                            guidance_options=KINDS)]
    images = jaxsd.generate(model, batch)
    for image, request in zip(images, batch):
        assert _far(image, jaxsd.generate(model, [request])[0]) <= 1, request
    with compilations() as count:
        again = jaxsd.generate(model, [PLAIN.replace(sampler='heun'), batch[1].replace(
            guidance=4.0, guidance_options=OTHER)])
    assert not count
    assert _far(again[1], images[1]) > 1


def test_every_kind_reaches_the_guidance(tiny_model):
    """From the same inputs as `generate`: each kind changes the Guidance and the parts it needs."""
    model = tiny_model('sdxl')
    for kind, value in {**KINDS, 'deep_shrink': SHRINK, 'deepcache': {}}.items():
        request = PLAIN.replace(guidance_options={kind: value})
        data = inputs(model, resolve([PLAIN, request], model.config))
        used = [name for name, field in data.steps.guidance._asdict().items() if field is not None]
        assert used == ['scale', {'cfg_zero_star': 'zero_star', 'deep_shrink': 'shrink'}.get(
            kind, kind)]
        texts = 4 if kind == 'perp_neg' else 2
        assert data.ids.shape == (2, texts, 6)
        assert {t.tokens.shape[1:] for t in data.tokens.values()} == {(texts, 16)}
        assert {a.shape for a in jax.tree.leaves(data.steps.guidance)} == {(3, 2)}


def test_requests_survive_json():
    request = Request(steps=3, guidance=[1.0, 2.0, 3.0], guidance_options=KINDS)
    found = json.loads(picture.record(request))['request']
    assert Request(**{**found, 'crop': (0, 0)}) == request


@pytest.mark.parametrize('fields, message', [
    (dict(guidance=[1.0, 2.0], steps=25),
     'guidance: expected a number or 25 of them, one per step; found 2'),
    (dict(guidance=True), 'guidance=True: expected a finite number'),
    (dict(guidance=-1), 'guidance=-1: expected a number of at least 0'),
    (dict(guidance_options={'pga': 3}), "unknown guidance option 'pga': did you mean 'pag'"),
    (dict(guidance_options=[('pag', 3)]), 'guidance_options=.*: expected a mapping'),
])
def test_refused_at_construction(fields, message):
    with pytest.raises(ValueError, match=message):
        Request(**fields)


@pytest.mark.parametrize('name', ['pag', 'sag'])
def test_attention_in_the_middle_is_needed(tiny_model, name):
    """Distilled networks may have none."""
    model = tiny_model('sd1')
    config = model.config.replace(unet=dataclasses.replace(model.config.unet,
                                                           mid_transformer_layers=-2))
    with pytest.raises(ValueError, match=f'{name}: expected a U-Net with attention in its middle'):
        inputs(model.replace(config=config), resolve([PLAIN.replace(
            guidance_options={name: 1.0})], config))


def test_adaptive_steps_take_constants_only(tiny_model):
    model = tiny_model('sd1')
    request = PLAIN.replace(sampler='dpm_adaptive')
    scale = inputs(model, resolve([request], model.config)).steps.guidance.scale
    assert scale.shape == (1000, 1) and (scale == 7).all()
    for fields in (dict(guidance=(1.0, 2.0, 3.0)), dict(guidance_options={'interval': (0, 0.5)})):
        with pytest.raises(ValueError, match='expected a constant with dpm_adaptive'):
            inputs(model, resolve([request.replace(**fields)], model.config))


def test_samplers_that_ask_for_the_config_get_the_models(tiny_model, monkeypatch):
    config = tiny_model('sd1').config.schedule
    given = []

    def curious(sigmas, config=None):
        given.append(config)
        return sampling.plan('euler', sigmas)

    monkeypatch.setitem(sampling.SAMPLERS, 'curious', curious)
    _table(Request(sampler='curious', schedule='karras', steps=3, strength=1), config)
    assert given == [config]


def test_deep_shrink_in_some_steps_of_some_pictures(tiny_model):
    """Where it is off a picture is what it is without, whatever is beside it; its span is data."""
    model = tiny_model('sd1')
    spans = [{'deep_shrink': SHRINK | span} for span in ({}, {'start': 0.9, 'end': 0.95})]
    asked = resolve([PLAIN.replace(guidance_options=span) for span in (*spans, {})], model.config)
    data = inputs(model, asked)
    assert data.steps.guidance.shrink.on.T.tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert len({program(inputs(model, [request])) for request in asked[:2]}) == 1

    def drawn(data):
        params, config = networks(model, data)
        draw = jax.jit(latents, static_argnames=('config', 'height', 'width'))
        return np.asarray(draw(params, data, config=config, height=64, width=64))

    shrunk, never, beside = drawn(data)
    np.testing.assert_array_equal(never, beside)
    alone, scale = drawn(inputs(model, asked[2:]))[0], np.abs(never).max()
    assert np.abs(alone - never).max() <= 1e-5 * scale < 1e-3 * scale < np.abs(shrunk - never).max()


@pytest.mark.parametrize('options, message', [
    ({'deep_shrink': 2}, 'expected a mapping, of block, factor'),
    ({'deep_shrink': {'blocks': 2}}, "deep_shrink 'blocks': did you mean 'block'"),
    ({'deep_shrink': {'block': 4}}, 'deep_shrink block=4: expected at most 3, the last block'),
    ({'deep_shrink': {'block': 1.5}}, 'expected a whole number'),
    ({'deep_shrink': {'factor': 0.5}}, 'deep_shrink factor=0.5: expected a number from 1 to 16'),
    ({'deep_shrink': {'start': 0.4}}, 'expected start < end'),
    ({'deep_shrink': {'upscale_method': 'bislerp'}}, 'unknown upscale_method of'),
    ({'deep_shrink': {}, 'sag': 1}, 'deep_shrink and sag: expected one of them')])
def test_deep_shrink_refused(tiny_model, options, message):
    with pytest.raises(ValueError, match=message):
        inputs(tiny_model('sd1'), resolve([PLAIN.replace(guidance_options=options)],
                                          tiny_model('sd1').config))


def test_deep_shrinks_of_several_settings_are_batches_of_their_own(tiny_model):
    """In one call of `inputs` they are refused; the engine gives each programs of its own."""
    model = tiny_model('sd1')
    several = resolve([PLAIN.replace(guidance_options={'deep_shrink': SHRINK | {'block': block}})
                       for block in (1, 2)], model.config)
    with pytest.raises(ValueError, match='expected the same; run them in batches of their own'):
        inputs(model, several)
    assert len({program(inputs(model, [request])) for request in several}) == 2


def test_deepcache_of_some_pictures(tiny_model):
    """A picture is the same beside others and alone, and near what it is without."""
    model = tiny_model('sd1')
    cached = PLAIN.replace(steps=8, guidance_options={'deepcache': {'interval': 2, 'branch': 1}})
    asked = resolve([cached, cached.replace(guidance_options={}), cached.replace(sampler='heun')],
                    model.config)
    again = inputs(model, asked).steps.guidance.deepcache.again
    assert again[:, 0].tolist() == [0, 1] * 4 + [1] * 7 and not again[:, 1].any()
    assert again[:15, 2].tolist() == [0, 1] * 7 + [0]
    images = jaxsd.generate(model, asked, slots=2)
    for request, image in zip(asked[:2], images):
        np.testing.assert_array_equal(jaxsd.generate(model, request, slots=2)[0], image)
    assert 0 < _far(images[0], images[1]) < 100


@pytest.mark.parametrize('options', [{'hypertile': {'tile_size': 32}},
                                     {'token_merging': {'ratio': 0.25}}])
def test_self_attention_over_fewer_tokens_is_a_program_of_its_own(tiny_model, options):
    model = tiny_model('sd1')
    asked = resolve([PLAIN.replace(guidance_options=more) for more in (options, {})], model.config)
    with pytest.raises(ValueError, match='expected the same; run them in batches of their own'):
        inputs(model, asked)
    assert len({program(inputs(model, [request])) for request in asked}) == 2
    images = jaxsd.generate(model, asked)
    assert 0 < _far(*images) < 100


@pytest.mark.parametrize('options, message', [
    ({'easycache': {'thresh': 1}}, "easycache 'thresh': did you mean 'threshold'"),
    ({'deepcache': {'interval': 0}}, 'deepcache.interval=0: expected a number from 1 to 64'),
    ({'deepcache': {'interval': 2.5}}, 'deepcache.interval=2.5: expected a whole number'),
    ({'deepcache': {'branch': 3}}, 'deepcache branch=3: expected at most 2, the last but one'),
    ({'deepcache': {}, 'sag': 1}, 'deepcache and sag: expected one of them'),
    ({'token_merging': {'ratio': 0.8}}, 'token_merging.ratio=0.8: expected a number from 0 to 0'),
    ({'hypertile': {}, 'token_merging': {}}, 'hypertile and token_merging: expected one of them')])
def test_cheaper_calls_refused(tiny_model, options, message):
    with pytest.raises(ValueError, match=message):
        inputs(tiny_model('sd1'), resolve([PLAIN.replace(guidance_options=options)],
                                          tiny_model('sd1').config))
