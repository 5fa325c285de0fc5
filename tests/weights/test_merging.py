"""Checkpoints merged: the formulas as published, block by block, without holding a model."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import ml_dtypes  # noqa: F401 (names bfloat16 for numpy)
import numpy as np
import pytest
from tiny import flat, random_params, same, small_config, sparse_file, tiny_config

import jaxsd
from jaxsd.models import spec as specs
from jaxsd.models.spec import spec
from jaxsd.weights import names
from jaxsd.weights.files import LazyArray
from jaxsd.weights.merging import block_names

HERE = pathlib.Path(__file__).parent


def models(n=3, config=None):
    """n random models of one kind."""
    config, rng = config or small_config('sd15'), np.random.default_rng(1)
    return [jaxsd.Model(config, {part: random_params(rng, shapes)
                                 for part, shapes in spec(config).items()}) for _ in range(n)]


def slerp(w, a, b):  # sd_mecha.slerp
    na, nb = a / np.linalg.norm(a), b / np.linalg.norm(b)
    omega = np.arccos(np.clip((na * nb).sum(), -1, 1))
    out = (na * np.sin((1 - w) * omega) + nb * np.sin(w * omega)) / np.sin(omega)
    return out * ((1 - w) * np.linalg.norm(a) + w * np.linalg.norm(b))


def train_difference(w, a, b, c):  # SuperMerger's mergers.py
    distance_a0, distance_a1 = abs(b - c), abs(b - a)
    scale = np.sign(b - c) * abs(distance_a1 / (distance_a0 + distance_a1))
    return a + scale * abs(b - c) * w * 1.8


PUBLISHED = {
    'weighted_sum': lambda w, a, b: (1 - w) * a + w * b, 'slerp': slerp,
    'add_difference': lambda w, a, b, c: a + w * (b - c), 'train_difference': train_difference}


@pytest.mark.parametrize('method', PUBLISHED)
def test_published_formulas(method):
    chosen = models(2 if method in ('weighted_sum', 'slerp') else 3)
    flats = [flat(model.params) for model in chosen]
    for name, array in flat(jaxsd.merge_models(chosen, method, 0.3).params).items():
        expected = PUBLISHED[method](0.3, *(arrays[name].astype('f8') for arrays in flats))
        if array.size > 1:  # one number alone has no direction
            np.testing.assert_allclose(array, expected, atol=3e-5, err_msg=name)


@pytest.mark.parametrize('method', PUBLISHED)
def test_weights_at_their_ends(method):
    """0 is A to the bit; where B is C, and where they are equal, nothing happens."""
    chosen = models(2 if method in ('weighted_sum', 'slerp') else 3)
    a = flat(chosen[0].params)
    if method != 'slerp':
        assert same(flat(jaxsd.merge_models(chosen, method, 0).params), a)
    equal = jaxsd.merge_models([chosen[0]] * len(chosen), method, 0.7)
    for name, array in flat(equal.params).items():
        np.testing.assert_allclose(array, a[name], rtol=1e-6)
    if method == 'weighted_sum':
        assert same(flat(jaxsd.merge_models(chosen, method, 1).params), flat(chosen[1].params))


def test_slerp_of_zeros_and_opposites():
    a, b = models(2)
    zero = a.replace(params=jax.tree.map(np.zeros_like, a.params))
    opposite = a.replace(params=jax.tree.map(lambda x: -x, a.params))
    for other in (zero, opposite):
        for array in flat(jaxsd.merge_models([a, other], 'slerp', 0.5).params).values():
            assert np.isfinite(array).all()


@pytest.mark.parametrize('version, count', [('sd15', 12), ('sdxl', 9)])
def test_blocks(version, count):
    """SuperMerger's blocks, of 1.x 26 numbers and of SDXL 20."""
    listed = ['BASE', *(f'IN{i:02}' for i in range(count)), 'M00',
              *(f'OUT{i:02}' for i in range(count))]
    a, b = models(2, tiny_config(version))
    assert block_names(a) == listed
    blocks = {name: i / 100 for i, name in enumerate(listed)}
    merged = jaxsd.merge_models([a, b], blocks=list(blocks.values()))
    some = jaxsd.merge_models([a, b], weight=1, blocks={'in01': 0, 'BASE': 0})
    places = names.places(a.config, spec(a.config))
    flats = [flat(m.params['unet']) for m in (a, b, merged, some)]
    used = set()
    for name, place in places['unet'].items():
        key = ''.join(f"['{part}']" for part in name.split('.'))
        part = place.name.removeprefix('model.diffusion_model.').split('.')
        block = {'input_blocks': f'IN{part[1]:0>2}', 'middle_block': 'M00', 'time_embed': 'IN00',
                 'output_blocks': f'OUT{part[1]:0>2}', 'label_emb': 'BASE',
                 'out': listed[-1]}[part[0]]
        used.add(block)
        one, two, found, partly = (f[key] for f in flats)
        w = np.float32(blocks[block])
        np.testing.assert_allclose(found, (1 - w) * one + w * two, atol=1e-6)
        assert np.array_equal(partly, one if block in ('IN01', 'BASE') else two)
    assert used | {'BASE'} == set(listed)
    assert same(flat(some.params['vae']), flat(a.params['vae']))


def test_inpainting_takes_what_a_model_learnt():
    """A1111: the channels of mask and masked image stay those of A."""
    (a,), (b, c) = models(1, small_config('sd15_inpainting')), models(2)
    merged = jaxsd.merge_models([a, b, c], 'add_difference', 1)
    first, *rest = (np.asarray(m.params['unet']['conv_in']['weight']) for m in (a, b, c, merged))
    assert first.shape[2] == 9
    np.testing.assert_allclose(rest[2][:, :, :4], first[:, :, :4] + rest[0] - rest[1], atol=1e-5)
    assert np.array_equal(rest[2][:, :, 4:], first[:, :, 4:])
    with pytest.raises(ValueError, match=r'model B is .*, A is .*, and their unet differ'):
        jaxsd.merge_models([b, a])


@pytest.mark.parametrize('arguments, said', [
    (dict(method='mean'), "unknown method 'mean'"),
    (dict(method='add_difference'), 'add_difference: expected 3 models, found 2'),
    (dict(weight='a'), "weight='a': expected a finite number"),
    (dict(blocks={'IN99': 1}), "unknown block 'IN99'"),
    (dict(blocks=[1, 2]), 'expected 10 weights, of BASE, IN00, IN01, IN02, IN03, M00, OUT00'),
    (dict(blocks={'M00': None}), 'weight of block M00=None: expected a finite number')])
def test_bad_input(arguments, said):
    with pytest.raises(ValueError) as caught:
        jaxsd.merge_models(models(2), **arguments)
    assert said in str(caught.value) and '\n' not in str(caught.value)


def test_models_of_other_kinds():
    (a,), (xl,) = models(1), models(1, small_config('sdxl'))
    with pytest.raises(ValueError, match='model B is .*; expected models of one kind'):
        jaxsd.merge_models([a, xl])
    other = a.replace(config=a.config.with_prediction('v_prediction'))
    with pytest.raises(ValueError, match='model B predicts v_prediction, A predicts epsilon'):
        jaxsd.merge_models([a, other])


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', None])
def test_lazily_it_is_the_same(dtype, tmp_path):
    a, b = models(2)
    for name, model in (('a', a), ('b.safetensors', b)):
        jaxsd.save(model, tmp_path / name, 'single-file' if '.' in name else 'diffusers')
    lazy = [jaxsd.load(tmp_path / name, dtype=dtype, lazy=True) for name in ('a', 'b.safetensors')]
    assert all(isinstance(leaf, LazyArray) for leaf in jax.tree.leaves(lazy[0].params))
    read = [jaxsd.load(tmp_path / name, dtype=dtype) for name in ('a', 'b.safetensors')]
    for model, expected in zip(lazy, read):
        assert same(flat(model.params), flat(expected.params))
        assert repr(model) == repr(expected)
    merged = jaxsd.merge_models(lazy, 'slerp', 0.4)
    jaxsd.save(merged, tmp_path / 'merged')
    assert same(flat(jaxsd.load(tmp_path / 'merged', dtype=None).params),
                flat(jaxsd.merge_models(read, 'slerp', 0.4).params))


def test_not_finite_is_told_when_it_is_written(tmp_path):
    a, = models(1)
    a.params['unet']['conv_in']['bias'] = np.full(8, np.nan, 'f4')
    jaxsd.save(a, tmp_path / 'a')
    lazy = jaxsd.load(tmp_path / 'a', lazy=True)
    with pytest.raises(ValueError, match='not finite .NaN or infinity.: unet/conv_in.bias'):
        jaxsd.save(lazy, tmp_path / 'b')
    assert [path.name for path in tmp_path.iterdir()] == ['a']


MERGE = r'''
import pathlib, re, sys
import jax, numpy as np
import jaxsd
from jaxsd.weights import reading
from test_memory import medium_config
reading._tokenizers = lambda *_: {}
def peak():
    return int(re.search(r'VmHWM:\s+(\d+) kB', pathlib.Path('/proc/self/status').read_text())[1])
jax.device_put(np.zeros(1)).block_until_ready()
before = peak()
models = [jaxsd.load(sys.argv[1], config=medium_config(), lazy=True) for _ in range(3)]
jaxsd.save(jaxsd.merge_models(models, 'train_difference', 0.5), sys.argv[2], 'single-file')
print(peak() - before)
'''


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc/self/status')
def test_memory(tmp_path):
    """Three models in, one out: a few tensors at a time."""
    from test_memory import medium_config
    config = medium_config()
    shapes = spec(config)
    sparse_file(tmp_path / 'a.safetensors', {
        place.name: place.shape(shapes[part][name])
        for part, table in names.places(config, shapes).items() for name, place in table.items()})
    peak = subprocess.run([sys.executable, '-c', MERGE, tmp_path / 'a.safetensors',
                           tmp_path / 'b.safetensors'], cwd=HERE, check=True, capture_output=True,
                          text=True).stdout
    weights = specs.count(shapes) * 4
    assert weights > 600e6
    assert int(peak) * 1024 < 0.5 * weights


def test_adapters_stay_lazy(tmp_path):
    """A LoRA that is baked in takes nothing into memory but its layer, and changes it."""
    model, = models(1)
    jaxsd.save(model, tmp_path / 'a')
    lazy = jaxsd.load(tmp_path / 'a', lazy=True)
    name = 'down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight'
    delta = jaxsd.weights.adapters.Delta(dense=np.ones((8, 8), 'f4'))
    adapter = jaxsd.Adapter({'unet': {name: delta}})
    merged = jaxsd.merge(lazy, {adapter: 0.5})
    assert all(isinstance(leaf, LazyArray) for leaf in jax.tree.leaves(merged.params))
    assert same(flat(merged.params), flat(jaxsd.merge(model, {adapter: 0.5}).params))
    assert not same(flat(merged.params), flat(model.params))


def test_extra_channels_are_only_those_of_inpainting_and_its_like():
    a, b = models(2)
    wide = dataclasses.replace(a.config.unet, in_channels=5)
    odd = b.replace(config=b.config.replace(unet=dataclasses.replace(wide, out_channels=5)))
    with pytest.raises(ValueError, match='their unet differ'):
        jaxsd.merge_models([odd, a])
