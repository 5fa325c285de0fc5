"""A thing from 5 pictures, as a word: a textual inversion of a star that the emoji model never saw.

    python -m launch.emoji_sets
    python -m launch.train --config=configs/train_emoji_star.py
"""

from jaxsd.train.config import recipe


def get_config():
    """The recipe."""
    return recipe(
        'textual_inversion', model='emoji',
        out='runs/emoji_star', export='runs/emoji_star/smiling-star.safetensors',
        data={'sets': {'star': {'path': 'data/star', 'caption': '<smiling-star>'}},
              'resolution': (64,), 'buckets': False,
              'cache': 'runs/emoji_star/cache', 'cache_latents': True},
        textual_inversion={'token': '<smiling-star>', 'vectors': 4, 'initial': 'star'},
        loss={'timesteps': 'cubic'},  # where a name decides
        optimizer={'learning_rate': 1e-2, 'schedule': 'cosine', 'warmup': 20, 'weight_decay': 0.0},
        train={'steps': 300, 'batch_size': 20, 'save_every': 100, 'sample_every': 100},
        sample={'prompts': ('<smiling-star>',) * 4 + (
            'star', 'glowing star', 'red apple', 'rocket', 'dog face'),
                'request': 'steps=20, guidance=2.0'})
