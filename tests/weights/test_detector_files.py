"""Files of detectors: which network each is, by the names and shapes of the published ones."""

import gzip
import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_manifests import DATA, SINGLE
from tiny import sparse_file

import jaxsd
from jaxsd.config import DepthAnythingConfig, DetectorConfig, DPTConfig
from jaxsd.models import detector, spec
from jaxsd.weights import Network, names, parts, save_network

FILES = json.loads(gzip.decompress((DATA / 'detectors.json.gz').read_bytes()))
KINDS = {'body_pose_model.pth': 'openpose', 'hand_pose_model.pth': 'openpose_hand',
         'facenet.pth': 'openpose_face', 'ControlNetHED.pth': 'hed', 'sk_model.pth': 'lineart',
         'netG.pth': 'lineart_anime', 'mlsd_large_512_fp32.pth': 'mlsd', 'scannet.pt': 'normal_bae'}
COUNTS = {'body_pose_model.pth': 52.3, 'hand_pose_model.pth': 36.8, 'facenet.pth': 38.5,
          'ControlNetHED.pth': 14.7, 'sk_model.pth': 4.3, 'netG.pth': 54.4,
          'mlsd_large_512_fp32.pth': 1.55, 'scannet.pt': 72.4}  # million parameters
SMALL = DepthAnythingConfig(image_size=28, hidden_size=64, intermediate_size=256,
                            num_hidden_layers=4, num_attention_heads=1, out_indices=(1, 2, 3, 4),
                            neck_hidden_sizes=(8, 8, 8, 8), fusion_hidden_size=8,
                            head_hidden_size=8)


@pytest.mark.parametrize('name', KINDS)
def test_published(name):
    stored = {key: tuple(shape) for key, shape in FILES[name].items()}
    found = detector.renamed(stored)
    config = detector.config_of({new: stored[old] for new, old in found.items()})
    assert config.kind == KINDS[name]
    assert spec.names(config) == {new: stored[old] for new, old in found.items()}
    left = [key for key in stored if key not in found.values()]
    assert all(re.search('num_batches_tracked|original_model.bn2', key) for key in left)
    assert spec.count(spec.names(config)) == pytest.approx(1e6 * COUNTS[name], rel=0.01)


@pytest.mark.parametrize('size, layers', [('vits', 12), ('vitb', 12), ('vitl', 24)])
def test_depth_anything_in_both_layouts(size, layers, tmp_path):
    files = FILES[f'depth_anything_v2_{size}.pth'], FILES[f'Depth-Anything-V2-{size}-hf']
    configs = []
    for stored in files:
        sparse_file(tmp_path / 'model.safetensors', stored)
        source = parts._open_file('depth_estimator', tmp_path / 'model.safetensors', None)
        assert source.mismatches() == {}
        configs.append(source.config)
    assert configs[0] == configs[1] and configs[0].num_hidden_layers == layers
    assert configs[0].out_indices == ((5, 12, 18, 24) if layers == 24 else (3, 6, 9, 12))
    sparse_file(tmp_path / 'depth_anything_vitx14.safetensors', files[0])
    first = parts._open_file('depth_estimator', tmp_path / 'depth_anything_vitx14.safetensors',
                             None).config
    assert first.out_indices == tuple(range(layers - 3, layers + 1))


def test_midas_alone(tmp_path):
    """Its own file has the names that it has within the 2.x depth model, and a classifier."""
    at = 'depth_model.model.'
    stored = {name.removeprefix(at): shape for name, shape in SINGLE['sd2_depth'].items()
              if name.startswith(at)}
    stored |= {'pretrained.model.head.weight': [1000, 768], 'pretrained.model.head.bias': [1000]}
    sparse_file(tmp_path / 'midas.safetensors', stored)
    source = parts._open_file('depth_estimator', tmp_path / 'midas.safetensors', None)
    assert source.config == DPTConfig() and source.mismatches() == {}
    assert names.kind(stored)[1] == 'load_depth_estimator'


def arrays(config, seed=0):
    rng = np.random.default_rng(seed)
    return {name: (0.1 * rng.standard_normal(shape)).astype('f4')
            for name, shape in spec.names(config).items()}


def test_a_file_of_any_prefix(tmp_path):
    """As torch.nn.DataParallel has it, with counters; read as half."""
    config = DetectorConfig('lineart_anime', 8, (3,))
    tensors = arrays(config)
    save_file({f'module.{name}': array for name, array in tensors.items()} | {
        'module.model.num_batches_tracked': np.zeros((), 'i8')}, tmp_path / 'netG.safetensors')
    network = jaxsd.load_detector(tmp_path / 'netG.safetensors', 'bfloat16')
    assert network.config == config
    assert {a.dtype.name for a in jax.tree.leaves(network.params)} == {'bfloat16'}
    weight = network.params['model']['model']['3']['weight']
    assert weight.shape == (4, 4, 1, 16)  # torch has [I,O,K,K]


def test_depth_anything_in_a_folder(tmp_path):
    """As transformers has it; what the file does not say stands in config.json."""
    network = Network(SMALL, spec.init_part(np.random.default_rng(0), spec.names(SMALL)))
    save_network(network, tmp_path / 'depth')
    found = jaxsd.load_detector(tmp_path / 'depth')
    assert found.config == SMALL
    jax.tree.map(np.testing.assert_array_equal, found.params, network.params)
    path = tmp_path / 'depth' / 'config.json'
    path.write_text(path.read_text().replace('"patch_size": 14', '"depth_estimation_type": '
                                             '"metric", "patch_size": 14', 1))
    with pytest.raises(ValueError, match="depth_estimation_type='metric' is not implemented"):
        jaxsd.load_detector(tmp_path / 'depth')


def test_wrong_files(tmp_path):
    def refused(tensors, message):
        save_file(tensors, tmp_path / 'model.safetensors')
        with pytest.raises(ValueError, match=message) as error:
            jaxsd.load_detector(tmp_path / 'model.safetensors')
        assert '\n' not in str(error.value)

    tensors = arrays(DetectorConfig('hed', 8, (1, 1, 1, 1, 1)))
    refused({'lora_unet_x.lora_down.weight': np.zeros((2, 2), 'f4')}, 'it is a LoRA.*load_adapter')
    refused({'strange': np.zeros(2, 'f4')}, 'expected OpenPose, HED, lineart, M-LSD')
    tensors.pop('block3.convs.0.bias')
    save_file(tensors, tmp_path / 'model.safetensors')
    with pytest.raises(ValueError, match=r'block3\.convs\.0\.bias'):
        jaxsd.load_detector(tmp_path / 'model.safetensors')
    with pytest.raises(FileNotFoundError):
        jaxsd.load_detector(tmp_path / 'missing.pth')
    save_file(arrays(DetectorConfig('hed', 8, (1, 1, 1, 1, 1))), tmp_path / 'hed.safetensors')
    for load in (jaxsd.load_controlnet, jaxsd.load_upscaler, jaxsd.load):
        with pytest.raises(ValueError, match='it is a detector for hints|load_detector'):
            load(tmp_path / 'hed.safetensors')
