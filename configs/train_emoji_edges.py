"""Edges to emoji: a ControlNet for checkpoints/emoji, half an hour on two CPU cores.

    python -m launch.emoji_data --edges=tests/data/emoji_eval.txt
"""

from jaxsd.train.config import recipe


def get_config():
    """The recipe."""
    return recipe(
        'controlnet', model='emoji', dtype='float16',
        out='runs/emoji_edges', export='runs/emoji_edges/model',
        data={'sets': {'emoji': {'path': 'data/emoji_edges64.npz', 'plain_repeats': 3}},
              'resolution': (64,), 'buckets': False, 'caption_dropout': 0.4,
              'cache': 'runs/emoji_edges/cache', 'cache_latents': True},
        # Beside the U-Net's own sizes. Without attention at 4x4 (the middle block keeps its) it
        # fits 10 MB in float16. As small as torch makes them, its seven convolutions would shrink
        # the hint to 1e-4.
        controlnet={'gain': 3.0, 'network': (
            ('transformer_layers', (1, 0)),
            ('conditioning_embedding_out_channels', (16, 32, 64, 128)))},
        loss={'timesteps': 'stratified'},
        optimizer={'learning_rate': 1.6e-3, 'schedule': 'cosine', 'warmup': 100, 'final': 0.02,
                   'b2': 0.99, 'decay_vectors': False},
        train={'steps': 1800, 'batch_size': 32, 'ema': 0.998, 'save_every': 200, 'log_every': 20})
