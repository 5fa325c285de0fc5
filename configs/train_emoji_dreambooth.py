"""A thing from 5 pictures, as weights: DreamBooth of a star that the emoji model never saw.

    python -m launch.emoji_sets
    python -m launch.train --config=configs/train_emoji_dreambooth.py

The model's own drawings of a star, the class, hold it where it was (prior preservation).
"""

from jaxsd.train.config import recipe


def get_config():
    """The recipe."""
    return recipe(
        'lora', model='emoji',
        out='runs/emoji_dreambooth', export='runs/emoji_dreambooth/star.safetensors',
        data={'sets': {'star': {'path': 'data/star', 'caption': 'sks star'}},
              'resolution': (64,), 'buckets': False,
              'cache': 'runs/emoji_dreambooth/cache', 'cache_latents': True},
        lora={'rank': 8, 'conv_rank': 8, 'layers': 'all', 'components': ('unet', 'text_encoder')},
        prior={'prompt': 'star', 'count': 20, 'request': 'steps=20'},
        loss={'timesteps': 'stratified'},
        optimizer={'learning_rate': 1e-3, 'schedule': 'cosine', 'warmup': 20},
        train={'steps': 300, 'batch_size': 20, 'ema': 0.98, 'save_every': 100, 'sample_every': 100},
        sample={'prompts': ('sks star',) * 4 + (
            'star', 'glowing star', 'red apple', 'rocket', 'dog face'),
                'request': 'steps=20, guidance=2.0'})
