"""Configs check themselves, and a folder's files are read, or refused in one line."""

import dataclasses
import json
import random
import shutil

import pytest

import jaxsd
from jaxsd import config as jc
from jaxsd import config_files as jcf
from jaxsd.run import resolve
from jaxsd.weights import write_config

SD15, XL = jcf.VERSIONS / 'sd15', jcf.VERSIONS / 'sdxl'


def changed(tmp_path, path, version=SD15, text=None, **settings):
    """A copy of a release's config files with some settings of one file replaced."""
    shutil.copytree(version, tmp_path / 'model')
    file = tmp_path / 'model' / path
    content = json.loads(file.read_text()) | settings
    file.write_text(json.dumps(content) if text is None else text)
    return tmp_path / 'model'


UNET, VAE, TEXT = 'unet/config.json', 'vae/config.json', 'text_encoder/config.json'
SCHEDULER, INDEX = 'scheduler/scheduler_config.json', 'model_index.json'


@pytest.mark.parametrize('path, settings, said', [
    (UNET, {'layers_per_block': 10**6}, 'layers_per_block: expected a number at least 1 and at '
                                        'most 64, found 1000000'),
    (UNET, {'layers_per_block': [1, 2, 2, 2]}, r'layers_per_block=\[1, 2, 2, 2\] is not impl'),
    (UNET, {'transformer_layers_per_block': [[1, 2], 1, 1, 1]}, 'expected one value, or one for'),
    (UNET, {'norm_eps': 'x'}, "norm_eps: expected a number, found 'x'"),
    (UNET, {'norm_eps': float('nan')}, 'norm_eps: expected a finite number'),
    (UNET, {'norm_num_groups': True}, 'norm_num_groups: expected a whole number, found True'),
    (UNET, {'norm_num_groups': None}, 'norm_num_groups: expected a whole number, found None'),
    (UNET, {'attention_head_dim': 7}, 'expected multiples of attention heads=7, found 320'),
    (UNET, {'block_out_channels': 320}, 'block_out_channels: expected a list of one entry per'),
    (UNET, {'block_out_channels': []}, '0 levels, down_block_types and up_block_types have 4'),
    (UNET, {'down_block_types': 7}, 'down_block_types: expected a list of one entry per level'),
    (UNET, {'addition_embed_type': 'text_time'}, 'projection_class_embeddings_input_dim as well'),
    (VAE, {'up_block_types': None}, 'up_block_types: expected a list of one entry per level'),
    (INDEX, {'_jaxsd': {'steps': 1.5}}, '_jaxsd: steps=1.5 is of the wrong kind'),
    (UNET, {'mid_block_type': 'MidBlock'}, "mid_block_type='MidBlock' is not implemented"),
    (UNET, {'reverse_transformer_layers_per_block': [1, 1]}, 'one entry for each of the 4'),
    (UNET, {'reverse_transformer_layers_per_block': [1, [2, 1], 1, 1]}, 'expected 3 numbers for'),
    (UNET, {'_class_name': 'UNetMotionModel'}, "_class_name='UNetMotionModel' is not implemented"),
    (VAE, {'scaling_factor': 0}, 'scaling_factor: expected a number above 0, found 0'),
    (VAE, {'scaling_factor': {}}, 'scaling_factor: expected a number, found {}'),
    (VAE, {'latents_mean': [0, 0]}, 'latents_mean: expected latent_channels=4 numbers, found 2'),
    (VAE, {'_class_name': 'AutoencoderOobleck'}, 'describes a AutoencoderOobleck; expected Auto'),
    (TEXT, {'hidden_act': 'relu'}, "hidden_act='relu' is not implemented"),
    (TEXT, {'num_attention_heads': 5}, 'expected multiples of num_attention_heads=5, found 768'),
    (SCHEDULER, {'_class_name': 'FlowMatchEulerDiscreteScheduler'}, 'FlowMatch.* is not impl'),
    (SCHEDULER, {'beta_start': -1}, 'beta_start: expected a number above 0 and at most 0.999'),
    (SCHEDULER, {'beta_schedule': 'cosine'}, "beta_schedule='cosine' is not implemented"),
    (SCHEDULER, {'prediction_type': 'flow_prediction'}, 'is not implemented; expected one of'),
    (INDEX, {'_class_name': 'StableDiffusion3Pipeline'}, 'is not implemented; expected a pipeline'),
    (INDEX, {'text_encoder': ['transformers', 'T5EncoderModel']}, 'text_encoder=.*T5EncoderModel'),
    (INDEX, {'tokenizer': ['transformers', 'T5Tokenizer']}, 'tokenizer=.* is not implemented'),
    (INDEX, {'text_encoder': 'CLIPTextModel'}, "text_encoder='CLIPTextModel' is not implemented"),
    (INDEX, {'image_encoder': ['transformers', 'CLIPVisionModelWithProjection']}, 'image_encoder'),
    (INDEX, {'requires_aesthetics_score': 3}, 'requires_aesthetics_score: expected true or false'),
])
def test_one_line_names_the_file_and_the_setting(tmp_path, path, settings, said):
    folder = changed(tmp_path, path, **settings)
    with pytest.raises(ValueError, match=said) as error:
        jaxsd.read_config(folder)
    assert str(folder / path.partition('/')[0]) in str(error.value)
    assert '\n' not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize('text, said', [
    ('[]', r'expected an object of settings, found \[\]'), ('"x"', 'expected an object'),
    ('{"a": ', 'not valid JSON'), ('', 'not valid JSON'), ('[' * 100_000, 'not valid JSON'),
    ('{"layers_per_block": ' + '[' * 500 + ']' * 500 + '}', 'layers_per_block='),
    ('{"block_out_channels": {"a": 1}}', 'unet'),
])
@pytest.mark.parametrize('path', [UNET, VAE, SCHEDULER, INDEX, TEXT])
def test_damaged_files(tmp_path, path, text, said):
    folder = changed(tmp_path, path, text=text)
    if text.startswith('{"'):
        said = '.'  # what is wrong depends on the file; some leave such a key alone
        if path in (SCHEDULER, INDEX, TEXT):
            return
    with pytest.raises(ValueError, match=said) as error:
        jaxsd.read_config(folder)
    assert '\n' not in str(error.value)


def test_playground(tmp_path):
    """The settings of Playground v2.5, which is SDXL trained as EDM."""
    mean, std = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]
    folder = changed(tmp_path, VAE, XL, latents_mean=mean, latents_std=std, scaling_factor=0.5)
    (folder / SCHEDULER).write_text(json.dumps({
        '_class_name': 'EDMDPMSolverMultistepScheduler', 'sigma_max': 80.0, 'sigma_min': 0.002,
        'sigma_data': 0.5, 'prediction_type': 'epsilon', 'solver_order': 2, 'rho': 7.0,
        'num_train_timesteps': 1000, 'sigma_schedule': 'karras', 'final_sigmas_type': 'zero'}))
    config = jaxsd.read_config(folder)
    assert config.schedule == jc.ScheduleConfig(edm=True, beta_start=config.schedule.beta_start)
    assert config.vae.latents_mean == tuple(mean) and config.vae.latents_std == tuple(std)
    assert config.version == 'custom'  # not SDXL, whose networks it has
    write_config(config, tmp_path / 'again')
    assert jaxsd.read_config(tmp_path / 'again') == config
    assert hash(config) == hash(jaxsd.read_config(tmp_path / 'again'))


@pytest.mark.parametrize('change', [
    {'trained_betas': (0.1, 0.2, 0.3), 'num_train_timesteps': 3},
    {'edm': True, 'prediction_type': 'v_prediction', 'sigma_data': 1.0, 'sigma_max': 120.0},
    {'rescale_betas_zero_snr': True, 'prediction_type': 'v_prediction'},
    {'beta_schedule': 'linear', 'beta_start': 0.001},
])
def test_schedules_are_written_and_read(tmp_path, change):
    config = jaxsd.read_config('sdxl')
    config = config.replace(schedule=dataclasses.replace(config.schedule, **change))
    write_config(config, tmp_path / 'a')
    assert jaxsd.read_config(tmp_path / 'a') == config


def test_what_a_file_leaves_out_is_what_diffusers_takes_it_for(tmp_path):
    """Not what 1.x has: a cross_attention_dim of 1280, betas of DDPM."""
    folder = changed(tmp_path, SCHEDULER, text='{"_class_name": "DDIMScheduler"}')
    content = json.loads((folder / UNET).read_text())
    del content['cross_attention_dim']
    (folder / UNET).write_text(json.dumps(content))
    config = jaxsd.read_config(folder)
    assert config.unet.cross_attention_dim == 1280
    assert config.schedule == jc.ScheduleConfig(beta_start=0.0001, beta_end=0.02,
                                                beta_schedule='linear')


def test_configs_check_themselves():
    with pytest.raises(ValueError, match='layers_per_block: expected a number'):
        dataclasses.replace(jc.UNetConfig(), layers_per_block=10**6)
    with pytest.raises(ValueError, match='expected one entry per level.*heads .found 2'):
        jc.UNetConfig(heads=(8, 8))
    with pytest.raises(ValueError, match='sigma_min=3: expected less than sigma_max=2'):
        jc.ScheduleConfig(edm=True, sigma_min=3, sigma_max=2)
    with pytest.raises(ValueError, match='no prediction of samples'):
        jc.ScheduleConfig(edm=True, prediction_type='sample')
    assert jc.UNetConfig(heads=[8, 8, 8, 8]) == jc.UNetConfig()
    for version in jaxsd.versions():
        jaxsd.read_config(version)


WRONG = [None, True, 'x', '1', -1, 0, 7, 1.5, 1e400, float('nan'), 10**12, [], [1], ['a'], [None],
         [[1, 2], [3]], [1] * 40, {}, {'a': 1}]


@pytest.mark.parametrize('version', ['sdxl', 'sd2_depth', 'x4_upscaler'])
def test_any_wrong_value_is_one_line_that_names_it(version, tmp_path):
    """Of a draw of all settings and values: it is read, or refused by the file's and its name."""
    shutil.copytree(jcf.VERSIONS / version, tmp_path / 'a')
    files = [file for file in sorted((tmp_path / 'a').rglob('*config.json'))
             if 'tokenizer' not in str(file)]
    changes = [(file, key, value) for file in [*files, tmp_path / 'a' / 'model_index.json']
               for key in json.loads(file.read_text()) for value in WRONG]
    refused = 0
    for file, key, value in random.Random(0).sample(changes, 100):
        text = file.read_text()
        file.write_text(json.dumps(json.loads(text) | {key: value}))
        try:
            config = jcf.read_config(tmp_path / 'a')
            assert config.unet.block_out_channels
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            assert '\n' not in str(error) and 'Error' not in str(error), (file, key, value)
            assert str(error).startswith(str(tmp_path))
        file.write_text(text)
    assert refused > 20


def test_networks_that_are_not_made_for_each_other():
    for version in jcf.versions():
        jcf.read_config(version).check_fit()
    sd15, sd21, xl = map(jcf.read_config, ('sd15', 'sd21', 'sdxl'))
    for config, said in (
            (sd15.replace(text_encoder=sd21.text_encoder), 'features of 1024, .*dim=768'),
            (xl.replace(text_encoder=None), 'features of 1280, .*dim=2048'),
            (xl.replace(aesthetic=True), r'input_dim=2816, .* give 1280 \+ 1280'),
            (sd15.replace(unet=dataclasses.replace(sd15.unet, out_channels=8)),
             'out_channels=8, .*latent_channels=4')):
        with pytest.raises(ValueError, match=said):
            resolve([jaxsd.Request('a')], config)
