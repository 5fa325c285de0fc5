"""Inversion and likelihood against closed forms, and on the shipped model."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsd
from jaxsd import sampling
from jaxsd.config import ScheduleConfig
from jaxsd.lab import ode
from jaxsd.models import vae

CONFIG = ScheduleConfig()
FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'checkpoints' / 'emoji'
LISTS = pathlib.Path(__file__).resolve().parents[1] / 'data'
MEANS, WIDTH = np.array([-0.8, 0.8]), 0.3  # tests/sampling/golden_cases.py has the same density


def two_modes(x, sigma, i=None, lib=jnp):
    """The posterior mean of x0 in {-0.8, 0.8} + 0.3 N(0, 1), each number for itself."""
    total = sigma**2 + WIDTH**2
    return (WIDTH**2 * x + sigma**2 * 0.8 * lib.tanh(0.8 * x / total)) / total


def karras(steps, last=0.05):
    return sampling.schedule('karras', steps, CONFIG, sigma_min=last)[:-1]


def pictures(count, dtype):
    random = np.random.default_rng(3)
    shape = (count, 4, 4, 3)
    return (random.choice(MEANS, shape) + WIDTH * random.standard_normal(shape)).astype(dtype)


def rms(x):
    return np.sqrt(np.square(x).mean(tuple(range(1, x.ndim))))


def there_and_back(x, sigmas, **options):
    @jax.jit
    def run(x):
        top, residual = ode.invert(two_modes, x, sigmas, **options)
        back = sampling.sample(two_modes, top, sampling.plan('euler', sigmas),
                               lambda i: jnp.zeros_like(x))
        return top, residual, back

    return map(np.asarray, run(x))


# A step may miss by its residual, 10 roundings of x; 20 misses of random sign add up to about
# sqrt(20), and the walk stretches them: near the ridge between the modes by about 3.
@pytest.mark.parametrize('dtype, bound', [('float32', 1e-5), ('float64', 1e-10)])
def test_the_walk_leads_back_from_the_inverted_point(dtype, bound):
    with jax.enable_x64(dtype == 'float64'):
        x = pictures(4, dtype)
        top, residual, back = there_and_back(x, karras(21))
        assert top.dtype == back.dtype == dtype
        assert (residual <= 10 * np.finfo(dtype).eps).all()
        assert (rms(back - x) <= bound * rms(x)).all()
        assert 0.9 < (top / 14.6146).std() < 1.1  # noise of the first level's size

        plain = list(there_and_back(x, karras(21), iterations=0))
        assert (rms(plain[2] - x) > 1e-2 * rms(x)).all()  # what the iteration is for
        assert (plain[1] > 1e-3).all()  # and its residual says so


def test_an_image_is_inverted_as_if_alone():
    """Each converges at its own pace; one is all zero, where a relative residual is 0 / 0."""
    x = pictures(3, np.float32) * np.array([1, 0, 3], np.float32).reshape(-1, 1, 1, 1)
    together = list(there_and_back(x, karras(12)))
    for i in range(3):
        for whole, alone in zip(together, there_and_back(x[i:i + 1], karras(12))):
            assert np.isfinite(alone).all()
            np.testing.assert_allclose(whole[i], alone[0], rtol=0, atol=1e-6 * abs(whole).max())


def test_no_iteration_is_ddim_inversion():
    """Against diffusers' DDIMInverseScheduler.step in its own convention, z = sqrt(abar) x."""
    sigmas, x = karras(8), pictures(2, np.float64)
    abar = 1 / (1 + sigmas**2)
    z = x * np.sqrt(abar[-1])
    for to, at in zip(abar[-2::-1], abar[:0:-1]):
        level = np.sqrt((1 - to) / to)
        point = z / np.sqrt(to)  # the network sees z as if at the level it goes to
        eps = (point - two_modes(point, level, lib=np)) / level
        z = np.sqrt(to) * (z - np.sqrt(1 - at) * eps) / np.sqrt(at) + np.sqrt(1 - to) * eps
    with jax.enable_x64(True):
        top, _ = ode.invert(two_modes, x, sigmas, iterations=0)
    np.testing.assert_allclose(top, z / np.sqrt(abar[0]), rtol=1e-12)


def test_bad_input():
    x = pictures(1, np.float32)
    with pytest.raises(ValueError, match="sigmas end in 0.*final='sigma_min'"):
        ode.invert(two_modes, x, np.array([2.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match='strictly decreasing'):
        ode.invert(two_modes, x, np.array([1.0, 2.0]))
    likelihood = functools.partial(ode.log_likelihood, two_modes, x, np.array([2.0, 1.0]),
                                   sampling.keys([0]))
    with pytest.raises(ValueError, match="unknown method 'rk5': did you mean 'rk4'"):
        likelihood(method='rk5')
    with pytest.raises(ValueError, match="unknown probe 'gauss'"):
        likelihood(probe='gauss')
    with pytest.raises(ValueError, match='probes=0'):
        likelihood(probes=0)


# Gaussian data N(mean, C): denoised = mean + C (C + sigma^2)^-1 (x - mean), and the ODE's flow
# stretches each eigenvector of C by sqrt((c + sigma_0^2) / (c + sigma_n^2)).
MEAN = np.array([0.5, -0.3, 0.1, 0.0, 1.0])
DIAGONAL = np.diag([0.2, 0.5, 1.0, 0.1, 2.0])
MIXING = np.random.default_rng(0).standard_normal((5, 5)) / 2
CORRELATED = MIXING @ MIXING.T + 0.1 * np.eye(5)


def gaussian(covariance):
    values, vectors = np.linalg.eigh(covariance)

    def denoise(x, sigma, i=None):
        return MEAN + ((x - MEAN) @ vectors * (values / (values + sigma**2))) @ vectors.T

    return denoise


def normal(x, mean, covariance):
    """log N(x; mean, covariance) -> [B]"""
    shift = x - mean
    return -0.5 * (np.sum(shift * np.linalg.solve(covariance, shift.T).T, -1)
                   + np.linalg.slogdet(2 * np.pi * covariance)[1])


def flowed(x, covariance, sigmas):
    """What the exact ODE gives with the prior N(0, sigma_0^2) -> [B]."""
    values, vectors = np.linalg.eigh(covariance)
    stretch = np.sqrt((values + sigmas[0]**2) / (values + sigmas[-1]**2))
    top = MEAN + ((x - MEAN) @ vectors * stretch) @ vectors.T
    return normal(top, 0, sigmas[0]**2 * np.eye(5)) + np.log(stretch).sum()


@jax.enable_x64(True)
def likelihood(denoise, x, sigmas, seeds=None, **options):
    keys = sampling.keys(range(len(x)) if seeds is None else seeds)
    run = jax.jit(lambda x: ode.log_likelihood(denoise, x, sigmas, keys, **options))
    return np.asarray(run(np.asarray(x, np.float64)))


def data(covariance, count):
    return np.random.default_rng(1).multivariate_normal(MEAN, covariance, count)


def test_likelihood_of_a_diagonal_gaussian_converges_with_the_methods_order():
    """Rademacher probes are exact for a diagonal Jacobian; what is left is the solver's error."""
    x = data(DIAGONAL, 4)
    for method, order in (('heun', 2), ('rk4', 4)):
        errors = []
        for steps in (64, 128):
            sigmas = karras(steps + 1)
            got = likelihood(gaussian(DIAGONAL), x, sigmas, method=method)
            errors.append(np.abs(got - flowed(x, DIAGONAL, sigmas)).max())
        assert abs(np.log2(errors[0] / errors[1]) - order) < 0.3, method
    assert errors[1] < 1e-5  # rk4


def test_likelihood_is_the_density_of_the_data_as_the_first_level_grows():
    """The prior leaves out the data's mean, seen from the first level: first order in 1 / level."""
    x, errors = data(DIAGONAL, 4), []
    for top in (30, 300):
        sigmas = np.geomspace(top, 0.01, 300)
        got = likelihood(gaussian(DIAGONAL), x, sigmas, method='rk4')
        errors.append(np.abs(got - normal(x, MEAN, DIAGONAL + 0.01**2 * np.eye(5))).max())
    assert errors[0] < 3 * np.linalg.norm(MEAN) / 30  # three standard deviations of the prior
    assert 7 < errors[0] / errors[1] < 14


@pytest.mark.parametrize('probe', ['rademacher', 'gaussian'])
def test_the_estimate_is_unbiased_with_hutchinsons_variance(probe):
    """One point under 4,000 keys, correlated data: mean and variance as theory says.

    The trajectory does not depend on the probe v, so the estimate is v . A v plus a constant,
    with the symmetric A = integral of d eps / dx: its variance is 2 |A|^2 for gaussian probes,
    and the diagonal does not count for rademacher. A = log of the flow's stretch.
    """
    count, sigmas = 4000, karras(41)
    x = np.repeat(data(CORRELATED, 1), count, 0)
    got = likelihood(gaussian(CORRELATED), x, sigmas, method='rk4', probe=probe)
    values, vectors = np.linalg.eigh(CORRELATED)
    stretch = (values + sigmas[0]**2) / (values + sigmas[-1]**2)
    a = vectors * (np.log(stretch) / 2) @ vectors.T
    counted = a - np.diag(np.diag(a)) if probe == 'rademacher' else a
    variance = 2 * np.square(counted).sum()
    assert abs(got.mean() - flowed(x[:1], CORRELATED, sigmas)[0]) < 4 * np.sqrt(variance / count)
    assert 0.85 < got.var() / variance < 1.15  # 4 standard errors, allowing for kurtosis

    eight = likelihood(gaussian(CORRELATED), x[:1000], sigmas, method='rk4', probe=probe, probes=8)
    assert 0.8 < eight.var() / (variance / 8) < 1.2


def test_likelihood_of_an_image_does_not_depend_on_its_batch():
    x = data(CORRELATED, 3)
    together = likelihood(gaussian(CORRELATED), x, karras(11), seeds=[5, 6, 7])
    alone = likelihood(gaussian(CORRELATED), x[1:2], karras(11), seeds=[6])
    np.testing.assert_allclose(together[1], alone[0], rtol=1e-12)
    other = likelihood(gaussian(CORRELATED), x[1:2], karras(11), seeds=[8])
    assert abs(other[0] - alone[0]) > 1e-3


def test_two_modes_in_one_dimension():
    """The density integrates to 1 and is that of the mixture plus the last level's noise."""
    x = np.linspace(-3, 3, 601)
    got = np.exp(likelihood(two_modes, x[:, None], np.geomspace(200, 0.02, 300), method='rk4'))
    variance = WIDTH**2 + 0.02**2
    true = np.exp(-(x[:, None] - MEANS)**2 / 2 / variance).mean(1) / np.sqrt(2 * np.pi * variance)
    assert abs(np.trapezoid(got, x) - 1) < 1e-4
    np.testing.assert_allclose(got, true, rtol=0, atol=1e-4)


def test_float32_agrees_with_float64():
    x, sigmas = pictures(2, np.float32), karras(31)
    run = jax.jit(lambda x: ode.log_likelihood(two_modes, x, sigmas, sampling.keys(range(2))))
    single = run(x)
    assert single.dtype == np.float32
    # 48 numbers of a few nats each, summed over 30 steps: roundings of about 1e-5 nats
    np.testing.assert_allclose(single, likelihood(two_modes, x, sigmas), rtol=0, atol=1e-3)


SIGMAS = karras(13)


@functools.partial(jax.jit, static_argnames='config')
def through_noise(params, data, image, *, config, iterations):
    """Pictures -> the decoded latent before and after the way up and down, and the residual."""
    x = vae.encode(params['vae'], config.vae, image / 127.5 - 1)[0]  # this VAE's scaling is 1
    denoise = ode.denoiser(params, config, data)
    top, residual = ode.invert(denoise, x, SIGMAS, iterations)
    back = sampling.sample(denoise, top, sampling.plan('euler', SIGMAS),
                           lambda i: jnp.zeros_like(x))
    return [vae.decode(params['vae'], config.vae, z) for z in (x, back)], residual


@pytest.mark.slow
def test_an_emoji_is_inverted_and_comes_back():
    """docs/research.md: 119 dB over 20 steps, and 31 dB by plain DDIM inversion.

    Latents come back to within 1e-5 (the bound above) of their size, about 1, which in pictures
    of range 2 is 106 dB; the decoder may stretch a change tenfold: 86 dB.
    """
    model = jaxsd.load(FOLDER)
    # The picture at a quarter of its size, all that is kept of the data set in this repository.
    reference = np.load(LISTS / 'emoji_reference.npz')
    apple = reference['features'][list(reference['captions']).index('red apple')]
    image = apple.reshape(1, 16, 16, 3).repeat(4, 1).repeat(4, 2).astype(np.float32)
    data = ode.problem(model, [jaxsd.Request('red apple', seed=0, guidance=1.0)])
    found = {}
    for iterations in (0, 30):
        (before, after), residual = through_noise(model.params, data, image, config=model.config,
                                                  iterations=iterations)
        found[iterations] = 20 * np.log10(2 / rms(np.asarray(after - before)))
    assert residual < 2e-6
    assert found[30] > 86 and found[0] < 40


def test_guidance_must_not_change_over_the_steps(tiny_model):
    request = jaxsd.Request('cat', seed=0, steps=4, guidance=(3.0, 3.0, 2.0, 2.0))
    with pytest.raises(ValueError, match='expected the same at all levels'):
        ode.problem(tiny_model('sd1'), [request])
