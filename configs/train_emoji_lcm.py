"""Four steps instead of twenty: an LCM-LoRA for the emoji model (Luo et al. 2023).

    python -m launch.emoji_data --size=64 --out=data/emoji64.npz
    python -m launch.train --config=configs/train_emoji_lcm.py
"""

from jaxsd.train.config import recipe


def get_config():
    """The recipe."""
    return recipe(
        'lora', model='emoji', out='runs/emoji_lcm', export='runs/emoji_lcm/lcm.safetensors',
        data={'sets': {'emoji': {'path': 'data/emoji64.npz', 'plain_repeats': 4}},
              'resolution': (64,), 'buckets': False,
              'cache': 'runs/emoji_lcm/cache', 'cache_latents': True},
        lora={'rank': 16, 'conv_rank': 16, 'layers': 'all'},
        loss={'objective': 'consistency', 'guidance_min': 2.0, 'guidance_max': 3.0,
              'solver_steps': 10},
        optimizer={'learning_rate': 2e-4, 'schedule': 'cosine', 'warmup': 20},
        train={'steps': 350, 'batch_size': 20, 'ema': 0.99, 'save_every': 175})
