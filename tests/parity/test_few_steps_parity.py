"""Models distilled to few steps against diffusers' pipelines: what is asked for is a prompt and
steps, the rest is what the folder says, on the same weights and with the same noise."""


import diffusers
import numpy as np
import pytest
import torch
from pipelines import TEXTS, far, ours, pipeline, random_model, tiny

import jaxsd

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
