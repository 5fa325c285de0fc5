"""What makes model calls cheaper: token merging against tomesd, tiles against torch's attention of
each, DeepCache against its authors' helper around diffusers' U-Net."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from DeepCache import DeepCacheSDHelper
from parity.test_guidance_parity import arrays, network
from tomesd.merge import bipartite_soft_matching_random2d

from jaxsd import config_files as jcf
from jaxsd.models import unet
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
    out = Fewer(tile=4)(*map(jnp.asarray, (q, k, v)), 2, 8, 12)
    places = np.arange(96).reshape(2, 4, 3, 4).swapaxes(1, 2).reshape(6, 16)
    for tile in places:
        np.testing.assert_allclose(out[:, tile], attend(q[:, tile], k[:, tile], v[:, tile]),
                                   rtol=1e-4, atol=1e-5)
    assert Fewer(tile=12)(*map(jnp.asarray, (q, k, v)), 2, 8, 12) is None
    small = q[:, :24], k[:, :24], v[:, :24]  # a level below: 4 x 6
    assert Fewer(tile=2)(*map(jnp.asarray, small), 2, 8, 12) is None
    assert Fewer(tile=2, depth=1)(*map(jnp.asarray, small), 2, 8, 12) is not None


def test_merged_attention_is_that_of_the_merged_tokens():
    q, k, v = RNG.normal(size=(3, 2, 64, 16)).astype(np.float32)
    merge, unmerge = bipartite_soft_matching_random2d(torch.tensor(k), 8, 8, 2, 2, 32, no_rand=True)
    expected = unmerge(torch.tensor(attend(*(merge(torch.tensor(a)).numpy() for a in (q, k, v)))))
    out = jax.jit(Fewer(ratio=0.5), static_argnums=(3, 4, 5))(q, k, v, 2, 8, 8)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('branch', range(5))
def test_deepcache(branch):
    """Four calls, of which the first and the last are whole; an image of a batch that is so in all
    of them."""
    module = network(layers_per_block=2)
    timesteps = torch.tensor([801.0, 601.0, 401.0, 201.0])
    helper = DeepCacheSDHelper(types.SimpleNamespace(
        unet=module, scheduler=types.SimpleNamespace(timesteps=timesteps)))
    helper.set_params(cache_interval=3, cache_branch_id=branch)
    xs = RNG.normal(size=(4, 1, 12, 10, 4)).astype(np.float32)
    context = RNG.normal(size=(1, 7, 32)).astype(np.float32)
    cfg, params = jcf._unet(dict(module.config)), arrays(module)
    shape = unet.deep_features(cfg, branch + 1, 12, 10)
    run = jax.jit(unet.apply, static_argnums=1)
    call = jax.jit(lambda x, t, again, features: unet.apply(
        params, cfg, x, t, context.repeat(len(x), 0), deep=unet.Deep(branch + 1, again, features)))
    ours, beside = jnp.zeros((1, *shape)), jnp.zeros((2, *shape))
    plain = [module(torch.tensor(x).permute(0, 3, 1, 2), t, torch.tensor(context)).sample
             for x, t in zip(xs, timesteps)]
    helper.enable()
    for i, (x, t) in enumerate(zip(xs, timesteps)):
        theirs = module(torch.tensor(x).permute(0, 3, 1, 2), t, torch.tensor(context)).sample
        again, at = np.array([i % 3 > 0]), np.full(1, t)
        out, ours = call(x, at, again, ours)
        theirs = theirs.detach().permute(0, 2, 3, 1).numpy()
        assert np.abs(out - theirs).max() <= 1e-5 * np.abs(theirs).max()
        different = np.abs(theirs - plain[i].detach().permute(0, 2, 3, 1).numpy()).max()
        assert (different > 1e-4) == again[0]
        both, beside = call(x.repeat(2, 0), at.repeat(2), np.array([again[0], False]), beside)
        assert np.abs(both[:1] - out).max() <= 1e-5 * np.abs(theirs).max()
        assert np.abs(both[1:] - run(params, cfg, x, at, context)).max() <= 1e-5 * np.abs(
            theirs).max()
