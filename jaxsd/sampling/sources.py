"""Noise as other programs draw it, so that pictures made elsewhere come again from their seeds.

On the host, in numpy: torch's CPU generator, and NVIDIA's Philox as stable-diffusion-webui (A1111)
draws it in its NV mode, after torch on CUDA.
"""

import math

import numpy as np
from numpy.typing import ArrayLike


def randn(source: str, seed: int, shape: tuple[int, int, int], draw: int = 0,
          batch: tuple[int, int] = (0, 1)) -> np.ndarray:
    """Standard normal noise of one picture -> float32 [h,w,C].

    source: 'torch' or 'philox'. shape: (C,h,w), of one picture. draw: which tensor of the seed, the
    first is 0; the generators give one after the other.
    batch: (place, size): torch draws [size,C,h,w] at once from one generator, as diffusers does;
    philox has a generator for each picture, so that the place does not matter.
    """
    place, size = batch
    if source == 'philox':
        flat = _philox(seed, draw, math.prod(shape))
    else:
        flat = _torch(seed, draw, size * math.prod(shape)).reshape(size, -1)[place]
    return flat.reshape(shape).transpose(1, 2, 0).astype(np.float32)


def _torch(seed, draw, count):
    """The draw-th `torch.randn(count)` after `torch.manual_seed(seed)` -> [count].

    aten/src/ATen/native/cpu/DistributionTemplates.h (normal_fill) and, for fewer than 16 numbers,
    ATen/core/DistributionsHelper.h (normal_distribution).
    """
    engine = np.random.RandomState(seed % 2**32)  # torch's seeds have 64 bits, its mt19937 takes 32

    def words(n):
        return engine.randint(0, 2**32, n, np.uint32)

    if count < 16:  # pairs from one stream, whatever the sizes of the draws
        pairs = -(-(draw + 1) * count // 2)
        high, low = words(4 * pairs).astype(np.uint64).reshape(-1, 2).T
        uniform = ((high << np.uint64(32) | low) % np.uint64(2**53) / 2.0**53).reshape(-1, 2)
        normal = np.stack(_box_muller(1 - uniform[:, 1], 2 * np.pi * uniform[:, 0]), 1)
        return normal.ravel()[draw * count:(draw + 1) * count]
    tail = 16 if count % 16 else 0  # the last 16 are drawn a second time, to fill a block
    words(draw * (count + tail))  # the draws before
    uniform = (words(count + tail) % 2**24 / 2.0**24).astype(np.float32)
    whole = _blocks(uniform[:count // 16 * 16])
    return np.concatenate([whole[:count - tail], _blocks(uniform[count:])])


def _blocks(uniform):
    """Blocks of 16: the first halves give the radii, the second ones the angles; float32, for the
    same roundings as torch."""
    first, second = uniform.reshape(-1, 2, 8).swapaxes(0, 1)
    return np.stack(_box_muller(1 - first, np.float32(2 * np.pi) * second), 1).ravel()


def _box_muller(radius, angle):
    """Uniform numbers in (0, 1], and angles -> two independent standard normal numbers."""
    radius = np.sqrt(-2 * np.log(radius))
    return radius * np.cos(angle), radius * np.sin(angle)


LOW = np.uint64(2**32 - 1)
PHILOX = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)  # the multipliers
WEYL = 0x9E3779B9, 0xBB67AE85  # what the key grows by


def _philox(seed, draw, count):
    """The draw-th tensor of a seed, the sine of Box-Muller -> float64 [count].

    modules/rng_philox.py of A1111: the counter (draw, 0, i, 0) makes the i-th number.
    """
    number, zero = np.arange(count, dtype=np.uint64), np.zeros(count, np.uint64)
    first, second, *_ = philox([zero + np.uint64(draw), zero, number, zero], seed)
    return _box_muller((first + 0.5) / 2**32, 2 * np.pi * (second + 0.5) / 2**32)[1]


def philox(counter: ArrayLike, key: int) -> np.ndarray:
    """Philox 4x32-10 of a counter, four 32-bit words or arrays of them, and a key of 64 bits -> the
    same shape (Salmon et al., https://doi.org/10.1145/2063384.2063405).
    """
    half = np.uint64(32)
    a, b, c, d = np.asarray(counter, np.uint64)
    for turn in range(10):
        keys = [np.uint64((word + turn * step) % 2**32)
                for word, step in zip((key % 2**32, key >> 32), WEYL)]
        left, right = a * PHILOX[0], c * PHILOX[1]  # products of 64 bits, taken apart
        a, b, c, d = (right >> half ^ b ^ keys[0], right & LOW, left >> half ^ d ^ keys[1],
                      left & LOW)
    return np.stack([a, b, c, d])
