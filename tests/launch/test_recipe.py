"""Options on the command line."""

import contextlib
import dataclasses
import importlib
import pathlib
import sys

import numpy as np
import pytest
from conftest import at_most
from safetensors.numpy import save_file

from jaxsd.config import ControlNetConfig, T2IAdapterConfig
from jaxsd.models.spec import names
from jaxsd.recipe import complete, fields, files, options, recipe, words
from jaxsd.run import request, resolving
from jaxsd.weights import Network, save_network
from launch.lab import settings

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'weights'))
import test_control_files as control_files  # noqa: E402
from tiny import random_params  # noqa: E402


def test_options_are_written_like_arguments():
    assert options('') == {}
    assert options('order=3, solver_type=heun') == {'order': 3, 'solver_type': 'heun'}
    assert options("interval=(0.2, 0.8), apg={'eta': 0.0}, s_churn=-1e2, table='a b'") == {
        'interval': (0.2, 0.8), 'apg': {'eta': 0.0}, 's_churn': -100.0, 'table': 'a b'}


@pytest.mark.parametrize('text', [
    'order', 'order=', '3', 'order=3 eta=1', 'a=__import__("os")', '**{}', 'a=1) + f(b=2',
    'a=1)(b=2', '*[1]', 'a=b.c', ')', 'a=1, a=2'])
def test_what_is_no_option(text):
    with pytest.raises(ValueError, match='expected names with values, for example') as error:
        options(text)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('piece', ['a', ' ', '(', '[', '{', '()', '-', '"', ',', '=', 'a=1,', 'a=(',
                                   'a,', ')', '1', '\\'])
def test_any_text_is_read_in_linear_time(piece):
    """Options, nested more deeply than Python reads, and more of them than a person writes."""
    with at_most(20):  # measured: 2
        for read in (options, lambda text: words('--control', text),
                     lambda text: settings(text, ()), resolving.bucket):
            for size in (10**6, 60_000, 300):
                for before in ('', 'a=', 'a(', '1:'):
                    text = before + (piece * size)[:size]
                    with contextlib.suppress(ValueError):
                        found = read(text)
                        assert read is not options or 'a' in found or not text.strip()
        for read in (options, lambda text: words('--control', text),
                     lambda text: settings(text, ())):
            with pytest.raises(ValueError, match=r'\(1000000 characters\): expected at most 65536'):
                read((piece * 10**6)[:10**6])


def test_settings_of_the_lab():
    assert settings('euler, unipc(order=3, x=(1, (2, 3))) ,heun()', ()) == [
        ('euler', {}), ('unipc', {'order': 3, 'x': (1, (2, 3))}), ('heun', {})]
    assert settings('all', ['a', 'b']) == [('a', {}), ('b', {})]
    for text in ('', 'a,,b', '(order=3)', 'a(b=1', 'a)', 'a(b=1) c', 'a(b=1))'):
        with pytest.raises(ValueError, match='expected'):
            settings(text, ())


def test_only_the_fields_that_were_given():
    config = recipe('x', 64)
    config.request = 'mask_blur=4'
    assert fields(config, ['steps']) == {'steps': None, 'mask_blur': 4}  # the model decides
    config.steps = 25
    assert fields(config, ['steps', 'request']) == {'steps': 25, 'mask_blur': 4}
    assert fields(config, []) == {'mask_blur': 4}
    assert {'width', 'guidance', 'mask_blur'} <= set(fields(config))


def test_files_and_folders_by_name(tmp_path):
    for name in ('b.safetensors', 'a.pt', 'readme.md', 'x=y.ckpt'):
        (tmp_path / name).touch()
    assert files('--lora', [f'{tmp_path}']) == {
        'a': f'{tmp_path}/a.pt', 'b': f'{tmp_path}/b.safetensors', 'x=y': f'{tmp_path}/x=y.ckpt'}
    assert files('--lora', [f'c={tmp_path}/a.pt', f'{tmp_path}/x=y.ckpt']) == {
        'c': f'{tmp_path}/a.pt', 'x=y': f'{tmp_path}/x=y.ckpt'}
    assert files('--lora', [f'{tmp_path}', f'{tmp_path}/a.pt'])['a'] == f'{tmp_path}/a.pt'
    assert files('--lora', []) == {}


def test_whatever_a_control_names(tiny_model, tmp_path):
    """A ControlNet, a Control-LoRA of the model and T2I-Adapters, files or folders."""
    model = tiny_model('sd1')
    net = control_files.tiny('sd15')
    net = Network(dataclasses.replace(
        net.config, **{name: value for name, value in vars(model.config.unet).items()
                       if name not in ('out_channels', 'sample_size')}), {})
    net = Network(net.config, random_params(np.random.default_rng(0), names(net.config)))
    control_files.write(tmp_path / 'lora.safetensors', control_files.control_lora(
        model.params['unet'], net, 2))
    light = T2IAdapterConfig(channels=model.config.unet.block_out_channels[:-1],
                             adapter_type='light_adapter')
    save_network(Network(light, random_params(np.random.default_rng(0), names(light))),
                 tmp_path / 'light')
    save_network(net, tmp_path / 'net')
    paths = [str(tmp_path / name) for name in ('lora.safetensors', 'light', 'net')]
    controls = [request.Control(path, 'a.png') for path in paths]
    requests = [request.Request('a', steps=2, controls=controls)]
    found, _ = complete(model, requests, 'float32', {}, {})
    configs = [found.controlnets[path].config for path in paths]
    assert [type(config) for config in configs] == [
        ControlNetConfig, T2IAdapterConfig, ControlNetConfig]
    assert configs[1] == light


def test_several_embeddings_in_a_file(tiny_model, tmp_path):
    """Each by its token, also where it was written down as NAME=PATH; a name alone fits one."""
    path = tmp_path / 'two.safetensors'
    save_file({f'<{name}>': np.full((1, 32), n, np.float32) for n, name in enumerate('ab')}, path)
    found = files('--embeddings', [f'{path}'])
    assert found == {'a': f'{path}', 'b': f'{path}'}
    model, named = complete(tiny_model('sd1'), None, 'float32', {}, found)
    assert [model.embeddings[name].vectors['text_encoder'][0, 0] for name in 'ab'] == [0, 1]
    assert files('--embeddings', named['embeddings']) == found
    with pytest.raises(ValueError, match='several tokens, a, b; .* found c'):
        complete(model, None, 'float32', {}, files('--embeddings', [f'c={path}']))


@pytest.mark.parametrize('name, prediction', [
    ('sd20', 'v_prediction'), ('sd20_base', 'epsilon'), ('sd21', 'v_prediction'),
    ('sd21_base', 'epsilon'), ('sdxl', None)])
def test_recipes_of_2x_say_what_their_models_predict(name, prediction):
    """Single files of 2.x do not; the recipe of the one is no recipe for the other."""
    module = importlib.import_module(f'configs.{name}')
    assert module.get_config().prediction == prediction
