"""ControlNets in their original names are what diffusers converts them to, tensor by tensor."""

import json
import pathlib
import sys

import pytest
import torch
from diffusers.loaders import single_file_utils as converters
from safetensors.torch import load_file

import jaxsd

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'weights'))
from test_control_files import as_files, tiny, write  # noqa: E402

pytestmark = pytest.mark.parity


@pytest.mark.parametrize('prefix', ['', 'control_model.'])
@pytest.mark.parametrize('version', ['sd15', 'sd21', 'sdxl'])
def test_controlnet_converts_as_in_diffusers(version, prefix, tmp_path):
    network = tiny(version)
    jaxsd.save_network(network, tmp_path / 'folder')
    write(tmp_path / 'a.safetensors', as_files(network, prefix))
    checkpoint = load_file(tmp_path / 'a.safetensors')
    expected = load_file(tmp_path / 'folder' / 'diffusion_pytorch_model.safetensors')
    found = converters.convert_controlnet_checkpoint(
        dict(checkpoint), json.loads((tmp_path / 'folder' / 'config.json').read_text()))
    if version == 'sdxl':  # diffusers has a table for these and does not use it
        table = converters.DIFFUSERS_TO_LDM_MAPPING['controlnet']['addition_embed_type']
        found |= {new: checkpoint[prefix + old] for new, old in table.items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
