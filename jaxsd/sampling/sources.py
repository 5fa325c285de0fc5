"""Noise as other programs draw it, so that pictures made elsewhere come again from their seeds.

On the host, in numpy: torch's CPU generator, and NVIDIA's Philox as stable-diffusion-webui (A1111)
draws it in its NV mode, after torch on CUDA; the Brownian tree of k-diffusion's SDE samplers, and
A1111's variations of a seed.
"""

import functools
import math
from collections.abc import Callable, Sequence

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


# Samplers whose noise k-diffusion takes from a Brownian tree (BrownianTreeNoiseSampler).
BROWNIAN = ('dpmpp_sde', 'dpmpp_2m_sde', 'dpmpp_3m_sde')
DIGITS = 6  # to which torchsde rounds noise levels: its tol is 1e-6


def brownian(source: str, seed: int, shape: tuple[int, int, int],
             spans: Sequence[tuple[float, float]], ends: tuple[float, float],
             batch: tuple[int, int] = (0, 1)) -> list[np.ndarray]:
    """The noise of k-diffusion's BrownianTreeNoiseSampler, of unit variance -> a list of float32
    [h,w,C], one for each span.

    source, seed, shape, batch: as of `randn`. spans: (from, to), noise levels of a step. ends: the
    least level but 0 and the largest, between which the tree is. torchsde's BrownianTree
    (torchsde/_brownian/brownian_interval.py): the interval is halved until levels rounded to DIGITS
    are its ends; each half's increment is that of the whole and a draw from a seed of its own,
    which numpy's SeedSequence makes of the seed and the place in the tree.
    """
    low, high = (float(np.float32(end)) for end in ends)

    def normal(words):  # [C*h*w], of the first seed that a SeedSequence gives
        return randn(source, int(words.generate_state(1)[0]), shape, 0, batch)

    def sequence(*key):
        return np.random.SeedSequence(seed, spawn_key=key, pool_size=24)

    root = round(low, DIGITS), round(high, DIGITS), 0, 0  # start, end, place in its depth, depth

    def halves(node):
        start, end, place, depth = node
        middle = round(0.5 * (end + start), DIGITS)
        return (start, middle, 2 * place, depth + 1), (middle, end, 2 * place + 1, depth + 1)

    @functools.lru_cache(64)  # the way down to a leaf, and that of the span before
    def left(node):
        (start, middle, *_), (_, end, *_) = halves(node)
        before, after, part = middle - start, end - middle, 1 / (end - start)
        return (before * whole(node) * part + math.sqrt(before * after * part)
                * normal(sequence(node[2], node[3])))

    parents = {root: None}

    @functools.lru_cache(64)
    def whole(node):
        parent = parents[node]
        if parent is None:
            return normal(sequence()) * math.sqrt(high - low)
        return left(parent) if node[2] % 2 == 0 else whole(parent) - left(parent)

    def cover(node, start, end):  # the largest intervals of the tree that make up one
        if (start, end) == node[:2]:
            return [node]
        found = []
        for half in halves(node):
            parents[half] = node
            inside = max(start, half[0]), min(end, half[1])
            if inside[0] < inside[1]:
                found += cover(half, *inside)
        return found

    found = []
    for span in spans:
        start, end = sorted(float(np.float32(level)) for level in span)
        between = [round(min(max(level, low), high), DIGITS) for level in (start, end)]
        if between[0] == between[1]:
            found.append(np.zeros((*shape[1:], shape[0]), np.float32))
            continue
        total = functools.reduce(np.add, map(whole, cover(root, *between)))
        sign = -1 if span[0] > span[1] else 1
        found.append(sign * total / np.sqrt(np.float32(end) - np.float32(start)))
    return found


def rounded(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The spans of dpmpp_sde's pairs of rows, to the middle and to the end of a step, as
    k-diffusion has them: by way of logarithms in float32, whose roundings the tree tells apart."""
    def log(level):
        return np.float32(-np.log(float(np.float32(level))))

    def level(log):
        return float(np.float32(np.exp(-float(log))))

    found = []
    for (start, middle), (_, end) in zip(spans[::2], spans[1::2]):
        first, last = log(start), log(end)
        share = np.float32(np.log(start / middle) / np.log(start / end))
        found += [(level(first), level(first + (last - first) * share)),
                  (level(first), level(last))]
    return found


Draw = Callable[[int, tuple[int, int, int]], np.ndarray]


def varied(draw: Draw, seed: int, shape: tuple[int, int, int], subseed: int = 0,
           strength: float = 0.0, size: tuple[int, int] | None = None) -> np.ndarray:
    """The noise that A1111 starts from where a seed is varied (modules/rng.py, ImageRNG.first) ->
    float32 [h,w,C].

    draw(seed, shape) -> [h,w,C], of `shape` (C,h,w). strength: how far from the seed's noise to
    the subseed's, along the sphere. size: the (h,w) of another picture whose noise stands in the
    middle of this one's, or is cut to it, so that its composition stays.
    """
    small = shape if size is None else (shape[0], *size)
    noise = draw(seed, small)
    if strength:
        noise = slerp(strength, noise, draw(subseed, small))
    if small == shape:
        return noise
    found = np.array(draw(seed, shape))
    shifts = [(n - m) // 2 for n, m in zip(shape[1:], small[1:])]
    (to_y, y, h), (to_x, x, w) = [(max(shift, 0), max(-shift, 0), m + 2 * min(shift, 0))
                                  for shift, m in zip(shifts, small[1:])]
    found[to_y:to_y + h, to_x:to_x + w] = noise[y:y + h, x:x + w]
    return found


def slerp(share: float, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Between two noises [h,w,C] along great circles, as A1111 has it: of each column of each
    channel, as its tensors [C,h,w] have no axis of pictures there."""
    def unit(a):
        return a / np.sqrt(np.square(a).sum(0, keepdims=True))

    dot = (unit(low) * unit(high)).sum(0, keepdims=True)
    if dot.mean() > 0.9995:
        return low * np.float32(share) + high * np.float32(1 - share)
    angle = np.arccos(dot)
    first, second = (np.sin(np.float32(part) * angle) / np.sin(angle)
                     for part in (1 - share, share))
    return (first * low + second * high).astype(np.float32)


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
