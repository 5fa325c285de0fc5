"""A LoRA for a model of yours: `jaxsd train --config=train_lora --config.model=...`.

A folder of pictures with captions beside them (docs/training.md); the result is one file that
jaxsd, A1111, ComfyUI and diffusers read.
"""

from jaxsd.train.config import recipe


def get_config():
    """The recipe."""
    return recipe(
        'lora',
        out='runs/lora', export='runs/lora/lora.safetensors',
        data={'sets': {'pictures': {'path': 'pictures'}}, 'cache': 'runs/lora/cache',
              'cache_latents': True, 'caption_dropout': 0.05},
        lora={'rank': 16},
        loss={'weighting': 'min_snr'},
        optimizer={'learning_rate': 1e-4, 'schedule': 'cosine', 'warmup': 50},
        train={'steps': 1500, 'batch_size': 1, 'save_every': 250, 'sample_every': 250,
               'dtype': 'bfloat16', 'remat': True})
