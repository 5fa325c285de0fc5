"""Train a ControlNet on a model: `python -m launch.train_control`.

The model stays as it is; edges of the data set's pictures are the hints. Training is taken up again
from its folder under config.out, as in launch.train, and the ControlNet is written to
config.export as a diffusers folder.
"""

import dataclasses
import pathlib

from absl import app, flags

from . import plain_errors
from .train import (
    check,
    define_flags,
    exported,
    in_batches,
    load_data,
    run_stage,
    save_grid,
)


def network_config(c, unet):
    """The recipe's ControlNetConfig: the U-Net's own sizes but for what no ControlNet has."""
    from jaxsd.config import ControlNetConfig
    sizes = dataclasses.asdict(unet)
    del sizes['out_channels'], sizes['sample_size']
    return ControlNetConfig(**sizes | c.controlnet.to_dict())


def smaller(images, seed):
    """Each picture [N,H,W,3] uint8 at 60 to 95 % of its size, somewhere on white."""
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(seed)
    out = np.full_like(images, 255)
    for sheet, image in zip(out, images):
        size = round(len(image) * rng.uniform(0.6, 0.95))
        y, x = rng.integers(0, len(image) - size + 1, 2)
        sheet[y:y + size, x:x + size] = Image.fromarray(image).resize(
            (size, size), Image.Resampling.LANCZOS)
    return out


def examples(c):
    """The data set and its smaller copies -> images, captions, edges uint8 [N,H,W,3], weights."""
    import numpy as np

    from jaxsd.images.preprocess import canny
    images, captions, plain, heldout = load_data(c.data)
    unseen = pathlib.Path(c.unseen).read_text().splitlines()
    tones = tuple(f'{caption}: ' for caption in unseen)  # of the same glyph: nearly its edges
    hidden = heldout | [text in unseen or text.startswith(tones) for text in captions.tolist()]
    weights = np.where(hidden, 0, np.where(plain, c.plain_weight, 1))
    images = np.concatenate([images, *(smaller(images, i) for i in range(c.copies))])
    edges = np.stack([canny(image, c.canny.low, c.canny.high) for image in images])
    weights = np.concatenate([c.whole_weight * weights, *[weights] * c.copies])
    return images, np.tile(captions, 1 + c.copies), edges, weights


def learn(c, model, net):
    """Train a ControlNet of the ControlNetConfig `net` on a model -> its parameters."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxsd
    from jaxsd import sampling
    from jaxsd.models import controlnet, vae
    from jaxsd.train import losses
    config, tokenizer = model.config, model.tokenizers['text_encoder']
    images, captions, edges, weights = examples(c)
    encode = jax.jit(lambda p, x: vae.encode(p, config.vae, x / 127.5 - 1)[0])
    latents = in_batches(lambda x: encode(model.params['vae'], x), images)
    data = {'latent': vae.scale(config.vae, latents),
            'tokens': tokenizer(captions.tolist()), 'hint': edges, 'empty': tokenizer([''])[0],
            'model': {k: model.params[k] for k in ('text_encoder', 'unet')}}
    abar = jnp.asarray(sampling.alphas_cumprod(config.schedule), jnp.float32)
    settings = c.stages.control
    seen, kept = (np.flatnonzero(rows) for rows in (weights > 0, weights == 0))
    shown = np.concatenate([rows[::max(1, len(rows) // 8)][:8] for rows in (seen, kept)])

    def preview(ema, step):
        """Rows: edges; with the caption, without; with the caption and no edges; the pictures."""
        steered = model.replace(controlnets={'edges': jaxsd.Network(net, ema)})
        rows = [edges[shown]]
        for captioned, scale in ((1, 1), (0, 1), (1, 0)):
            rows.append(jaxsd.generate(steered, [
                jaxsd.Request(str(captions[i]) * captioned, seed=0, steps=12, guidance=3.0,
                              weighting='plain',
                              controls=[jaxsd.Control('edges', edges[i], scale)])
                for i in shown]))
        save_grid(f'{c.out}/control/{step:06d}.png',
                  np.stack([*rows, images[shown]]) / np.float32(127.5) - 1)

    def loss(p, b, key):
        return losses.control(p, config, net, b, key, abar, settings.caption_dropout,
                              settings.min_snr_gamma)

    start = controlnet.init_from_unet(model.params['unet'], net, np.random.default_rng(0))
    # As small as torch makes them, its seven convolutions would shrink the hint to 1e-4.
    start['controlnet_cond_embedding'] = jax.tree.map(
        lambda a: 3 * a if a.ndim == 4 else a, start['controlnet_cond_embedding'])
    return run_stage('control', loss, start, data, weights, c, preview)


def train(c, overwrite=False):
    """Train the recipe's ControlNet and write it."""
    check(c, overwrite)
    import jaxsd
    from jaxsd.weights import save_network
    model = jaxsd.load(c.model)
    net = network_config(c, model.config.unet)
    save_network(jaxsd.Network(net, learn(c, model, net)), c.export, dtype='float16')
    exported(c)


if __name__ == '__main__':
    define_flags('train_emoji_edges')
    app.run(plain_errors(lambda: train(flags.FLAGS.config, flags.FLAGS.overwrite)))
