"""Models distilled to few steps against diffusers' pipelines: what is asked for is a prompt and
steps, the rest is what the folder says, on the same weights and with the same noise."""

import pathlib
import sys

import diffusers
import numpy as np
import pytest
import torch
from pipelines import TEXTS, far, ours, pipeline, random_model, tiny
from safetensors.numpy import save_file

import jaxsd

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'weights'))
import adapter_files as files  # noqa: E402

pytestmark = pytest.mark.parity
SEED, BOUND = 7, 1e-4
TRAILING = {'timestep_spacing': 'trailing'}

# (model, its U-Net's fields, diffusers' scheduler, its settings, (steps, its guidance) of pictures)
CASES = {
    'LCM': ('sd1', {'time_cond_proj_dim': 32}, 'LCM', {}, ((4, 8.5), (1, 1.0), (3, 2.0))),
    'LCM without scale': ('sdxl', {}, 'LCM', {}, ((4, 0.0),)),
    'TCD': ('sd1', {}, 'TCD', {}, ((4, 0.0),)),
    'SD-Turbo': ('sd2', {}, 'EulerDiscrete', TRAILING, ((1, 0.0), (3, 0.0))),
    'SDXL-Turbo': ('sdxl', {}, 'EulerAncestralDiscrete', TRAILING, ((1, 0.0), (4, 0.0))),
    'SDXL-Lightning': ('sdxl', {}, 'EulerDiscrete', TRAILING, ((8, 0.0), (4, 2.0))),
    'SDXL-Lightning of one step': ('sdxl', {}, 'EulerDiscrete', TRAILING, ((1, 0.0),)),
    'Hyper-SD': ('sd1', {}, 'DDIM', {'clip_sample': False, **TRAILING}, ((2, 0.0), (8, 0.0))),
}


@pytest.mark.parametrize('case', CASES)
def test_pipeline(case, tokenizer_folder, tmp_path):
    name, fields, scheduler, settings, pictures = CASES[case]
    config = tiny(name, levels=2, **fields)
    predicts = {'SDXL-Lightning of one step': 'sample', 'SD-Turbo': 'epsilon'}.get(case, 'epsilon')
    made = random_model(config.with_prediction(predicts).replace(defaults={
        'scheduler': {'_class_name': f'{scheduler}Scheduler', **settings}}), tokenizer_folder)
    jaxsd.save(made, tmp_path / 'a')
    model = jaxsd.load(tmp_path / 'a')
    xl = name == 'sdxl'
    kind = (diffusers.StableDiffusionXLPipeline if xl else diffusers.LatentConsistencyModelPipeline
            if fields else diffusers.StableDiffusionPipeline)
    pipe = pipeline(kind, model, tmp_path / 'a', **({} if xl else {'safety_checker': None}))
    assert type(pipe.scheduler).__name__ == f'{scheduler}Scheduler'
    texts = dict(TEXTS)
    if fields:
        del texts['negative_prompt']
    for steps, scale in pictures:
        size = 2 * 8
        expected = pipe(**texts, num_inference_steps=steps, guidance_scale=scale, height=size,
                        width=size, generator=torch.Generator().manual_seed(SEED),
                        output_type='latent', **({'eta': 0.3} if scheduler == 'TCD' else {}),
                        ).images.permute(0, 2, 3, 1).numpy()
        request = jaxsd.Request(**TEXTS, seed=SEED, noise='torch', steps=steps, width=size,
                                height=size, guidance=max(scale, 1.0))
        found = ours(model, [request], None)
        assert np.isfinite(found).all() and expected.std() > 0.05
        assert far(found, expected) <= BOUND, (steps, scale)


# Layers of the published LCM-LoRAs: target_modules of diffusers' train_lcm_distill_lora_sdxl.py.
LCM_LAYERS = ('to_q', 'to_k', 'to_v', 'to_out.0', 'proj_in', 'proj_out', 'ff.net.0.proj',
              'ff.net.2', 'conv1', 'conv2', 'conv_shortcut', 'downsamplers.0.conv',
              'upsamplers.0.conv', 'time_emb_proj')


@pytest.mark.parametrize('name, kind', [
    ('sd1', diffusers.StableDiffusionPipeline),
    pytest.param('sdxl', diffusers.StableDiffusionXLPipeline, marks=pytest.mark.slow)])
def test_lcm_lora(name, kind, tokenizer_folder, tmp_path):
    """On a model of many steps, with kohya's names, asked for as configs/lcm_lora.py does."""
    model = random_model(tiny(name, levels=2), tokenizer_folder)
    more = {'safety_checker': None} if name == 'sd1' else {}
    pipe = pipeline(kind, model, tmp_path / 'a', **more)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    layers = [layer for layer in files.layers(model.config)
              if layer[0] == 'unet' and layer[1].endswith(LCM_LAYERS)]
    save_file(files.file(model.config, files.kohya, files.KOHYA, files.lora, layers, alpha=2.0),
              tmp_path / 'lcm.safetensors')
    pipe.load_lora_weights(tmp_path / 'lcm.safetensors', adapter_name='lcm')
    model = model.replace(adapters={'lcm': jaxsd.load_adapter(tmp_path / 'lcm.safetensors', model)})
    size, pictures = 2 * 8, {}
    for steps, scale, weight in ((4, 1.0, 1.0), (4, 1.0, 0.6), (4, 2.0, 1.0)):
        pipe.set_adapters('lcm', weight)
        expected = pipe(**TEXTS, num_inference_steps=steps, guidance_scale=scale, height=size,
                        width=size, generator=torch.Generator().manual_seed(SEED),
                        output_type='latent').images.permute(0, 2, 3, 1).numpy()
        request = jaxsd.Request(**TEXTS | {'prompt': f'{TEXTS["prompt"]} <lora:lcm:{weight}>'},
                                seed=SEED, noise='torch', steps=steps, width=size, height=size,
                                guidance=scale, schedule='diffusers',
                                schedule_options={'scheduler': 'LCM'})
        found = pictures[steps, scale, weight] = ours(model, [request], None)
        assert np.isfinite(found).all() and expected.std() > 0.05
        assert far(found, expected) <= BOUND, (steps, scale, weight)
    one, less = pictures[4, 1.0, 1.0], pictures[4, 1.0, 0.6]
    assert far(one, less) > 0.1  # the weight counts
