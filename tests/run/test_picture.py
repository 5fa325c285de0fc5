"""PNG files, their texts, grids."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from jaxsd.run import picture
from jaxsd.run.request import Request

REQUEST = Request(prompt='red apple, für dich', negative_prompt='dog\ncat', seed=4376845645,
                  steps=20, guidance=7.5, sampler='dpmpp_2m', schedule='karras', width=512,
                  height=768, sampler_options={})


def test_parameters_are_what_a1111_reads():
    text = picture.parameters(REQUEST, 'a, b')
    *prompt, last = text.split('\n')
    assert prompt == ['red apple, für dich', 'Negative prompt: dog', 'cat']
    # The expression by which stable-diffusion-webui takes the last line apart.
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert len(found) >= 3
    pairs = dict(found)
    assert pairs.pop('Version').startswith('jaxsd ')
    assert pairs == {'Steps': '20', 'Sampler': 'DPM++ 2M', 'Schedule type': 'Karras',
                     'CFG scale': '7.5', 'Seed': '4376845645', 'Size': '512x768',
                     'Model': '"a, b"'}
    assert 'Negative' not in picture.parameters(REQUEST.replace(negative_prompt=''))


def test_levels_and_guidance_of_each_step():
    request = REQUEST.replace(steps=3, guidance=[9, 5, 2], schedule=np.array([14.6, 1, 0.5, 0]))
    text = picture.parameters(request)
    assert 'Schedule type: "14.6,1,0.5,0", CFG scale: 9,' in text
    found = json.loads(picture.record(request))['request']
    assert found['guidance'] == [9, 5, 2] and found['schedule'] == [14.6, 1, 0.5, 0]


def test_png_round_trip(tmp_path):
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    texts = {'parameters': picture.parameters(REQUEST), 'jaxsd': picture.record(REQUEST, dtype='x')}
    picture.write_png(tmp_path / 'a.png', image, texts)
    with Image.open(tmp_path / 'a.png') as file:
        np.testing.assert_array_equal(np.asarray(file), image)
        assert file.text['parameters'] == texts['parameters']
        found = json.loads(file.text['jaxsd'])
    assert Request(**{**found['request'], 'crop': (0, 0)}) == REQUEST
    assert found['dtype'] == 'x' and {'jax', 'jaxsd'} <= set(found['versions'])


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / 'a.png').write_bytes(b'old')
    with pytest.raises(TypeError):
        picture.write_png(tmp_path / 'a.png', np.zeros((4, 4, 7), np.uint8))
    assert [p.name for p in tmp_path.iterdir()] == ['a.png']
    assert (tmp_path / 'a.png').read_bytes() == b'old'


def test_grid():
    images = np.stack([np.full((2, 3, 3), i, np.uint8) for i in range(5)])
    found = picture.grid(images)
    assert found.shape == (4, 9, 3)
    assert found[::2, ::3, 0].tolist() == [[0, 1, 2], [3, 4, 255]]
    assert picture.grid(images, columns=5).shape == (2, 15, 3)


def test_check_folder(tmp_path):
    assert picture.check_folder(tmp_path / 'a' / 'b').is_dir()
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match='file'):
        picture.check_folder(tmp_path / 'file' / 'b')
