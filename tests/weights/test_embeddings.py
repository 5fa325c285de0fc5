"""Textual inversions in every form in which they are shared, and what is none of them."""

import base64
import io
import pathlib
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file
from test_pickles import GOLDENS, packed
from tiny import tiny_config

import jaxsd
from jaxsd.recipe import files
from jaxsd.weights import embeddings, names

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


def test_a_pti(tmp_path):
    """cog-sdxl's, which diffusers reads row by row as <s0>, <s1> ...: the words behind TOK."""
    arrays = {'text_encoders_1': vectors(2, 1280), 'text_encoders_0': vectors(2, 768)}
    save_file(arrays, tmp_path / 'embeddings.pti')
    found = jaxsd.load_embedding(tmp_path / 'embeddings.pti', jaxsd.read_config('sdxl'))
    assert found.name == 'embeddings' and names.kind(arrays)[1] == 'load_embedding'
    np.testing.assert_array_equal(found.vectors['text_encoder'], arrays['text_encoders_0'])
    np.testing.assert_array_equal(found.vectors['text_encoder_2'], arrays['text_encoders_1'])


@pytest.mark.parametrize('steps', ['', '-steps-500'])
@pytest.mark.parametrize('widths', [(768, 1280), (12, 12)])
def test_diffusers_two_files(steps, widths, tmp_path):
    """learned_embeds for the first text encoder, learned_embeds_2 for the second."""
    arrays = [vectors(1, width) for width in widths]
    paths = [tmp_path / f'learned_embeds{part}{steps}.safetensors' for part in ('', '_2')]
    for path, array in zip(paths, arrays):
        save_file({'<cat-toy>': array}, path)
    config = jaxsd.read_config('sdxl') if widths[0] == 768 else tiny_config('sdxl')
    for path in paths:
        found = jaxsd.load_embedding(path, config)
        assert found.name == 'cat-toy'
        np.testing.assert_array_equal(found.vectors['text_encoder'], arrays[0])
        np.testing.assert_array_equal(found.vectors['text_encoder_2'], arrays[1])
    assert embeddings.listed(tmp_path) == [('cat-toy', paths[0])]
    paths[1].unlink()
    with pytest.raises(ValueError, match='needs text_encoder_2'):
        jaxsd.load_embedding(paths[0], config)


@pytest.mark.parametrize('prefix', ['', 'string_to_param.', 'bundle_emb.'])
def test_several_tokens(prefix, tmp_path):
    suffix, path = '.emb_params' * (prefix == 'bundle_emb.'), tmp_path / 'two.safetensors'
    arrays = {name: vectors(n, 768) for n, name in enumerate(('<s1>', '<s2>'), 1)}
    save_file({f'{prefix}{name}{suffix}': array for name, array in arrays.items()}, path)
    for name, array in arrays.items():
        found = jaxsd.load_embedding(path, jaxsd.read_config('sd15'), name.strip('<>'))
        assert found.name == name.strip('<>')
        np.testing.assert_array_equal(found.vectors['text_encoder'], array)
    for name in (None, 's3'):
        with pytest.raises(ValueError, match='several tokens, s1, s2; expected the name of one'):
            jaxsd.load_embedding(path, name=name)
    assert embeddings.listed(path) == [('s1', path), ('s2', path)]


PICTURES = np.load(pathlib.Path(__file__).parents[1] / 'goldens' / 'embedding_pictures.npz')


@pytest.mark.parametrize('kind', ['text', 'pixels'])
def test_a1111s_pictures(kind, tmp_path):
    (tmp_path / 'x.png').write_bytes(PICTURES[kind].tobytes())
    found = jaxsd.load_embedding(tmp_path / 'x.png', jaxsd.read_config('sd15'))
    assert found.name == PICTURES['name']
    np.testing.assert_array_equal(found.vectors['text_encoder'], PICTURES['vectors'])
    with Image.open(tmp_path / 'x.png') as file:
        file.save(tmp_path / 'x.webp', lossless=True)
        file.convert('RGBA').save(tmp_path / 'y.png')
        file.save(tmp_path / 'lossy.webp', quality=50)
    for name in ('x.webp', 'y.png'):
        again = jaxsd.load_embedding(tmp_path / name, name='it')
        assert again.name == 'it'
        np.testing.assert_array_equal(again.vectors['text_encoder'], PICTURES['vectors'])
    with pytest.raises(ValueError, match='lossy.webp: no textual inversion in this picture'):
        jaxsd.load_embedding(tmp_path / 'lossy.webp')


def test_a1111s_random_numbers():
    """The values in its own test of them, of which the pattern has the low halves."""
    assert embeddings._pattern(9).tolist() == [
        n & 15 for n in (253, 242, 127, 44, 157, 27, 239, 133, 38)]
    assert (embeddings._pattern(10**6)[:99] == embeddings._pattern(99)).all()


@pytest.mark.parametrize('text', [
    'x', '[1]', '{}', '{"string_to_param": {"*": 1}}', '{"string_to_param": []}', '[' * 10**5,
    '{"string_to_param": {"*": {"TORCHTENSOR": [[1], [1, 2]]}}}',
    '{"string_to_param": {"*": {"TORCHTENSOR": [[1e999]]}}}',
    '{"string_to_param": {"*": {"TORCHTENSOR": [[NaN]]}}}'])
def test_pictures_whose_text_is_damaged(text, tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text('sd-ti-embedding', base64.b64encode(text.encode()).decode())
    Image.new('RGB', (8, 8)).save(tmp_path / 'a.png', pnginfo=info)
    with pytest.raises(ValueError, match='damaged|have 1 numbers') as caught:
        jaxsd.load_embedding(tmp_path / 'a.png')
    assert '\n' not in str(caught.value)


def test_a_bomb_in_the_pixels(tmp_path):
    packed = np.frombuffer(zlib.compress(b' ' * (embeddings.LARGEST + 1), 9), np.uint8)
    packed = np.resize(packed, (64, len(packed) // 192 + 1, 3))
    pattern, black = embeddings._pattern(packed.size).reshape(packed.shape), np.zeros((64, 1, 3))
    halves = [(half ^ pattern) | 16 for half in (packed & 15, packed >> 4)]
    pixels = np.concatenate([halves[0], black, np.ones((64, 1, 3)), black, halves[1]], 1)
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / 'a.png')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, 'LARGEST', embeddings.LARGEST + 1)
        with pytest.raises(ValueError, match='is damaged'):
            jaxsd.load_embedding(tmp_path / 'a.png')
    with pytest.raises(ValueError, match='no textual inversion in this picture'):
        jaxsd.load_embedding(tmp_path / 'a.png')


def test_a_folder(tmp_path):
    """Pictures that hold none are previews, and what is no embedding waits until it is named."""
    for name in ('a.safetensors', 'b.pti'):
        save_file({'emb_params': vectors(1, 768)}, tmp_path / name)
    (tmp_path / 'style.PNG').write_bytes(PICTURES['pixels'].tobytes())
    for name in ('a.png', 'a.preview.png', 'z.webp', 'plain.png'):
        Image.new('RGB', (8, 8)).save(tmp_path / name)
    (tmp_path / 'broken.pt').write_bytes(b'x')
    (tmp_path / 'readme.md').touch()
    found = dict(embeddings.listed(tmp_path))
    assert {name: path.name for name, path in found.items()} == {
        'a': 'a.safetensors', 'b': 'b.pti', 'broken': 'broken.pt', 'my style-9': 'style.PNG'}
    assert files('--embeddings', [f'{tmp_path}']) == {n: str(p) for n, p in found.items()}
    for name in ('broken.pt', 'plain.png'):
        with pytest.raises(ValueError, match=name):
            files('--embeddings', [f'{tmp_path}/{name}'])
    named = f'it={tmp_path}/style.PNG'
    assert files('--embeddings', [named]) == {'it': f'{tmp_path}/style.PNG'}


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
