"""dpm_adaptive against k-diffusion's own code, and each image of a batch against its solo run."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import denoise, start

from jaxsd import sampling

GOLDENS = np.load(pathlib.Path(__file__).parents[1] / 'goldens' / 'adaptive.npz')
CASES = [key.removesuffix('/x') for key in GOLDENS if key.endswith('/x')]
X, NOISES = start()


def plan(case):
    sigmas, options = json.loads(str(GOLDENS[f'{case}/plan']))
    return sampling.plan('dpm_adaptive', sigmas, **options)


def analytic(x, sigma, i):
    return denoise(x, sigma.reshape(-1, *(1,) * (x.ndim - 1)), jnp)


def taken(call):
    """For info: what was done by a row."""
    return call.sigma > 0, call.after.y.accepted, call.after.y.rejected, jnp.exp(-call.after.y.s)


def steps_of(seen):
    """-> model calls, steps accepted, steps rejected, the noise level reached, [B] of each."""
    called, *rest = map(np.asarray, seen)
    return called.sum(0), *(field[-1] for field in rest)


@jax.jit
def sample(x, plan, pool):
    return sampling.sample(analytic, x, plan, lambda i: pool[i % len(pool)], info=taken)


def run(cases, dtype=np.float64):
    """All of X is one image, as in the goldens; every image has the same pool of noise."""
    plans = [plan(case) for case in cases]
    x = np.stack([X * p.sigma[0] for p in plans]).astype(dtype)
    pool = np.repeat(NOISES[:, None], len(cases), 1).astype(dtype)
    with jax.enable_x64(dtype == np.float64):
        x, seen = sample(x, sampling.stack(plans), pool)
    assert x.dtype == dtype
    return np.asarray(x), steps_of(seen)


@pytest.mark.parametrize('case', CASES)
def test_equals_k_diffusion(case):
    x, steps = run([case])
    assert [int(field[0]) for field in steps[:3]] == GOLDENS[f'{case}/steps'].tolist()
    expected = GOLDENS[f'{case}/x']
    assert np.abs(x[0] - expected).max() <= 1e-10 * np.abs(expected).max()


@functools.cache
def all_in_one_batch(dtype):
    return run(CASES, dtype)


def test_a_batch_equals_its_solo_runs_in_one_program():
    """Other options, orders and ends side by side; the first image ends 100 calls early."""
    mixed, steps = all_in_one_batch(np.float64)
    programs = sample._cache_size()
    for i, case in enumerate(CASES):
        x, alone = run([case])
        assert [field[0] for field in alone[:3]] == [field[i] for field in steps[:3]]
        np.testing.assert_allclose(mixed[i], x[0], rtol=0, atol=1e-12)
    assert sample._cache_size() <= programs + 1, 'options compiled anew'
    assert np.ptp(steps[0]) > 100
    ends = np.exp([-plan(case).fields['end'][0] for case in CASES])
    np.testing.assert_allclose(steps[3], ends, rtol=1e-12)


def test_float32_stays_within_the_tolerance():
    """The first steps' errors are all rounding, which the step sizes follow (a step at most)."""
    exact, steps = all_in_one_batch(np.float64)
    single, same = all_in_one_batch(np.float32)
    assert (abs(same[1] - steps[1]) <= 1).all()
    far = abs(single - exact).max((1, 2)) / abs(exact).max((1, 2))
    assert (far < [plan(case).fields['rtol'][0] for case in CASES]).all(), far


@jax.jit
def bent(x, plan, gain):
    """A model that turns the faster the larger its gain."""
    return sampling.sample(lambda x, sigma, i: jnp.sin(gain * x), x, plan, lambda i: 0 * x,
                           info=lambda call: call.sigma > 0)[1].sum(0)


def test_each_image_has_its_own_error():
    """A hard image takes as many calls as alone, and does not slow down an easy one."""
    x, gain = jnp.array([[40.0, -70.0], [40.0, -70.0]]), jnp.array([[0.0], [3.0]])
    options = sampling.plan('dpm_adaptive', [50.0, 0.001])
    together = bent(x, options, gain)
    assert together[0] < together[1]
    assert together.tolist() == [int(bent(x[:1], options, g[None])[0]) for g in gain]


def gaussian(x, sigma, i):
    """Data N(0, 0.5^2), whose solution is x(sigma) = x0 sqrt((0.5^2 + sigma^2) / ...)."""
    return x * 0.25 / (0.25 + sigma[:, None] ** 2)


def test_error_follows_the_tolerance():
    """Errors of the steps add up to a few tolerances; 100 times less of it is felt."""
    options = sampling.stack([
        sampling.plan('dpm_adaptive', [20.0, 0.05], order=order, rtol=rtol, atol=1e-9)
        for order in (2, 3) for rtol in (1e-3, 1e-4, 1e-5)])
    with jax.enable_x64(True):
        end = np.asarray(jax.jit(lambda x, options: sampling.sample(
            gaussian, x, options, lambda i: 0 * x))(np.full((6, 1), 20.0), options))
    errors = abs(end / 20 * np.sqrt((0.25 + 20**2) / (0.25 + 0.05**2)) - 1).reshape(2, 3)
    assert (errors < 10 * np.array([1e-3, 1e-4, 1e-5])).all(), errors
    assert (errors[:, 0] > 25 * errors[:, 2]).all(), errors


def test_variance_on_gaussian_data():
    """With eta = 1, 10,000 numbers come out with the variance of the data."""
    pool = np.random.default_rng(0).standard_normal((300, 1, 10_000)).astype(np.float32)
    options = sampling.plan('dpm_adaptive', [80.0, 0.01], eta=1.0, rtol=0.01)
    x = 80 * pool[-1]
    end, seen = sampling.sample(gaussian, x, options, lambda i: jnp.asarray(pool)[i], info=taken)
    assert steps_of(seen)[0] < 300
    assert abs(np.var(end) / 0.25 - 1) < 0.05
    assert abs(np.corrcoef(end, x)[0, 1]) < 0.1  # it is the fresh noise that makes the picture


@jax.jit
def hurt(x, options, scale, shake):
    def model(x, sigma, i):
        return scale * gaussian(x, sigma, i) + shake * jnp.sin(1e9 * x + i) * sigma[:, None]

    return sampling.sample(model, x, options, lambda i: x, info=taken)


def test_it_always_ends():
    """At the cap, and where the model is not finite; the other image of the batch is untouched."""
    x, one = jnp.full((2, 5), 9.0), jnp.ones((2, 1))
    options = sampling.plan('dpm_adaptive', [10.0, 0.1], max_calls=40)
    fine, seen = hurt(x, options, one, 0 * one)
    calls, *_, sigma = steps_of(seen)
    assert (calls < 40).all()
    np.testing.assert_allclose(sigma, 0.1, rtol=1e-5)
    end, seen = hurt(x, options, one.at[1].set(jnp.nan), 0 * one)
    np.testing.assert_array_equal(end[0], fine[0])
    assert np.isnan(end[1]).all() and steps_of(seen)[0][1] <= 6
    end, seen = hurt(x, options, one, one.at[0].set(0))
    calls, *_, sigma = steps_of(seen)
    np.testing.assert_array_equal(end[0], fine[0])
    assert calls[1] == 40 and sigma[1] > 0.1 and np.isfinite(end).all()


def test_what_sample_offers_elsewhere():
    """Low precision is lifted, memory is carried, no noise at eta = 0."""
    seen = []

    def model(x, sigma, i, memory):
        jax.debug.callback(lambda i: seen.append(int(i)), i)
        return (gaussian(x, sigma, i).astype(jnp.bfloat16), 0 * x), memory + 1

    options = sampling.plan('dpm_adaptive', [10.0, 0.1])

    def noise(i):
        jax.debug.callback(lambda: seen.append('noise'))
        return jnp.zeros((1, 5))

    end, found = jax.jit(lambda x: sampling.sample(
        model, x, options, noise, info=taken, memory=jnp.zeros(())))(
            jnp.ones((1, 5), jnp.bfloat16))
    jax.effects_barrier()
    assert end.dtype == jnp.float32 and sorted(seen) == list(range(int(steps_of(found)[0][0])))


def test_fresh_noise_is_drawn_by_the_number_of_the_call():
    keys, one = sampling.keys([1, 2]), sampling.plan('dpm_adaptive', [10.0, 0.1], eta=1.0)
    noise = sampling.fresh(keys, sampling.stack([one, one]), (3,))
    np.testing.assert_array_equal(noise(7), sampling.draw(keys, 7, (3,)))


@pytest.mark.parametrize('sigmas, options, match', [
    ([3, 1], {'order': 4}, 'order=4: expected a whole number from 2 to 3'),
    ([3, 1], {'rtol': 0}, 'rtol=0: expected a finite number above 0'),
    ([3, 1], {'atol': -1e-3}, 'atol=-0.001: expected'),
    ([3, 1], {'h_init': np.inf}, 'h_init=inf: expected'),
    ([3, 1], {'accept_safety': 0}, 'accept_safety=0: expected'),
    ([3, 1], {'pcoeff': np.nan}, 'pcoeff=nan: expected a finite number'),
    ([3, 1], {'eta': -1}, 'eta=-1: expected'),
    ([3, 1], {'max_calls': 0}, 'max_calls=0: expected'),
    ([3, 1], {'steps': 3}, "no option 'steps'; it takes: order, rtol"),
    ([3, 0], {}, 'needs two of them'),
])
def test_bad_options(sigmas, options, match):
    with pytest.raises(ValueError, match=match) as error:
        sampling.plan('dpm_adaptive', sigmas, **options)
    assert '\n' not in str(error.value)


def test_it_does_not_mix_with_tables():
    tables = [sampling.plan(name, [3.0, 1.0, 0.0]) for name in ('euler', 'dpm_adaptive', 'heun')]
    with pytest.raises(ValueError, match='^1 of 3 images are dpm_adaptive.*all or none.*own$'):
        sampling.stack(tables)
