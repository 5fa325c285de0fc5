"""One network alone: every layout of a VAE, its place in a model, and what is wrong in one line."""

import dataclasses
import gzip
import hashlib
import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import flat, random_model, same, sparse_file

import jaxsd
from jaxsd.config import DPTConfig, TinyVAEConfig
from jaxsd.config_files import read_config
from jaxsd.models.spec import from_jax, names
from jaxsd.weights import hub, load_depth_estimator, parts
from jaxsd.weights.names import network_places

HERE = pathlib.Path(__file__).parent
DATA = HERE.parent / 'data' / 'manifests'
SINGLE, FOLDERS = (json.loads(gzip.decompress((DATA / f'{kind}.json.gz').read_bytes()))
                   for kind in ('singlefile', 'diffusers'))
TINY = TinyVAEConfig(encoder_block_out_channels=(6, 6), decoder_block_out_channels=(5, 5),
                     num_encoder_blocks=(1, 2), num_decoder_blocks=(2, 1))


@pytest.fixture(scope='module')
def model():
    return random_model('sd15')


@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp('parts') / 'model'
    jaxsd.save(model, folder)
    return folder


def single_file(path, tensors, config, prefix=''):
    """A network's file in its original names, from its arrays in diffusers' names."""
    places = network_places('vae', config, names(config), prefix)
    save_file({place.name: np.ascontiguousarray(tensors[name]).reshape(
        place.shape(tensors[name].shape)) for name, place in places.items()}, path)
    return path


def fails(path, kind=ValueError, load=jaxsd.load_vae, **options):
    with pytest.raises(kind) as caught:
        load(path, **options)
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize('table, name', [
    (SINGLE, 'vae_ldm'), (SINGLE, 'sd15_with_ema'), (SINGLE, 'sdxl_base'), (SINGLE, 'sd2_depth'),
    (FOLDERS, 'sd15_vae'), (FOLDERS, 'sd15_vae_old_attention_names'), (FOLDERS, 'sdxl_base_vae'),
    (SINGLE, 'sd2_x4_upscaler'), (FOLDERS, 'x4_upscaler_vae')])
def test_released_vaes_in_a_file(table, name, tmp_path):
    path = tmp_path / 'vae.safetensors'
    sparse_file(path, table[name])
    source = parts._open_file('vae', path, None)
    version = read_config('x4_upscaler' if 'x4' in name else 'sd15').vae
    assert source.mismatches() == {} and source.config.factor == version.factor
    assert len(source.places['vae']) == len(names(version)) == len(source.tensors)
    assert source.config.scaling_factor is None  # a file cannot say


@pytest.mark.parametrize('kind', ['bare', 'prefixed', 'folder names', 'old names', 'half'])
def test_every_layout_gives_the_same_arrays(kind, model, folder, tmp_path):
    config, path = model.config.vae, tmp_path / 'vae.safetensors'
    tensors = load_file(folder / 'vae' / 'diffusion_pytorch_model.safetensors')
    if kind in ('bare', 'prefixed'):
        single_file(path, tensors, config, 'first_stage_model.' * (kind == 'prefixed'))
        extra = {'model_ema.decay': np.zeros(1, 'f4'), 'loss.logvar': np.zeros(1, 'f4'),
                 'model.diffusion_model.out.2.bias': np.zeros(4, 'f4')}
        keep = list(extra)[:2] if kind == 'bare' else list(extra)
        save_file(load_file(path) | {name: extra[name] for name in keep}, path)
    elif kind == 'half':
        path = tmp_path / 'vae'
        path.mkdir()
        shutil.copy(folder / 'vae' / 'config.json', path)
        save_file(tensors, path / 'diffusion_pytorch_model.fp16.safetensors')
    else:
        old = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}
        for new, name in old.items() if kind == 'old names' else ():
            tensors = {k.replace(f'.{new}.', f'.{name}.'): v for k, v in tensors.items()}
        save_file(tensors, path)
    network = jaxsd.load_vae(path, config=config)
    assert network.config == config and same(flat(network.params), flat(model.params['vae']))
    cast = jaxsd.load_vae(path, 'bfloat16', config).params
    assert {str(a.dtype) for a in flat(cast).values()} == {'bfloat16'}


def test_a_model_gives_its_vae_and_takes_another(model, folder, tmp_path):
    network = jaxsd.load_vae(folder)
    assert same(flat(network.params), flat(model.params['vae']))
    assert network.config == model.config.vae
    other = jaxsd.Network(dataclasses.replace(network.config, scaling_factor=0.13025),
                          random_model('sd21').params['vae'])
    jaxsd.save_network(other, tmp_path / 'vae')
    other = jaxsd.load_vae(tmp_path / 'vae')
    swapped = model.with_vae(other)
    assert swapped.config.vae.scaling_factor == 0.13025  # what a config.json says
    assert swapped.params['vae'] is other.params and swapped.params['unet'] is model.params['unet']
    jaxsd.save(swapped, tmp_path / 'model')
    again = jaxsd.load(tmp_path / 'model')
    assert again.config.vae == other.config
    assert same(flat(again.params), flat(swapped.params))


def test_what_a_file_cannot_say_stays_the_models(model):
    config = model.config.replace(vae=dataclasses.replace(
        model.config.vae, scaling_factor=0.5, shift_factor=0.25, force_upcast=True))
    unsaid = dict.fromkeys(('scaling_factor', 'shift_factor', 'force_upcast', 'sample_size'))
    network = jaxsd.Network(dataclasses.replace(config.vae, **unsaid), model.params['vae'])
    assert model.replace(config=config).with_vae(network).config == config


def test_a_vae_that_does_not_fit(model):
    for fields, said in (({'latent_channels': 16}, '16 channels each, the model.s have 4'),
                         ({'block_out_channels': (4, 8)}, '2 pixels each, the model.s have 8')):
        config = dataclasses.replace(model.config.vae, **fields)
        with pytest.raises(ValueError, match=said):
            model.with_vae(jaxsd.Network(config, {}))


def tiny_vae(tmp_path, prefix=''):
    """TAESD's tensors by diffusers' names, and its two files."""
    rng = np.random.default_rng(0)
    tensors = {n: rng.normal(size=s).astype('f4') for n, s in names(TINY).items()}
    for side, shift in (('encoder', 0), ('decoder', 1)):
        save_file({f'{int(n.split(".")[2]) + shift}.{n.split(".", 3)[3]}': a
                   for n, a in tensors.items() if n.startswith(side)},
                  tmp_path / f'taesd_{side}.safetensors')
    return tensors


def test_taesd_in_every_layout(tmp_path):
    tensors = tiny_vae(tmp_path)
    single_file(tmp_path / 'comfy.safetensors', tensors, TINY)
    joined = load_file(tmp_path / 'comfy.safetensors')
    assert {'taesd_encoder.1.conv.0.weight', 'taesd_decoder.1.weight'} < joined.keys()
    save_file(joined | {'vae_scale': np.ones((), 'f4')}, tmp_path / 'comfy.safetensors')
    save_file(tensors, tmp_path / 'diffusers.safetensors')
    jaxsd.save_network(jaxsd.load_vae(tmp_path / 'diffusers.safetensors', config=TINY),
                       tmp_path / 'folder')
    for name in ('taesd_encoder.safetensors', 'taesd_decoder.safetensors', 'comfy.safetensors',
                 'diffusers.safetensors', 'folder'):
        config = None if name == 'folder' else TINY
        network = jaxsd.load_vae(tmp_path / name, config=config)
        assert network.config == TINY
        found = {k[2:-2].replace("']['", '.'): from_jax(k, v)
                 for k, v in flat(network.params).items()}
        assert same(found, tensors), name
    (tmp_path / 'taesd_encoder.safetensors').unlink()
    assert 'taesd_encoder.safetensors: no such file' in fails(
        tmp_path / 'taesd_decoder.safetensors', FileNotFoundError)


def test_the_released_taesd_is_recognised(tmp_path):
    sparse_file(tmp_path / 'a.safetensors', names(TinyVAEConfig()))
    assert jaxsd.load_vae(tmp_path / 'a.safetensors').config == TinyVAEConfig()


def test_a_model_with_taesd_goes_both_ways(model, tmp_path):
    config = TinyVAEConfig(**{k: v + v[-1:] * 2 for k, v in vars(TINY).items()
                              if isinstance(v, tuple)})
    rng = np.random.default_rng(0)
    save_file({n: rng.normal(size=s).astype('f4') for n, s in names(config).items()},
              tmp_path / 'vae.safetensors')
    small = model.with_vae(jaxsd.load_vae(tmp_path / 'vae.safetensors', config=config))
    jaxsd.save(small, tmp_path / 'folder')
    jaxsd.save(small, tmp_path / 'single.safetensors', layout='single-file')
    assert jaxsd.load(tmp_path / 'folder').config == small.config
    for path in ('folder', 'single.safetensors'):
        again = jaxsd.load(tmp_path / path, config=small.config)
        assert same(flat(again.params), flat(small.params))


def test_midas_names_are_what_transformers_converts():
    """Each of our tensors from the same one, or third of one, as in transformers' script."""
    config = DPTConfig()
    places = network_places('depth_estimator', config, names(config), 'depth_model.model.')
    lines = [f'{name} <- {place.name} {place.how}'.rstrip()
             for name, place in sorted(places.items())]
    golden = json.loads((HERE.parent / 'goldens' / 'dpt_names.json').read_text())
    assert len(lines) == golden['tensors']
    assert hashlib.sha256('\n'.join(lines).encode()).hexdigest() == golden['sha256']


@pytest.mark.parametrize('layout', ['whole', 'depth_model', 'bare'])
def test_released_depth_estimators_in_a_file(layout, tmp_path):
    shapes = SINGLE['sd2_depth']
    if layout != 'whole':
        shapes = {k.removeprefix('depth_model.model.' * (layout == 'bare')): v
                  for k, v in shapes.items() if k.startswith('depth_model.')}
    sparse_file(tmp_path / 'a.safetensors', shapes)
    source = parts._open_file('depth_estimator', tmp_path / 'a.safetensors', None)
    assert source.mismatches() == {} and source.config == DPTConfig()
    assert source.config == read_config('sd2_depth').depth_estimator


def test_every_layout_gives_the_same_depth_estimator(tmp_path):
    model = random_model('sd2_depth')
    params, config = flat(model.params['depth_estimator']), model.config.depth_estimator
    whole, single, bare = (tmp_path / f'{name}.safetensors' for name in ('a', 'b', 'c'))
    jaxsd.save(model, tmp_path / 'model')
    jaxsd.save(model, whole, layout='single-file')
    tensors = load_file(whole) | {f'depth_model.model.pretrained.model.head.{name}':
                                  np.zeros(shape, 'f4') for name, shape in
                                  (('weight', (5, 12)), ('bias', 5))}
    tensors = {k: v for k, v in tensors.items() if k.startswith('depth_model.')}
    save_file(tensors, single)
    save_file({k.removeprefix('depth_model.model.'): v for k, v in tensors.items()}, bare)
    assert 'pretrained.model.blocks.0.attn.qkv.bias' in load_file(bare)
    jaxsd.save_network(load_depth_estimator(tmp_path / 'model'), tmp_path / 'alone')
    for path in (tmp_path / 'model', tmp_path / 'alone', whole, single, bare):
        network = load_depth_estimator(path, config=None if path.is_dir() else config)
        assert network.config == config and same(flat(network.params), params), path
    path = bare.rename(tmp_path / 'midas.pt')  # by what is in it, not by its name
    assert same(flat(load_depth_estimator(path, config=config).params), params)


def test_all_that_is_wrong_in_one_error(model, folder, tmp_path):
    tensors = load_file(folder / 'vae' / 'diffusion_pytorch_model.safetensors')
    del tensors['quant_conv.bias']
    tensors |= {'stray': np.zeros(1, 'f4'), 'post_quant_conv.bias': np.full(4, np.nan, 'f4')}
    save_file(tensors, tmp_path / 'vae.safetensors')
    said = fails(tmp_path / 'vae.safetensors', config=model.config.vae)
    assert '1 missing: quant_conv.bias' in said and '1 unexpected: stray' in said
    assert '1 not finite (NaN or infinity): post_quant_conv.bias' in said


@pytest.mark.parametrize('name, what', [
    ('lora_unet_down_blocks_0.lora_down.weight', 'a LoRA'),
    ('base_model.model.lora_A.weight', 'a LoRA'),
    ('model.diffusion_model.out.2.bias', 'a whole checkpoint'),
    ('control_model.zero_convs.0.0.weight', 'a ControlNet'),
    ('encoder.down.0.block.0.conv1.weight', 'a VAE'), ('down_blocks.0.resnets.0', 'a U-Net'),
    ('text_model.embeddings.x', 'a text encoder'), ('x', 'something else')])
def test_a_file_of_another_kind(name, what, tmp_path):
    save_file({name: np.zeros(3, 'f4')}, tmp_path / 'a.safetensors')
    load = jaxsd.load_controlnet if what == 'a VAE' else jaxsd.load_vae
    said = fails(tmp_path / 'a.safetensors', load=load)
    assert what in said and name in said


def test_folders_of_another_kind(folder, tmp_path):
    said = fails(folder / 'unet')
    assert 'UNet2DConditionModel' in said and 'AutoencoderKL or AutoencoderTiny' in said
    assert 'vae/config.json' in fails(tmp_path, FileNotFoundError)
    assert 'no such file' in fails(tmp_path / 'none.safetensors', FileNotFoundError)
    assert 'pickle' in fails(shutil.copy(folder / 'model_index.json', tmp_path / 'vae.pt'))


def test_nothing_is_saved_that_cannot_be_read(model, tmp_path):
    unsaid = dataclasses.replace(model.config.vae, scaling_factor=None)
    with pytest.raises(ValueError, match='scaling_factor'):
        jaxsd.save_network(jaxsd.Network(unsaid, model.params['vae']), tmp_path / 'vae')
    with pytest.raises(ValueError, match='quant_conv'):
        params = {k: v for k, v in model.params['vae'].items() if k != 'quant_conv'}
        jaxsd.save_network(jaxsd.Network(model.config.vae, params), tmp_path / 'vae')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('part, stem', [('vae', 'diffusion_pytorch_model'),
                                        ('depth_estimator', 'model')])
def test_saving_over_a_network(part, stem, tmp_path):
    """What would be read instead of the new weights goes, everything else stays."""
    model = random_model('sd2_depth')
    network = jaxsd.Network(getattr(model.config, part), model.params[part])
    jaxsd.save_network(network, tmp_path / 'a')
    new = {p.name for p in (tmp_path / 'a').iterdir()}
    stale = {f'{stem}{end}' for end in (
        '.fp16.safetensors', '-00001-of-00002.safetensors', '.fp16-00001-of-00002.safetensors',
        '.safetensors.index.json', '.safetensors.index.fp16.json')}
    others = {'README.md', 'preview.png', 'model_of_mine.safetensors', 'sdxl.vae.safetensors'}
    for name in stale | others:
        (tmp_path / 'a' / name).write_text(name)
    jaxsd.save_network(network, tmp_path / 'a')
    assert {p.name for p in (tmp_path / 'a').iterdir()} == new | others
    assert all((tmp_path / 'a' / name).read_text() == name for name in others)
    again = load_depth_estimator if part == 'depth_estimator' else jaxsd.load_vae
    assert same(flat(again(tmp_path / 'a', 'float16').params),
                {k: a.astype('float16') for k, a in flat(network.params).items()})


def test_what_is_downloaded():
    weights = 'diffusion_pytorch_model.safetensors'
    alone = ['README.md', 'config.json', weights, 'diffusion_pytorch_model.bin',
             'sdxl.vae.safetensors']
    assert hub.needed('a/b', alone, part='vae') == ['config.json', weights]
    whole = ['model_index.json', 'vae/config.json', f'vae/{weights}', 'unet/config.json',
             f'unet/{weights}']
    assert hub.needed('a/b', whole, part='vae') == ['vae/config.json', f'vae/{weights}']
    with pytest.raises(ValueError, match='give that path'):
        hub.needed('a/b', ['control_v11p_sd15_canny.safetensors'], part='controlnet')
    old = ['config.json', 'diffusion_pytorch_model.bin']
    assert hub.needed('a/b', old, part='vae') == old
