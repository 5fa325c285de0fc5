"""The emoji model at 128 pixels, for one GPU: what differs from 64 pixels."""

from configs import train_emoji64
from configs.train_emoji64 import settings


def get_config():
    c = train_emoji64.get_config()
    c.data = 'data/emoji128.npz'  # python -m launch.emoji_data --size=128
    c.out = 'runs/emoji128'
    c.export = 'runs/emoji128/model'
    c.vae.update(block_out_channels=(32, 64, 96, 128), sample_size=128)
    c.unet.update(block_out_channels=(64, 128, 160), layers_per_block=2,
                  transformer_layers=(0, 1, 1), heads=(2, 4, 5), only_cross_attention=(False,) * 3,
                  sample_size=16)
    often = {'save_every': 2000, 'log_every': 100}
    c.stages.vae = settings(steps=12000, batch_size=32, learning_rate=1.5e-3, warmup=200,
                            ema=0.998, **often)
    c.stages.text.train.steps = 1000
    c.stages.unet = settings(steps=30000, batch_size=128, learning_rate=1e-3, warmup=500,
                             ema=0.9995, caption_dropout=0.1, **often)
    c.stages.decoder = settings(steps=6000, batch_size=32, learning_rate=8e-4, warmup=200,
                                ema=0.998, **often)
    return c
