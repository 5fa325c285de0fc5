"""The whole U-Net of a model of yours: `jaxsd train --config=train_full --config.model=...`.

--config.full.components="('unet', 'text_encoder')" trains a text encoder too (without cache_texts).
docs/training.md says which switches fit into which memory.
"""

from jaxsd.train.config import recipe


def get_config():
    """The recipe."""
    return recipe(
        'full',
        out='runs/full', export='runs/full/model', dtype='float16',
        data={'sets': {'pictures': {'path': 'pictures'}}, 'cache': 'runs/full/cache',
              'cache_latents': True, 'cache_texts': True, 'caption_dropout': 0.1},
        loss={'weighting': 'min_snr'},
        optimizer={'learning_rate': 1e-5, 'warmup': 100},
        train={'steps': 10000, 'batch_size': 4, 'save_every': 500, 'sample_every': 500,
               'dtype': 'bfloat16', 'remat': True, 'ema': 0.9999})
