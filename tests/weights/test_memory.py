"""Loading needs little more memory than the weights themselves."""

import pathlib
import subprocess
import sys

import pytest
from tiny import sparse_file

from jaxsd.config_files import read_config
from jaxsd.models.spec import count, spec
from jaxsd.weights.names import places

HERE = pathlib.Path(__file__).parent

LOAD = r'''
import pathlib, re, sys
import jax, numpy as np
import jaxsd
from jaxsd.weights import reading
from test_memory import medium_config
reading._tokenizers = lambda *_: {}  # the tokenizers are no weights
def peak():  # in KiB; not ru_maxrss, which a process inherits from the one that started it
    return int(re.search(r'VmHWM:\s+(\d+) kB', pathlib.Path('/proc/self/status').read_text())[1])
jax.device_put(np.zeros(1)).block_until_ready()
before = peak()
model = jaxsd.load(sys.argv[1], dtype=sys.argv[2], config=medium_config())
jax.block_until_ready(model.params)
print(peak() - before)
'''


def medium_config():
    """SDXL base with a U-Net of half the width: 800 MB in float32."""
    import dataclasses
    config = read_config('sdxl')
    unet = dataclasses.replace(config.unet, block_out_channels=(96, 192, 384),
                               transformer_layers=(0, 2, 2), mid_transformer_layers=2,
                               heads=(3, 6, 12), cross_attention_dim=512)
    text = dataclasses.replace(config.text_encoder_2, vocab_size=9999, num_hidden_layers=3)
    return config.replace(unet=unet, text_encoder=text, text_encoder_2=text, version='custom')


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc/self/status')
@pytest.mark.parametrize('layout, stored, wanted', [
    pytest.param('single-file', 'F32', 'float32', marks=pytest.mark.slow),
    ('single-file', 'F16', 'float32'),
    pytest.param('diffusers', 'F32', 'float32', marks=pytest.mark.slow),
    ('diffusers', 'F32', 'bfloat16')])
def test_peak(layout, stored, wanted, tmp_path):
    config = medium_config()
    shapes = spec(config)
    if layout == 'single-file':
        path = tmp_path / 'model.safetensors'
        sparse_file(path, {place.name: place.shape(shapes[part][name])
                           for part, table in places(config, shapes).items()
                           for name, place in table.items()}, stored)
    else:
        path = tmp_path / 'model'
        for part in shapes:
            stem = 'model' if part.startswith('text') else 'diffusion_pytorch_model'
            sparse_file(path / part / f'{stem}.safetensors', shapes[part], stored)
    peak = subprocess.run([sys.executable, '-c', LOAD, str(path), wanted], cwd=HERE, check=True,
                          capture_output=True, text=True).stdout
    weights = count(shapes) * (4 if wanted == 'float32' else 2)
    assert weights > 300e6
    assert 0.9 * weights < int(peak) * 1024 < 1.3 * weights
