"""Quantized weights: the blocks of GGUF's own package, and networks that compute from them."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, write_tokenizer
from flax import traverse_util

import jaxsd
from jaxsd.models import clip, quantized, spec, unet
from jaxsd.models.layers import conv, linear, pointwise, upsample
from jaxsd.prompt.tokenizer import Tokenizer
from jaxsd.run.replica import placed
from jaxsd.weights.adapters import Adapter, Delta
from jaxsd.weights.model import on_host

# The largest error of a number, of the largest one of its row: half a step of the kind, or its 3 or
# 2 bits of mantissa.
WORST = {'int8': 1 / 254, 'float8_e4m3fn': 1 / 16, 'float8_e4m3fn_scaled': 1 / 16,
         'float8_e5m2': 1 / 8, 'q8_0': 1 / 250, 'q5_1': 1 / 30, 'q5_0': 1 / 15, 'q4_1': 1 / 14,
         'q4_0': 1 / 7}


def held(kind, array, name='down_blocks.0.x.weight'):
    """A layer's parameters with an array, in torch's order, quantized."""
    found = quantized.quantize('unet', name, array, kind)
    return {key.rpartition('.')[2]: jnp.asarray(value) for key, value in found.items()}


@pytest.fixture(scope='module')
def rows():
    """Numbers [O,N] whose rows have other sizes, one of them zeros."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(24, 96)) * 2.0 ** rng.integers(-6, 3, (24, 1)) * (
        np.arange(24) > 0)[:, None]).astype(np.float32)


@pytest.mark.parametrize('kind', quantized.BLOCKS)
def test_blocks_are_those_of_gguf(kind, rows):
    p = held(kind, rows)
    theirs = getattr(gguf.GGMLQuantizationType, kind.upper())
    blocks = gguf.quants.quantize(rows, theirs)
    np.testing.assert_array_equal(p[kind].reshape(blocks.shape), blocks)
    np.testing.assert_array_equal(quantized.matrix(p), gguf.quants.dequantize(blocks, theirs))


@pytest.mark.parametrize('kind', quantized.KINDS)
def test_numbers_stay_near(kind, rows):
    p = held(kind, rows)
    near, largest = np.asarray(quantized.matrix(p)), np.abs(rows).max(1, keepdims=True)
    assert np.isfinite(near).all()
    error = np.abs(near - rows) / np.maximum(largest, 1e-9)
    assert WORST[kind] / 4 < error.max() <= WORST[kind]
    again = held(kind, near)  # what such a file holds stays as it is
    np.testing.assert_allclose(quantized.matrix(again), near, rtol=1e-6)


@pytest.mark.parametrize('kind', ['int8', 'q4_0'])
def test_layers(kind):
    """Each layer is that of the widened weight."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 6, 6, 32)), jnp.float32)
    for shape, layer in (((24, 32), linear), ((24, 32, 1, 1), pointwise), ((24, 32, 3, 3), conv),
                         ((24, 32, 3, 3), lambda p, x: upsample({'conv': p}, x))):
        w = rng.normal(size=shape).astype(np.float32)
        p = held(kind, w) | {'bias': jnp.ones(24)}
        wide = spec.to_jax('weight', np.asarray(quantized.matrix(p)).reshape(shape))
        np.testing.assert_allclose(layer(p, x), layer({'weight': wide, 'bias': p['bias']}, x),
                                   rtol=1e-5, atol=1e-5)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder of a tiny model whose blocks are 64 wide."""
    config = TINY['sd1']
    path = tmp_path_factory.mktemp('model') / 'tiny'
    jaxsd.save(jaxsd.Model(config, spec.init(0, config)), path)
    return path


def outputs(model):
    """The U-Net's and the text encoder's, for some input."""
    rng, config = np.random.default_rng(2), model.config
    x = jnp.asarray(rng.normal(size=(1, 8, 8, 4)), jnp.float32)
    hidden = clip.encode(model.params['text_encoder'], config.text_encoder,
                         jnp.arange(16)[None]).hidden
    return hidden, unet.apply(model.params['unet'], config.unet, x, jnp.full(1, 400.0), hidden)


def test_networks(folder):
    """Equal to those of the same numbers in float32, and not far from those of the file."""
    whole, kept = jaxsd.load(folder), jaxsd.load(folder, quantize='int8')
    params = traverse_util.flatten_dict(kept.params, sep='.')
    names = [name for name in params if name.endswith('.int8')]
    assert len(names) > 60 and not any('norm' in name for name in names)
    assert {name.split('.')[0] for name in names} == {'unet', 'text_encoder'}
    wide = traverse_util.flatten_dict(whole.params, sep='.')
    for name in names:
        layer = name.removesuffix('int8')
        matrix = quantized.matrix({'int8': params[name], 'scale': params[f'{layer}scale']})
        shape = spec.from_jax('weight', np.asarray(wide[f'{layer}weight'])).shape
        wide[f'{layer}weight'] = jnp.asarray(spec.to_jax('weight', np.reshape(matrix, shape)))
    same = whole.replace(params=traverse_util.unflatten_dict(wide, sep='.'))
    for ours, its, exact in zip(outputs(kept), outputs(same), outputs(whole)):
        np.testing.assert_allclose(ours, its, rtol=1e-5, atol=1e-5)
        off = float(jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact))
        assert 1e-5 < off < 0.02


def test_no_copy_is_widened_before_a_loop():
    """The loop's program needs the memory of one widened layer, not of all."""
    rng, layers = np.random.default_rng(3), 16
    kept = {str(i): held('q8_0', rng.normal(size=(512, 512)).astype(np.float32))
            for i in range(layers)}

    def loop(params, x):
        def step(x, _):
            for p in params.values():
                x = jnp.tanh(linear(p, x))
            return x, None
        return jax.lax.scan(step, x, length=4)[0]

    memory = jax.jit(loop).lower(kept, jnp.ones((2, 512))).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 2**20  # a layer is 1 MiB, all are 16


@pytest.mark.parametrize('arguments, message', [
    ({'quantize': 'int4'}, "quantize='int4': expected one of int8, float8_e4m3fn, "),
    ({'quantize': 'int8', 'lazy': True}, "quantize='int8': expected a dtype to compute in, and no"),
    ({'quantize': 'int8', 'dtype': None}, "quantize='int8': expected a dtype to compute in")])
def test_wrong_arguments(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        jaxsd.load(folder, **arguments)


def test_what_needs_the_weights_themselves_is_refused(folder, tmp_path):
    model = jaxsd.load(folder, quantize='q4_0')
    with pytest.raises(ValueError, match='save: expected weights as they are in the file, found '
                                         'quantized ones; load the model without quantize'):
        jaxsd.save(model, tmp_path / 'again')
    with pytest.raises(ValueError, match='merge: expected weights as they are in the file'):
        jaxsd.merge(model, {})


@pytest.fixture(scope='module')
def prompted(tmp_path_factory):
    """A folder of a tiny model with a tokenizer."""
    path = tmp_path_factory.mktemp('prompted')
    write_tokenizer(path / 'words')
    config = TINY['sd1']
    jaxsd.save(jaxsd.Model(config, spec.init(0, config), {
        'text_encoder': Tokenizer.from_folder(path / 'words')}), path / 'tiny')
    return path / 'tiny'


def test_pictures_share_programs_and_adapters(prompted):
    """With a LoRA, and one without in the same batch; the same as alone."""
    model = jaxsd.load(prompted, quantize='q8_0')
    layer = 'down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q'
    rng = np.random.default_rng(5)
    deltas = {'unet': {f'{layer}.weight': Delta(
        down=rng.normal(size=(32, 4)).astype(np.float32),
        up=rng.normal(size=(4, 32)).astype(np.float32))}}
    model = model.replace(adapters={'ink': Adapter(deltas, {})})
    asked = [jaxsd.Request('red apple', seed=1, steps=4, adapters={'ink': 1}),
             jaxsd.Request('red apple', seed=1, steps=4, adapters={'ink': 0})]
    images = jaxsd.generate(model, asked)
    assert np.abs(images[0].astype(int) - images[1]).max() > 8
    np.testing.assert_array_equal(images[0], jaxsd.generate(model, asked[0])[0])
    plain = jaxsd.generate(jaxsd.load(prompted), asked[1].replace(adapters={}))[0]
    assert 0 < np.abs(images[1].astype(int) - plain).max() < 16


def test_what_is_idle_stays_on_the_host(prompted):
    """The same pictures, and no array of the text encoder or of the VAE on a device."""
    asked = jaxsd.Request('red apple', seed=1, steps=2)
    model = jaxsd.load(prompted)
    expected = jaxsd.generate(model, asked)
    away = jaxsd.load(prompted, offload=True)
    np.testing.assert_array_equal(jaxsd.generate(away, asked), expected)
    here = placed(away, jax.local_devices()[0]).params
    assert on_host(here['vae']) and on_host(here['text_encoder'])
    assert all(isinstance(a, jax.Array) for a in jax.tree.leaves(here['unet']))
    network = jaxsd.load_vae(prompted)
    assert on_host(away.with_vae(network).params['vae'])
    assert not on_host(model.with_vae(network).params['vae'])
    with pytest.raises(ValueError, match='offload and lazy: expected one of them'):
        jaxsd.load(prompted, offload=True, lazy=True)
