"""The configs and the vocabulary that ship inside the package."""

import dataclasses
import json

import pytest
from tiny import tiny_config

from jaxsd.config import ScheduleConfig
from jaxsd.config_files import VERSIONS, read_config, versions
from jaxsd.prompt.tokenizer import Tokenizer
from jaxsd.weights import write_config

ALL = ('sd14', 'sd15', 'sd15_inpainting', 'sd15_pix2pix', 'sd20', 'sd20_base', 'sd21', 'sd21_base',
       'sd2_depth', 'sd2_inpainting', 'sdxl', 'sdxl_inpainting', 'sdxl_pix2pix', 'sdxl_refiner',
       'x4_upscaler')


def as_custom(config):
    return config.replace(version='custom')


def test_no_version_is_missing():
    assert versions() == sorted(ALL)


@pytest.mark.parametrize('version', ALL)
def test_written_config_reads_back(version, tmp_path):
    """Both the released files and the ones that are made for a custom config."""
    config = read_config(version)
    for name, c in (('released', config), ('custom', as_custom(config)),
                    ('tiny', tiny_config(version))):
        write_config(c, tmp_path / name)
        assert as_custom(read_config(tmp_path / name)) == as_custom(c)
    unet = json.loads((tmp_path / 'released' / 'unet' / 'config.json').read_text())
    assert unet == json.loads((VERSIONS / version / 'unet' / 'config.json').read_text())


def test_what_cannot_be_written_is_refused(tmp_path):
    config = read_config('sd15')
    odd = config.replace(text_encoder=dataclasses.replace(config.text_encoder, skip=1))
    with pytest.raises(ValueError, match='text_encoder.skip'):
        write_config(odd, tmp_path)


def test_facts_of_the_versions():
    v768 = {v for v in ALL if read_config(v).schedule.prediction_type == 'v_prediction'}
    assert v768 == {'sd20', 'sd21', 'x4_upscaler'}
    assert {v for v in ALL if read_config(v).aesthetic} == {'sdxl_refiner'}
    assert {v for v in ALL if read_config(v).zero_negative} == {
        'sdxl', 'sdxl_inpainting', 'sdxl_pix2pix'}
    sizes = {v: read_config(v).unet.sample_size for v in ALL}
    assert {v for v in ALL if sizes[v] == 96} == v768 - {'x4_upscaler'}
    assert {v for v in ALL if sizes[v] == 128} == {
        v for v in ALL if v.startswith(('sdxl', 'x4'))}
    assert {v for v in ALL if read_config(v).low_res} == {'x4_upscaler'}
    upscaler = read_config('x4_upscaler')
    assert upscaler.low_res == ScheduleConfig(beta_start=0.0001, beta_end=0.02)
    assert upscaler.schedule == dataclasses.replace(upscaler.low_res,
                                                    prediction_type='v_prediction')
    assert (upscaler.vae.scaling_factor, upscaler.vae.factor, upscaler.vae.force_upcast,
            upscaler.max_noise_level) == (0.08333, 4, True, 350)
    schedule = read_config('sdxl').schedule
    assert (schedule.beta_start, schedule.beta_end) == (0.00085, 0.012)
    assert schedule.beta_schedule == 'scaled_linear'


def test_vocabulary():
    clip = VERSIONS / 'clip'
    vocab = json.loads((clip / 'vocab.json').read_text(encoding='utf-8'))
    merges = (clip / 'merges.txt').read_text(encoding='utf-8').splitlines()[1:]
    assert sorted(vocab.values()) == list(range(49408))
    assert len(merges) == 48894
    assert [vocab[m.replace(' ', '')] for m in merges] == list(range(512, 49406))
    assert vocab['!'] == 0 and vocab['<|endoftext|>'] == 49407
    assert 'Copyright (c) 2021 OpenAI' in (clip / 'LICENSE').read_text()


@pytest.mark.parametrize('folder, pad', [('sd15/tokenizer', 49407), ('sd21/tokenizer', 0),
                                         ('sdxl/tokenizer', 49407), ('sdxl/tokenizer_2', 0),
                                         ('sdxl_refiner/tokenizer_2', 0)])
def test_tokens_and_padding(folder, pad):
    """Ids as in CLIP's own tokenizer; 2.x and OpenCLIP pad with '!', which is token 0."""
    tokens = Tokenizer.from_folder(VERSIONS / folder)(['a photo of a cat'])
    assert tokens.tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407] + [pad] * 70]
