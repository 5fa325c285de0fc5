"""From a network's prediction to the denoised picture, and guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsd import sampling
from jaxsd.config import ScheduleConfig
from jaxsd.sampling.guidance import zero_prediction

CONFIG = ScheduleConfig()
KINDS = ('epsilon', 'v_prediction', 'sample')


def perfect(kind, x0, seen):
    """A network that knows x0, in the training convention: x_in = alpha x0 + std eps."""
    def net(x_in, t, i):
        seen.append(t)
        sigma = np.interp(t, np.arange(1000), sampling.model_sigmas(CONFIG))[:, None]
        alpha, std = 1 / np.sqrt(1 + sigma**2), sigma / np.sqrt(1 + sigma**2)
        eps = (x_in - alpha * x0) / std
        return {'epsilon': eps, 'v_prediction': alpha * eps - std * x0, 'sample': x0}[kind]
    return net


@pytest.mark.parametrize('kind', KINDS)
def test_a_perfect_network_denoises_perfectly(kind):
    x0 = np.array([[0.3, -1.0], [2.0, 0.1], [0.0, 0.5]], np.float32)
    seen = []
    config = ScheduleConfig(prediction_type=kind)
    denoise = sampling.denoiser(perfect(kind, x0, seen), config)
    sigma = sampling.model_sigmas(config)[[0, 500, 999]].astype(np.float32)
    x = jnp.asarray(x0 + sigma[:, None] * np.array([[1.0, -0.5]], np.float32))
    np.testing.assert_allclose(denoise(x, sigma), x0, atol=2e-5)
    np.testing.assert_array_equal(seen[0], [0, 500, 999])  # whole timesteps are met exactly
    np.testing.assert_array_equal(  # and one sigma for all images
        np.asarray(denoise(x, sigma[1]))[1], np.asarray(denoise(x, sigma))[1])


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('sigma', [0.0, 1e-6, 4096.0, 1e20])
def test_extreme_sigmas_stay_finite(kind, sigma):
    denoise = sampling.denoiser(lambda x, t, i: 0.9 * x, ScheduleConfig(prediction_type=kind))
    x = jnp.full((2, 3), np.float32(sigma)) * 1.01 + 0.5
    out = np.asarray(denoise(x, jnp.float32(sigma)))
    assert np.isfinite(out).all()
    if kind != 'epsilon':  # at any noise level the picture has the scale of a picture
        assert np.abs(out).max() < 2


def test_timesteps_equal_the_table_and_have_gradients():
    t = np.array([0.0, 1.0, 0.5, 17.25, 500.0, 998.7, 999.0])
    sigma = jnp.asarray(sampling.t_to_sigma(t, CONFIG), jnp.float32)
    np.testing.assert_allclose(sampling.timestep(sigma, CONFIG), t, atol=1e-3)
    np.testing.assert_array_equal(
        sampling.timestep(jnp.asarray(sampling.model_sigmas(CONFIG), jnp.float32), CONFIG),
        np.arange(1000))
    assert sampling.timestep(jnp.array([0.0, 1e9]), CONFIG).tolist() == [0, 999]
    for at in (sigma[3], sigma[4]):  # between timesteps, and on one
        slope = jax.grad(lambda s: sampling.timestep(s, CONFIG))(at)
        near = sampling.sigma_to_t(np.array([at * 0.9999, at * 1.0001]), CONFIG)
        np.testing.assert_allclose(slope, np.diff(near)[0] / (at * 0.0002), rtol=1e-2)


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="prediction_type='eps' is not implemented; expected one"):
        ScheduleConfig(prediction_type='eps')


@pytest.mark.parametrize('kind, sign', [('epsilon', 1), ('v_prediction', -1)])
def test_edm_preconditioning(kind, sign):
    """Karras et al. 2022, table 1: c_in, c_skip, c_out and c_noise, with sigma_data 0.5."""
    config = ScheduleConfig(prediction_type=kind, edm=True)
    seen = []

    def net(x, t, i):
        seen.append((x, t))
        return jnp.sin(x)

    x, sigma, data = np.array([[3.0, -1.0], [0.2, 7.0]], np.float32), np.array([2.0, 80.0]), 0.5
    found = sampling.denoiser(net, config)(jnp.asarray(x), jnp.asarray(sigma, jnp.float32))
    c_in = (1 / np.sqrt(sigma**2 + data**2))[:, None]
    skip = (data**2 / (sigma**2 + data**2))[:, None]
    out = (sigma * data / np.sqrt(sigma**2 + data**2))[:, None]
    np.testing.assert_allclose(seen[0][0], c_in * x, rtol=1e-6)
    np.testing.assert_allclose(seen[0][1], np.log(sigma) / 4, rtol=1e-6)
    np.testing.assert_allclose(found, skip * x + sign * out * np.sin(c_in * x), rtol=1e-5)
    zero = sampling.denoiser(lambda x, t, i: 0 * x, config)(jnp.asarray(x), jnp.float32(2.0))
    np.testing.assert_allclose(zero_prediction(x, 2.0, kind, data), zero, rtol=1e-6)


def test_edm_levels():
    """Karras et al. 2022, eq. 5, at five steps."""
    config = ScheduleConfig(edm=True)
    np.testing.assert_allclose(sampling.schedule('karras', 5, config)[:3], [80, 17.5278, 2.5152],
                               rtol=1e-4)
    np.testing.assert_allclose(sampling.model_sigmas(config)[[0, -1]], [0.002, 80])
    with pytest.raises(ValueError, match='no betas'):
        sampling.betas(config)


def test_trained_betas_are_the_betas():
    found = tuple(np.linspace(0.01, 0.02, 10))
    config = ScheduleConfig(num_train_timesteps=10, trained_betas=found)
    np.testing.assert_array_equal(sampling.betas(config), found)


def test_guidance_per_image():
    """Text is 10 for cond, 1 for uncond, in pair's order; a guidance for each image."""
    text = sampling.pair(jnp.full((3, 1), 1.0), jnp.full((3, 1), 10.0))
    assert text[:, 0].tolist() == [1, 10] * 3

    def denoise(x, sigma, i):
        assert x.shape == (6, 2) and sigma.shape == (6,)
        return x * 0 + text + sigma[:, None] * 0

    guide = sampling.guided(denoise, jnp.array([0.0, 1.0, 7.5]))
    out, uncond = guide(jnp.ones((3, 2)), jnp.float32(2.0), 0)
    np.testing.assert_allclose(uncond, 1)
    np.testing.assert_allclose(out[:, 0], [1, 10, 1 + 7.5 * 9])
    same, _ = sampling.guided(denoise, 3.0)(jnp.ones((3, 2)), jnp.full((3,), 2.0), 0)
    np.testing.assert_allclose(same, 1 + 3.0 * 9)


@pytest.mark.parametrize('sampler', ['dpmpp_2m', 'unipc'])
def test_zero_terminal_snr_from_sigma_4096(sampler):
    """A v-model on Gaussian data N(0.4, 0.2^2), zero terminal SNR: mean and spread come out."""
    config = ScheduleConfig(prediction_type='v_prediction', rescale_betas_zero_snr=True)

    def net(x_in, t, i):
        sigma = jnp.exp(jnp.interp(t, jnp.arange(1000.0),
                                   np.log(sampling.model_sigmas(config)).astype(np.float32)))
        sigma = sigma[:, None]
        norm = jnp.hypot(sigma, 1)
        share = (0.2 / norm) ** 2 / ((0.2 / norm) ** 2 + (sigma / norm) ** 2)
        x0 = 0.4 * (1 - share) + share * x_in * norm
        eps_scaled = (x_in - x0 / norm) / (sigma / norm)
        return eps_scaled / norm - x0 * sigma / norm

    sigmas = sampling.schedule('karras', 60, config)
    x = sampling.initial(sampling.keys([3]), (4000,)) * np.float32(sigmas[0])
    end = sampling.sample(sampling.denoiser(net, config), x, sampling.plan(sampler, sigmas),
                          lambda i: x)
    assert abs(float(end.mean()) - 0.4) < 0.02
    assert abs(float(end.std()) / 0.2 - 1) < 0.03


def easycache(denoise, x, sigmas, threshold):
    """EasyCache by Euler's method in a plain loop -> the end, and in which steps it was called."""
    last = noise = rate = None
    estimate, called = 0.0, []
    for i, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])):
        seen = x / np.sqrt(1 + sigma**2)
        change = None if last is None else np.abs(seen - last).mean()
        if rate is not None:
            estimate += rate * change / np.abs(noise).mean()
        if rate is None or not estimate < threshold[i]:
            fresh = (x - denoise(x, sigma)) / sigma
            if noise is not None:
                rate = np.abs(fresh - noise).mean() / change
            noise, estimate = fresh, 0.0
            called.append(i)
        x, last = x + (after - sigma) * noise, seen
    return x, called


def test_easycache_is_that_of_the_paper_for_each_image_alone():
    """Images of other thresholds in one batch, one of them without; rows in which all reuse call no
    model."""
    steps = 24
    sigmas = sampling.schedule('karras', steps, CONFIG)
    target = np.random.default_rng(0).normal(size=(4, 6, 2))
    x = np.random.default_rng(1).normal(size=(4, 6, 2)) * sigmas[0]
    threshold = np.zeros((steps, 4))
    threshold[3:20] = [0, 0.05, 0.2, 0.2]

    def bent(x, sigma, where):  # a denoiser whose noise changes on the way
        return target[where] + np.sin(2 * target[where]) * sigma**0.5 + 0.1 * np.tanh(x)

    expected, called = zip(*[easycache(lambda x, s, k=k: bent(x, s, k), x[k], sigmas,
                                       threshold[:, k]) for k in range(4)])
    assert [len(c) for c in called][0] == steps > len(called[1]) > len(called[2]) > 8

    def run(which):
        count = []

        def denoise(x, sigma, i):
            jax.debug.callback(lambda: count.append(1))
            s = sigma[:, None, None]
            return target[which] + np.sin(2 * target[which]) * s**0.5 + 0.1 * jnp.tanh(x)

        def cached(x, sigma, i, memory):
            limit = jnp.asarray(threshold)[i][np.array(which)]
            out, memory = sampling.easycache(denoise, limit, sigma <= 0)(x, sigma, i, memory)
            return out, memory

        rows = sampling.plan('euler', sigmas, config=CONFIG)
        start = jnp.asarray(x[which], jnp.float32)
        found = sampling.sample(cached, start, rows, lambda i: jnp.zeros_like(start),
                                memory=sampling.Reuse.of(start))
        jax.effects_barrier()
        return found, len(count)

    found, count = run([0, 1, 2, 3])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert count == steps
    for k in (1, 2):
        alone, count = run([k])
        np.testing.assert_allclose(alone[0], expected[k], rtol=1e-4, atol=1e-4)
        assert count == len(called[k])
