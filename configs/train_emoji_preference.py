"""Pictures nearer to what was meant: Diffusion-DPO on the emoji model (Wallace et al. 2023).

    python -m launch.emoji_sets --pairs=300
    python -m launch.train --config=configs/train_emoji_preference.py
"""

from jaxsd.train.config import recipe


def get_config():
    """The recipe."""
    return recipe(
        'lora', model='emoji', out='runs/emoji_preference',
        export='runs/emoji_preference/preference.safetensors',
        data={'sets': {'pairs': {'path': 'data/preferred', 'hints': 'data/others'}},
              'resolution': (64,), 'buckets': False, 'cache': 'runs/emoji_preference/cache'},
        lora={'rank': 16, 'layers': 'transformer'},
        loss={'objective': 'preference', 'beta': 500.0},
        optimizer={'learning_rate': 1e-4, 'schedule': 'cosine', 'warmup': 20},
        train={'steps': 300, 'batch_size': 16, 'ema': 0.99, 'save_every': 150})
