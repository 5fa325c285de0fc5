"""One compiled program for every table: mixing, padding, counting, compiling."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import denoise as analytic

from jaxsd import sampling
from jaxsd.config import ScheduleConfig

CONFIG = ScheduleConfig()
SHAPE = (4, 4, 3)
# One image each: sampler, schedule, steps, seed. Every sampler, every schedule, 1 to 10 steps.
IMAGES = [
    (name, schedule, 1 + 7 * seed % 10, seed) for seed, (name, schedule) in enumerate(zip(
        sorted(set(sampling.SAMPLERS) - {'dpm_adaptive', 'pndm'}),
        itertools.cycle(sampling.SCHEDULES)))]


def table(image):
    name, schedule, steps, _ = image
    return sampling.plan(name, sampling.schedule(schedule, steps, CONFIG), config=CONFIG)


def denoise(x, sigma, i):
    return analytic(x, sigma.reshape(-1, 1, 1, 1), jnp)


def start(images):
    """First points [B,...] and a pool of noise [calls,B,...], each image from its own seed."""
    pools = [np.random.default_rng(seed).standard_normal((65, *SHAPE)) for *_, seed in images]
    pool = np.stack(pools, axis=1).astype(np.float32)
    first = np.array([table(image).sigma[0] for image in images], np.float32)
    return pool[-1] * first.reshape(-1, 1, 1, 1), pool[:-1]


@jax.jit
def run(x, rows, pool):
    return sampling.sample(denoise, x, rows, lambda i: pool[i])


def test_mixed_batch_equals_solo_runs_without_a_recompile():
    rows = sampling.stack([table(image) for image in IMAGES])
    assert rows.sigma.shape == (64, len(IMAGES)) and rows.mix.shape == (64, len(IMAGES), 2, 8)
    x, pool = start(IMAGES)
    mixed = np.asarray(run(x, rows, pool))
    before = None
    for index, image in enumerate(IMAGES):
        x, pool = start([image])
        alone = np.asarray(run(x, sampling.stack([table(image)]), pool))
        np.testing.assert_allclose(mixed[index], alone[0], rtol=0, atol=2e-6, err_msg=image[0])
        before = before or run._cache_size()
        assert run._cache_size() == before, 'a sampler, schedule or step count compiled anew'


def test_shared_rows_equal_rows_per_image():
    image = ('dpmpp_sde', 'karras', 6, 10)
    x, pool = start([image] * 3)
    shared = run(x, table(image), pool)
    np.testing.assert_allclose(shared, run(x, sampling.stack([table(image)] * 3), pool), atol=2e-6)


def test_padding_changes_nothing_and_costs_no_call():
    seen = []
    image = ('heun', 'normal', 4, 4)
    x, pool = start([image])

    def counted(x, rows, pool):
        def call(x, sigma, i):
            jax.debug.callback(lambda i: seen.append(int(i)), i)
            return denoise(x, sigma, i)

        return sampling.sample(call, x, rows, lambda i: pool[i])

    ends = []
    for length in (None, 64, 128):
        seen.clear()
        rows = table(image) if length is None else sampling.pad(table(image), length)
        ends.append(np.asarray(jax.jit(counted)(x, rows, pool)))
        jax.effects_barrier()
        assert sorted(seen) == list(range(2 * 4 - 1))
    np.testing.assert_array_equal(ends[0], ends[1])
    np.testing.assert_array_equal(ends[0], ends[2])


def test_padding_really_skips_the_model():
    """Count by a callback inside the model itself, in a batch of 3 and of 9 steps."""
    seen = []

    def model(x, sigma, i):
        jax.debug.callback(lambda i: seen.append(int(i)), i)
        return denoise(x, sigma, i)

    rows = sampling.stack([table(('euler', 'karras', steps, 0)) for steps in (3, 9)])
    x = jnp.ones((2, *SHAPE))
    jax.block_until_ready(jax.jit(
        lambda x, rows: sampling.sample(model, x, rows, lambda i: x))(x, rows))
    jax.effects_barrier()
    assert sorted(seen) == list(range(9))
    assert sampling.calls(rows).tolist() == [3, 9]


def test_a_finished_image_is_frozen_even_where_the_model_fails():
    """A model that is NaN at sigma 0 cannot hurt the image that finished first."""
    rows = sampling.stack([table(('euler', 'karras', steps, 0)) for steps in (3, 9)])
    x = jnp.full((2, *SHAPE), 3.0)
    end = sampling.sample(lambda x, sigma, i: x / sigma.reshape(-1, 1, 1, 1) * 0 + 0.25, x, rows,
                          lambda i: x * jnp.nan)
    np.testing.assert_array_equal(end, np.full((2, *SHAPE), 0.25, np.float32))


def test_noise_is_drawn_only_where_a_row_asks():
    drawn = []

    def noise(i):
        jax.debug.callback(lambda i: drawn.append(int(i)), i)
        return jnp.zeros((1, *SHAPE))

    for name, expected in (('dpmpp_2m', []), ('euler_ancestral', list(range(5)))):
        drawn.clear()
        rows = sampling.pad(table((name, 'karras', 6, 0)), 16)
        sampling.sample(denoise, jnp.ones((1, *SHAPE)), rows, noise)
        jax.effects_barrier()
        assert sorted(drawn) == expected


def test_state_is_float32_whatever_the_model_computes_in():
    rows = table(('dpmpp_2m', 'karras', 5, 0))
    x = jnp.full((1, *SHAPE), 10.0, jnp.bfloat16)
    end = sampling.sample(lambda x, sigma, i: (x * 0 + 0.3).astype(jnp.bfloat16), x, rows,
                          lambda i: x)
    assert end.dtype == jnp.float32
    np.testing.assert_allclose(end, np.float32(jnp.bfloat16(0.3)), rtol=1e-6)


def test_gradients_pass_through_a_trajectory():
    rows = sampling.pad(table(('heun', 'karras', 4, 0)), 10)

    def end(shift):
        return sampling.sample(lambda x, sigma, i: denoise(x, sigma, i) + shift,
                               jnp.ones((1, 2, 2, 1)), rows,
                               lambda i: jnp.zeros((1, 2, 2, 1))).mean()

    got = jax.grad(end)(0.1)
    assert abs(got - (end(0.1 + 1e-2) - end(0.1 - 1e-2)) / 2e-2) < 1e-3 * abs(got)


def test_info_sees_every_row():
    """What goes into a row and what comes out of it, stacked; Euler's step from these alone."""
    sigmas = sampling.schedule('karras', 5, CONFIG)
    rows = sampling.pad(sampling.plan('euler', sigmas), 8)
    x = jnp.asarray(start([('euler', 'karras', 5, 3)])[0])
    end, seen = sampling.sample(denoise, x, rows, lambda i: x, info=lambda call: dict(
        x=call.x, denoised=call.denoised, eps=call.eps, sigma=call.sigma, after=call.after.x))
    assert {field.shape for field in seen.values()} == {(8, 1, *SHAPE), (8,)}
    np.testing.assert_allclose(seen['sigma'][:5], sigmas[:-1], rtol=1e-6)
    np.testing.assert_array_equal(seen['x'][1:], seen['after'][:-1])
    np.testing.assert_array_equal(seen['after'][-1], end)
    for i, (a, b) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        np.testing.assert_allclose(
            seen['denoised'][i], denoise(seen['x'][i], jnp.float32(a), i), rtol=1e-6)
        np.testing.assert_allclose(
            seen['after'][i], seen['x'][i] + (b - a) * seen['eps'][i], atol=2e-5)
    assert not seen['eps'][5:].any()  # rows without a model call
    np.testing.assert_array_equal(sampling.sample(denoise, x, rows, lambda i: x), end)


def test_log_probability_of_stochastic_steps():
    """Of x' = mean + w noise given x: in closed form, and its gradient that of a score function."""
    sigmas = np.array([9.0, 4.0, 1.5, 0.0])
    rows = sampling.stack([sampling.plan('euler_ancestral', sigmas, eta=eta) for eta in (1.0, 0.0)],
                          length=4)
    x, pool = jnp.full((2, *SHAPE), 3.0), np.random.default_rng(0).normal(size=(4, 2, *SHAPE))

    def sample(shift):
        return sampling.sample(
            lambda x, sigma, i: denoise(x, sigma, i) + shift, x, rows,
            lambda i: jnp.asarray(pool, jnp.float32)[i],
            info=lambda call: (sampling.log_probability(call), call.x, call.after.x, call.denoised))

    logs, before, after, denoised = map(np.asarray, sample(0.0)[1])
    assert logs.shape == (4, 2) and not logs[:, 1].any() and not logs[2:, 0].any()
    for i in range(2):
        mix = rows.mix[i, 0, 0]
        mean = mix[0] * before[i, 0] + mix[3] * denoised[i, 0]
        z = (after[i, 0] - mean) / mix[2]
        expected = -(0.5 * z**2 + np.log(mix[2] * np.sqrt(2 * np.pi))).sum()
        np.testing.assert_allclose(logs[i, 0], expected, rtol=1e-4)
    # d log N / d shift at the first step: (x' - mean) / w^2 times d mean / d shift
    gradient = jax.jacobian(lambda shift: sample(shift)[1][0][0, 0])(0.0)
    mix = rows.mix[0, 0, 0]
    np.testing.assert_allclose(gradient, mix[3] * pool[0, 0].sum() / mix[2], rtol=1e-3)


def test_memory_goes_from_call_to_call():
    """A denoiser that averages what it said; rows without a call leave its memory alone."""
    rows = sampling.pad(table(('heun', 'karras', 4, 0)), 9)
    x = jnp.ones((1, *SHAPE))

    def averaged(x, sigma, i, memory):
        memory = 0.5 * memory + 0.5 * denoise(x, sigma, i)
        return memory, memory

    end = sampling.sample(averaged, x, rows, lambda i: x, memory=jnp.zeros_like(x))
    said = [np.zeros((1, *SHAPE))]

    def by_hand(x, sigma, i):
        said.append(0.5 * said[-1] + 0.5 * np.asarray(denoise(x, sigma, i)))
        return said[-1]

    state = sampling.init(x, rows)
    for i in range(7):
        row = sampling.Row(*(jnp.asarray(field[i], jnp.float32) for field in rows))
        state = sampling.step(state, row, by_hand(state.x, row.sigma, i), jnp.zeros_like(x))
    np.testing.assert_allclose(end, state.x, atol=1e-5)


def test_bucket_and_pad():
    assert [sampling.bucket(n) for n in (1, 64, 65, 199)] == [64, 64, 128, 256]
    with pytest.raises(ValueError, match='5 rows do not fit a length of 3'):
        sampling.pad(table(('euler', 'karras', 5, 0)), 3)
