"""Reference pictures against the formula of sd-webui-controlnet's scripts/hook.py and of diffusers'
community pipeline stable_diffusion_reference, in diffusers' own pipelines."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from flax import traverse_util
from pipelines import BOUND, STEPS, ours, pipeline, random_model, request, theirs, tiny
from test_models import nchw

from jaxsd import sampling
from jaxsd.models import vae
from jaxsd.run import encode_image, reference
from jaxsd.run.request import Reference

pytestmark = pytest.mark.parity


class Referring:
    """A U-Net's forward that sees a reference first: [latents, latents] of both halves, with
    prepared noises in turn, each noised as the scheduler that the model was trained with does."""

    def __init__(self, net, latents, noises, alphas, weight, fidelity, steps):
        self.net, self.latents, self.noises, self.alphas = net, latents, noises, alphas
        self.fidelity, self.steps, self.call, self.mode = fidelity, steps, 0, None
        self.forward = net.forward
        net.forward = self
        found = [m for part in ('down_blocks', 'mid_block', 'up_blocks')
                 for m in getattr(net, part).modules() if isinstance(m, BasicTransformerBlock)]
        found = sorted(found, key=lambda m: -m.norm1.normalized_shape[0])
        for i, module in enumerate(found):
            if weight > i / len(found):
                self.hack(module.attn1)

    def hack(self, attn):
        plain, bank = attn.forward, []

        def forward(x, encoder_hidden_states=None, **more):
            if self.mode == 'write':
                bank.append(x.clone())
            if self.mode != 'read':
                return plain(x, **more)
            seen = plain(x, encoder_hidden_states=torch.cat([x, *bank], 1), **more)
            bank.clear()
            alone = seen.clone()
            half = len(x) // 2  # the negative prompt's
            alone[:half] = plain(x[:half], **more)
            return self.fidelity * alone + (1 - self.fidelity) * seen

        attn.forward = forward

    def __call__(self, x, t, **more):
        if self.call in self.steps:
            alpha = self.alphas[int(t)]
            noised = alpha.sqrt() * self.latents + (1 - alpha).sqrt() * self.noises[self.call]
            if x.shape[1] > 4:
                noised = torch.cat([noised, torch.zeros_like(noised[:, :1]), self.latents], 1)
            self.mode = 'write'
            self.forward(torch.cat([noised] * 2), t, **more)
            self.mode = 'read'
        out = self.forward(x, t, **more)
        self.mode, self.call = None, self.call + 1
        return out


def lively(model):
    """Self-attention that chooses, and of which much comes."""
    unet = traverse_util.flatten_dict(model.params['unet'], sep='.')
    unet = {name: a * 4 if '.attn1.' in name and name.endswith('weight') else a
            for name, a in unet.items()}
    return model.replace(params=model.params | {'unet': traverse_util.unflatten_dict(unet, sep='.')
                                                })


@pytest.mark.slow
@pytest.mark.parametrize('family, fields', [
    ('sd1', {}), ('sd1', {'weight': 0.4, 'fidelity': 1.0, 'end': 0.6}),
    ('sdxl', {'fidelity': 0.0})])
def test_reference(family, fields, tmp_path, tokenizer_folder):
    xl = family == 'sdxl'
    kind = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    model = lively(random_model(tiny(family, 2), tokenizer_folder))
    more = {} if xl else {'safety_checker': None}
    pipe = pipeline(kind, model, tmp_path / 'model', **more)
    size = 8 * model.config.vae.factor
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (size, size, 3), np.uint8)
    noise = rng.standard_normal((1, 8, 8, 4)).astype(np.float32)
    asked = request(width=size, height=size, seed=7,
                    reference=Reference(image, **fields))
    found = ours(model, [asked], noise)
    plain = ours(model, [asked.replace(reference=None)], noise)

    latents = encode_image(model.params, model.config, vae.unit(image[None]))
    keys = sampling.keys([7])
    noises = [nchw(sampling.draw(keys, reference.CALL + np.uint32(i), (8, 8, 4)))
              for i in range(STEPS)]
    Referring(pipe.unet, nchw(np.asarray(latents)), noises, pipe.scheduler.alphas_cumprod,
              fields.get('weight', 1.0), fields.get('fidelity', 0.5),
              range(round(fields.get('end', 1.0) * STEPS)))
    with torch.no_grad():
        expected = theirs(pipe, 'euler', [noise], width=size, height=size)
    assert np.abs(found - plain).max() > 0.05 * plain.std()
    error = np.abs(found - expected).max() / expected.std()
    assert error <= BOUND, error
