"""A ControlNet for a model of yours, from pictures and hints of the same names.

`jaxsd train --config=train_controlnet --config.model=... --config.data.sets.pictures.path=pictures
--config.data.sets.pictures.hints=hints`
"""

from jaxsd.train.config import recipe


def get_config():
    """The recipe."""
    return recipe(
        'controlnet',
        out='runs/controlnet', export='runs/controlnet/model', dtype='float16',
        data={'sets': {'pictures': {'path': 'pictures', 'hints': 'hints'}},
              'cache': 'runs/controlnet/cache', 'cache_latents': True, 'cache_texts': True,
              'caption_dropout': 0.5},
        optimizer={'learning_rate': 1e-5, 'warmup': 500},
        train={'steps': 20000, 'batch_size': 4, 'save_every': 500, 'sample_every': 500,
               'dtype': 'bfloat16', 'remat': True})
