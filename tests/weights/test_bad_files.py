"""What is wrong with a file is said in one line, and nothing is half-written."""

import json
import pickle
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_manifests import FOLDERS, SINGLE
from tiny import random_model, sparse_file

import jaxsd
from jaxsd.config import T2IAdapterConfig
from jaxsd.models.spec import names


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp('saved')
    model = random_model('sd15')
    jaxsd.save(model, folder / 'folder')
    jaxsd.save(model, folder / 'model.safetensors', layout='single-file')
    return folder, model.config


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved[0] / 'folder', tmp_path / 'folder')
    return tmp_path / 'folder'


def error(path, kind=ValueError, **options):
    with pytest.raises(kind) as caught:
        jaxsd.load(path, **options)
    message = str(caught.value)
    assert '\n' not in message
    return message


def change(path, **changes):
    """Rewrite some tensors of a file; None removes one."""
    tensors = load_file(path) | {k.replace('/', '.'): v for k, v in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


def test_everything_wrong_in_one_error(folder):
    path = folder / 'unet' / 'diffusion_pytorch_model.safetensors'
    nan = load_file(path)['conv_out.weight']
    nan[0, 0, 0, 0] = np.nan
    change(path, **{'conv_in/weight': None, 'conv_in/bias': None, 'stray': np.zeros(2, 'f4'),
                    'conv_norm_out/bias': np.zeros(3, 'f4'), 'conv_out/weight': nan,
                    'conv_out/bias': np.zeros(4, 'i4')})
    inf = load_file(folder / 'vae' / 'diffusion_pytorch_model.safetensors')['quant_conv.bias']
    inf[0] = -np.inf
    change(folder / 'vae' / 'diffusion_pytorch_model.safetensors', **{'quant_conv/bias': inf})
    message = error(folder)
    assert str(folder) in message
    assert '2 missing: unet/conv_in.bias, unet/conv_in.weight' in message
    assert '1 unexpected: unet/stray' in message
    assert '1 mis-shaped: unet/conv_norm_out.bias (expected [8], found [3])' in message
    assert '1 not floating point: unet/conv_out.bias (found int32)' in message
    assert '2 not finite (NaN or infinity): unet/conv_out.weight, vae/quant_conv.bias' in message


def test_long_lists_are_cut_but_counted(folder):
    save_file({f'stray.{i:03}': np.zeros(1, 'f4') for i in range(90)},
              folder / 'text_encoder' / 'model.safetensors')
    message = error(folder)
    assert '90 unexpected: text_encoder/text_model.stray.000' in message
    assert 'and 70 more' in message and 'stray.089' not in message


def test_single_file_names_its_own_tensors(saved, tmp_path):
    path = shutil.copy(saved[0] / 'model.safetensors', tmp_path)
    change(path, **{'model/diffusion_model/out/2/bias': np.full(4, np.nan, 'f4'),
                    'lora_unet_x': np.zeros(1, 'f4')})
    message = error(path, config=saved[1])
    assert '1 unexpected: lora_unet_x' in message
    assert '1 not finite (NaN or infinity): model.diffusion_model.out.2.bias' in message


def test_overflow_of_float16_is_told_from_infinity(folder):
    path = folder / 'unet' / 'diffusion_pytorch_model.safetensors'
    change(path, **{'conv_out/bias': np.full(4, 1e6, 'f4')})
    assert '1 too large for float16: unet/conv_out.bias' in error(folder, dtype='float16')
    jaxsd.load(folder, dtype='bfloat16')


@pytest.mark.parametrize('keep', [0, 5, 8, 100, 5000, -1])
def test_truncated(saved, tmp_path, keep):
    path = tmp_path / 'cut.safetensors'
    path.write_bytes((saved[0] / 'model.safetensors').read_bytes()[:keep])
    message = error(path, config=saved[1])
    assert 'truncated or corrupt' in message and str(path) in message


def lying(entry):
    head = json.dumps({'a': entry}).encode()
    return len(head).to_bytes(8, 'little') + head + bytes(16)


@pytest.mark.parametrize('data', [
    (2 ** 62).to_bytes(8, 'little') + b'{}', b'\x10' + bytes(7) + b'not json at all!',
    bytes(8), (2).to_bytes(8, 'little') + b'[]',
    lying({'dtype': 'F32', 'shape': [4], 'data_offsets': [0, 10 ** 15]}),
    lying({'dtype': 'F32', 'shape': [10 ** 12, 10 ** 12], 'data_offsets': [0, 16]}),
    lying({'dtype': 'F32', 'shape': [-4], 'data_offsets': [0, 16]}),
    lying({'dtype': 'F32', 'shape': [4], 'data_offsets': [-16, 0]}),
    lying({'dtype': 'X99', 'shape': [4], 'data_offsets': [0, 16]}),
    lying({'dtype': 'F32', 'shape': 'four', 'data_offsets': [0, 16]}),
    lying({'dtype': 'F32'}), lying(None),
])
def test_headers_that_lie(tmp_path, data):
    path = tmp_path / 'lie.safetensors'
    path.write_bytes(data)
    assert 'truncated or corrupt' in error(path)


@pytest.mark.parametrize('name', ['model.ckpt', 'model.pt', 'model.bin', 'renamed.safetensors'])
def test_attacks_are_refused(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath('exploded').mkdir, ())
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(), protocol=2))
    message = error(tmp_path / name)
    assert 'getattr' in message and 'Nothing of it was run' in message
    assert not (tmp_path / 'exploded').exists()


@pytest.mark.parametrize('part', ['unet', 'vae', 'text_encoder', 'scheduler'])
def test_folder_without_a_component(folder, part):
    shutil.rmtree(folder / part)
    assert part in error(folder, FileNotFoundError)


def test_folder_without_weights_or_with_a_bad_pickle(folder):
    (folder / 'vae' / 'diffusion_pytorch_model.safetensors').unlink()
    assert str(folder / 'vae') in error(folder, FileNotFoundError)
    (folder / 'vae' / 'diffusion_pytorch_model.bin').write_bytes(b'x')
    assert 'not a whole pickle' in error(folder)


def test_folder_without_its_tokenizer(tmp_path):
    jaxsd.save(random_model('sd15', tokenizers=True), tmp_path)
    shutil.rmtree(tmp_path / 'tokenizer')
    assert "'tokenizer'" in error(tmp_path, FileNotFoundError)


def test_bad_index_of_shards(folder, tmp_path):
    whole = folder / 'unet' / 'diffusion_pytorch_model.safetensors'
    index = whole.with_name(whole.name + '.index.json')
    whole.rename(tmp_path / 'secret.safetensors')
    index.write_text('{"weight_map": {"conv_in.weight": "../../secret.safetensors"}}')
    assert 'not in the same folder' in error(folder)
    index.write_text('{"weight_map": {"conv_in.weight": "gone.safetensors"}}')
    assert 'gone.safetensors' in error(folder, FileNotFoundError)
    index.write_text('[]')
    assert 'index of shards' in error(folder)


def test_missing_path_and_unknown_model(tmp_path):
    assert 'no such file' in error(tmp_path / 'none.safetensors', FileNotFoundError)
    save_file({'model.diffusion_model.a': np.zeros(3, 'f4')}, tmp_path / 'other.safetensors')
    message = error(tmp_path / 'other.safetensors')
    assert 'model.diffusion_model.a. Give' in message and 'first_stage_model.*' in message


@pytest.mark.parametrize('what, reader, shapes', [
    ('a VAE', 'load_vae', SINGLE['vae_ldm']),
    ('a VAE', 'load_vae', FOLDERS['sdxl_base_vae']),
    ('a ControlNet', 'load_controlnet', SINGLE['controlnet_sd15_control_model']),
    ('a ControlNet', 'load_controlnet', SINGLE['controlnet_sd15_full_1.0']),
    ('a ControlNet', 'load_controlnet', SINGLE['controlnet_sd21_full']),
    ('a ControlNet', 'load_controlnet', FOLDERS['controlnet_sdxl']),
    ('a T2I-Adapter', 'load_t2i_adapter', names(T2IAdapterConfig())),
    ('a depth estimator', 'load_depth_estimator', FOLDERS['sd2_depth_depth_estimator']),
    ('a text encoder', None, FOLDERS['sd15_text_encoder']),
    ('a text encoder', None, {k.removeprefix('text_model.'): v  # as transformers 5 writes it
                              for k, v in FOLDERS['sd15_text_encoder'].items()}),
    ('a LoRA', 'load_adapter',
     {'lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight': [4, 320]}),
    ('a LoRA', 'load_adapter', {'unet.down_blocks.0.attentions.0.to_q.lora.down.weight': [4, 320]}),
    ('a LoRA', 'load_adapter', {'unet.down_blocks.0.attentions.0.to_q.lora_A.weight': [4, 320]}),
    ('a textual inversion embedding', 'load_embedding', {'emb_params': [2, 768]}),
    ('a textual inversion embedding', 'load_embedding', {'clip_l': [2, 768], 'clip_g': [2, 1280]}),
    ('a textual inversion embedding', 'load_embedding', {'<cat-toy>': [768]}),
])
def test_what_is_no_whole_model(what, reader, shapes, tmp_path):
    """Released files of one network: what it is and what reads it, of a file and of a folder."""
    path = tmp_path / 'diffusion_pytorch_model.safetensors'
    sparse_file(path, shapes)
    (tmp_path / 'config.json').write_text('{}')
    for found in (path, tmp_path):
        message = error(found)
        assert f'{found}: is {what}, by its tensor ' in message
        assert message.endswith(f'jaxsd.{reader}' if reader else 'reads no such file')
        assert not reader or getattr(jaxsd, reader)


def test_bad_options(saved):
    assert 'float64' in error(saved[0] / 'folder', dtype='float64')
    assert 'eps' in error(saved[0] / 'folder', prediction_type='eps')
    model = random_model('sd15')
    with pytest.raises(ValueError, match='layout'):
        jaxsd.save(model, saved[0] / 'x', layout='onnx')
    with pytest.raises(ValueError, match='safetensors'):
        jaxsd.save(model, saved[0] / 'x', layout='single-file')


def test_nothing_half_written(tmp_path, monkeypatch):
    model = random_model('sd15')
    broken = model.replace(params={k: v for k, v in model.params.items() if k != 'vae'})
    with pytest.raises(ValueError, match='vae'):
        jaxsd.save(broken, tmp_path / 'model')
    monkeypatch.setattr('jaxsd.weights.writing.from_jax', lambda name, a: a[:0])  # a late failure
    for path, layout in ((tmp_path / 'model', 'diffusers'),
                         (tmp_path / 'model.safetensors', 'single-file')):
        with pytest.raises(ValueError):
            jaxsd.save(model, path, layout)
    assert list(tmp_path.iterdir()) == []
