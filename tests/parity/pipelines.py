"""One tiny model as ours and as a diffusers pipeline, and their walks from the same noise."""

import dataclasses
import functools
import sys
from unittest import mock

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from conftest import TINY
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from test_models import nchw

import jaxsd
from jaxsd import sampling
from jaxsd.models import spec
from jaxsd.prompt.tokenizer import Tokenizer
from jaxsd.run import Encoded, denoiser, inputs, latents, lengthened, networks, resolve
from jaxsd.run.steps import Steps

torch.set_num_threads(1)  # for such small arrays more of them wait for each other, 20 times as long
STEPS, BOUND = 5, 1e-4
# diffusers' scheduler for a sampler of ours, both on 'trailing' timesteps, which is our 'simple'
# where the steps divide 1000.
SCHEDULERS = {
    'ddim': (diffusers.DDIMScheduler, {'clip_sample': False}),
    'euler': (diffusers.EulerDiscreteScheduler, {}),
    'dpmpp_2m': (diffusers.DPMSolverMultistepScheduler,
                 {'lower_order_final': True, 'final_sigmas_type': 'zero'}),
    'unipc': (diffusers.UniPCMultistepScheduler,
              {'solver_order': 2, 'final_sigmas_type': 'zero'}),
}
UNIT = ('ddim', 'dpmpp_2m', 'unipc')  # at unit variance all the way in diffusers, not in ours
TEXTS = {'prompt': 'a red apple', 'negative_prompt': 'dog'}


def tiny(name, levels=4, **unet):
    """The config of TINY[name]; unet: other fields of its U-Net; levels: of its VAE, two make
    pictures of twice the latents' size, which compile sooner."""
    config = TINY[name]
    vae = dataclasses.replace(config.vae, block_out_channels=(16,) * levels)
    return config.replace(unet=dataclasses.replace(config.unet, **unet), vae=vae)


def random_model(config, tokenizer_folder, seed=0):
    """A Model of random weights, its biases and norms too: init's 0 and 1 would hide mistakes."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda a: a + 0.2 * rng.standard_normal(a.shape, np.float32) if a.ndim == 1 else a,
        spec.init(seed, config))
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    texts = [t for t in ('text_encoder', 'text_encoder_2') if getattr(config, t)]
    return jaxsd.Model(config, params, dict.fromkeys(texts, tokenizer))


def pipeline(kind, model, folder, **more):
    """A diffusers pipeline of our model, which it reads from the folder that we write."""
    if not folder.exists():
        jaxsd.save(model, folder)
    pipe = kind.from_pretrained(folder, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe, sampler, draws, **call):
    """What a pipeline makes of TEXTS -> latents [B,h,w,L].

    draws: what it finds when it draws noise, in turn. Its VAE gives the mean of the posterior, as
    ours does; diffusers samples from it.
    """
    kind, settings = SCHEDULERS[sampler]
    kept = {k: v for k, v in pipe.scheduler.config.items()
            if k.startswith('beta') or k == 'prediction_type'}
    pipe.scheduler = kind(timestep_spacing='trailing', **settings, **kept)
    draws = [nchw(draw) if draw.ndim == 4 else torch.tensor(draw) for draw in draws]

    def randn(shape, **_):
        assert draws[0].shape == tuple(shape)
        return draws.pop(0)

    def mean(self, generator=None):
        return self.mode()

    with (mock.patch.object(sys.modules[type(pipe).__module__], 'randn_tensor', randn),
          mock.patch.object(DiagonalGaussianDistribution, 'sample', mean)):
        out = pipe(**TEXTS | {'num_inference_steps': STEPS, 'guidance_scale': 5.0} | call,
                   output_type='latent').images
    assert not draws
    return out.permute(0, 2, 3, 1).numpy()


_latents = jax.jit(latents, static_argnames=('config', 'height', 'width'))


def ours(model, requests, noise, stage=None):
    """Requests through all that `generate` does before its decoder -> latents [B,h,w,L]."""
    requests = resolve(requests, model.config)
    data = lengthened(inputs(model, requests, noise, stage=stage))
    params, config = networks(model, data)
    return np.asarray(_latents(params, data, config=config, height=requests[0].height,
                            width=requests[0].width))


@functools.partial(jax.jit, static_argnames='config')
def denoised(params, config, x, conditioning, guidance, rows):
    """The denoise loop over a sampler's rows, with one Guidance for all of them and no fresh noise
    -> latents like x."""
    guided = denoiser(params, config, Encoded(conditioning, None))
    step = Steps(None, 0, guidance)
    return sampling.sample(lambda x, sigma, i, *memory: guided(x, sigma, step, *memory), x, rows,
                           lambda i: jnp.zeros_like(x),
                           memory=jnp.zeros_like(x) if guidance.momentum else None)


def request(**fields):
    """A Request of TEXTS, as `theirs` asks for it."""
    return jaxsd.Request(**TEXTS | {'seed': 0, 'sampler': 'euler', 'schedule': 'simple',
                                    'steps': STEPS, 'guidance': 5.0} | fields)


def far(found, expected):
    """The largest difference, in deviations of what is expected or in ones."""
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / max(1.0, expected.std())


def picture(seed, size):
    """A square picture of smooth spots, for both sides."""
    spots = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(spots).resize((size, size), Image.Resampling.BICUBIC)


def normal(count, size=8, seed=1):
    """Standard normal noise [count,size,size,4]."""
    return np.random.default_rng(seed).standard_normal((count, size, size, 4), np.float32)


def cells(seed, size):
    """A mask of 8 x 8 black or white cells, those of the latents: their maximum, which we take, is
    their first pixel, which diffusers takes."""
    found = 255 * np.random.default_rng(seed).integers(0, 2, (8, 8), np.uint8)
    return Image.fromarray(found.repeat(size // 8, 0).repeat(size // 8, 1))
