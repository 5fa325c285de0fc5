"""How a picture of an emoji is scored: by its rank among all emoji in 16x16 mean-pooled colours."""

import pathlib

import numpy as np

CELLS = 16  # cells along each side


def pool(images):
    """Mean colour of 16x16 cells: uint8 [N,S,S,3] -> float32 [N,768], 0..255; 16 divides S."""
    n, height, width, channels = images.shape
    if height % CELLS or width % CELLS:
        raise ValueError(f'pictures of {height}x{width}: expected multiples of {CELLS}')
    cells = images.reshape(n, CELLS, height // CELLS, CELLS, width // CELLS, channels)
    return cells.mean((2, 4), dtype=np.float32).reshape(n, -1)


def sketch(features, size):
    """Pooled features [768] as a picture again: uint8 [size,size,3], 16x16 enlarged smoothly."""
    from PIL import Image
    cells = np.asarray(features, np.uint8).reshape(CELLS, CELLS, 3)
    return np.asarray(Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC))


def right_half():
    """Which of the 768 features lie in the right half, bool [768]."""
    half = np.zeros((CELLS, CELLS, 3), bool)
    half[:, CELLS // 2:] = True
    return half.reshape(-1)


def ranks(features, targets, reference):
    """How many reference pictures lie nearer (L2) than the right one: 0 if it is the nearest.

    features: float [B,768] of the pictures to score; targets: int [B], their rows in `reference`;
    reference: uint8 or float [N,768]. A picture that equals the right one (Norway's flag is
    Svalbard's too) is as near as it, so it never counts against it. Returns int [B].
    """
    distance = _distance(features, reference)
    right = np.take_along_axis(distance, np.asarray(targets)[:, None], 1)
    return (distance < right - 1e-6).sum(1)  # equal pictures tie but for the product's rounding


def nearest(features, reference):
    """Row of the nearest reference picture: float [B,768], [N,768] -> int [B]."""
    return _distance(features, reference).argmin(1)


def _distance(features, reference):
    """|f - r|^2 less |f|^2, which all r have in common: [B,768], [N,768] -> float64 [B,N]."""
    reference = np.asarray(reference, np.float64)
    return (reference**2).sum(1) - 2 * np.asarray(features, np.float64) @ reference.T


def score(rank):
    """Rates from ranks, int [B]: the right picture is the nearest, is among the five nearest."""
    return {'top1': float(np.mean(rank < 1)), 'top5': float(np.mean(rank < 5)), 'n': len(rank)}


def read_reference(path):
    """Pooled features uint8 [N,768], captions str [N], plain bool [N] and heldout bool [N]."""
    if not pathlib.Path(path).exists():
        raise FileNotFoundError(f'{path}: no such file; it ships in tests/data, and '
                                '`python -m launch.emoji_data --reference=tests/data` rebuilds it')
    with np.load(path) as file:
        return {key: file[key] for key in ('features', 'captions', 'plain', 'heldout')}
