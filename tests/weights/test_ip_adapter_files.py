"""IP-Adapters and image encoders in files: all of h94's are known, and what is wrong is said."""

import dataclasses
import gzip
import json
import math

import jax
import numpy as np
import pytest
from conftest import TINY
from safetensors.numpy import load_file, save_file
from test_manifests import DATA, FOLDERS, SINGLE
from tiny import sparse_file
from tiny_ip_adapters import VISION, adapters, config, encoder, tensors

import jaxsd
from jaxsd.config import VisionConfig
from jaxsd.config_files import read_config
from jaxsd.models import ip_adapter, spec, unet
from jaxsd.weights.ip_adapters import fits, lora
from jaxsd.weights.parts import _open_file, _open_folder

FILES = json.loads(gzip.decompress((DATA / 'ip_adapter.json.gz').read_bytes()))
ENCODERS = {name: table for name, table in FILES.items() if name.endswith('image_encoder')}
ADAPTERS = {name: table for name, table in FILES.items() if name not in ENCODERS}
# The bytes that are published of h94's files, of float16 but for the first image encoder.
SIZES = {'ip-adapter_sd15': 44_642_768, 'ip-adapter_sd15_light': 44_642_768,
         'ip-adapter-plus_sd15': 98_183_288, 'ip-adapter_sdxl_vit-h': 698_391_064,
         'ip-adapter-plus_sdxl_vit-h': 847_517_512, 'ip-adapter-plus-face_sdxl_vit-h': 847_517_512,
         'models/image_encoder': 2_528_373_448, 'sdxl_models/image_encoder': 3_689_912_664}
KINDS = {'plus': 'plus', 'plus-face': 'plus', 'full-face': 'full', 'faceid': 'faceid',
         'faceid-portrait': 'faceid', 'faceid-plus': 'faceid_plus', 'faceid-plusv2': 'faceid_plus'}


@pytest.mark.parametrize('name', SIZES)
def test_the_manifests_come_to_the_published_bytes(name):
    header = {'__metadata__': {'format': 'pt'}} if name in ENCODERS else {}
    kind, size, end = ('F32', 4, 0) if name == 'models/image_encoder' else ('F16', 2, 0)
    for tensor, shape in sorted(FILES[name].items(), key=lambda item: ('ids' not in item[0], item)):
        ids = tensor.endswith('position_ids')
        length = math.prod(shape) * (8 if ids else size)
        header[tensor] = {'dtype': 'I64' if ids else kind, 'shape': shape,
                          'data_offsets': [end, end + length]}
        end += length
    head = len(json.dumps(header, separators=(',', ':')))
    assert 8 + head + -head % 8 + end == SIZES[name]


@pytest.mark.parametrize('name', ADAPTERS)
def test_the_released_adapters(name):
    """Every tensor of a file is its kind's, and it fits its model, and no other."""
    table = {tensor: tuple(shape) for tensor, shape in ADAPTERS[name].items()}
    found = ip_adapter.detect(table)
    xl, middle = 'sdxl' in name, name.removeprefix('ip-adapter').split('_')[0].strip('-')
    assert spec.names(found) == table
    assert found.kind == KINDS.get(middle, 'base')
    assert found.rank == (128 if 'faceid' in name and 'portrait' not in name else 0)
    assert found.tokens == {'plus': 16, 'plus-face': 16, 'full-face': 0,
                            'faceid-portrait': 16}.get(middle, 4)
    ip_adapter.check(found, read_config('sdxl' if xl else 'sd15').unet)
    for other in ('sd21', 'sd15' if xl else 'sdxl'):
        with pytest.raises(ValueError, match=r'this IP-Adapter is for (1\.x|SDXL) .*the model is'):
            ip_adapter.check(found, read_config(other).unet)
    big = name in ('ip-adapter_sd15_vit-G', 'ip-adapter_sdxl')
    h, g = VisionConfig(), VisionConfig(hidden_size=1664, num_attention_heads=16,
                                        projection_dim=1280)
    assert (fits(found, h), fits(found, g)) == (not big or found.kind == 'faceid',
                                                big or found.kind == 'faceid')


@pytest.mark.parametrize('name', ENCODERS)
def test_the_released_image_encoders(name, tmp_path):
    sparse_file(tmp_path / 'model.safetensors', ENCODERS[name])
    source = _open_file('image_encoder', tmp_path / 'model.safetensors', None)
    assert source.mismatches() == {}
    assert spec.count(source.shapes['image_encoder']) == {
        'models/image_encoder': 632_076_800, 'sdxl_models/image_encoder': 1_844_907_264}[name]
    (tmp_path / 'config.json').write_text(json.dumps(
        {'architectures': ['CLIPVisionModelWithProjection'], 'model_type': 'clip_vision_model'}
        | dataclasses.asdict(source.config)))
    folder = _open_folder('image_encoder', tmp_path, None, False)
    assert folder.config == source.config and folder.mismatches() == {}


@pytest.mark.parametrize('kind', ['base', 'plus', 'full', 'faceid', 'faceid_plus'])
def test_round_trip(kind, tmp_path):
    found, = adapters(TINY['sd1'].unet, tmp_path, a=(kind, {'rank': 2 * kind.startswith('face')})
                      ).values()
    stored = load_file(tmp_path / 'a.safetensors')
    for name, array in stored.items():
        value = found.params
        for key in name.split('.'):
            value = value[key]
        np.testing.assert_array_equal(spec.from_jax(name, np.asarray(value)), array)
    assert len(jax.tree.leaves(found.params)) == len(stored)
    assert 'IPAdapterConfig' in repr(found)
    half = jaxsd.load_ip_adapter(tmp_path / 'a.safetensors', dtype='bfloat16')
    assert {a.dtype.name for a in jax.tree.leaves(half)} == {'bfloat16'}


def test_the_second_version_of_faceid_plus_is_known_by_its_name(tmp_path):
    stored = tensors(config('faceid_plus', TINY['sd1'].unet), 0)
    for name, given, shortcut in (('ip-adapter-faceid-plusv2_sd15', None, True),
                                  ('ip-adapter-faceid-plus_sd15', None, False),
                                  ('ip-adapter-faceid-plus_sd15', True, True)):
        save_file(stored, tmp_path / f'{name}.safetensors')
        found = jaxsd.load_ip_adapter(tmp_path / f'{name}.safetensors', shortcut=given)
        assert found.config.shortcut == shortcut


def test_the_lora_of_a_face_is_an_adapter_of_all_attentions(tmp_path):
    cfg = TINY['sd1'].unet
    found, = adapters(cfg, tmp_path, a=('faceid', {'rank': 3})).values()
    own = lora(found, cfg)
    assert lora(found, cfg) is own  # so that its side paths are made once
    stored, deltas = load_file(tmp_path / 'a.safetensors'), own.deltas['unet']
    first = next(iter(unet.cross_attentions(cfg)))
    np.testing.assert_array_equal(deltas[f'{first}.to_out.0.weight'].up.T,
                                  stored['ip_adapter.1.to_out_lora.up.weight'])
    np.testing.assert_array_equal(deltas[f'{first[:-1]}1.to_q.weight'].down.T,
                                  stored['ip_adapter.0.to_q_lora.down.weight'])
    assert len(deltas) == 4 * 2 * 4 and deltas.keys() <= spec.names(cfg).keys()


def error(path, *arguments, **options):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        jaxsd.load_ip_adapter(path, *arguments, **options)
    message = str(caught.value)
    assert '\n' not in message and str(path) in message
    return message


def test_what_is_no_ip_adapter(tmp_path):
    path = tmp_path / 'a.safetensors'
    assert 'no such file' in error(path)
    assert 'is a folder; expected the file of an IP-Adapter' in error(tmp_path)
    sparse_file(path, SINGLE['sd15_emaonly'])
    assert 'it is a whole checkpoint' in error(path)
    sparse_file(path, FOLDERS['controlnet_sd15'])
    assert 'it is a ControlNet' in (said := error(path)) and 'jaxsd.load_controlnet' in said
    for load, other in ((jaxsd.load, 'load_ip_adapter'), (jaxsd.load_controlnet, 'IP-Adapter')):
        sparse_file(path, ADAPTERS['ip-adapter-faceid_sd15'])
        with pytest.raises(ValueError, match=f'an IP-Adapter.*{other}|{other}'):
            load(path)
    sparse_file(path, ENCODERS['models/image_encoder'])
    assert 'it is an image encoder' in (said := error(path)) and 'load_image_encoder' in said


def test_everything_wrong_in_one_error(tmp_path):
    stored = tensors(config('plus', TINY['sd1'].unet), 0)
    del stored['image_proj.norm_out.bias'], stored['ip_adapter.5.to_v_ip.weight']
    stored |= {'stray': np.zeros(2, np.float32), 'image_proj.proj_in.bias': np.zeros(3, np.float32)}
    save_file(stored, tmp_path / 'a.safetensors')
    message = error(tmp_path / 'a.safetensors')
    assert '2 missing: image_proj.norm_out.bias, ip_adapter.5.to_v_ip.weight' in message
    assert '1 unexpected: stray' in message
    assert '1 mis-shaped: image_proj.proj_in.bias (expected [40], found [3])' in message
    del stored['ip_adapter.1.to_k_ip.weight']
    save_file(stored, tmp_path / 'a.safetensors')
    assert 'ip_adapter.1.to_k_ip.weight' in error(tmp_path / 'a.safetensors')


def test_an_encoder_of_another_width(tmp_path):
    save_file(tensors(config('base', TINY['sd1'].unet), 0), tmp_path / 'a.safetensors')
    other = dataclasses.replace(VISION, projection_dim=32)
    message = error(tmp_path / 'a.safetensors', jaxsd.Network(other, {}))
    assert 'reads image features of 24 (embeds), the image encoder gives 32 (embeds)' in message
    with pytest.raises(ValueError, match='expected one of jaxsd.load_image_encoder, found a VAE'):
        jaxsd.load_ip_adapter(tmp_path / 'a.safetensors', jaxsd.Network(TINY['sd1'].vae, {}))
    shared = encoder()
    assert jaxsd.load_ip_adapter(tmp_path / 'a.safetensors', shared).image_encoder is shared
