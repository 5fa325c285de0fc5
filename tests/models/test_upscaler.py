"""Networks that enlarge pictures: files, tiles, hires fix. Their numbers: tests/parity."""

import math
import pickle

import jax
import numpy as np
import pytest
from mains import run_main
from PIL import Image
from safetensors.numpy import save_file

import jaxsd
from jaxsd.batch.identity import Identity
from jaxsd.config import UpscalerConfig
from jaxsd.models import upscaler
from jaxsd.models.upscaler import names

SMALL = UpscalerConfig(kind='rrdb', scale=2, ups=1, channels=8, growth=4, blocks=(2,))
# Parameters as their authors count them: Real-ESRGAN's RRDBNets (23 and 6 blocks), KAIR's log of
# SwinIR's classical medium x4, and the 910 K that later papers count of its light x2.
RELEASED = [
    (UpscalerConfig(), 16_697_987), (UpscalerConfig(blocks=(6,)), 4_467_779),
    (UpscalerConfig(kind='swinir', upsampler='pixelshuffle', channels=180, growth=64, hidden=360,
                    blocks=(6,) * 6, heads=(6,) * 6), 11_900_199),
    (UpscalerConfig(kind='swinir', scale=2, ups=0, upsampler='pixelshuffledirect', channels=60,
                    hidden=120, blocks=(6,) * 4, heads=(6,) * 4), 910_000)]


def random_file(path, config, seed=0):
    """A file of a random network that leaves a picture about as it is."""
    rng = np.random.default_rng(seed)
    tensors = {name: (0.1 * rng.standard_normal(shape)).astype('f4')
               for name, shape in names(config).items()}
    save_file(tensors, path)
    return tensors


@pytest.mark.parametrize('config, count', RELEASED)
def test_released_sizes(config, count):
    """The names and shapes of a config are those of its network, and say the config."""
    table = names(config)
    assert round(sum(map(math.prod, table.values())), -3 if count % 1000 == 0 else 0) == count
    assert upscaler.config_of(table) == config


@pytest.mark.parametrize('config', [SMALL, UpscalerConfig(
    kind='compact', scale=2, ups=0, channels=8, blocks=(2,)), UpscalerConfig(
    kind='rrdb', scale=1, ups=2, unshuffle=4, channels=8, growth=4, blocks=(1,))])
def test_files(config, tmp_path):
    tensors = random_file(tmp_path / 'a.safetensors', config)
    network = jaxsd.load_upscaler(tmp_path / 'a.safetensors', 'bfloat16')
    assert network.config == config and 'UpscalerConfig' in repr(network)
    first = 'body.0' if config.kind == 'compact' else 'conv_first'
    inner = network.params
    for key in first.split('.'):
        inner = inner[key]
    assert inner['weight'].dtype == 'bfloat16'
    expected = tensors[f'{first}.weight'].transpose(2, 3, 1, 0).astype('bfloat16')
    assert np.array_equal(inner['weight'], expected)


def test_other_files_are_named(tmp_path):
    path = tmp_path / 'a.safetensors'
    tensors = random_file(path, SMALL)
    save_file({name: a for name, a in tensors.items() if name != 'conv_hr.bias'}, path)
    with pytest.raises(ValueError, match=r'1 missing: conv_hr\.bias'):
        jaxsd.load_upscaler(path)
    save_file(tensors | {'body.0.rdb1.conv1x1.weight': np.zeros((4, 8, 1, 1), 'f4')}, path)
    with pytest.raises(ValueError, match=r'1 unexpected: body\.0\.rdb1\.conv1x1\.weight'):
        jaxsd.load_upscaler(path)
    save_file({name: a[:, :1] if name == 'conv_first.weight' else a
               for name, a in tensors.items()}, path)  # gray
    with pytest.raises(ValueError, match=r'1 mis-shaped: conv_first\.weight'):
        jaxsd.load_upscaler(path)
    with pytest.raises(ValueError, match='is an upscaler, by its tensor .*jaxsd.load_upscaler'):
        jaxsd.load(path)
    save_file({'lora_unet_x.lora_down.weight': np.zeros((2, 2), 'f4')}, path)
    with pytest.raises(ValueError, match='it is a LoRA; read it with jaxsd.load_adapter'):
        jaxsd.load_upscaler(path)
    save_file({'x': np.zeros(2, 'f4')}, path)
    with pytest.raises(ValueError, match='expected an ESRGAN, a Real-ESRGAN'):
        jaxsd.load_upscaler(path)
    (tmp_path / 'evil.pth').write_bytes(pickle.dumps(print))
    with pytest.raises(ValueError, match='an attack. Nothing of it was run'):
        jaxsd.load_upscaler(tmp_path / 'evil.pth')


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp('upscaler') / 'a.safetensors'
    random_file(path, SMALL)
    return jaxsd.load_upscaler(path)


def test_upscale(network):
    """Of its own scale, twice over and resized, in tiles; grey and transparent pictures too."""
    rng = np.random.default_rng(0)
    image = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8)).resize((45, 30)))
    found = jaxsd.upscale(network, image)
    raw = jax.jit(upscaler.apply, static_argnums=1)(network.params, network.config,
                                                    image[None].astype('f4') / 255)
    assert found.shape == (60, 90, 3) and found.dtype == np.uint8
    assert np.abs(found - np.clip(np.asarray(raw[0]) * 255, 0, 255)).max() < 0.51
    assert found.std() > 1
    larger = jaxsd.upscale(network, image, 3)
    again = Image.fromarray(jaxsd.upscale(network, found)).resize((135, 90),
                                                                  Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(larger, again)
    tiled = jaxsd.upscale(network, image, tile=24)
    assert tiled.shape == found.shape
    close = np.abs(tiled.astype(int) - found)
    assert close.max() > 0 and np.mean(close) < 0.1 * found.std()
    for scale in (0, -1, 'a', float('nan')):
        with pytest.raises(ValueError, match='scale'):
            jaxsd.upscale(network, image, scale)
    with pytest.raises(ValueError, match='expected a network of load_upscaler'):
        jaxsd.upscale(jaxsd.Network(UpscalerConfig, {}), image)


@pytest.mark.slow
def test_hires(network):
    """The second pass starts from what the network makes of the first one."""
    model = jaxsd.load('emoji').replace(upscalers={'small': network})
    fields = {'prompt': 'red apple', 'seed': 7, 'steps': 3, 'sampler': 'euler'}
    two = jaxsd.Request(**fields, hires=jaxsd.Hires(scale=1.5, upscaler='small', strength=0.5))
    alone, found, _ = jaxsd.generate(model, [jaxsd.Request(**fields), two, two.replace(
        hires=jaxsd.Hires(scale=1.5, strength=0.5))])
    large = Image.fromarray(jaxsd.upscale(network, alone)).resize((96, 96),
                                                                  Image.Resampling.LANCZOS)
    [expected] = jaxsd.generate(model, jaxsd.Request(
        **fields, image=large, strength=0.5, width=96, height=96))
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match=r"unknown upscaler 'smal': did you mean 'small'\?.*"
                       r'--upscalers=NAME=PATH'):
        jaxsd.generate(model, two.replace(hires=jaxsd.Hires(upscaler='smal')))
    ids = []
    for factor in (1, 2):
        net = network if factor == 1 else jaxsd.Network(network.config, jax.tree.map(
            lambda a: 2 * a, network.params))
        identity = Identity(model.replace(upscalers={'small': net}), slots=None)
        engine = jaxsd.Engine(model)
        ids.append([identity.of(r) for r in engine.resolve([two, jaxsd.Request(**fields)])])
    assert ids[0][0] != ids[1][0] and ids[0][1] == ids[1][1]


@pytest.mark.slow
def test_mains(tmp_path):
    """`upscale`, and a picture whose record says the upscaler's file, drawn again."""
    random_file(tmp_path / 'up.safetensors', SMALL)
    Image.new('RGB', (20, 10), 'red').save(tmp_path / 'a.png')
    code, out, err = run_main('-m', 'launch.upscale', f'--model={tmp_path}/up.safetensors',
                              '--scale=1.5', f'--out={tmp_path}/out', tmp_path / 'a.png')
    assert code == 0, err
    assert Image.open(tmp_path / 'out' / 'a-upscaled.png').size == (30, 15)
    flags = ('--prompt=red apple', '--seed=3', '--steps=2', '--hires=scale=1.5, upscaler=up')
    code, out, err = run_main('-m', 'launch.generate', *flags, f'--out={tmp_path}/b',
                              f'--upscalers={tmp_path}/up.safetensors')
    assert code == 0, err
    [first] = (tmp_path / 'b').glob('*.png')
    code, out, err = run_main('-m', 'launch.generate', f'--from={first}', '--trust',
                              f'--out={tmp_path}/c')
    assert code == 0, err
    [second] = (tmp_path / 'c').glob('*.png')
    assert np.array_equal(Image.open(first), Image.open(second))
    code, out, err = run_main('-m', 'launch.upscale', f'--model={tmp_path}/a.png', 'none.png')
    assert code == 1 and 'none.png' in err
