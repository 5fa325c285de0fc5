"""Edges to emoji: a ControlNet for checkpoints/emoji, half an hour on two CPU cores."""

import ml_collections

from configs.train_emoji64 import stage


def get_config():
    c = ml_collections.ConfigDict()
    c.data = 'data/emoji64.npz'  # written by launch/emoji_data.py
    c.model = 'checkpoints/emoji'  # the model it is made for; it stays as it is
    c.out = 'runs/emoji_edges'  # states, curves and sample grids; training resumes from it
    c.export = 'runs/emoji_edges/model'
    c.unseen = 'tests/data/emoji_eval.txt'  # captions whose edges are kept for the evaluation
    c.plain_weight = 3  # how often a glyph without a skin tone comes for one with
    c.copies = 2  # of each picture, smaller and elsewhere
    c.whole_weight = 4  # how often a picture itself comes for one of its copies
    c.canny = ml_collections.ConfigDict({'low': 50, 'high': 150})  # keeps the white ghost's outline
    # Beside the U-Net's own sizes. Without attention at 4x4 (the middle block keeps its) it fits
    # 10 MB in float16.
    c.controlnet = ml_collections.ConfigDict({
        'transformer_layers': (1, 0), 'conditioning_embedding_out_channels': (16, 32, 64, 128)})
    c.stages = ml_collections.ConfigDict({
        'control': stage(steps=2400, batch_size=32, learning_rate=1.6e-3, warmup=100, ema=0.998)})
    c.stages.control.caption_dropout = 0.4
    c.stages.control.min_snr_gamma = 0.0  # as the model itself was trained
    return c
