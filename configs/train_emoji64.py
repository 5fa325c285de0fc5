"""The emoji model at 64 pixels: about two hours on two CPU cores."""

import ml_collections

from jaxsd.train.config import stage


def get_config():
    c = ml_collections.ConfigDict()
    c.data = 'data/emoji64.npz'  # written by launch/emoji_data.py
    c.tokenizer = 'checkpoints/emoji/tokenizer'
    c.out = 'runs/emoji64'  # states, curves and sample grids; training resumes from it
    c.export = 'runs/emoji64/model'
    c.start = ''  # a folder: that model is trained further
    c.start_parts = ('unet', 'vae', 'text_encoder')  # what is taken of it; the rest begins anew
    c.skip = ()  # stages that are left out
    c.method = 'full'
    c.plain_repeats = 4  # how often a glyph without a skin tone comes for one with

    c.vae = ml_collections.ConfigDict({
        'latent_channels': 16, 'block_out_channels': (16, 32, 96, 128), 'layers_per_block': 1,
        'norm_num_groups': 8, 'scaling_factor': 1.0, 'sample_size': 64})
    c.text_encoder = ml_collections.ConfigDict({
        'hidden_size': 192, 'intermediate_size': 768, 'num_hidden_layers': 3,
        'num_attention_heads': 6, 'max_position_embeddings': 24, 'hidden_act': 'gelu'})
    c.unet = ml_collections.ConfigDict({
        'in_channels': 16, 'out_channels': 16, 'block_out_channels': (64, 224),
        'layers_per_block': 1, 'transformer_layers': (1, 1), 'mid_transformer_layers': 1,
        'heads': (2, 7), 'only_cross_attention': (False, False), 'cross_attention_dim': 192,
        'use_linear_projection': True, 'norm_num_groups': 16, 'sample_size': 8})
    c.prediction_type = 'v_prediction'

    c.stages = ml_collections.ConfigDict({
        'vae': settings(steps=3200, batch_size=8, learning_rate=1.5e-3, warmup=50, ema=0.995),
        'text': settings(steps=500, batch_size=128, learning_rate=2e-3, warmup=50, ema=0.99),
        # No min-SNR weights: for v they all but remove the loss at high noise, where the text
        # decides the picture.
        'unet': settings(steps=4200, batch_size=32, learning_rate=1e-3, warmup=100, ema=0.998,
                         save_every=300, caption_dropout=0.1),
        'decoder': settings(steps=800, batch_size=8, learning_rate=8e-4, warmup=50, ema=0.995),
    })
    return c


def settings(learning_rate, warmup, caption_dropout=0.0, **train):
    """A stage's settings, with what all have in common."""
    train = {'save_every': 200, 'log_every': 20, **train}
    return stage(
        train={'sample_every': train['save_every'], **train},
        optimizer={'learning_rate': learning_rate, 'warmup': warmup, 'schedule': 'cosine',
                   'final': 0.02, 'b2': 0.99, 'decay_vectors': False},
        loss={'timesteps': 'stratified'}, caption_dropout=caption_dropout)
