"""Files go both ways between jaxsd and diffusers, and the names agree with its converters."""

import json
import pathlib
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils as converters
from safetensors.torch import load_file

import jaxsd
from jaxsd.weights.reading import prediction

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'weights'))
from tiny import flat, random_model, same  # noqa: E402

pytestmark = pytest.mark.parity
FAMILIES = ['sd15', 'sd21', 'sdxl', 'sdxl_refiner', 'x4_upscaler']


def tensors_of(folder):
    """{component: its tensors} of a folder that jaxsd wrote."""
    return {file.parent.name: load_file(file) for file in folder.glob('*/*.safetensors')}


def state(module):
    """A module's state without the names' prefix that came and went in transformers."""
    return {k.removeprefix('text_model.'): v for k, v in module.state_dict().items()
            if not k.endswith('position_ids')}


def assert_same(found, expected):
    expected = {k.removeprefix('text_model.'): v for k, v in expected.items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize('version', [*FAMILIES, 'sd15_inpainting'])
def test_diffusers_loads_what_jaxsd_saves(version, tmp_path):
    model = random_model(version, tokenizers=True)
    jaxsd.save(model, tmp_path)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    for part, expected in tensors_of(tmp_path).items():
        assert_same(state(getattr(pipeline, part)), expected)
    for part, tokenizer in model.tokenizers.items():
        theirs = getattr(pipeline, {'text_encoder': 'tokenizer',
                                    'text_encoder_2': 'tokenizer_2'}[part])
        text = ['a photo of a cat', 'naïve café & 42 cats']
        found = theirs(text, padding='max_length', max_length=77, truncation=True).input_ids
        assert np.array_equal(found, tokenizer(text))
    config, theirs = model.config, pipeline.scheduler.config
    assert theirs.prediction_type == config.schedule.prediction_type
    assert pipeline.vae.config.scaling_factor == config.vae.scaling_factor


@pytest.mark.parametrize('version', FAMILIES)
def test_jaxsd_loads_what_diffusers_saves(version, tmp_path):
    model = random_model(version, tokenizers=True)
    jaxsd.save(model, tmp_path / 'ours')
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / 'ours')
    pipeline.save_pretrained(tmp_path / 'theirs', max_shard_size='20KB')
    assert list((tmp_path / 'theirs' / 'unet').glob('*.index.json'))
    found = jaxsd.load(tmp_path / 'theirs')
    assert found.config.replace(version='custom') == model.config
    assert same(flat(found.params), flat(model.params))
    for part, tokenizer in model.tokenizers.items():
        text = ['a photo of a cat']
        assert np.array_equal(found.tokenizers[part](text), tokenizer(text))


@pytest.mark.parametrize('version', FAMILIES)
def test_single_file_converts_as_in_diffusers(version, tmp_path):
    model = random_model(version)
    jaxsd.save(model, tmp_path / 'folder')
    jaxsd.save(model, tmp_path / 'a.safetensors', layout='single-file')
    checkpoint, expected = load_file(tmp_path / 'a.safetensors'), tensors_of(tmp_path / 'folder')

    def config(part):
        return json.loads((tmp_path / 'folder' / part / 'config.json').read_text())
    unet = converters.convert_ldm_unet_checkpoint(dict(checkpoint), config('unet'))
    assert_same(unet, expected['unet'])
    vae = converters.convert_ldm_vae_checkpoint(dict(checkpoint), config('vae'))
    assert_same({k: v.reshape(expected['vae'][k].shape) for k, v in vae.items()}, expected['vae'])
    for part, tensors in expected.items():
        if not part.startswith('text'):
            continue
        prefix = jaxsd.weights.names.prefixes(model.config)[part]
        if prefix.endswith('transformer.'):
            found = converters.convert_ldm_clip_checkpoint(dict(checkpoint))
        else:
            module = torch.nn.Module()  # only its config's hidden_size is asked for
            module.config = type('Config', (), {'hidden_size': 12})
            found = converters.convert_open_clip_checkpoint(module, dict(checkpoint), prefix)
        assert_same({k.removeprefix('text_model.'): v for k, v in found.items()}, tensors)


def test_the_output_tells_what_a_2x_model_predicts(tmp_path):
    """A1111's is_using_v_parameterization_for_sd2 with diffusers' U-Net, around its -1."""
    model = random_model('sd21')
    jaxsd.save(model, tmp_path)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / 'unet')
    x = torch.ones((1, 4, 8, 8)) * 0.5
    with torch.no_grad():
        out = theirs(x, torch.asarray([999]), torch.ones((1, 2, 12)) * 0.5).sample
    found, unet = float((out - x).mean()), model.params['unet']
    for far, expected in ((0.01, 'epsilon'), (-0.01, 'v_prediction')):
        bias = unet['conv_out']['bias'] - 1 - found + far
        params = unet | {'conv_out': unet['conv_out'] | {'bias': bias}}
        assert prediction(params, model.config.unet) == expected
