"""Schedules by dynamic programming and by gradients: the parts exactly, the whole on the model."""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsd
from jaxsd import sampling
from jaxsd.config import ScheduleConfig
from jaxsd.lab import ode, search

CONFIG = ScheduleConfig()
FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'checkpoints' / 'emoji'
LISTS = pathlib.Path(__file__).resolve().parents[1] / 'data'


def denoise(x, sigma, i=None, lib=jnp):
    """The posterior mean of x0 in {-0.8, 0.8} + 0.3 N(0, 1)."""
    total = sigma**2 + 0.3**2
    return (0.3**2 * x + sigma**2 * 0.8 * lib.tanh(0.8 * x / total)) / total


@pytest.mark.parametrize('coeff', [1.0, 1.15])
def test_shortest_paths_are_the_best_of_all(coeff):
    random = np.random.default_rng(0)
    cost = np.where(np.triu(np.ones((8, 8)), 1), random.random((8, 8)), np.inf)
    found = search.shortest(cost, [1, 3, 5, 7], coeff)
    assert list(found) == [1, 3, 5, 7]

    def price(path):
        return sum(coeff**k * cost[i, j] for k, (i, j) in enumerate(itertools.pairwise(path)))

    for n, path in found.items():
        ways = [(0, *middle, 7) for middle in itertools.combinations(range(1, 7), n - 1)]
        assert price(path) == pytest.approx(min(map(price, ways)), rel=1e-12)


def test_a_jump_costs_eulers_distance_from_the_teacher():
    sigmas = sampling.schedule('karras', 5, CONFIG)
    random = np.random.default_rng(0)
    points, denoised = random.standard_normal((6, 3, 2, 2)), random.standard_normal((5, 3, 2, 2))
    cost = search.jumps(points, denoised, sigmas)
    assert np.isinf(cost[np.tril_indices(6)]).all()
    end = sampling.sample(lambda x, sigma, i: denoised[1], points[1],
                          sampling.plan('euler', sigmas[[1, 4]]), lambda i: points[0])
    miss = np.sqrt(np.square(end - points[4]).sum((1, 2))).mean()
    assert cost[1, 4] == pytest.approx(miss, rel=1e-5)


@jax.jit
@jax.value_and_grad
def toy(rows, x, target):
    end = sampling.sample(denoise, x, rows, lambda i: jnp.zeros_like(x))
    return jnp.sqrt(jnp.square(end - target).mean())


def toy_problem():
    """1,000 numbers from the two modes' prior, and where a thousand Euler steps take them."""
    x = 14.6 * np.random.default_rng(0).standard_normal((1, 1000))
    rows = sampling.plan('heun', np.append(np.geomspace(14.6, 0.002, 400), 0))
    return x, np.asarray(sampling.sample(denoise, x, rows, lambda i: jnp.zeros_like(x)))


@pytest.mark.slow
@pytest.mark.parametrize('sampler', ['euler', 'heun', 'dpmpp_2m', 'unipc'])
@pytest.mark.parametrize('last', [0.0, 0.05])
def test_the_gradient_is_that_of_the_whole_walk(sampler, last):
    """Against differences of the loss itself, in float64: table and loop together."""
    x = 14.6 * np.random.default_rng(0).standard_normal((1, 20))
    inner = np.log([14.6, 4.0, 1.5, 0.6, 0.2])

    def table(z):
        sigmas = np.append(np.exp(np.append(inner[0], inner[1:] + z)), last)
        return sampling.plan(sampler, sigmas)

    with jax.enable_x64(True):
        def loss(z):
            return toy(table(z), x, np.ones_like(x))

        got = search.chain(loss(np.zeros(4))[1], table, np.zeros(4))
        for k, step in enumerate(1e-5 * np.eye(4)):
            expected = (loss(step)[0] - loss(-step)[0]) / 2e-5
            assert got[k] == pytest.approx(float(expected), rel=1e-5, abs=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize('last', [0.0, 0.05])
def test_learning_halves_the_error_of_karras(last):
    x, target = toy_problem()
    sigmas = np.append(sampling.schedule('karras', 6, CONFIG, sigma_min=0.06)[:-1], last)
    if last:  # the target is then the point at that level
        rows = sampling.plan('heun', np.geomspace(14.6, last, 400))
        target = np.asarray(sampling.sample(denoise, x, rows, lambda i: jnp.zeros_like(x)))
    values = []
    found = search.learn(lambda rows, k: toy(rows, x, target), 'dpmpp_2m', sigmas, updates=40,
                         progress=lambda k, value: values.append(value))
    assert found.dtype == np.float64 and len(values) == 40
    assert found[0] == sigmas[0] and found[-1] == pytest.approx(last, rel=1e-12)
    assert (np.diff(found) < 0).all()
    rows = sampling.plan('dpmpp_2m', found)
    assert toy(sampling.pad(rows, 64), x, target)[0] < 0.5 * values[0]


def test_bad_input():
    with pytest.raises(ValueError, match="'euler_ancestral'.*expected one without fresh noise"):
        search.learn(None, 'euler_ancestral', [2.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="unknown method 'git': did you mean 'gits'"):
        search.search(None, [], [4], method='git')
    with pytest.raises(ValueError, match="no option 'level'; it takes: levels"):
        search.search(None, [], [4], level=3)


@pytest.fixture(scope='module')
def emoji():
    return jaxsd.load(FOLDER)


def requests(captions, first):
    return [jaxsd.Request(caption, seed=first + i, guidance=4.0)
            for i, caption in enumerate(captions)]


@pytest.mark.slow
def test_found_schedules_beat_karras_on_prompts_and_seeds_not_seen(emoji):
    """Small and quick; docs/research.md has the full numbers.
    """
    captions = (LISTS / 'emoji_eval.txt').read_text().splitlines()
    seen, unseen = requests(captions[:2], 0), requests(captions[100:102], 1000)
    data = ode.problem(emoji, unseen)
    target = search.converged(emoji, data, 40)

    def error(sampler, sigmas):
        ends = search.solve(emoji, data, sampler, sigmas)
        return float(np.sqrt(np.square(ends - target).mean((1, 2, 3))).mean())

    karras = sampling.schedule('karras', 6, emoji.config.schedule)
    gits = search.search(emoji, seen, [2, 6], levels=20)
    assert [len(gits[n]) for n in (2, 6)] == [3, 7]
    assert error('euler', gits[6]) < 0.9 * error('euler', karras)

    learnt = search.search(emoji, seen, [6], method='learn', sampler='dpmpp_2m', updates=8,
                           rate=0.3, reference=40)
    assert error('dpmpp_2m', learnt[6]) < 0.5 * error('dpmpp_2m', karras)


def test_gits_errors_name_what_to_change(emoji):
    one = requests(['red apple'], 0)
    with pytest.raises(ValueError, match='steps=9: expected a whole number from 1 to levels=8'):
        search.search(emoji, one, [4, 9], levels=8)
    with pytest.raises(ValueError, match="teacher 'heun': expected a sampler of one call a step"):
        search.search(emoji, one, [4], levels=8, teacher='heun')
