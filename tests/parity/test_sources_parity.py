"""torch's CPU generator in numpy, against torch."""

import numpy as np
import pytest
import torch

from jaxsd.sampling import initial, keys, sources

pytestmark = pytest.mark.parity


def _check(seed, shape, batch, draws):
    generator = torch.Generator().manual_seed(seed)
    for draw in range(draws):
        images = torch.randn((batch, *shape), generator=generator).numpy()
        for place, image in enumerate(images):
            found = sources.randn('torch', seed, shape, draw, (place, batch))
            # float32 roundings of the logarithm and the sine: 4.8e-7, one unit in the last place
            # of the largest numbers, with torch's vector code
            np.testing.assert_allclose(found.transpose(2, 0, 1), image, rtol=0, atol=1e-6)


@pytest.mark.parametrize('seeds', [range(0, 101), (2**32 - 1, 2**32, 2**63, 2**64 - 1)])
def test_seeds(seeds):
    for seed in seeds:
        _check(seed, (4, 64, 64), 1, 1)


@pytest.mark.parametrize('shape', [(4, 64, 64), (4, 9, 7), (3, 5, 1), (1, 1, 16), (1, 1, 17),
                                   (1, 1, 3), (1, 1, 1)])
@pytest.mark.parametrize('batch', [1, 2, 3, 16])
def test_sizes_batches_and_draws(shape, batch):
    _check(5, shape, batch, 4)


def test_manual_seed():
    torch.manual_seed(31)
    np.testing.assert_allclose(sources.randn('torch', 31, (4, 8, 8)).transpose(2, 0, 1),
                               torch.randn(4, 8, 8).numpy(), rtol=0, atol=1e-6)


def _slerp(share, low, high):
    """modules/rng.py of A1111, for a tensor [C,h,w] as it gives it."""
    dot = (low / torch.norm(low, dim=1, keepdim=True)
           * (high / torch.norm(high, dim=1, keepdim=True))).sum(1)
    if dot.mean() > 0.9995:
        return low * share + high * (1 - share)
    omega = torch.acos(dot)
    parts = [(torch.sin(part * omega) / torch.sin(omega)).unsqueeze(1) * noise
             for part, noise in ((1 - share, low), (share, high))]
    return parts[0] + parts[1]


def _first(draw, seed, shape, subseed, strength, size):
    """ImageRNG.first of A1111; draw(seed, shape) -> tensor."""
    small = shape if size is None else (shape[0], *size)
    noise = draw(seed, small)
    if strength:
        noise = _slerp(strength, noise, draw(subseed, small))
    if small == shape:
        return noise
    x = draw(seed, shape).clone()
    dx, dy = (shape[2] - small[2]) // 2, (shape[1] - small[1]) // 2
    w = small[2] if dx >= 0 else small[2] + 2 * dx
    h = small[1] if dy >= 0 else small[1] + 2 * dy
    to = slice(max(dy, 0), max(dy, 0) + h), slice(max(dx, 0), max(dx, 0) + w)
    x[:, to[0], to[1]] = noise[:, max(-dy, 0):max(-dy, 0) + h, max(-dx, 0):max(-dx, 0) + w]
    return x


@pytest.mark.parametrize('source', ['torch', 'philox', 'threefry'])
@pytest.mark.parametrize('strength, size', [(0.3, None), (1.0, None), (0.0, (6, 12)),
                                            (0.25, (11, 5)), (0.0, (4, 4)), (0.5, (13, 13))])
def test_variations_are_a1111s(source, strength, size):
    def ours(seed, shape):
        if source == 'threefry':
            return np.asarray(initial(keys([seed]), (*shape[1:], shape[0])))[0]
        return sources.randn(source, seed, shape)

    def theirs(seed, shape):
        if source == 'torch':
            return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return torch.from_numpy(ours(seed, shape).copy()).permute(2, 0, 1)

    shape = 4, 8, 9
    found = sources.varied(ours, 7, shape, 2**33, strength, size)
    expected = _first(theirs, 7, shape, 2**33, strength, size)
    np.testing.assert_allclose(found.transpose(2, 0, 1), expected.numpy(), rtol=0, atol=5e-6)


def test_noises_that_are_nearly_one():
    low = torch.randn(4, 8, 8, generator=torch.manual_seed(0))
    high = low + 1e-3
    found = sources.slerp(0.2, *(a.permute(1, 2, 0).numpy() for a in (low, high)))
    np.testing.assert_allclose(found.transpose(2, 0, 1), _slerp(0.2, low, high), atol=1e-6)
