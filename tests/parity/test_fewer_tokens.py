"""Token merging against tomesd, tiles against torch's attention of each."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tomesd.merge import bipartite_soft_matching_random2d

from jaxsd.models.self_attention import Fewer, merging

RNG = np.random.default_rng(0)


@pytest.mark.parametrize('size', [(8, 8), (7, 10)])
@pytest.mark.parametrize('ratio', [0.2, 0.5, 0.75])
def test_merging_is_tomesds(size, ratio):
    height, width = size
    metric, x = RNG.normal(size=(2, 2, height * width, 16)).astype(np.float32)
    merge, unmerge = merging(jnp.asarray(metric), height, width, ratio)
    theirs = bipartite_soft_matching_random2d(
        torch.tensor(metric), width, height, 2, 2, int(height * width * ratio), no_rand=True)
    ours = merge(jnp.asarray(x))
    assert ours.shape[1] == height * width - int(height * width * ratio)
    np.testing.assert_allclose(  # the order of merged tokens is theirs and ours
        unmerge(ours), theirs[1](theirs[0](torch.tensor(x))), rtol=1e-5, atol=1e-6)


def attend(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(
        *(torch.tensor(a).unflatten(-1, (2, -1)).transpose(1, 2) for a in (q, k, v))
    ).transpose(1, 2).flatten(2).numpy()


def test_tiles_look_at_themselves_alone():
    q, k, v = RNG.normal(size=(3, 2, 8 * 12, 16)).astype(np.float32)
    out = Fewer(tile=4).attend(*map(jnp.asarray, (q, k, v)), 2, 8, 12)
    places = np.arange(96).reshape(2, 4, 3, 4).swapaxes(1, 2).reshape(6, 16)
    for tile in places:
        np.testing.assert_allclose(out[:, tile], attend(q[:, tile], k[:, tile], v[:, tile]),
                                   rtol=1e-4, atol=1e-5)
    assert Fewer(tile=12).attend(*map(jnp.asarray, (q, k, v)), 2, 8, 12) is None
    small = q[:, :24], k[:, :24], v[:, :24]  # a level below: 4 x 6
    assert Fewer(tile=2).attend(*map(jnp.asarray, small), 2, 8, 12) is None
    assert Fewer(tile=2, depth=1).attend(*map(jnp.asarray, small), 2, 8, 12) is not None


def test_merged_attention_is_that_of_the_merged_tokens():
    q, k, v = RNG.normal(size=(3, 2, 64, 16)).astype(np.float32)
    merge, unmerge = bipartite_soft_matching_random2d(torch.tensor(k), 8, 8, 2, 2, 32, no_rand=True)
    expected = unmerge(torch.tensor(attend(*(merge(torch.tensor(a)).numpy() for a in (q, k, v)))))
    out = Fewer(ratio=0.5).attend(*map(jnp.asarray, (q, k, v)), 2, 8, 8)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
