"""Textual inversions in every form in which they are shared, and what is none of them."""

import io
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_pickles import GOLDENS, packed
from tiny import tiny_config

import jaxsd

RNG = np.random.default_rng(0)


def vectors(n, width):
    return RNG.normal(size=(n, width)).astype(np.float32)


def a1111(width, array, param=b'}X\x01\x00\x00\x00*%ss'):
    """As torch writes {'string_to_token': {'*': 265}, 'string_to_param': {'*': array}, ...}."""
    n = len(array)
    tensor = (b'ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n'
              b'X\x01\x00\x00\x000X\x03\x00\x00\x00cpuI%d\ntQK\x00(I%d\nI%d\nt(I%d\nK\x01t\x89'
              b'ccollections\nOrderedDict\n)RtR' % (n * width, n, width, width))
    return packed(b'\x80\x02}(X\x0f\x00\x00\x00string_to_token}X\x01\x00\x00\x00*M\x09\x01s'
                  b'X\x0f\x00\x00\x00string_to_param' + param % tensor
                  + b'X\x04\x00\x00\x00nameX\x05\x00\x00\x00otherX\x04\x00\x00\x00stepM\xe8\x03u.',
                  data=array.tobytes())


def test_a1111(tmp_path):
    array = vectors(3, 768)
    module = (b'ctorch.nn.modules.container\nParameterDict\n)\x81}X\x0b\x00\x00\x00_parameters'
              b'}X\x01\x00\x00\x00*%sssb')  # the first textual inversions kept a ParameterDict
    for data in (a1111(768, array), a1111(768, array, module)):
        (tmp_path / 'bad-hands.pt').write_bytes(data)
        found = jaxsd.load_embedding(tmp_path / 'bad-hands.pt')
        assert found.name == 'bad-hands' and list(found.vectors) == ['text_encoder']
        np.testing.assert_array_equal(found.vectors['text_encoder'], array)


@pytest.mark.parametrize('width, part', [(768, 'text_encoder'), (1024, 'text_encoder'),
                                         (1280, 'text_encoder_2')])
@pytest.mark.parametrize('key, stem, name', [
    ('emb_params', 'style', 'style'), ('<cat-toy>', 'cat', 'cat'),
    ('<cat-toy>', 'learned_embeds', 'cat-toy'), ('*', 'a.b', 'a.b')])
def test_one_tensor(width, part, key, stem, name, tmp_path):
    array = vectors(2, width)
    save_file({key: array}, tmp_path / f'{stem}.safetensors')
    found = jaxsd.load_embedding(tmp_path / f'{stem}.safetensors')
    assert found.name == name and list(found.vectors) == [part]
    np.testing.assert_array_equal(found.vectors[part], array)


def test_one_vector_in_half_precision(tmp_path):
    array = vectors(1, 768)[0].astype(np.float16)
    save_file({'<a>': array}, tmp_path / 'a.safetensors')
    found = jaxsd.load_embedding(tmp_path / 'a.safetensors').vectors['text_encoder']
    assert found.shape == (1, 768) and found.dtype == np.float32
    np.testing.assert_array_equal(found[0], array)


def test_sdxl(tmp_path):
    arrays = {'clip_g': vectors(2, 1280), 'clip_l': vectors(2, 768)}
    save_file(arrays, tmp_path / 'xl.safetensors')
    for config in (None, jaxsd.read_config('sdxl')):
        found = jaxsd.load_embedding(tmp_path / 'xl.safetensors', config)
        np.testing.assert_array_equal(found.vectors['text_encoder'], arrays['clip_l'])
        np.testing.assert_array_equal(found.vectors['text_encoder_2'], arrays['clip_g'])


def test_other_widths_by_the_models_config(tmp_path):
    save_file({'emb_params': vectors(2, 12)}, tmp_path / 'a.safetensors')
    found = jaxsd.load_embedding(tmp_path / 'a.safetensors', tiny_config('sd15'))
    assert found.vectors['text_encoder'].shape == (2, 12)


def test_both_of_one_width(tmp_path):
    save_file({'clip_g': vectors(1, 12), 'clip_l': vectors(1, 12)}, tmp_path / 'a.safetensors')
    found = jaxsd.load_embedding(tmp_path / 'a.safetensors', tiny_config('sdxl'))
    assert set(found.vectors) == {'text_encoder', 'text_encoder_2'}


@pytest.mark.parametrize('tensors, config, said', [
    ({'emb_params': (2, 12)}, None, 'have 12 numbers .no released .*; expected 768 .* 1024'),
    ({'emb_params': (2, 1024)}, 'sd15', 'have 1024 numbers .2.x.; expected 768 numbers .1.x, SDXL'),
    ({'emb_params': (2, 768)}, 'sdxl', 'this model also needs text_encoder_2'),
    ({'clip_l': (2, 1280), 'clip_g': (2, 768)}, None, "'clip_g' have 768 numbers"),
    ({'clip_l': (2, 768), 'a': (2, 768)}, None, 'expected the vectors'),
    ({'a': (2, 768), 'b': (2, 768)}, None, 'found 2 tensors'),
    ({'lora_unet_a.lora_down.weight': (2, 768), 'b': (1, 1)}, None, 'it is a LoRA'),
    ({'emb_params': ()}, None, 'expected the vectors'),
    ({'emb_params': (0, 768)}, None, 'empty or not finite'),
])
def test_what_is_none(tensors, config, said, tmp_path):
    save_file({k: np.ones(s, np.float32) for k, s in tensors.items()}, tmp_path / 'a.safetensors')
    with pytest.raises(ValueError, match=said) as caught:
        jaxsd.load_embedding(tmp_path / 'a.safetensors', config and jaxsd.read_config(config))
    assert '\n' not in str(caught.value) and 'a.safetensors' in str(caught.value)


def test_not_finite_and_missing(tmp_path):
    save_file({'emb_params': np.full((1, 768), np.nan, np.float32)}, tmp_path / 'a.safetensors')
    with pytest.raises(ValueError, match='not finite'):
        jaxsd.load_embedding(tmp_path / 'a.safetensors')
    with pytest.raises(FileNotFoundError, match='none.pt'):
        jaxsd.load_embedding(tmp_path / 'none.pt')
    (tmp_path / 'b.pt').write_bytes(GOLDENS['zip'].tobytes())
    with pytest.raises(ValueError, match='expected the vectors'):
        jaxsd.load_embedding(tmp_path / 'b.pt')
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        archive.writestr('a/data.pkl', b"cos\nsystem\n(S'true'\ntR.")
    (tmp_path / 'c.pt').write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="asks for 'os.system'"):
        jaxsd.load_embedding(tmp_path / 'c.pt')
