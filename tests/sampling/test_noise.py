"""A key per image: noise never depends on the batch."""

import jax
import numpy as np
import pytest

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
