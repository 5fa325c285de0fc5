"""A key per image: noise never depends on the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import denoise as analytic

from jaxsd import sampling

SEEDS = [0, 1, 2**32 - 1, 2**32, 4376845645, 2**63, 2**64 - 1]
SHAPE = (5, 7, 4)
draw = jax.jit(sampling.draw, static_argnums=2)  # one program for each batch size


def test_noise_alone_equals_noise_in_a_batch_bitwise():
    batch = sampling.keys(SEEDS)
    for call in (0, 3, sampling.noise.INITIAL):
        whole = np.asarray(draw(batch, call, SHAPE))
        for i, seed in enumerate(SEEDS):
            assert (np.asarray(draw(sampling.keys([seed]), call, SHAPE))[0] == whole[i]).all()
    assert (np.asarray(sampling.initial(batch, SHAPE)) == whole).all()


def test_seeds_and_calls_give_different_noise():
    keys = sampling.keys(SEEDS)
    draws = [np.asarray(draw(keys, call, SHAPE)) for call in (0, 1, 63, sampling.noise.INITIAL)]
    flat = np.concatenate(draws).reshape(4 * len(SEEDS), -1)
    assert len(np.unique(flat[:, 0])) == len(flat)
    off_diagonal = np.corrcoef(flat) - np.eye(len(flat))
    assert np.abs(off_diagonal).max() < 5 / np.sqrt(flat.shape[1])
    assert abs(flat.mean()) < 0.05 and abs(flat.std() - 1) < 0.05


def test_the_definition():
    """DESIGN: fold_in(key(seed), call); beyond 32 bits the high half is the key's first word."""
    got = draw(sampling.keys([1234]), 5, SHAPE)
    key = jax.random.fold_in(jax.random.key(1234, impl='threefry2x32'), 5)
    assert (np.asarray(got)[0] == np.asarray(jax.random.normal(key, SHAPE))).all()
    data = jax.random.key_data(sampling.keys([4376845645, 2**64 - 1]))
    assert data.tolist() == [[1, 4376845645 - 2**32], [2**32 - 1, 2**32 - 1]]


def test_calls_may_differ_per_image():
    each = np.asarray(draw(sampling.keys([7] * 7), np.arange(7), SHAPE))
    for call in (2, 6):
        assert (each[call] == np.asarray(draw(sampling.keys([7]), call, SHAPE))[0]).all()


def test_seeds_in_any_integer_type():
    numbers = jax.random.key_data(sampling.keys([3, 5]))
    for same in (np.array([3, 5]), np.array([3, 5], np.uint64), (3.0, 5.0)):
        assert (jax.random.key_data(sampling.keys(same)) == numbers).all()
    assert sampling.keys(2**64 - 1).shape == (1,)


@pytest.mark.parametrize('seed', [-1, 2**64, 1.5, 'seven', None, float('nan'), float('inf')])
def test_bad_seeds(seed):
    with pytest.raises(ValueError, match=r'expected a whole number from 0 to 2\^64 - 1'):
        sampling.keys([seed])


def path(sigmas):
    """The path column of an SDE sampler that walks down these sigmas, for any number of images."""
    return sampling.plan('euler_ancestral', np.append(sigmas, 0.0))


def test_one_brownian_path_whatever_the_steps():
    """The noise of one long step is the sum of the noises of the short steps inside it."""
    keys = sampling.keys([3, 2**40])
    fine = np.geomspace(14.6, 0.03, 33)
    draws = {}
    for every in (1, 8, 32):
        sigmas = fine[::every]
        noise = jax.jit(sampling.fresh(keys, path(sigmas), (3, 5)))
        draws[every] = np.stack([noise(i) for i in range(len(sigmas) - 1)])
    for every in (8, 32):  # equal steps in log sigma: equal weights
        sums = draws[1].reshape(-1, every, 2, 3, 5).sum(1) / np.sqrt(every)
        np.testing.assert_allclose(draws[every], sums, atol=2e-3)
    assert np.abs(draws[1][0] - draws[1][1]).max() > 0.5


def test_brownian_noise_is_standard_normal_and_its_steps_independent():
    keys = sampling.keys([11])
    sigmas = np.geomspace(80, 0.002, 9) * np.array([1, 1.1, 1, 0.9, 1, 1.3, 1, 1, 1])
    noise = jax.jit(sampling.fresh(keys, path(sigmas), (40_000,)))
    z = np.stack([np.asarray(noise(i))[0] for i in range(8)])
    np.testing.assert_allclose(z @ z.T / z.shape[1], np.eye(8), atol=0.025)
    np.testing.assert_allclose(z.mean(1), 0, atol=0.025)
    np.testing.assert_allclose((z**4).mean(1), 3, atol=0.2)


def test_path_and_independent_noise_in_one_batch():
    """Images without a path draw by the row's index, as `draw` does, whoever is beside them."""
    keys = sampling.keys([5, 6])
    tables = [sampling.plan('euler_ancestral', [9.0, 4.0, 1.0, 0.0]),
              sampling.plan('euler', [9.0, 4.0, 1.0, 0.0], s_churn=1.0)]
    noise = jax.jit(sampling.fresh(keys, sampling.stack(tables), (4,)))
    np.testing.assert_array_equal(noise(1)[1], sampling.draw(keys, 1, (4,))[1])
    solo = jax.jit(sampling.fresh(keys[:1], sampling.stack(tables[:1]), (4,)))
    for i in range(2):
        np.testing.assert_array_equal(noise(i)[0], solo(i)[0])
        assert np.abs(noise(i)[0] - sampling.draw(keys, i, (4,))[0]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize('name', ['euler_ancestral', 'dpmpp_2m_sde', 'dpmpp_3m_sde', 'dpmpp_sde'])
def test_more_steps_of_one_seed_converge_to_one_picture(name):
    """Distances to the picture of four times the steps shrink with strong order 1/2 or better."""
    keys, shape = sampling.keys([1, 2, 3]), (64,)

    def end(steps):
        sigmas = np.append(np.geomspace(14.6, 0.03, steps + 1), 0.0)
        rows = sampling.plan(name, sigmas)
        x = sampling.initial(keys, shape) * np.float32(sigmas[0])
        return np.asarray(jax.jit(lambda x, rows: sampling.sample(
            lambda x, s, i: analytic(x, s, jnp), x, rows, sampling.fresh(keys, rows, shape)))(
                x, rows))

    ends = [end(steps) for steps in (25, 100, 400)]
    gaps = [np.sqrt(np.mean((a - b) ** 2)) for a, b in zip(ends, ends[1:])]
    assert gaps[1] < gaps[0] / 2, gaps
