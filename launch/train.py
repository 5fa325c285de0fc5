"""Train a small Stable Diffusion: `python -m launch.train --config=configs/train_emoji64.py`.

Four stages, each taken up again from its own folder under config.out: the autoencoder; a start for
the text encoder; text encoder and U-Net together, by forward diffusion; the decoder once more, on
the latents of the data set. At the end the model is written to config.export as a diffusers folder;
one that another run wrote stays, unless --overwrite says so.
"""

import functools
import importlib.util
import json
import pathlib

from absl import app, flags
from ml_collections import config_flags

from . import plain_errors

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXPORTED = 'exported.txt'  # in config.out: what this run wrote


def define_flags(recipe='train_emoji64'):
    """Not at import: other mains have flags of these names. recipe: the default one."""
    config_flags.DEFINE_config_file(
        'config', str(ROOT / 'configs' / f'{recipe}.py'),
        'Training recipe; every field is a flag too, --config.stages.unet.steps=100.')
    flags.DEFINE_boolean('overwrite', False, 'config.export may be written over.')


def check(c, overwrite=False):
    """Raise ValueError or ImportError for what would end a training later, before it begins."""
    if 'stages' not in c:
        raise ValueError('--config: expected a training recipe, such as configs/train_emoji64.py')
    if importlib.util.find_spec('matplotlib') is None:
        raise ImportError("training draws curves with matplotlib: pip install 'jaxsd[train]'")
    for name, stage in c.stages.items():
        if not 0 <= stage.warmup < stage.steps:
            raise ValueError(f'stages.{name}.warmup={stage.warmup}: expected less than its '
                             f'{stage.steps} steps')
    export, ours = pathlib.Path(c.export), pathlib.Path(c.out) / EXPORTED
    if export.exists() and not overwrite and not (
            ours.exists() and ours.read_text() == str(export.absolute())):
        raise ValueError(f'config.export={c.export}: is there already, and this run did not write '
                         'it; give another folder, or --overwrite')


def exported(c):
    """Note that this run wrote config.export, and may do so again."""
    pathlib.Path(c.out, EXPORTED).write_text(str(pathlib.Path(c.export).absolute()))
    print(f'written: {c.export}')


def model_config(c):
    """The ModelConfig that a training recipe describes."""
    from jaxsd import config as jc
    vocabulary = json.loads((pathlib.Path(c.tokenizer) / 'vocab.json').read_text())
    text = jc.TextConfig(vocab_size=len(vocabulary), eos_token_id=vocabulary['<|endoftext|>'],
                         **c.text_encoder)
    schedule = jc.ScheduleConfig(prediction_type=c.prediction_type)
    return jc.ModelConfig(unet=jc.UNetConfig(**c.unet), vae=jc.VAEConfig(**c.vae),
                          schedule=schedule, text_encoder=text)


def load_data(path):
    """(images uint8 [N,H,W,3], captions [N], plain bool [N], heldout bool [N])."""
    import numpy as np
    if not pathlib.Path(path).exists():
        raise FileNotFoundError(f'{path}: no such file. Build the data set first: '
                                f'python -m launch.emoji_data --out={path}')
    with np.load(path) as data:
        return tuple(data[k] for k in ('images', 'captions', 'plain', 'heldout'))


def fold_standardisation(params, mean, deviation):
    """The VAE whose latents are (z - mean) / deviation, per channel [L], of the given one's z.

    Both are folded into quant_conv and post_quant_conv, so that the folder stays a standard one
    with scaling_factor 1.
    """
    import jax.numpy as jnp
    encoder, decoder = params['quant_conv'], params['post_quant_conv']
    scale = jnp.concatenate([1 / deviation, jnp.ones_like(deviation)])
    shift = jnp.concatenate([-mean / deviation, -2 * jnp.log(deviation)])
    return params | {
        'quant_conv': {'weight': encoder['weight'] * scale,
                       'bias': encoder['bias'] * scale + shift},
        'post_quant_conv': {
            'weight': decoder['weight'] * deviation[:, None],
            'bias': decoder['bias'] + mean @ decoder['weight'][0, 0]}}


def save_grid(path, images):
    """Write images [rows, columns, H, W, 3] in [-1,1] as one PNG."""
    import numpy as np
    from PIL import Image
    rows, columns, h, w, _ = images.shape
    sheet = np.asarray(images).transpose(0, 2, 1, 3, 4).reshape(rows * h, columns * w, 3)
    Image.fromarray(np.uint8(np.clip(sheet * 127.5 + 128, 0, 255))).save(path)


def in_batches(f, x, size=64):
    """Apply f to x [N, ...] in equal batches, the last one padded."""
    import numpy as np
    padded = np.concatenate([x, np.repeat(x[-1:], -len(x) % size, 0)])
    parts = [np.asarray(f(padded[i:i + size])) for i in range(0, len(padded), size)]
    return np.concatenate(parts)[:len(x)]


def run_stage(name, loss, params, data, weights, c, preview=None):
    """Train one stage from where its folder left it -> the running average of its parameters."""
    import jax
    import jax.numpy as jnp

    from jaxsd.train import loop
    s = c.stages[name]
    tx = loop.optimizer(s)
    step = jax.jit(loop.make_step(loss, tx, s.ema, jnp.dtype(s.dtype)), donate_argnums=0)
    return loop.fit(step, loop.start(params, tx), data, weights, s, f'{c.out}/{name}', preview)


def train_vae(c, config, params, images, weights):
    """Stage 1: the autoencoder, then its latents' standardisation -> (VAE, latents [N,h,w,L])."""
    import jax
    import numpy as np

    from jaxsd.models import vae
    from jaxsd.train import losses
    encode = jax.jit(lambda p, x: vae.encode(p, config.vae, x)[0])
    decode = jax.jit(lambda p, z: vae.decode(p, config.vae, z))
    some = images[::max(1, len(images) // 32)][:32]

    def preview(ema, step):
        again = np.asarray(decode(ema['vae'], encode(ema['vae'], some)))
        half = len(some) // 2
        rows = [some[:half], again[:half], some[half:2 * half], again[half:2 * half]]
        save_grid(f'{c.out}/vae/{step:06d}.png', np.stack(rows))

    params = run_stage('vae', lambda p, b, k: losses.autoencoder(p, config, b, k),
                       {'vae': params['vae']}, {'image': images}, weights, c, preview)['vae']
    latents = in_batches(functools.partial(encode, params), images)
    mean, deviation = latents.mean((0, 1, 2)), latents.std((0, 1, 2))
    return fold_standardisation(params, mean, deviation), (latents - mean) / deviation


def train_text_and_unet(c, config, params, latents, captions, weights, vae):
    """Stages 2 and 3: a start for the text encoder, then it and the U-Net by forward diffusion."""
    import jax.numpy as jnp
    import numpy as np

    import jaxsd
    from jaxsd import sampling
    from jaxsd.prompt.tokenizer import Tokenizer
    from jaxsd.train import losses
    tokenizer = Tokenizer.from_folder(c.tokenizer)
    data = {'latent': latents, 'tokens': tokenizer([str(caption) for caption in captions])}
    width = latents[0].size
    head = {'weight': jnp.zeros((config.text_encoder.hidden_size, width)), 'bias': jnp.zeros(width)}
    text = run_stage('text', lambda p, b, k: losses.alignment(p, config, b, k),
                     {'text_encoder': params['text_encoder'], 'alignment': head}, data, weights,
                     c)['text_encoder']

    abar = jnp.asarray(sampling.alphas_cumprod(config.schedule), jnp.float32)
    settings = c.stages.unet
    shown = [str(caption) for caption in captions[weights > 0]]
    shown = shown[::max(1, len(shown) // 32)][:32]

    def model(ema):
        return jaxsd.Model(config, {'vae': vae, **ema}, {'text_encoder': tokenizer})

    def preview(ema, step):
        requests = [jaxsd.Request(prompt, seed=i, steps=12, guidance=3.0, weighting='plain')
                    for i, prompt in enumerate(shown)]
        images = jaxsd.generate(model(ema), requests).astype(np.float32) / 127.5 - 1
        half = len(images) // 2
        save_grid(f'{c.out}/unet/{step:06d}.png', images[:2 * half].reshape(
            2, half, *images.shape[1:]))

    def loss(p, b, key):
        return losses.diffusion(p, config, b, key, abar, settings.caption_dropout,
                                settings.min_snr_gamma)

    return model(run_stage('unet', loss, {'text_encoder': text, 'unet': params['unet']},
                           data | {'empty': tokenizer([''])[0]}, weights, c, preview))


def train_decoder(c, config, vae, images, latents, weights):
    """Stage 4: the decoder alone, on the latents that the U-Net learnt -> the whole VAE."""
    from jaxsd.train import losses
    trained = run_stage('decoder', lambda p, b, k: losses.decoder(p, config, b, k),
                        {'vae': {k: vae[k] for k in ('decoder', 'post_quant_conv')}},
                        {'image': images, 'latent': latents}, weights, c)
    return vae | trained['vae']


def run():
    """Train all stages of the recipe and write the model."""
    import numpy as np

    import jaxsd
    from jaxsd.models import spec
    c = flags.FLAGS.config
    check(c, flags.FLAGS.overwrite)
    config = model_config(c)
    images, captions, plain, heldout = load_data(c.data)
    images = images.astype(np.float32) / 127.5 - 1
    weights = np.where(heldout, 0, np.where(plain, c.plain_weight, 1))
    params = spec.init(0, config)
    vae, latents = train_vae(c, config, params, images, weights)
    model = train_text_and_unet(c, config, params, latents, captions, weights, vae)
    vae = train_decoder(c, config, vae, images, latents, weights)
    jaxsd.save(model.replace(params=model.params | {'vae': vae}), c.export, dtype='float16')
    exported(c)


if __name__ == '__main__':
    define_flags()
    app.run(plain_errors(run))
