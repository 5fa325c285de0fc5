"""The emoji model at 128 pixels, for one GPU."""

import ml_collections

from configs.train_emoji64 import stage


def get_config():
    c = ml_collections.ConfigDict()
    c.data = 'data/emoji128.npz'  # python -m launch.emoji_data --size=128
    c.tokenizer = 'checkpoints/emoji/tokenizer'
    c.out = 'runs/emoji128'
    c.export = 'runs/emoji128/model'
    c.plain_weight = 2

    c.vae = ml_collections.ConfigDict({
        'latent_channels': 16, 'block_out_channels': (32, 64, 96, 128), 'layers_per_block': 1,
        'norm_num_groups': 8, 'scaling_factor': 1.0, 'sample_size': 128})
    c.text_encoder = ml_collections.ConfigDict({
        'hidden_size': 192, 'intermediate_size': 768, 'num_hidden_layers': 3,
        'num_attention_heads': 6, 'max_position_embeddings': 24, 'hidden_act': 'gelu'})
    c.unet = ml_collections.ConfigDict({
        'in_channels': 16, 'out_channels': 16, 'block_out_channels': (64, 128, 160),
        'layers_per_block': 2, 'transformer_layers': (0, 1, 1), 'mid_transformer_layers': 1,
        'heads': (2, 4, 5), 'only_cross_attention': (False,) * 3, 'cross_attention_dim': 192,
        'use_linear_projection': True, 'norm_num_groups': 16, 'sample_size': 16})
    c.prediction_type = 'v_prediction'

    c.stages = ml_collections.ConfigDict({
        'vae': stage(steps=12000, batch_size=32, learning_rate=1.5e-3, warmup=200, ema=0.998,
                     save_every=2000, log_every=100),
        'text': stage(steps=1000, batch_size=128, learning_rate=2e-3, warmup=50, ema=0.99),
        'unet': stage(steps=30000, batch_size=128, learning_rate=1e-3, warmup=500, ema=0.9995,
                      save_every=2000, log_every=100),
        'decoder': stage(steps=6000, batch_size=32, learning_rate=8e-4, warmup=200, ema=0.998,
                         save_every=2000, log_every=100),
    })
    c.stages.unet.caption_dropout = 0.1
    c.stages.unet.min_snr_gamma = 0.0
    return c
