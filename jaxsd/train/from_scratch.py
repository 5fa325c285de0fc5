"""A small Stable Diffusion from nothing: VAE, text encoder and U-Net, and the decoder once more.

Each stage has a folder of its own in the run's, from which it is taken up again. With c.start, the
folder of such a model, its networks named in c.start_parts are trained further; the stages of
c.skip are left out.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

import jaxsd
from jaxsd import config as jc
from jaxsd.models import spec, vae
from jaxsd.prompt import blocks
from jaxsd.prompt.tokenizer import Tokenizer
from jaxsd.run.picture import grid
from jaxsd.train import loop, losses, optimizers
from jaxsd.train.config import SECTIONS
from jaxsd.typing import Params, Path
from jaxsd.weights import Model

Images = UInt8[np.ndarray, 'N H W 3']
Latents = Float[np.ndarray, 'N h w L']
START_PARTS = ('unet', 'vae', 'text_encoder')
LOG_VARIANCE = -10.0  # a deviation of 0.007, of latents whose deviation is 1


def train(c: ConfigDict) -> Model:
    """Train all stages of a recipe, such as configs/train_emoji64.py."""
    stages: dict[str, dict[str, Any]] = {
        name: {part: SECTIONS[part](**stage[part]) for part in ('train', 'optimizer', 'loss')}
        for name, stage in c.stages.items() if name not in c.skip}
    model = first_model(c)
    config = model.config
    images, captions, plain, heldout = load_data(c.data)
    repeats = np.where(heldout, 0, np.where(plain, c.plain_repeats, 1))

    def run(name: str, loss: Callable[..., losses.Loss], params: Params, batches: Callable,
            sample: Callable | None = None) -> Params:
        """Train one stage -> what it comes to. batches: of the stage's batch size and seed."""
        s = stages[name]
        settings = s['train']
        return loop.fit(
            lambda p, frozen, batch, key: loss(p, config, batch, key), params, {},
            batches(settings.batch_size, settings.seed),
            optimizers.optimizer(s['optimizer'], settings.steps, params), settings,
            pathlib.Path(c.out) / name, sample)

    if 'vae' in stages:
        model = train_vae(run, model, images, repeats)
    latents = encode(model, images)
    if 'text' in stages:
        model = train_text(run, model, latents, captions, repeats)
    if 'unet' in stages:
        model = train_unet(run, model, latents, captions, repeats, c.stages.unet.caption_dropout,
                           stages['unet']['loss'])
    if 'decoder' not in stages:
        return model
    data = {'image': images, 'latent': latents}
    whole = model.params['vae']
    parts = {k: whole[k] for k in ('decoder', 'post_quant_conv')}
    decoder = run('decoder', losses.decoder, {'vae': parts},
                  lambda size, seed: loop.arrays(data, repeats, size, seed))['vae']
    return model.replace(params=model.params | {'vae': whole | decoder})


def first_model(c: ConfigDict) -> Model:
    """What the first stage begins with: random weights, or the networks c.start_parts of the model
    in the folder c.start and random weights for the others.

    Raises ValueError where a network that is taken is not the recipe's.
    """
    config = model_config(c)
    fresh = Model(config, spec.init(0, config),
                  {'text_encoder': Tokenizer.from_folder(c.tokenizer)})
    if not c.start:
        return fresh
    model, params = jaxsd.load(c.start, dtype='float32'), fresh.params
    for part in c.start_parts:
        if getattr(model.config, part) != getattr(config, part):
            raise ValueError(f'start={c.start}: its {part} is not the one that the recipe '
                             f'describes, expected {getattr(config, part)}')
        params = params | {part: model.params[part]}
    networks = {part: getattr(config, part) for part in START_PARTS}
    words = model if 'text_encoder' in c.start_parts else fresh
    return model.replace(config=dataclasses.replace(model.config, **networks), params=params,
                         tokenizers=words.tokenizers)


def model_config(c: ConfigDict) -> jc.ModelConfig:
    """The ModelConfig that a recipe describes."""
    vocabulary = json.loads((pathlib.Path(c.tokenizer) / 'vocab.json').read_text())
    text = jc.TextConfig(vocab_size=len(vocabulary), eos_token_id=vocabulary['<|endoftext|>'],
                         **c.text_encoder)
    return jc.ModelConfig(
        unet=jc.UNetConfig(**c.unet), vae=jc.VAEConfig(**c.vae), text_encoder=text,
        schedule=jc.ScheduleConfig(prediction_type=c.prediction_type))


def load_data(path: Path) -> tuple[np.ndarray, ...]:
    """A data set -> images uint8 [N,H,W,3], captions [N], plain bool [N], heldout bool [N]."""
    if not pathlib.Path(path).exists():
        raise FileNotFoundError(f'{path}: no such file. Build the data set first: '
                                f'python -m launch.emoji_data --out={path}')
    with np.load(path) as data:
        return tuple(data[k] for k in ('images', 'captions', 'plain', 'heldout'))


def train_vae(run: Callable[..., Params], model: Model, images: Images,
              repeats: np.ndarray) -> Model:
    """The autoencoder, then the standardisation of its latents."""
    config, params = model.config, model.params
    decode = jax.jit(lambda p, z: vae.decode(p, config.vae, z))
    shown = images[::max(1, len(images) // 32)][:32]

    def sample(params, step):
        again = np.asarray(decode(params['vae'], means(params['vae'], config.vae, shown)))
        again = np.uint8(np.clip(again * 127.5 + 128, 0, 255))
        half = len(shown) // 2
        return grid(np.concatenate([shown[:half], again[:half], shown[half:2 * half],
                                    again[half:2 * half]]), half)

    trained = run('vae', losses.autoencoder, {'vae': params['vae']},
                  lambda size, seed: loop.arrays({'image': images}, repeats, size, seed),
                  sample)
    model = model.replace(params=params | trained)
    latents = encode(model, images)
    return model.replace(params=model.params | {'vae': fold_standardisation(
        model.params['vae'], latents.mean((0, 1, 2)), latents.std((0, 1, 2)))})


def encode(model: Model, images: Images) -> Latents:
    """The latents of all pictures, each the mean of its distribution."""
    return np.concatenate([means(model.params['vae'], model.config.vae, images[i:i + 64])
                           for i in range(0, len(images), 64)])


@functools.partial(jax.jit, static_argnames='config')
def means(params: Params, config: jc.VAEConfig, images: jax.Array) -> jax.Array:
    """The means of the latents of a few pictures."""
    return vae.encode(params, config, vae.unit(images))[0]


def fold_standardisation(params: Params, mean: Any, deviation: Any) -> Params:
    """The VAE whose latents are (z - mean) / deviation, per channel [L], of the given one's z.

    Both are folded into quant_conv and post_quant_conv, so that the folder stays a standard one
    with scaling_factor 1. The latents' own distributions become narrow, LOG_VARIANCE: the KL term
    lets channels that say little be mostly noise, which standardised would be as loud as others.
    """
    encoder, decoder = params['quant_conv'], params['post_quant_conv']
    scale = jnp.concatenate([1 / deviation, jnp.zeros_like(deviation)])
    shift = jnp.concatenate([-mean / deviation, jnp.full_like(deviation, LOG_VARIANCE)])
    return params | {
        'quant_conv': {'weight': encoder['weight'] * scale,
                       'bias': encoder['bias'] * scale + shift},
        'post_quant_conv': {
            'weight': decoder['weight'] * deviation[:, None],
            'bias': decoder['bias'] + mean @ decoder['weight'][0, 0]}}


def train_text(run: Callable[..., Params], model: Model, latents: Latents, captions: np.ndarray,
               repeats: np.ndarray) -> Model:
    """A start for the text encoder, see losses.alignment."""
    width = latents[0].size
    assert model.config.text_encoder is not None
    head = {'weight': jnp.zeros((model.config.text_encoder.hidden_size, width)),
            'bias': jnp.zeros(width)}
    data = {'latent': latents, 'tokens': blocks.captions(model.tokenizers, captions.tolist(), 1)}
    found = run('text', losses.alignment,
                {'text_encoder': model.params['text_encoder'], 'alignment': head},
                lambda size, seed: loop.arrays(data, repeats, size, seed))
    return model.replace(params=model.params | {'text_encoder': found['text_encoder']})


def train_unet(run: Callable[..., Params], model: Model, latents: Latents, captions: np.ndarray,
               repeats: np.ndarray, dropout: float, c: Any) -> Model:
    """Text encoder and U-Net together, by forward diffusion.

    dropout: how often a caption is replaced by '' (Ho and Salimans 2022); c: LossConfig.
    """
    names = [str(text) for text in captions]
    data = {'latent': latents, 'tokens': blocks.captions(model.tokenizers, names, 1)}
    empty = blocks.captions(model.tokenizers, [''], 1)
    shown = [text for text, n in zip(names, repeats) if n]
    shown = shown[::max(1, len(shown) // 32)][:32]

    def batches(size, seed):
        whole = loop.arrays(data, repeats, size, seed)

        def some(step):
            for i, batch in enumerate(whole(step), step):
                drop = np.random.default_rng((seed, i)).random((size, 1, 1)) < dropout
                yield batch | {'tokens': {k: np.where(drop, empty[k], tokens)
                                          for k, tokens in batch['tokens'].items()}}

        return some

    def sample(params, step):
        requests = [jaxsd.Request(prompt, seed=i, steps=12, guidance=3.0, weighting='plain')
                    for i, prompt in enumerate(shown)]
        images = jaxsd.generate(model.replace(params=model.params | params), requests)
        return grid(images, max(1, len(images) // 2))

    found = run('unet', lambda p, config, b, key: losses.diffusion(p, config, b, key, c),
                {k: model.params[k] for k in ('text_encoder', 'unet')}, batches, sample)
    return model.replace(params=model.params | found)
