"""The emoji model at 64 pixels, trained further: what differs from its first training.

VAE and U-Net need not wait for each other, see docs/emoji.md: --config.skip leaves stages out.
"""

from configs import train_emoji64
from configs.train_emoji64 import settings


def get_config():
    c = train_emoji64.get_config()
    c.start = 'checkpoints/emoji'
    c.skip = ('text',)
    c.out = 'runs/emoji64_longer'
    c.export = 'runs/emoji64_longer/model'
    often = {'save_every': 500, 'log_every': 50}
    c.stages.vae = settings(steps=7000, batch_size=8, learning_rate=1e-3, warmup=100, ema=0.999,
                            **often)
    c.stages.unet = settings(steps=6000, batch_size=32, learning_rate=1e-3, warmup=100, ema=0.999,
                             caption_dropout=0.1, **often)
    # Where there is more noise than picture the name alone decides, and there it knew too little.
    c.stages.unet.loss.timesteps = 'cubic'
    c.stages.decoder = settings(steps=1500, batch_size=8, learning_rate=5e-4, warmup=50, ema=0.998,
                                **often)
    return c
