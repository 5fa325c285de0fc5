"""Reference pictures: what they do, beside pictures without them, in records, and errors."""

import jax
import numpy as np
import pytest
from test_generate import _far

import jaxsd
from jaxsd import Reference, Request
from jaxsd.config_files import read_config
from jaxsd.models import unet
from jaxsd.run import infotext, picture, reference
from jaxsd.run.inputs import inputs, lengthened, networks
from jaxsd.run.pipeline import latents
from jaxsd.run.resolving import resolve

IMAGE, OTHER = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
TEXT = Request('cat', seed=1, steps=2, sampler='euler')

_latents = jax.jit(latents, static_argnums=(2, 3, 4))


def drawn(model, *requests):
    requests = resolve(requests, model.config)
    data = lengthened(inputs(model, requests))
    params, config = networks(model, data)
    return np.asarray(_latents(params, data, config, 64, 64))


def asked(image=IMAGE, **fields):
    return TEXT.replace(reference=Reference(image, **fields))


@pytest.mark.slow
def test_a_batch_with_and_without(tiny_model):
    """Every field is data; a picture without a reference, or beyond its span, is as alone."""
    model = tiny_model('sd1')
    requests = [TEXT, asked(), asked(OTHER), asked(fidelity=0.0), asked(fidelity=1.0),
                asked(weight=0.5), asked(start=0.5), asked(end=0.5), asked(weight=0)]
    found = drawn(model, *requests)
    size = found.std()
    for i, j in np.ndindex(len(requests), len(requests)):
        same = i == j or {i, j} == {0, len(requests) - 1}
        assert (abs(found[i] - found[j]).max() > 1e-5 * size) != same, (i, j)
    np.testing.assert_allclose(found[0], drawn(model, TEXT)[0], atol=1e-5 * size)
    np.testing.assert_allclose(drawn(model, *requests[::-1])[::-1], found, atol=1e-5 * size)
    [image] = jaxsd.generate(model, [asked()])
    [again] = jaxsd.generate(model, [TEXT, asked()])[1:]
    np.testing.assert_array_equal(image, again)  # the engine makes each by itself
    assert _far(image, jaxsd.generate(model, [TEXT])[0]) > 0
    halves = [jaxsd.Region('dog', box=(0, 0, 0.5, 1)), jaxsd.Region('red', box=(0.5, 0, 1, 1))]
    several = drawn(model, asked().replace(regions=halves), TEXT.replace(regions=halves))
    assert abs(several[0] - several[1]).max() > 1e-5 * size


def test_self_attentions():
    """The widest first; among them those of the input, the middle and the output blocks."""
    places = reference.self_attentions(read_config('sd15').unet)
    assert len(places) == 16
    assert places[:7] == [
        'down_blocks.2.attentions.0.transformer_blocks.0.attn1',
        'down_blocks.2.attentions.1.transformer_blocks.0.attn1',
        'mid_block.attentions.0.transformer_blocks.0.attn1',
        *(f'up_blocks.1.attentions.{i}.transformer_blocks.0.attn1' for i in range(3)),
        'down_blocks.1.attentions.0.transformer_blocks.0.attn1']
    assert len(reference.self_attentions(read_config('sdxl').unet)) == 70
    assert set(places) == {place.replace('attn2', 'attn1')
                           for place in unet.cross_attentions(read_config('sd15').unet)}


def test_what_cannot_be(tiny_model):
    for fields, message in (({'image': None}, 'expected image='), ({'weight': 1.5}, 'from 0 to 1'),
                            ({'fidelity': -1}, 'reference fidelity=-1'),
                            ({'start': 0.8, 'end': 0.2}, 'reference')):
        with pytest.raises(ValueError, match=message):
            asked(**fields)
    with pytest.raises(ValueError, match='reference: expected jaxsd.Reference or None, found nd'):
        TEXT.replace(reference=IMAGE)
    model = tiny_model('sd1')
    for fields, message in (({'guidance_options': {'pag': 2.0}}, 'reference and pag'),
                            ({'guidance_options': {'deep_shrink': {}}}, 'reference and deep_shr'),
                            ({'guidance_options': {'token_merging': {}}}, 'reference and tok'),
                            ({'window': 32}, 'reference and window: expected one of them')):
        with pytest.raises(ValueError, match=message):
            inputs(model, resolve([asked().replace(**fields)], model.config))
    with pytest.raises(ValueError, match='dpm_adaptive'):
        inputs(model, resolve([asked(end=0.5).replace(sampler='dpm_adaptive')], model.config))


def test_the_record(tmp_path):
    """A path is read again; a picture that was given as such is noted."""
    from PIL import Image
    path = str(tmp_path / 'a.png')
    Image.fromarray(IMAGE).save(path)
    request = asked(path, weight=0.5, fidelity=0.25)
    assert picture.files(request) == {path}
    for one, image in ((request, path), (asked(), None)):
        picture.write_png(tmp_path / 'b.png', IMAGE, {
            'jaxsd': picture.record(one, checkpoint='emoji', dtype='float32', ema=False, tile=0,
                                    slots=1, offload=False)})
        found = infotext.read(tmp_path / 'b.png')
        if image:
            again = found.fields['reference']
            assert (again.image, again.weight, again.fidelity) == (path, 0.5, 0.25)
            assert found.named()['reference'] is again
            found.check_files()
            Image.fromarray(OTHER).save(path)
            with pytest.raises(ValueError, match=r'a\.png has changed since'):
                found.check_files()
        else:
            assert found.fields.get('reference') is None
            assert found.notes == ['reference: was given as an array, which the record does not '
                                   'hold']
