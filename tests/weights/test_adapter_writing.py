"""What was trained, in files: read again it is the same, and others find what they look for."""

import functools
import gzip
import hashlib
import json
import pathlib

import jax
import numpy as np
import pytest
from tiny import random_model

import jaxsd
from jaxsd.config_files import read_config
from jaxsd.models.spec import spec
from jaxsd.train import methods
from jaxsd.weights import Model, adapter_names, adapter_writing
from jaxsd.weights.files import TensorFile

MANIFESTS = json.loads(gzip.decompress(
    (pathlib.Path(__file__).parents[1] / 'data' / 'manifests' / 'lora.json.gz').read_bytes()))
KINDS = ('lora', 'dora', 'loha', 'lokr')
RNG = np.random.default_rng(0)


@functools.cache
def trained(version, kind):
    """(Model, an Adapter of random numbers as training gives it)."""
    model = random_model(version)
    texts = [part for part in model.params if part.startswith('text')]
    method = methods.lora(model, methods.AdapterConfig(
        kind, rank=2, alpha=1.0, conv_rank=3, conv_alpha=1.5, layers='all',
        components=('unet', *texts), factor=3), RNG)
    return model, method.result(jax.tree.map(
        lambda a: np.float32(a + 0.2 * RNG.standard_normal(a.shape)), method.trainable))


@pytest.mark.slow
@pytest.mark.parametrize('version', ['sd15', 'sd21', 'sdxl'])
@pytest.mark.parametrize('layout', adapter_writing.LAYOUTS)
@pytest.mark.parametrize('kind', KINDS)
def test_round_trip(version, layout, kind, tmp_path):
    model, adapter = trained(version, kind)
    path = tmp_path / 'style.safetensors'
    if layout == 'diffusers' and kind in ('loha', 'lokr'):
        with pytest.raises(ValueError, match="diffusers reads no lo.* layout='kohya' is the one"):
            jaxsd.save_adapter(adapter, path, layout)
        return
    jaxsd.save_adapter(adapter, path, layout)
    found = jaxsd.load_adapter(path, model)
    assert found.deltas.keys() == adapter.deltas.keys()
    shapes = spec(model.config)
    for part, deltas in adapter.deltas.items():
        assert deltas.keys() == found.deltas[part].keys()
        assert {len(shapes[part][name]) for name in deltas} == ({2, 4} if part == 'unet' else {2})
        for name, delta in deltas.items():
            for mine, other in zip(delta, found.deltas[part][name], strict=True):
                assert (mine is None) == (other is None)
                if mine is not None:
                    np.testing.assert_allclose(other, mine, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('name, version', [
    ('kohya_sd15', 'sd15'), ('kohya_sd21', 'sd21'), ('kohya_sdxl', 'sdxl'),
    ('kohya_sd15_conv3x3', 'sd15'), ('kohya_sdxl_conv3x3', 'sdxl')])
def test_layers_are_called_as_in_kohyas_own_files(name, version):
    spellings = adapter_writing._spellings(read_config(version)).values()
    assert {key.split('.')[0] for key in MANIFESTS[name]} <= set(spellings)


@pytest.mark.parametrize('name, version', [
    ('lycoris_sd15_locon_dora', 'sd15'), ('lycoris_sd15_loha', 'sd15'),
    ('lycoris_sd15_lokr', 'sd15'), ('lycoris_sdxl_lokr', 'sdxl')])
def test_parts_have_the_shapes_of_lycoris(name, version):
    """Of the same layers, at its own factor and rank."""
    kind, config = name.split('_')[-1], read_config(version)
    shapes, expected = spec(config), {}
    for key, shape in MANIFESTS[name].items():
        layer, part = adapter_names.split(key)
        expected.setdefault(adapter_names.find(layer, config), {})[key.split('.', 1)[1]] = shape
    for (component, layer), parts in expected.items():
        shape = shapes[component][f'{layer}.weight']
        inner = ('lora_down.weight', 'hada_w1_b', 'lokr_w2_b')  # [rank, ...]
        rank = next((parts[name][0] for name in inner if name in parts), 8)
        made = methods.KINDS[kind](RNG, shape, rank, methods.AdapterConfig(kind, factor=8))
        made['alpha'] = np.float32(8)
        if kind == 'dora':
            made['magnitude'] = adapter_writing._magnitude(np.ones(shape[0]), shape, 'kohya')
        found = {adapter_writing.LAYOUTS['kohya'].get(part, part): list(array.shape)
                 for part, array in made.items()}
        assert found == parts, (layer, shape)


@pytest.mark.parametrize('version, base, v2, kind', [
    ('sd15', 'sd_v1', 'False', 'v1'), ('sd21', 'sd_v2_v', 'True', 'v2-768-v'),
    ('sdxl', 'sdxl_base_v1-0', 'False', 'xl-v1-base')])
def test_kohyas_header(version, base, v2, kind, tmp_path):
    _, adapter = trained(version, 'dora')
    path = tmp_path / 'my style.safetensors'
    tags = {'10_cat': {'cat': 10, 'grass': 3}}
    jaxsd.save_adapter(adapter, path, metadata={'ss_tag_frequency': tags, 'modelspec.title': 'x'})
    found = TensorFile(path).metadata
    assert found['ss_base_model_version'] == base and found['ss_v2'] == v2
    assert found['modelspec.architecture'] == f'stable-diffusion-{kind}/lora'
    assert found['ss_output_name'] == 'my style' and found['modelspec.title'] == 'x'
    assert (found['ss_network_dim'], found['ss_network_alpha']) == ('2', '1')
    assert found['ss_network_module'] == 'lycoris.kohya'
    assert json.loads(found['ss_network_args']) == {
        'algo': 'locon', 'dora_wd': 'True', 'conv_dim': '3', 'conv_alpha': '1.5'}
    assert json.loads(found['ss_tag_frequency']) == tags
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], 'little')
    assert found['sshs_model_hash'] == hashlib.sha256(data[start:]).hexdigest()


def test_pefts_settings(tmp_path):
    _, adapter = trained('sd15', 'lora')
    jaxsd.save_adapter(adapter, tmp_path / 'a.safetensors', 'diffusers', dtype='float16')
    file = TensorFile(tmp_path / 'a.safetensors')
    settings = json.loads(file.metadata['lora_adapter_metadata'])
    assert settings['unet.r'] == 2 and settings['unet.lora_alpha'] == 1
    assert settings['unet.rank_pattern']['down_blocks.0.resnets.0.conv1'] == 3
    assert settings['unet.alpha_pattern']['down_blocks.0.resnets.0.conv1'] == 1.5
    assert 'encoder.layers.0.mlp.fc1' in settings['text_encoder.target_modules']
    assert not settings['text_encoder.rank_pattern'] and not settings['unet.use_dora']
    assert {dtype.name for dtype in file.dtypes.values()} == {'float16'}


def test_nothing_is_written_over_or_left(tmp_path):
    model, adapter = trained('sd15', 'lora')
    path = tmp_path / 'a.safetensors'
    path.write_bytes(b'mine')
    embedding = jaxsd.Embedding('a', {'text_encoder': np.ones((1, 12), np.float32)})
    for save, thing in ((jaxsd.save_adapter, adapter), (jaxsd.save_embedding, embedding)):
        with pytest.raises(ValueError, match='exists already; .*overwrite=True'):
            save(thing, path)
        assert path.read_bytes() == b'mine'
        save(thing, path, overwrite=True)
        assert path.read_bytes() != b'mine'
        path.write_bytes(b'mine')
        with pytest.raises(ValueError, match='expected the name of a .safetensors file'):
            save(thing, tmp_path / 'a.pt')
        with pytest.raises(ValueError, match="dtype 'int8': expected one of"):
            save(thing, path, dtype='int8')
    large = methods.lora(model, methods.AdapterConfig(rank=1), RNG)
    large = large.result(jax.tree.map(lambda a: 1e6 * np.ones_like(a), large.trainable))
    embedding = jaxsd.Embedding('a', {'text_encoder': np.full((1, 12), 1e6, np.float32)})
    for save, thing in ((jaxsd.save_adapter, large), (jaxsd.save_embedding, embedding)):
        with pytest.raises(ValueError, match='not finite in float16'):
            save(thing, tmp_path / 'b.safetensors', dtype='float16')
    with pytest.raises(ValueError, match="layout 'peft': expected one of kohya, diffusers"):
        jaxsd.save_adapter(adapter, tmp_path / 'b.safetensors', 'peft')
    assert [p.name for p in tmp_path.iterdir()] == ['a.safetensors']


def test_one_that_was_read_has_no_parts(tmp_path):
    model, adapter = trained('sd15', 'lora')
    jaxsd.save_adapter(adapter, tmp_path / 'a.safetensors')
    again = jaxsd.load_adapter(tmp_path / 'a.safetensors', model)
    with pytest.raises(ValueError, match='has no parts: expected one that was trained'):
        jaxsd.save_adapter(again, tmp_path / 'b.safetensors')


@pytest.mark.parametrize('version', ['sd15', 'sd21', 'sdxl', 'sdxl_refiner'])
def test_embeddings(version, tmp_path):
    config = read_config(version)
    widths = {part: getattr(config, part).hidden_size
              for part in ('text_encoder', 'text_encoder_2') if getattr(config, part)}
    embedding = jaxsd.Embedding('cat-toy', {
        part: RNG.standard_normal((3, width)).astype(np.float32)
        for part, width in widths.items()})
    path = tmp_path / 'toy.safetensors'
    jaxsd.save_embedding(embedding, path)
    found = jaxsd.load_embedding(path, config)
    assert found.name == 'toy' and found.vectors.keys() == embedding.vectors.keys()
    for part, vectors in embedding.vectors.items():
        np.testing.assert_array_equal(found.vectors[part], vectors)
    keys = {'clip_l', 'clip_g'} if len(widths) == 2 else {'<cat-toy>'}
    assert set(TensorFile(path).shapes) == keys
    path = tmp_path / 'learned_embeds.safetensors'
    jaxsd.save_embedding(embedding, path, dtype='float16')
    half = jaxsd.load_embedding(path, config)
    for part, vectors in embedding.vectors.items():
        np.testing.assert_array_equal(half.vectors[part], vectors.astype(np.float16))
    assert Model(config, {}, embeddings={half.name: half})
