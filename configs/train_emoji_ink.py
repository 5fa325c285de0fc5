"""A style from 20 pictures: a LoRA that makes the emoji model draw in blue ink.

    python -m launch.emoji_sets
    python -m launch.train --config=configs/train_emoji_ink.py
"""

from jaxsd.train.config import recipe


def get_config():
    """The recipe."""
    return recipe(
        'lora', model='emoji', out='runs/emoji_ink', export='runs/emoji_ink/ink.safetensors',
        data={'sets': {'ink': {'path': 'data/ink'}}, 'resolution': (64,), 'buckets': False,
              'cache': 'runs/emoji_ink/cache', 'cache_latents': True, 'caption_dropout': 0.1},
        lora={'rank': 8, 'conv_rank': 8, 'layers': 'all'},
        loss={'timesteps': 'stratified'},
        optimizer={'learning_rate': 1e-3, 'schedule': 'cosine', 'warmup': 20},
        train={'steps': 100, 'batch_size': 20, 'ema': 0.99, 'save_every': 50, 'sample_every': 50},
        sample={'prompts': ('red apple', 'rocket', 'rooster', 'alien', 'four leaf clover',
                            'musical note', 'red heart', 'dog face', 'sailboat'),
                'request': 'steps=20, guidance=2.0'})
