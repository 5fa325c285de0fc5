"""Depth maps from the command line, with a tiny depth estimator in each place it may come from."""

import re

import numpy as np
import pytest
from mains import run_main
from PIL import Image

import jaxsd
import jaxsd.images
from jaxsd.config import DPTConfig
from jaxsd.models import shapes, spec
from jaxsd.run import depth
from jaxsd.weights import Network, save_network

TINY = DPTConfig(image_size=64, hidden_size=24, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=3, backbone_out_indices=(0, 1, 0, 1),
                 neck_hidden_sizes=(32, 64, 24, 20), fusion_hidden_size=16, depths=(1, 1, 1),
                 embedding_size=16, hidden_sizes=(32, 64, 96), num_groups=2)


@pytest.fixture(scope='module')
def network():
    params = spec.init_part(np.random.default_rng(0), shapes.dpt(TINY))
    params['head']['head']['4']['bias'] += 1  # clear of the last ReLU
    return Network(TINY, params)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(1)
    for name, size in (('wide.png', (60, 40)), ('tall.jpg', (30, 70))):
        coarse = Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8))
        coarse.resize(size).save(folder / name)
    return folder


def _run(*arguments):
    return run_main('-m', 'launch.depth', *arguments)


@pytest.mark.slow
def test_estimate(network):
    """The depth of each picture of a batch, alone or in company, from a Model or a Network."""
    images = np.random.default_rng(0).integers(0, 255, (2, 50, 90, 3), np.uint8)
    found = depth.estimate(network, images)
    assert found.shape == (2, 64, 64) and found.dtype == np.float32
    assert found.std() > 1e-4 and (found > 0).mean() > 0.9
    assert abs(found[0] - found[1]).max() > 0.1 * found.std()
    np.testing.assert_allclose(depth.estimate(network, images[1:])[0], found[1],
                               atol=1e-4 * found.std())
    model = jaxsd.Model(jaxsd.read_config('sd2_depth').replace(depth_estimator=TINY),
                        {'depth_estimator': network.params})
    np.testing.assert_array_equal(depth.estimate(model, images), found)
    with pytest.raises(ValueError, match='100x64: expected sides that are multiples of 32'):
        depth.estimate(network, images[:1], (64, 100))


def test_depth_maps_of_pictures(network, pictures, tmp_path):
    save_network(network, tmp_path / 'dpt')
    assert (tmp_path / 'dpt' / 'model.safetensors').exists()  # as transformers expects
    out = tmp_path / 'new' / 'out'
    code, stdout, stderr = _run(f'--checkpoint={tmp_path}/dpt', f'--out={out}',
                                pictures / 'wide.png', pictures / 'tall.jpg')
    assert code == 0, stderr
    assert stdout.split() == [f'{out}/wide-depth.png', f'{out}/tall-depth.png']
    for name, size in (('wide.png', (60, 40)), ('tall.jpg', (30, 70))):
        image = jaxsd.images.read(pictures / name)
        expected = depth.gray16(depth.estimate(network, image[None]), *image.shape[:2])[0]
        with Image.open(out / f'{name[:4]}-depth.png') as found:
            assert found.size == size and found.mode == 'I;16'
            found = np.asarray(found)
        assert (found.min(), found.max()) == (0, 65535)
        np.testing.assert_allclose(found, expected, atol=10)  # of 65535


@pytest.mark.parametrize('arguments, message', [
    (['--checkpoint=missing.safetensors', '{pictures}/wide.png'], 'missing.safetensors: no such'),
    (['--checkpoint=x', '{pictures}/missing.png'], 'missing.png'),
    (['--checkpoint=x'], 'expected at least one, of different names; found none'),
    (['--checkpoint=x', 'a/b.png', 'c/b.jpg'], 'of different names; found a/b.png, c/b.jpg'),
])
def test_bad_input_is_one_clear_line(pictures, tmp_path, arguments, message):
    code, stdout, stderr = _run(f'--out={tmp_path}/out',
                                *(a.format(pictures=pictures) for a in arguments))
    assert code == 1 and re.fullmatch(r'error: [^\n]*\n', stderr), stderr
    assert message in stderr
    assert not list(tmp_path.rglob('*.png'))
