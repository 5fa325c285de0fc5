"""A word for what a few pictures show: `jaxsd train --config=train_textual_inversion
--config.model=... --config.textual_inversion.token="<thing>"`, with the token in the captions."""

from jaxsd.train.config import recipe


def get_config():
    """The recipe."""
    return recipe(
        'textual_inversion',
        out='runs/embedding', export='runs/embedding/embedding.safetensors',
        data={'sets': {'pictures': {'path': 'pictures', 'caption': 'a photo of <thing>'}},
              'cache': 'runs/embedding/cache', 'cache_latents': True},
        textual_inversion={'token': '<thing>', 'vectors': 4},
        optimizer={'learning_rate': 5e-3, 'warmup': 50, 'weight_decay': 0.0},
        train={'steps': 2000, 'batch_size': 1, 'save_every': 250, 'sample_every': 250,
               'dtype': 'bfloat16', 'remat': True})
