"""Train a small Stable Diffusion: `python -m launch.train --config=configs/train_emoji64.py`.

Three stages, each resumed from its own folder under config.out: the autoencoder, a start for the
text encoder, then text encoder and U-Net together by forward diffusion. At the end the model is
written to config.export as a diffusers folder.
"""

import functools
import json
import pathlib

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file('config', 'configs/train_emoji64.py', 'Training recipe.')
_STAGES = flags.DEFINE_list('stages', ['vae', 'unet'], 'vae alone, or vae and then the rest.')


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
        'quant_conv': {'weight': encoder['weight'] * scale, 'bias': encoder['bias'] * scale + shift},
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


def train_vae(c, config, params, images, weights):
    """Stage 1: the autoencoder, then its latents' standardisation -> (VAE, latents [N,h,w,L])."""
    import jax
    import numpy as np

    from jaxsd.models import vae
    from jaxsd.train import losses, loop
    encode = jax.jit(lambda p, x: vae.encode(p, config.vae, x)[0])
    decode = jax.jit(lambda p, z: vae.decode(p, config.vae, z))
    some = images[::len(images) // 32][:32]

    def preview(ema, step):
        again = np.asarray(decode(ema['vae'], encode(ema['vae'], some)))
        rows = [some[:16], again[:16], some[16:], again[16:]]
        save_grid(pathlib.Path(c.out) / 'vae' / f'{step:06d}.png', np.stack(rows))

    params = loop.fit(lambda p, b, k: losses.autoencoder(p, config, b, k), {'vae': params['vae']},
                      {'image': images}, weights, c.stages.vae, f'{c.out}/vae', preview)['vae']
    latents = in_batches(functools.partial(encode, params), images)
    mean, deviation = latents.mean((0, 1, 2)), latents.std((0, 1, 2))
    return fold_standardisation(params, mean, deviation), (latents - mean) / deviation


def train_text_and_unet(c, config, params, latents, captions, weights, vae):
    """Stages 2 and 3: a start for the text encoder, then it and the U-Net by forward diffusion."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxsd
    from jaxsd import sampling
    from jaxsd.prompt.tokenizer import Tokenizer
    from jaxsd.train import losses, loop
    tokenizer = Tokenizer.from_folder(c.tokenizer)
    data = {'latent': latents, 'tokens': tokenizer([str(caption) for caption in captions])}
    width = latents[0].size
    head = {'weight': jnp.zeros((config.text_encoder.hidden_size, width)), 'bias': jnp.zeros(width)}
    text = loop.fit(lambda p, b, k: losses.alignment(p, config, b, k),
                    {'text_encoder': params['text_encoder'], 'alignment': head}, data, weights,
                    c.stages.text, f'{c.out}/text')['text_encoder']

    abar = jnp.asarray(sampling.alphas_cumprod(config.schedule), jnp.float32)
    settings = c.stages.unet
    shown = [str(caption) for caption in captions[weights > 0][::len(captions) // 32]][:32]

    def model(ema):
        return jaxsd.Model(config, {'vae': vae, **ema}, {'text_encoder': tokenizer})

    def preview(ema, step):
        requests = [jaxsd.Request(prompt, seed=i, steps=12, guidance=3.0)
                    for i, prompt in enumerate(shown)]
        images = jaxsd.generate(model(ema), requests).astype(np.float32) / 127.5 - 1
        save_grid(f'{c.out}/unet/{step:06d}.png', images.reshape(2, 16, *images.shape[1:]))

    def loss(p, b, key):
        return losses.diffusion(p, config, b, key, abar, settings.caption_dropout,
                                settings.min_snr_gamma)

    ema = loop.fit(loss, {'text_encoder': text, 'unet': params['unet']},
                   data | {'empty': tokenizer([''])[0]}, weights, settings, f'{c.out}/unet',
                   preview)
    return model(jax.device_get(ema))


def main(argv):
    del argv
    import numpy as np

    import jaxsd
    from jaxsd.models import spec
    c = _CONFIG.value
    config = model_config(c)
    images, captions, plain, heldout = load_data(c.data)
    images = images.astype(np.float32) / 127.5 - 1
    weights = np.where(heldout, 0, np.where(plain, c.plain_weight, 1))
    params = spec.init(0, config)
    vae, latents = train_vae(c, config, params, images, weights)
    if 'unet' in _STAGES.value:
        model = train_text_and_unet(c, config, params, latents, captions, weights, vae)
        jaxsd.save(model, c.export, dtype='float16')
        print(f'written: {c.export}')


if __name__ == '__main__':
    app.run(main)
