"""What is saved comes back, in both layouts and all dtypes, byte by byte."""

import json
import logging

import jax
import ml_dtypes  # noqa: F401 (names bfloat16 for numpy)
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_manifests import FILES, SINGLE
from tiny import flat, random_model, same, tiny_config

import jaxsd
from jaxsd.config_files import read_config, versions
from jaxsd.models.spec import spec
from jaxsd.weights.names import places


def single_file_like(version, dtype='float32'):
    """The tensors of a random single file of a tiny model, with everything such files hold."""
    config, rng = tiny_config(version), np.random.default_rng(1)
    shapes = spec(config)
    tensors = {place.name: rng.standard_normal(place.shape(shapes[part][name])).astype(dtype)
               for part, table in places(config, shapes).items() for name, place in table.items()}
    released = read_config(version)
    used = {place.name for table in places(released, spec(released)).values()
            for place in table.values()}
    file = next(file for file, (found, *_) in FILES.items() if found == version)
    unused = SINGLE[file].keys() - used
    extra = sorted(name for name in unused if 'resblocks' not in name)
    if any('resblocks' in name for name in unused):  # 2.x's last layer, here the fourth
        extra.append('cond_stage_model.model.transformer.resblocks.3.attn.in_proj_weight')
    tensors |= {name: rng.standard_normal(5).astype('float32') for name in extra}
    tensors['model_ema.num_updates'] = np.array(3, np.int32)
    tensors['cond_stage_model.transformer.text_model.embeddings.position_ids'] = np.arange(77)[None]
    return config, tensors


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
@pytest.mark.parametrize('version', ['sd15', 'sd21', 'sd2_depth', 'sdxl', 'sdxl_refiner',
                                     'x4_upscaler'])
def test_single_folder_single(version, dtype, tmp_path):
    config, tensors = single_file_like(version, dtype)
    save_file(tensors, tmp_path / 'a.safetensors')
    model = jaxsd.load(tmp_path / 'a.safetensors', dtype=None, config=config)
    jaxsd.save(model, tmp_path / 'folder')
    again = jaxsd.load(tmp_path / 'folder', dtype=None)
    assert same(flat(again.params), flat(model.params))
    jaxsd.save(again, tmp_path / 'b.safetensors', layout='single-file')
    v = config.schedule.prediction_type == 'v_prediction'  # marked as ComfyUI does
    marked = tensors | {'v_pred': np.zeros(0, 'f4')} if v else tensors
    assert same(load_file(tmp_path / 'b.safetensors'), marked)


@pytest.mark.slow
@pytest.mark.parametrize('version', versions())
def test_folder_keeps_config_and_arrays(version, tmp_path):
    model = random_model(version)
    jaxsd.save(model, tmp_path / 'model')
    again = jaxsd.load(tmp_path / 'model')
    assert again.config.replace(version='custom') == model.config
    assert same(flat(again.params), flat(model.params))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(again.params))


@pytest.mark.parametrize('family', ['sd1', 'sd2', 'sdxl', 'refiner'])
def test_any_sizes(family, tiny_model, tmp_path):
    """Models that are no release: fewer levels, a vocabulary of their own."""
    model = tiny_model(family)
    jaxsd.save(model, tmp_path / 'folder')
    jaxsd.save(model, tmp_path / 'a.safetensors', layout='single-file')
    folder = jaxsd.load(tmp_path / 'folder')
    assert folder.config == model.config and folder.tokenizers.keys() == model.tokenizers.keys()
    single = jaxsd.load(tmp_path / 'a.safetensors', config=model.config)
    assert same(flat(folder.params), flat(model.params))
    assert same(flat(single.params), flat(model.params))
    for part, tokenizer in model.tokenizers.items():
        assert np.array_equal(folder.tokenizers[part](['a red cat']), tokenizer(['a red cat']))


@pytest.mark.slow
@pytest.mark.parametrize('stored', ['float32', 'float16', 'bfloat16'])
@pytest.mark.parametrize('wanted', ['float32', 'float16', 'bfloat16'])
def test_any_dtype_in_any_out(stored, wanted, tmp_path):
    model = random_model('sd15')
    jaxsd.save(model, tmp_path / 'model', dtype=stored)
    found = flat(jaxsd.load(tmp_path / 'model', dtype=wanted).params)
    for name, array in flat(model.params).items():
        assert found[name].dtype == np.dtype(wanted)
        assert np.array_equal(found[name], array.astype(stored).astype(wanted)), name


def test_transposed_once(tmp_path):
    """A linear [O,I] is kept as [I,O], a convolution OIHW as HWIO, an embedding as it is."""
    config, tensors = single_file_like('sd15')
    save_file(tensors, tmp_path / 'a.safetensors')
    params = jaxsd.load(tmp_path / 'a.safetensors', config=config).params
    unet, text = params['unet'], params['text_encoder']['text_model']
    stored = tensors['model.diffusion_model.time_embed.0.weight']
    assert np.array_equal(unet['time_embedding']['linear_1']['weight'], stored.T)
    stored = tensors['model.diffusion_model.input_blocks.0.0.weight']
    assert np.array_equal(unet['conv_in']['weight'], stored.transpose(2, 3, 1, 0))
    stored = tensors['cond_stage_model.transformer.text_model.embeddings.token_embedding.weight']
    assert np.array_equal(text['embeddings']['token_embedding']['weight'], stored)


def test_openclip_parts(tmp_path):
    """OpenCLIP fuses q, k and v by rows and keeps text_projection transposed."""
    config, tensors = single_file_like('sdxl')
    save_file(tensors, tmp_path / 'a.safetensors')
    params = jaxsd.load(tmp_path / 'a.safetensors', config=config).params['text_encoder_2']
    attn = params['text_model']['encoder']['layers']['1']['self_attn']
    prefix = 'conditioner.embedders.1.model.'
    fused = tensors[f'{prefix}transformer.resblocks.1.attn.in_proj_weight']
    for i, name in enumerate(('q_proj', 'k_proj', 'v_proj')):
        assert np.array_equal(attn[name]['weight'], fused[12 * i:12 * i + 12].T)
    assert np.array_equal(params['text_projection']['weight'],
                          tensors[f'{prefix}text_projection'])  # ours is transposed too


def test_folders_as_other_programs_write_them(tmp_path):
    """Shards, fp16 variants, no text_model. prefix, old VAE attention names, position_ids."""
    model = random_model('sd15')
    jaxsd.save(model, tmp_path, dtype='float16')
    unet = tmp_path / 'unet' / 'diffusion_pytorch_model.safetensors'
    tensors = load_file(unet)
    unet.unlink()
    half = len(tensors) // 2
    shards = [dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])]
    files = [f'diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors' for i in range(2)]
    for file, shard in zip(files, shards):
        save_file(shard, tmp_path / 'unet' / file)
    (tmp_path / 'unet' / 'diffusion_pytorch_model.safetensors.index.json').write_text(json.dumps(
        {'weight_map': {name: f for f, shard in zip(files, shards) for name in shard}}))

    vae = tmp_path / 'vae' / 'diffusion_pytorch_model.safetensors'
    tensors = load_file(vae)
    vae.unlink()
    for new, old in (('to_q', 'query'), ('to_k', 'key'), ('to_v', 'value'),
                     ('to_out.0', 'proj_attn')):
        tensors = {k.replace(f'.{new}.', f'.{old}.'): v for k, v in tensors.items()}
    save_file(tensors, tmp_path / 'vae' / 'diffusion_pytorch_model.fp16.safetensors')

    text = tmp_path / 'text_encoder' / 'model.safetensors'
    tensors = {k.removeprefix('text_model.'): v for k, v in load_file(text).items()}
    save_file(tensors | {'embeddings.position_ids': np.arange(77)[None]}, text)
    found = jaxsd.load(tmp_path)
    expected = jax.tree.map(lambda a: np.asarray(a).astype('float16').astype('float32'),
                            model.params)
    assert same(flat(found.params), flat(expected))


def test_fp16_variant_only_for_16_bits(tmp_path):
    model = random_model('sd15')
    jaxsd.save(model, tmp_path)
    unet = tmp_path / 'unet' / 'diffusion_pytorch_model.safetensors'
    zeros = {k: np.zeros_like(v, 'float16') for k, v in load_file(unet).items()}
    save_file(zeros, tmp_path / 'unet' / 'diffusion_pytorch_model.fp16.safetensors')
    assert not np.any(jaxsd.load(tmp_path, dtype='bfloat16').params['unet']['conv_in']['weight'])
    assert np.any(jaxsd.load(tmp_path, dtype='float32').params['unet']['conv_in']['weight'])


@pytest.mark.slow
def test_tokenizers_are_kept(tmp_path):
    model = random_model('sdxl', tokenizers=True)
    jaxsd.save(model, tmp_path / 'folder')
    jaxsd.save(model, tmp_path / 'model.safetensors', layout='single-file')
    folder = jaxsd.load(tmp_path / 'folder')
    single = jaxsd.load(tmp_path / 'model.safetensors', config=model.config)
    text = ['a red apple!', 'naïve &amp; “quoted” 猫']
    for part in ('text_encoder', 'text_encoder_2'):
        expected = model.tokenizers[part](text)
        assert np.array_equal(folder.tokenizers[part](text), expected)
        assert np.array_equal(single.tokenizers[part](text), expected)
    assert folder.tokenizers['text_encoder'].pad_id != folder.tokenizers['text_encoder_2'].pad_id


def test_averaged_copy_is_ignored_aloud(tmp_path, caplog):
    config, tensors = single_file_like('sd15')
    tensors['model_ema.diffusion_modelout2bias'] = np.zeros(4, np.float32)
    save_file(tensors, tmp_path / 'a.safetensors')
    with caplog.at_level(logging.WARNING):
        model = jaxsd.load(tmp_path / 'a.safetensors', config=config)
    assert 'model_ema' in caplog.text and '1 tensors' in caplog.text
    assert 'model_ema.diffusion_modelout2bias' not in model.extras
    assert 'model_ema.num_updates' in model.extras


@pytest.mark.slow
def test_saving_over_a_folder(tmp_path):
    """Other files stay; weights that would be read instead of the new ones go."""
    old, new = random_model('sd15'), random_model('sd15')
    jaxsd.save(old, tmp_path / 'model')
    (tmp_path / 'model' / 'README.md').write_text('mine')
    stale = tmp_path / 'model' / 'unet' / 'diffusion_pytorch_model.fp16.safetensors'
    stale.write_bytes(b'stale')
    new = new.replace(params=jax.tree.map(lambda a: a + 1, new.params))
    jaxsd.save(new, tmp_path / 'model')
    assert not stale.exists()
    assert (tmp_path / 'model' / 'README.md').read_text() == 'mine'
    assert same(flat(jaxsd.load(tmp_path / 'model').params), flat(new.params))
    assert [p.name for p in tmp_path.iterdir()] == ['model']  # nothing temporary is left


def test_single_files_without_text_model(tmp_path):
    """Some fine-tunes of 1.x lack that part of the names."""
    config, tensors = single_file_like('sd15')
    save_file(tensors, tmp_path / 'a.safetensors')
    save_file({k.replace('transformer.text_model.', 'transformer.'): v
               for k, v in tensors.items()}, tmp_path / 'b.safetensors')
    a, b = (jaxsd.load(tmp_path / f'{name}.safetensors', config=config) for name in 'ab')
    assert same(flat(a.params), flat(b.params)) and same(a.extras, b.extras)
