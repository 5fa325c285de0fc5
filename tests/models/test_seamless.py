"""Pictures whose edges meet: shifted around, a picture is another tile of the same pattern."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import jaxsd
from jaxsd.models import layers, quantized, unet, vae
from jaxsd.run import infotext, invokeai, picture
from jaxsd.run.inputs import inputs, program
from jaxsd.run.request import Request
from jaxsd.run.resolving import resolve


@pytest.fixture(scope='module')
def model(tiny_model):
    return tiny_model('sd1')


def _far(a, b):
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


@pytest.mark.parametrize('axes, shift', [('x', (0, 1)), ('y', (1, 0)), ('xy', (1, 1))])
def test_networks_know_no_edges(model, axes, shift):
    rng = np.random.default_rng(0)
    config, params = model.config, model.params
    levels = 2 ** (len(config.unet.block_out_channels) - 1)
    x = jnp.asarray(rng.normal(size=(2, 8, 8, config.unet.in_channels)), jnp.float32)
    text = jnp.asarray(rng.normal(size=(2, 5, config.unet.cross_attention_dim)), jnp.float32)

    def apply(axes, x):
        return unet.apply(layers.seamless(params['unet'], axes), config.unet, x,
                          jnp.full(2, 500.0), text)

    def decode(axes, z):
        return vae.decode(layers.seamless(params['vae'], axes), config.vae, z)

    for network, step, after, z in (
            (apply, levels, levels, x), (decode, 1, config.vae.factor, x[..., :4])):
        along = [n * step for n in shift]
        moved = jnp.roll(z, along, (1, 2))
        back = [-n * after // step for n in along]
        run = jax.jit(network, static_argnums=0)
        whole = run(axes, z)
        assert _far(jnp.roll(run(axes, moved), back, (1, 2)), whole) < 1e-5
        plain = run('', z)
        assert _far(jnp.roll(run('', moved), back, (1, 2)), plain) > 1e-2
        assert _far(whole, plain) > 1e-2


def test_quantized_weights(model):
    """Of such layers nobody knows the kernel's size before they run."""
    flat = traverse_util.flatten_dict(model.params['unet'], sep='.')
    found = {}
    for name, array in flat.items():
        rows = np.moveaxis(np.asarray(array), -1, 0)  # torch's order
        if array.ndim == 4:
            rows = rows.transpose(0, 3, 1, 2)
        found |= quantized.quantize('unet', name, rows, 'float8_e5m2') or {name: array}
    params = traverse_util.unflatten_dict(found, sep='.')
    config, rng = model.config.unet, np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 8, 8, 4)), jnp.float32)
    text = jnp.asarray(rng.normal(size=(1, 5, config.cross_attention_dim)), jnp.float32)
    run = jax.jit(lambda x: unet.apply(layers.seamless(params, 'xy'), config, x,
                                       jnp.full(1, 500.0), text))
    assert quantized.is_quantized(params)
    step = 2 ** (len(config.block_out_channels) - 1)
    moved = jnp.roll(run(jnp.roll(x, (step, step), (1, 2))), (-step, -step), (1, 2))
    assert _far(moved, run(x)) < 1e-5


@pytest.mark.slow
def test_pictures_of_a_kind_of_their_own(model):
    """Others' programs are as they were; the three kinds are told apart; a batch has one."""
    requests = resolve([Request(width=32, height=32, steps=2, seed=1, force_size=True,
                                tiling=tiling) for tiling in ('', 'x', 'y', True)], model.config)
    data = [inputs(model, [request]) for request in requests]
    assert data[0].tiling is None and len({*map(program, data)}) == 4
    with pytest.raises(ValueError, match="tiling: '', 'x': expected the same of all"):
        inputs(model, requests[:2])
    images = jaxsd.generate(model, requests[::3])
    assert (images[0] != images[1]).any()
    [alone] = jaxsd.generate(model, requests[3:])
    np.testing.assert_array_equal(images[1], alone)
    with pytest.raises(ValueError, match="tiling='xy': expected no tile"):
        jaxsd.generate(model, requests[3:], tile=16)


def test_it_is_told_and_read_back():
    for tiling, text in (('xy', 'Tiling: True'), ('x', 'Tiling: x'), ('y', 'Tiling: y')):
        line = picture.parameters(Request('cat', seed=1, steps=2, width=64, height=64,
                                          tiling=tiling))
        past = infotext.foreign(line)
        assert text in line and past.fields['tiling'] == tiling and not past.notes
    assert 'Tiling' not in picture.parameters(Request('cat', seed=1))
    for metadata, tiling in (('{"seamless_x": true, "seamless_y": false}', 'x'),
                             ('{"seamless_x": true, "seamless_y": true}', 'xy')):
        fields, _, notes = invokeai.read({'invokeai_metadata': metadata})
        assert fields['tiling'] == tiling and not notes
    with pytest.raises(ValueError, match='window and tiling: expected one of them'):
        Request(tiling='x', window=512)
    with pytest.raises(ValueError, match="unknown tiling 'z'"):
        Request(tiling='z')
