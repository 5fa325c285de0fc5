"""Adapters against diffusers, PEFT and LyCORIS, on tiny random networks in float32."""

import dataclasses
import functools
import pathlib
import sys

import diffusers
import jax
import lycoris
import numpy as np
import peft
import pytest
import torch
from flax import traverse_util
from pipelines import random_model
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from test_models import close, nchw

import jaxsd
from jaxsd.models import clip, unet
from jaxsd.models.layers import timestep_embedding
from jaxsd.models.spec import from_jax

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'weights'))
import adapter_files as files  # noqa: E402
from tiny import tiny_config  # noqa: E402

pytestmark = pytest.mark.parity
PIPELINES = {'sd15': diffusers.StableDiffusionPipeline, 'sdxl': diffusers.StableDiffusionXLPipeline}


@pytest.fixture(scope='module')
def pair(tokenizer_folder, tmp_path_factory):
    """pair('sd15') -> a Model of random weights, and a diffusers pipeline of it."""
    @functools.cache
    def make(name):
        config = tiny_config(name)
        if name == 'sdxl':  # the pooled text and six numbers of four sinusoids each
            config = config.replace(unet=dataclasses.replace(config.unet, added_dim=6 + 6 * 4))
        model = random_model(config, tokenizer_folder)
        folder = tmp_path_factory.mktemp('adapted') / name
        jaxsd.save(model, folder)
        return model, PIPELINES[name].from_pretrained(folder)

    return make


@functools.partial(jax.jit, static_argnames='config')
def _outputs(params, x, t, context, added, tokens, config):
    found = {'unet': unet.apply(params['unet'], config.unet, x, t, context, added)}
    for part in ('text_encoder', 'text_encoder_2'):
        if part in params:  # before the final norm, which hides a wrong scale
            text = dataclasses.replace(getattr(config, part), skip=0, final_norm=False)
            found[part] = clip.encode(params[part], text, tokens).hidden
    return found


def ours(model, seed=0):
    """The outputs of every network that adapters change, and what they were computed of."""
    rng, c = np.random.default_rng(seed), model.config.unet
    inputs = {'x': rng.standard_normal((2, 8, 8, c.in_channels), np.float32),
              't': np.float32([5, 800]),
              'context': rng.standard_normal((2, 7, c.cross_attention_dim), np.float32),
              'added': None, 'tokens': rng.integers(0, 99, (2, 7))}
    more = {}
    if c.added_dim:
        ids, text = rng.random((2, 6), np.float32), rng.standard_normal((2, 6), np.float32)
        inputs['added'] = np.concatenate(
            [text, np.asarray(timestep_embedding(ids, c.added_time_dim)).reshape(2, -1)], 1)
        more = {'added_cond_kwargs': {'text_embeds': torch.tensor(text),
                                      'time_ids': torch.tensor(ids)}}
    return _outputs(model.params, config=model.config, **inputs), inputs, more


@torch.no_grad()
def theirs(pipe, inputs, more):
    x, t, context = nchw(inputs['x']), *(torch.tensor(inputs[n]) for n in ('t', 'context'))
    found = {'unet': pipe.unet(x, t, context, **more).sample.permute(0, 2, 3, 1)}
    for part in ('text_encoder', 'text_encoder_2'):
        if getattr(pipe, part, None) is not None:
            # transformers' last hidden state of all has passed no norm
            found[part] = getattr(pipe, part)(torch.tensor(inputs['tokens']),
                                              output_hidden_states=True).hidden_states[-1]
    return found


def compare(model, pipe, path, parts):
    """Our merge of a file against the pipeline, which holds it."""
    before, _, _ = ours(model)
    found, inputs, more = ours(jaxsd.merge(model, {jaxsd.load_adapter(path, model): 1}))
    expected = theirs(pipe, inputs, more)
    for part in parts:
        close(found[part], expected[part])
        assert np.abs(found[part] - before[part]).max() > 0.1 * np.std(before[part])


SPELLINGS = {  # as diffusers reads them: spelling, parts' keys, which layers, alpha
    'kohya': (files.kohya, files.KOHYA, files.layers, 2.0),
    'kohya without convolutions': (files.kohya, files.KOHYA, files.attentions, None),
    'sgm': (files.sgm, files.KOHYA, files.layers, 2.0),
    'peft': (files.peft, files.PEFT, files.layers, None),
    'trained': (files.trained, files.PLAIN, files.attentions, None),
    'processors': (files.processors, files.PLAIN, files.attentions, None),
}


@pytest.mark.parametrize('spelling', SPELLINGS)
@pytest.mark.parametrize('name', PIPELINES)
def test_lora_files_as_diffusers_reads_them(pair, name, spelling, tmp_path):
    model, pipe = pair(name)
    spell, suffixes, chosen, alpha = SPELLINGS[spelling]
    if spelling == 'sgm' and name == 'sd15':
        pytest.skip('only SDXL files have these names')
    path, layers = tmp_path / 'lora.safetensors', chosen(model.config)
    if suffixes is files.KOHYA:  # diffusers takes the name of this layer for add.embedding
        layers = [layer for layer in layers if 'add_embedding' not in layer[1]]
    save_file(files.file(model.config, spell, suffixes, files.lora, layers, alpha=alpha), path)
    pipe.load_lora_weights(path)
    try:
        compare(model, pipe, path, ours(model)[0])
    finally:
        pipe.unload_lora_weights()


@pytest.mark.parametrize('dora', [False, True])
@pytest.mark.parametrize('name', PIPELINES)
def test_peft_adapters_with_their_settings(pair, name, dora, tmp_path):
    """alpha and rank-stabilised scales stand in the header that diffusers writes."""
    model, pipe = pair(name)
    targets = r'.*(to_q|to_out\.0|ff\.net\.2|conv1|proj_in|downsamplers\.0\.conv)'
    pipe.unet.add_adapter(peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, use_dora=dora, target_modules=targets,
        alpha_pattern={'attn2.to_q': 1}))
    try:
        randomise(pipe.unet, lambda key: 'lora_' in key)
        pipe.unet.save_lora_adapter(tmp_path)
        compare(model, pipe, tmp_path / 'pytorch_lora_weights.safetensors', ['unet'])
    finally:
        pipe.unload_lora_weights()


def randomise(module, chosen, seed=0):
    """Random parameters of an adapter; those of one axis or of norms move from what they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in module.named_parameters():
            if chosen(key):
                whole = not ('magnitude' in key or 'dora_scale' in key or 'rescale' in key)
                noise = files.SIZE * torch.randn(p.shape, generator=generator)
                p.copy_(noise if whole else p * (1 + noise))


LYCORIS = {  # what create_lycoris is asked for
    'locon': {'algo': 'locon'},
    'locon tucker': {'algo': 'locon', 'use_tucker': True},
    'locon alpha': {'algo': 'locon', 'linear_alpha': 1, 'conv_alpha': 1},
    'locon norm': {'algo': 'locon', 'train_norm': True},
    'locon dora': {'algo': 'locon', 'dora_wd': True},
    'locon dora of inputs': {'algo': 'locon', 'dora_wd': True, 'wd_on_output': False},
    'loha': {'algo': 'loha'},
    'loha tucker': {'algo': 'loha', 'use_tucker': True},
    'loha dora': {'algo': 'loha', 'dora_wd': True},
    'lokr': {'algo': 'lokr'},
    'lokr tucker': {'algo': 'lokr', 'use_tucker': True},
    'lokr decomposed': {'algo': 'lokr', 'decompose_both': True, 'linear_dim': 1, 'conv_dim': 1},
    'lokr whole': {'algo': 'lokr', 'full_matrix': True},
    'lokr dora': {'algo': 'lokr', 'dora_wd': True},
    'full': {'algo': 'full'},
    'ia3': {'algo': 'ia3'},
    'glora': {'algo': 'glora'},
    'glora alpha': {'algo': 'glora', 'linear_alpha': 1, 'conv_alpha': 1},
    'diag-oft': {'algo': 'diag-oft'},
    'diag-oft bounded': {'algo': 'diag-oft', 'constraint': 0.01},
    'diag-oft rescaled': {'algo': 'diag-oft', 'rescaled': True},
}


@pytest.mark.parametrize('algorithm', LYCORIS)
@pytest.mark.parametrize('name', PIPELINES)
def test_lycoris_files_as_the_library_merges_them(pair, name, algorithm, tmp_path):
    """alpha is the rank except where its modules apply it once: LoHa and LoKr do so twice."""
    model, _ = pair(name)
    module = torch_unet(pair, name)
    settings = {'linear_dim': 2, 'linear_alpha': 2, 'conv_dim': 2, 'conv_alpha': 2,
                **LYCORIS[algorithm]}
    if algorithm == 'lokr decomposed':
        settings |= {'linear_alpha': 1, 'conv_alpha': 1}
    network = lycoris.create_lycoris(module, 1.0, **settings)
    path = random_file(network, tmp_path)
    network.merge_to(1.0)
    merged = jaxsd.merge(model, {jaxsd.load_adapter(path, model): 1})
    found = traverse_util.flatten_dict(merged.params['unet'], sep='.')
    before = traverse_util.flatten_dict(model.params['unet'], sep='.')
    changed = 0
    for key, expected in module.state_dict().items():
        expected = expected.detach().numpy()
        ours = from_jax(key, np.asarray(found[key]))
        # relative to the layer: norms near 0 blow a DoRA up
        assert np.abs(ours - expected).max() <= 1e-5 * max(1, np.abs(expected).max()), key
        changed += not np.array_equal(found[key], before[key])
    assert changed >= len(network.loras)


def random_file(network, folder):
    """The file of a LyCORIS network, made random -> its path."""
    tensors = {}
    for number, lora in enumerate(network.loras):
        randomise(lora, lambda key: True, number)
        found = lora.state_dict()
        if getattr(lora, 'name', '') == 'full':  # writes what is right only once it is applied
            found = {'diff': lora.weight} | ({} if lora.bias is None else {'diff_b': lora.bias})
        for key, value in found.items():
            tensors[f'{lora.lora_name}.{key}'] = value.detach().clone().contiguous()
    save_torch(tensors, folder / 'lycoris.safetensors')
    return folder / 'lycoris.safetensors'


def torch_unet(pair, name):
    """A U-Net of its own with the model's weights."""
    module = pair(name)[1].unet
    fresh = diffusers.UNet2DConditionModel.from_config(module.config)
    fresh.load_state_dict(module.state_dict())
    return fresh.eval()


@pytest.mark.parametrize('kind', ['loha', 'lokr', 'dylora'])
def test_scales_that_the_library_merges_otherwise(pair, kind, tmp_path):
    """LyCORIS' own merge applies LoHa's and LoKr's alpha twice and DyLoRA's to a part of the rank;
    what its modules add to an output is the reference here."""
    model, _ = pair('sd15')
    module = torch_unet(pair, 'sd15')
    network = lycoris.create_lycoris(module, 1.0, linear_dim=4, linear_alpha=1, conv_dim=4,
                                     conv_alpha=1, algo=kind, block_size=2)
    adapter = jaxsd.load_adapter(random_file(network, tmp_path), model)
    layers = dict(module.named_modules())
    for lora in network.loras:
        layer = next(n for n in layers if f'lycoris_{n}'.replace('.', '_') == lora.lora_name)
        weight = np.asarray(functools.reduce(dict.get, layer.split('.'),
                                             model.params['unet'])['weight'])
        delta = from_jax('weight', adapter.deltas['unet'][f'{layer}.weight'].of(weight))
        if kind == 'dylora':
            up, down = torch.cat(list(lora.up_list), 1), torch.cat(list(lora.down_list))
            expected = (up @ down / 4).reshape(delta.shape).detach().numpy()
        else:
            size = (1, delta.shape[1], *(5,) * (delta.ndim - 2))
            x = torch.randn(size)
            expected = lora.bypass_forward_diff(x).detach().numpy()
            delta = lora.op(x, torch.tensor(delta.copy()), None, **lora.kw_dict).numpy()
        np.testing.assert_allclose(delta, expected, atol=1e-5)
