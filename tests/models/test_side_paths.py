"""Adapters beside the weights: equal to merged ones, per image, with nothing to compile again."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import jaxsd
from jaxsd.models import clip, layers, spec, unet
from jaxsd.weights import adapters
from jaxsd.weights.adapter_formats import Delta

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'weights'))
import adapter_files as files  # noqa: E402


def random_adapter(model, seed, rank=3):
    """Every kind of Delta: the layers take turns; norms and biases change as well."""
    rng, deltas = np.random.default_rng(seed), {}
    for part, shapes in spec.spec(model.config).items():
        if part == 'vae':
            continue
        found = deltas.setdefault(part, {})
        for number, (name, shape) in enumerate(shapes.items()):
            if name.endswith('embedding.weight'):
                continue
            if len(shape) == 1:
                found[name] = Delta(dense=files.draw(rng, *shape))
                continue
            own = spec.to_jax(name, np.zeros(shape, np.float32)).shape
            low = {'down': files.draw(rng, *own[:-1], rank), 'up': files.draw(rng, rank, own[-1])}
            kinds = low, {'dense': files.draw(rng, *own) / 3}, {'scale': files.draw(rng, own[-1])}
            found[name] = Delta(**low | kinds[2] if number % 4 == 3 else kinds[number % 4])
    return jaxsd.weights.Adapter(deltas)


@pytest.fixture(scope='module', params=['sd1', 'sdxl'])
def model(request, tiny_model):
    model = tiny_model(request.param)
    return model.replace(adapters={'a': random_adapter(model, 0), 'b': random_adapter(model, 1)})


@pytest.fixture(scope='module')
def run(model):
    return program(model.config)


def arguments(config, rows=3):
    rng = np.random.default_rng(2)
    added = rng.standard_normal((rows, config.unet.added_dim), np.float32)
    return (rng.standard_normal((rows, 8, 8, 4), np.float32), jnp.linspace(5., 900., rows),
            rng.standard_normal((rows, 7, config.unet.cross_attention_dim), np.float32),
            added if config.unet.added_dim else None), rng.integers(0, 500, (rows, 7))


def program(config):
    """(params, factors, weights) -> the outputs of the U-Net and the text encoders."""
    inputs, tokens = arguments(config)

    @jax.jit
    def run(params, factors, weights):
        params = {part: adapters.attach(tree, factors[part], weights)
                  for part, tree in params.items() if part != 'vae'}
        found = [unet.apply(params['unet'], config.unet, *inputs)]
        return found + [clip.encode(params[part], getattr(config, part), tokens).hidden
                        for part in params if part != 'unet']

    return run


@pytest.mark.slow
def test_side_paths_are_the_merge_and_each_image_has_its_own_weights(model, run):
    a, b = model.adapters.values()
    weights = np.float32([[0.7, 0], [0, -0.4], [0.5, 0.9]])
    paths = adapters.factors(model, ['a', 'b'])
    beside = run(model.params, paths, weights)
    for row, (u, v) in enumerate(weights):
        # weights of 0 add exact zeros, and save another compilation
        merged = run(jaxsd.merge(model, [(a, u), (b, v)]).params, paths, 0 * weights)
        for found, expected in zip(beside, merged, strict=True):
            scale = max(1, np.std(expected[row]))
            assert np.abs(found[row] - expected[row]).max() <= 1e-5 * scale
    plain = run(model.params, paths, 0 * weights)
    assert all(np.abs(x[0] - y[0]).max() > 0.1 for x, y in zip(beside, plain, strict=True))


def test_other_weights_and_adapters_of_like_shapes_do_not_compile(model, run):
    weights = np.ones((3, 2), np.float32)
    first = run(model.params, adapters.factors(model, ['a', 'b']), weights)
    programs = run._cache_size()
    other = model.replace(adapters={'c': random_adapter(model, 5),
                                    'd': random_adapter(model, 6, rank=4)})
    second = run(model.params, adapters.factors(other, ['c', 'd']), 0.3 * weights)
    assert run._cache_size() == programs
    assert not np.allclose(first[0], second[0])
    assert adapters.factors(model, ['a', 'b']) is adapters.factors(model, ['a', 'b'])


def test_parts_have_weights_of_their_own(model):
    a = model.adapters['a']
    merged, both = jaxsd.merge(model, {a: (0.5, 0)}), jaxsd.merge(model, {a: 0.5})
    same = {part: all(jax.tree.leaves(jax.tree.map(np.array_equal, tree, both.params[part])))
            for part, tree in merged.params.items()}
    assert same == {part: part in ('unet', 'vae') for part in same}


def test_layers_without_adapters_are_what_they_say():
    """The side paths must cost nothing where there are none."""
    p = {'weight': jnp.ones((3, 3, 4, 8)), 'bias': jnp.ones(8)}
    linear, norm = {'weight': jnp.ones((4, 5)), 'bias': jnp.ones(5)}, dict.fromkeys(
        ('weight', 'bias'), jnp.ones(4))
    x, image = jnp.ones((2, 6, 4)), jnp.ones((2, 6, 6, 4))

    def count(f, *args):
        return len(jax.make_jaxpr(f)(*args).eqns)

    assert count(layers.linear, linear, x) == count(lambda p, x: x @ p['weight'] + p['bias'],
                                                    linear, x)
    assert count(layers.conv, p, image) == count(
        lambda p, x: jax.lax.conv_general_dilated(
            x, p['weight'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
        + p['bias'], p, image)
    assert count(layers.affine, norm, x) == 0


def test_factors_are_padded_to_ranks_in_steps(model):
    found = traverse_util.flatten_dict(adapters.factors(model, ['a', 'b'])['unet'])
    ranks = {path.down.shape[-1] for path in found.values() if path.down is not None}
    assert ranks <= {8, 16, 32, 64, 128}


def test_bfloat16_stays_and_its_roundings_are_small():
    """Merged the sum is rounded once; beside the weights each factor is, in its own dtype."""
    rng = np.random.default_rng(3)
    low = {'down': files.draw(rng, 32, 3), 'up': files.draw(rng, 3, 16),
           'scale': files.draw(rng, 16)}
    weight = jnp.asarray(files.draw(rng, 32, 16), 'bfloat16')
    bias = {'dense': files.draw(rng, 16)}
    model = jaxsd.Model(None, {'unet': {'a': {'weight': weight, 'bias': jnp.ones(16, 'bfloat16')}}})
    deltas = {'unet': {'a.weight': Delta(**low), 'a.bias': Delta(**bias)}}
    model = model.replace(adapters={'a': jaxsd.weights.Adapter(deltas)})
    x, own = jnp.asarray(rng.standard_normal((2, 5, 32)), 'bfloat16'), np.float64(weight)
    expected = np.float64(x) @ (own + 0.7 * (own * low['scale'] + low['down'] @ low['up'])) + (
        1 + 0.7 * bias['dense'])
    merged = layers.linear(jaxsd.merge(model, {model.adapters['a']: 0.7}).params['unet']['a'], x)
    paths = adapters.factors(model, ['a'])['unet']
    beside = layers.linear(adapters.attach(model.params['unet'], paths,
                                           np.full((2, 1), 0.7, np.float32))['a'], x)
    for found in (merged, beside):
        assert found.dtype == 'bfloat16'
        error = np.abs(np.float64(found) - expected).max() / expected.std()
        assert error < 4 * 2**-8, error
