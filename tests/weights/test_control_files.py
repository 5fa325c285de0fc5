"""ControlNets and T2I-Adapters in files: every layout is read, and what is saved comes back."""

import dataclasses
import gzip
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file
from test_manifests import DATA, FOLDERS, SINGLE
from tiny import flat, random_params, same, sparse_file, tiny_config

from jaxsd.config import ControlNetConfig, T2IAdapterConfig
from jaxsd.config_files import VERSIONS, read_network_config
from jaxsd.models import quantized, shapes, spec, t2i_adapter
from jaxsd.weights import Model, Network, load_controlnet, load_t2i_adapter, names, save_network
from jaxsd.weights.parts import KINDS, _open_file, _open_folder, is_t2i_adapter

# ControlNet-Union and ProMax: from diffusers' ControlNetUnionModel on torch's meta device, with the
# published config, which is the SDXL ControlNet's and num_control_type 6 or 8. As float16 that of
# ProMax is the published file to the byte, 2,513,342,408; both have its 863 tensors.
UNIONS = json.loads(gzip.decompress((DATA / 'controlnet_union.json.gz').read_bytes()))
COUNTS = {'sd15': 361_279_120, 'sd21': 364_228_240, 'sdxl': 1_251_014_160}


def released(version):
    return read_network_config(VERSIONS / f'controlnet_{version}')


def tiny(version, **fields):
    """A random ControlNet with a released version's structure."""
    cfg = ControlNetConfig(**dataclasses.asdict(tiny_config(version).unet) | fields,
                           conditioning_embedding_out_channels=(2, 4, 6, 8))
    cfg = dataclasses.replace(cfg, sample_size=64)  # which a ControlNet's config.json does not say
    return Network(cfg, random_params(np.random.default_rng(0), shapes.controlnet(cfg)))


def as_files(network, prefix=''):
    """The tensors of a single file."""
    part = 'controlnet' if isinstance(network.config, ControlNetConfig) else 't2i_adapter'
    table = spec.names(network.config)
    places = names.network_places(part, network.config, table, prefix)
    arrays = traverse_util.flatten_dict(network.params, sep='.')
    return {places[name].name: spec.from_jax(name, np.asarray(arrays[name])) for name in table}


def write(path, tensors):
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path)


@pytest.mark.parametrize('name, version', [
    ('controlnet_sd15_control_model', 'sd15'), ('controlnet_sd15_full_1.0', 'sd15'),
    ('controlnet_sd21_control_model', 'sd21'), ('controlnet_sd21_full', 'sd21')])
@pytest.mark.parametrize('bare', [False, True])
def test_single_files_of_the_released_ones(name, version, bare, tmp_path):
    found = SINGLE[name]
    if bare:  # files with the prefix taken away
        found = {k.removeprefix('control_model.'): v for k, v in found.items()
                 if k.startswith('control_model.')}
    sparse_file(tmp_path / 'a.safetensors', found)
    source = _open_file('controlnet', tmp_path / 'a.safetensors', None)
    assert source.config == released(version)
    assert source.mismatches() == {}
    assert spec.count(source.shapes['controlnet']) == COUNTS[version]


@pytest.mark.parametrize('version', COUNTS)
def test_folders_of_the_released_ones(version, tmp_path):
    found = FOLDERS[f'controlnet_{version}']
    sparse_file(tmp_path / 'diffusion_pytorch_model.safetensors', found)
    (tmp_path / 'config.json').write_text(
        (VERSIONS / f'controlnet_{version}' / 'config.json').read_text())
    sources = [_open_folder('controlnet', tmp_path, None, False),
               _open_file('controlnet', tmp_path / 'diffusion_pytorch_model.safetensors', None)]
    for source in sources:
        assert source.config == released(version)
        assert source.mismatches() == {}
        assert spec.count(source.shapes['controlnet']) == COUNTS[version]


@pytest.mark.parametrize('name, modes, count', [
    ('controlnet_union_sdxl', 6, 1_255_958_800),
    ('controlnet_union_promax_sdxl', 8, 1_256_614_800)])
def test_released_unions(name, modes, count, tmp_path):
    """As a file, and in a folder whose config.json says the modes, says others, or says nothing of
    them, as the first did."""
    expected = dataclasses.replace(released('sdxl'), num_control_type=modes)
    weights = f'diffusion_pytorch_model{"_promax" * ("promax" in name)}.safetensors'
    sparse_file(tmp_path / weights, UNIONS[name])
    sources = [_open_file('controlnet', tmp_path / weights, None)]
    plain = json.loads((VERSIONS / 'controlnet_sdxl' / 'config.json').read_text())
    for more in ({'_class_name': 'ControlNetUnionModel', 'num_control_type': modes},
                 {'_class_name': 'ControlNetUnionModel'}, {'num_control_type': modes}, {}):
        (tmp_path / 'config.json').write_text(json.dumps(plain | more))
        sources.append(_open_folder('controlnet', tmp_path, None, False))
    for source in sources:
        assert source.config == expected
        assert source.mismatches() == {}
        assert spec.count(source.shapes['controlnet']) == count


@pytest.mark.slow
def test_every_lost_or_changed_tensor_is_noticed(tmp_path):
    found = dict(SINGLE['controlnet_sd15_control_model'])
    del found['control_model.zero_convs.3.0.bias']
    found['control_model.input_hint_block.2.weight'] = [16, 16, 3, 4]
    found['control_model.stray'] = [1]
    sparse_file(tmp_path / 'a.safetensors', found)
    problems = _open_file('controlnet', tmp_path / 'a.safetensors', None).mismatches()
    assert {kind: list(names) for kind, names in problems.items()} == {
        'missing': ['control_model.zero_convs.3.0.bias'],
        'mis-shaped': ['control_model.input_hint_block.2.weight'],
        'unexpected': ['control_model.stray']}
    with pytest.raises(ValueError, match=r'\(controlnet\): 1 missing'):
        load_controlnet(tmp_path / 'a.safetensors')


@pytest.mark.parametrize('version', ['sd15', 'sd21', 'sdxl'])
def test_round_trip(version, tmp_path):
    network = tiny(version, global_pool_conditions=version == 'sd21')
    save_network(network, tmp_path / 'folder')
    again = load_controlnet(tmp_path / 'folder')
    assert again.config == network.config
    assert same(flat(again.params), flat(network.params))
    for prefix in ('', 'control_model.'):
        write(tmp_path / 'single.safetensors', as_files(network, prefix))
        if prefix:
            expected = load_file(tmp_path / 'single.safetensors')
            save_network(network, tmp_path / 'single.safetensors', layout='single-file')
            assert same(load_file(tmp_path / 'single.safetensors'), expected)
        assert any(k.startswith(f'{prefix}zero_convs.')
                   for k in load_file(tmp_path / 'single.safetensors'))
        single = load_controlnet(tmp_path / 'single.safetensors', config=network.config)
        assert same(flat(single.params), flat(network.params))
    half = load_controlnet(tmp_path / 'folder', dtype='bfloat16')
    assert half.params['conv_in']['weight'].dtype == jnp.bfloat16


def test_union_round_trip(tmp_path):
    network = tiny('sdxl', num_control_type=3, num_trans_head=2, num_trans_layer=2)
    save_network(network, tmp_path / 'folder')
    again = load_controlnet(tmp_path / 'folder')
    assert again.config == network.config
    save_network(network, tmp_path / 'single.safetensors', layout='single-file')
    found = load_file(tmp_path / 'single.safetensors')  # published under diffusers' names
    assert found.keys() == shapes.controlnet(network.config).keys()
    single = load_controlnet(tmp_path / 'single.safetensors', config=network.config)
    for params in (again.params, single.params):
        assert same(flat(params), flat(network.params))


@pytest.mark.parametrize('kind', ['full_adapter', 'full_adapter_xl'])
def test_adapter_round_trip(kind, tmp_path):
    cfg = T2IAdapterConfig(channels=(4, 8, 12, 12), adapter_type=kind, downscale_factor=2)
    network = Network(cfg, random_params(np.random.default_rng(0), t2i_adapter.names(cfg)))
    save_network(network, tmp_path / 'folder')
    save_network(network, tmp_path / 'single.safetensors', layout='single-file')
    assert same(load_file(tmp_path / 'single.safetensors'), as_files(network))
    assert 'body.6.block1.weight' in load_file(tmp_path / 'single.safetensors')
    assert 'body.4.in_conv.weight' in load_file(tmp_path / 'single.safetensors')
    assert load_t2i_adapter(tmp_path / 'folder').config == cfg
    for path, config in (('folder', None), ('single.safetensors', cfg)):
        again = load_t2i_adapter(tmp_path / path, config=config)
        assert same(flat(again.params), flat(network.params))


def test_light_adapter_round_trip(tmp_path):
    """Its own names are those of TencentARC/T2I-Adapter's Adapter_light."""
    cfg = T2IAdapterConfig(channels=(4, 8, 12), adapter_type='light_adapter', downscale_factor=2)
    network = Network(cfg, random_params(np.random.default_rng(0), t2i_adapter.names(cfg)))
    save_network(network, tmp_path / 'folder')
    save_network(network, tmp_path / 'a.safetensors', layout='single-file')
    found = load_file(tmp_path / 'a.safetensors')
    assert found['body.0.in_conv.weight'].shape == (1, 12, 1, 1)
    assert found['body.3.body.1.block2.weight'].shape == (3, 3, 3, 3)
    assert found['body.3.out_conv.weight'].shape == (12, 3, 1, 1) and len(found) == 4 * 12
    for path, config in (('folder', None), ('a.safetensors', cfg)):
        again = load_t2i_adapter(tmp_path / path, config=config)
        assert again.config == cfg and same(flat(again.params), flat(network.params))
    assert is_t2i_adapter(tmp_path / 'folder') and is_t2i_adapter(tmp_path / 'a.safetensors')
    assert not is_t2i_adapter(tmp_path)


def control_lora(unet, net, rank=None, seed=0):
    """The file of a Control-LoRA, as stability-ComfyUI-nodes' ControlLoraSave writes it: factors of
    the difference from a U-Net; random ones of a rank where one is given."""
    rng, base = np.random.default_rng(seed), traverse_util.flatten_dict(unet, sep='.')
    tensors = {'lora_controlnet': np.zeros(0, 'f4')}
    places = names.network_places('controlnet', net.config, spec.names(net.config))
    whole = as_files(net)
    for name, place in places.items():
        weight = whole[place.name]
        if name not in base or weight.ndim < 2:
            tensors[place.name] = weight
            continue
        shape, at = weight.shape, place.name.removesuffix('.weight')
        if rank is None:
            difference = weight - spec.from_jax(name, np.asarray(base[name]))[:, :shape[1]]
            left, values, right = np.linalg.svd(difference.reshape(len(difference), -1),
                                                full_matrices=False)
            up, down = left * values, right
        else:
            up = rng.standard_normal((shape[0], rank)) / 10
            down = rng.standard_normal((rank, int(np.prod(shape[1:])))) / 10
        more = (1, 1) * (weight.ndim == 4)
        tensors[f'{at}.up'] = up.reshape(*up.shape, *more).astype('f4')
        tensors[f'{at}.down'] = down.reshape(len(down), *shape[1:]).astype('f4')
    return tensors


def quantize_all(unet):
    """A U-Net's parameters as load(quantize='int8') keeps them."""
    kept = {}
    for name, array in traverse_util.flatten_dict(unet, sep='.').items():
        kept |= quantized.quantize('unet', name, spec.from_jax(name, np.asarray(array)), 'int8'
                                   ) or {name: array}
    return traverse_util.unflatten_dict(kept, sep='.')


@pytest.mark.parametrize('version', ['sd15', 'sdxl', 'sd15_inpainting'])
def test_control_lora(version, tmp_path):
    """comfy/controlnet.py, ControlLoraOps: weight + mm(up.flatten(1), down.flatten(1)); of a full
    rank it is the ControlNet that it was made from."""
    config = tiny_config(version)
    model = Model(config, {'unet': random_params(np.random.default_rng(1), shapes.unet(config.unet))
                           })
    net = tiny(version, in_channels=4)
    write(tmp_path / 'full.safetensors', control_lora(model.params['unet'], net))
    found = load_controlnet(tmp_path / 'full.safetensors', base=model)
    assert dataclasses.replace(found.config, sample_size=64) == net.config
    for name, array in flat(found.params).items():
        np.testing.assert_allclose(array, flat(net.params)[name], atol=2e-6, err_msg=name)

    tensors = control_lora(model.params['unet'], net, 3)
    write(tmp_path / 'rank3.safetensors', tensors)
    found = as_files(load_controlnet(tmp_path / 'rank3.safetensors', base=model))
    base = model.params['unet']['down_blocks']['0']['resnets']['0']['conv1']['weight']
    up, down = (tensors[f'input_blocks.1.0.in_layers.2.{side}'] for side in ('up', 'down'))
    expected = spec.from_jax('weight', np.asarray(base))
    np.testing.assert_allclose(
        found['input_blocks.1.0.in_layers.2.weight'], expected + (
            up.reshape(len(up), -1) @ down.reshape(3, -1)).reshape(expected.shape), atol=1e-6)
    assert set(found) == set(as_files(net))
    kept = model.replace(params={'unet': quantize_all(model.params['unet'])})
    assert quantized.is_quantized(kept.params)
    near = as_files(load_controlnet(tmp_path / 'rank3.safetensors', base=kept))
    for name, array in found.items():
        assert abs(near[name] - array).max() <= 0.01 * max(abs(array).max(), 1e-9), name
    half = load_controlnet(tmp_path / 'rank3.safetensors', 'bfloat16', base=model)
    assert half.params['conv_in']['weight'].dtype == jnp.bfloat16


def test_a_control_lora_that_does_not_fit(tmp_path):
    config = tiny_config('sd15')
    model = Model(config, {'unet': random_params(np.random.default_rng(1), shapes.unet(config.unet))
                           })
    tensors = control_lora(model.params['unet'], tiny('sd15'), 2)

    def refused(message, tensors=tensors, base=model):
        write(tmp_path / 'a.safetensors', tensors)
        with pytest.raises(ValueError, match=message) as error:
            load_controlnet(tmp_path / 'a.safetensors', base=base)
        assert '\n' not in str(error.value)

    refused('a Control-LoRA.*base=model', base=None)
    at = 'input_blocks.1.0.in_layers.2'
    wide = np.zeros((2, 3, 3, 3), 'f4')
    refused(rf'{at}.up .* do not make a weight .*or the model that it is for',
            tensors | {f'{at}.down': wide})
    refused('1 unexpected: stray', tensors | {'stray': np.zeros(2, 'f4')})
    refused(rf'1 unexpected: {at}.up',
            {n: a for n, a in tensors.items() if n != f'{at}.down'})
    refused('1 missing: zero_convs.0.0.weight',
            {n: a for n, a in tensors.items() if n != 'zero_convs.0.0.weight'})


def test_single_files_that_cannot_be(tmp_path):
    network = tiny('sd15')
    for path in (tmp_path, tmp_path / 'a.pth'):
        with pytest.raises(ValueError, match='expected the name of a .safetensors file'):
            save_network(network, path, layout='single-file')
    with pytest.raises(ValueError, match="layout 'kohya': expected one of"):
        save_network(network, tmp_path / 'a.safetensors', layout='kohya')
    assert not list(tmp_path.iterdir())


def test_adapters_are_told_apart_by_their_shapes(tmp_path):
    for config in KINDS['t2i_adapter'].released():
        sparse_file(tmp_path / 'a.safetensors', t2i_adapter.names(config))
        assert _open_file('t2i_adapter', tmp_path / 'a.safetensors', None).config == config


def test_a_model_is_no_controlnet(tmp_path):
    sparse_file(tmp_path / 'a.safetensors', SINGLE['sd15_emaonly'])
    with pytest.raises(ValueError, match='not a ControlNet .* a whole checkpoint'):
        load_controlnet(tmp_path / 'a.safetensors')
