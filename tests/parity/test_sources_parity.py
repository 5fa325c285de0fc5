"""torch's CPU generator in numpy, against torch."""

import numpy as np
import pytest
import torch

from jaxsd.sampling import sources

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
