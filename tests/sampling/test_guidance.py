"""Guidance: formulas in float64 numpy, neutral values, tables, and closed-form posteriors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsd import sampling
from jaxsd.config import ScheduleConfig
from jaxsd.sampling import guidance as guiding
from jaxsd.sampling import guidance_options as written
from jaxsd.sampling.guidance import Guidance, Projection, Threshold, ZeroStar

CONFIG = ScheduleConfig()
SIGMAS = sampling.schedule('karras', 10, CONFIG)
PICTURES = np.random.default_rng(0).normal(size=(5, 2, 6, 5, 4)).astype(np.float32)
X, SIGMA = PICTURES[4], np.array([2.0, 0.5], np.float32)


def model(parts):
    """A network that returns given pictures, whatever x is."""
    outs = sampling.pair(*PICTURES[:parts])

    def denoise(x, sigma, i):
        assert x.shape == outs.shape and sigma.shape == outs.shape[:1]
        return outs + 0 * x
    return denoise


def sample(guidance, prediction='epsilon', i=0):
    guide = sampling.guided(model(guidance.parts), guidance, prediction)
    if guidance.momentum:
        return guide(X, SIGMA, i, jnp.zeros_like(X))[0]
    return guide(X, SIGMA, i)


@pytest.mark.slow
def test_every_kind_at_its_neutral_value_changes_nothing():
    expected, uncond = sample(Guidance(5.0))
    np.testing.assert_allclose(expected, 5 * PICTURES[1] - 4 * PICTURES[0], atol=1e-5)
    kinds = [name for name in Guidance._fields if name not in ('scale', 'sag', 'perp_neg')]
    off = written.OFF._replace(scale=5.0, perp_neg=(0.0,), sag=None)
    for guidance in [off] + [Guidance(5.0)._replace(**{k: getattr(off, k)}) for k in kinds]:
        out, raw = sample(guidance)
        np.testing.assert_allclose(out, expected, atol=1e-5)
        np.testing.assert_array_equal(raw, uncond)


def test_what_is_off_is_absent_from_the_program():
    """Only a scale: the program of classifier-free guidance written by hand, equation for equation.
    """
    denoise = model(2)

    def by_hand(x, sigma, i, g):
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])
        both = denoise(sampling.pair(x, x), sampling.pair(sigma, sigma), i)
        both = both.reshape(-1, 2, *x.shape[1:])
        uncond, cond = both[:, 0], both[:, 1]
        return uncond + g.reshape(-1, 1, 1, 1) * (cond - uncond), uncond

    def ours(x, sigma, i, g, **kinds):
        return sampling.guided(denoise, Guidance(g, **kinds))(x, sigma, i)

    def operations(f, **kinds):
        program = jax.make_jaxpr(lambda *args: f(*args, **kinds))(X, SIGMA, 0, jnp.ones(2))
        return sorted(equation.primitive.name for equation in program.eqns)

    assert operations(ours) == operations(by_hand)
    assert len(operations(ours, rescale=0.5)) > len(operations(by_hand))


def test_each_image_and_each_row_has_its_own_values():
    scale = np.array([[2.0, 3.0], [4.0, 5.0]])
    for i, b in np.ndindex(2, 2):
        out, _ = sample(Guidance(scale, rescale=scale / 10), i=i)
        alone, _ = sample(Guidance(scale[i, b], rescale=scale[i, b] / 10))
        np.testing.assert_allclose(out[b], alone[b], atol=1e-6)


@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction', 'sample'])
def test_rescale_and_zero_star_act_on_the_prediction(kind):
    """The same in terms of what the network predicts, through the denoiser's own definition."""
    config = ScheduleConfig(prediction_type=kind)
    raw = PICTURES[:2].astype(np.float64)  # predictions now
    denoise = sampling.denoiser(lambda x, t, i: sampling.pair(*PICTURES[:2]), config)
    one = sampling.denoiser(lambda x, t, i: jnp.asarray(expected, jnp.float32), config)

    expected = 4 * raw[1] - 3 * raw[0]
    ratio = raw[1].std((1, 2, 3)) / expected.std((1, 2, 3))
    expected = expected * (0.6 * ratio + 0.4)[:, None, None, None]
    out, _ = sampling.guided(denoise, Guidance(4.0, rescale=0.6), kind)(X, SIGMA, 0)
    np.testing.assert_allclose(out, one(X, SIGMA), atol=3e-5)

    best = (raw[0] * raw[1]).sum((1, 2, 3)) / (raw[0] ** 2).sum((1, 2, 3))
    uncond = raw[0] * best[:, None, None, None]
    expected = uncond + 4 * (raw[1] - uncond)
    star = Guidance(4.0, zero_star=ZeroStar(1.0, np.array([0.0, 0.0])))
    out, _ = sampling.guided(denoise, star, kind)(X, SIGMA, 0)
    np.testing.assert_allclose(out, one(X, SIGMA), atol=3e-5)

    expected = np.stack([0 * raw[0, 0], expected[1]])  # zero-init of the first image
    star = Guidance(4.0, zero_star=ZeroStar(1.0, np.array([1.0, 0.0])))
    out, _ = sampling.guided(denoise, star, kind)(X, SIGMA, 0)
    np.testing.assert_allclose(out, one(X, SIGMA), atol=3e-5)


def test_threshold():
    uncond, cond = PICTURES[:2].astype(np.float64)
    high, low = (uncond + g * (cond - uncond) for g in (9.0, 2.0))
    expected = np.zeros_like(high)
    for b, c in np.ndindex(2, 4):
        picture, mimic = high[b, ..., c], low[b, ..., c]
        centred = picture - picture.mean()
        limit = np.abs(mimic - mimic.mean()).max()
        s = max(limit, np.quantile(np.abs(centred), 0.9))
        expected[b, ..., c] = picture.mean() + np.clip(centred, -s, s) / s * limit
    out, _ = sample(Guidance(9.0, threshold=Threshold(2.0, 0.9, 1.0)))
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert np.abs(expected - high).max() > 1


def test_perp_neg_with_several_negatives():
    uncond, cond, *negatives = PICTURES[:4].astype(np.float64)
    expected = uncond.copy()
    for b in range(2):
        positive = (cond - uncond)[b]
        pull = 0
        for weight, negative in zip((0.7, 1.5), negatives):
            other = (negative - uncond)[b]
            pull = pull + weight * (
                other - (other * positive).sum() / np.linalg.norm(positive) ** 2 * positive)
        expected[b] += 6 * (positive - pull)
    out, _ = sample(Guidance(6.0, perp_neg=(0.7, 1.5)))
    np.testing.assert_allclose(out, expected, atol=2e-5)


def test_several_prompts_add_up_and_leave_single_ones_alone():
    """Composable diffusion by hand; beside it an image with one prompt, equal to the bit."""
    weights = [np.array([1.0, 0.7], np.float32), np.array([0.0, -1.5], np.float32)]
    out, uncond = sample(Guidance(3.0, prompts=weights))
    plain, _ = sample(Guidance(3.0))
    np.testing.assert_array_equal(out[0], plain[0])
    u, c, d = PICTURES[:3, 1].astype(np.float64)
    np.testing.assert_allclose(out[1], u + 3 * (0.7 * (c - u) - 1.5 * (d - u)), atol=1e-5)
    levels = SIGMAS[:-1]
    one = written.table(2.0, {}, SIGMAS, levels)
    two = written.table(2.0, {}, SIGMAS, levels, (0.5, -1.0))
    assert one.prompts is None
    assert [tuple(w[0]) for w in written.stack([one, two]).prompts] == [(1.0, 0.5), (0.0, -1.0)]
    mixed = Guidance(1.0, prompts=(1.0, 0.0), perp_neg=(0.5,), pag=1.0)
    assert mixed.parts == 5


def test_projection_removes_what_is_parallel_and_limits_the_rest():
    cond = PICTURES[1].astype(np.float64)
    out, _ = sample(Guidance(8.0, apg=Projection(0.0, 2.5)))
    change = np.asarray(out) - cond
    for b in range(2):
        assert abs((change[b] * cond[b]).sum()) < 1e-3 * np.linalg.norm(cond[b])
        assert np.linalg.norm(change[b]) <= 7 * 2.5 * (1 + 1e-5)
    np.testing.assert_allclose(sample(Guidance(1.0, apg=Projection(0.0, 2.5)))[0], cond, atol=1e-6)


def test_momentum_goes_through_the_scan_and_skips_rows_without_a_call():
    """A running sum of differences, also for an image whose neighbour calls the model alone."""
    sigmas, seen = SIGMAS[-4:], []
    tables = [sampling.plan('euler', sigmas), sampling.plan('euler', sigmas, s_churn=2.0)]
    assert len(tables[1].sigma) == len(tables[0].sigma) + 1  # its first row only adds noise
    rows = sampling.stack(tables)
    options = written.check({'apg': {'eta': 0.2, 'norm': 3.0, 'momentum': -0.4}}, 3)

    def run(images):
        table = sampling.Rows(*(field[:, images] for field in rows))
        guidance = written.stack([written.table(4.0, options, sigmas, table.sigma[:, k])
                                  for k in range(len(images))])

        def denoise(x, sigma, i):  # uncond and cond take turns
            sigma = sigma[:, None]
            return x / (1 + sigma) + jnp.tile(jnp.array([[0.0], [1.0]]), (len(x) // 2, 1)) * (
                jnp.cos(x) + sigma)

        x = jnp.asarray(PICTURES[0, :, 0, 0][images]) * 2
        return sampling.sample(sampling.guided(denoise, guidance), x, table,
                               lambda i: jnp.ones_like(x), memory=jnp.zeros_like(x))

    both = np.asarray(run([0, 1]))
    for k in (0, 1):
        np.testing.assert_allclose(both[k], run([k])[0], rtol=1e-5)

    x, total = PICTURES[0, 0, 0, 0].astype(np.float64) * 2, 0  # the paper's loop for image 0
    for a, b in zip(sigmas[:-1], sigmas[1:]):
        uncond = x / (1 + a)
        cond = uncond + np.cos(x) + a
        total = cond - uncond - 0.4 * total
        step = total * min(1, 3.0 / np.linalg.norm(total))
        unit = cond / np.linalg.norm(cond)
        parallel = (step @ unit) * unit
        denoised = cond + 3 * (step - parallel + 0.2 * parallel)
        x = denoised + b / a * (x - denoised)
        seen.append(x)
    np.testing.assert_allclose(both[0], x, rtol=2e-5)


def test_tables_look_up_steps_by_sigma():
    """Heun's second call at the next sigma takes the next step's value; padding is neutral."""
    rows = sampling.plan('heun', SIGMAS[-4:])
    values = (2.0, 3.0, 4.0)
    table = written.table(values, {}, SIGMAS[-4:], rows.sigma)
    assert table.scale.tolist() == [2, 3, 3, 4, 4] and table.parts == 2
    options = written.check({'interval': (0.3, 0.7), 'rescale': tuple(np.arange(10) / 10)}, 10)
    table = written.table(7.0, options, SIGMAS, SIGMAS[:-1])
    assert table.scale.tolist() == [1] * 3 + [7] * 4 + [1] * 3
    np.testing.assert_array_equal(table.rescale, np.arange(10) / 10)
    options = written.check({'interval_sigma': (0.3, 5.0)}, 10)
    table = written.table(7.0, options, SIGMAS, SIGMAS[:-1])
    np.testing.assert_array_equal(table.scale == 7, (0.3 < SIGMAS[:-1]) & (SIGMAS[:-1] <= 5))


def test_stacking_keeps_what_nobody_uses_absent():
    options = [written.check(o, 10) for o in (
        {}, {'pag': 3.0, 'perp_neg': (('dog', 1.0),)},
        {'perp_neg': (('dog', 2.0), ('cat', 3.0)), 'apg': {}})]
    found = written.stack([written.table(7.0, o, SIGMAS, SIGMAS) for o in options])
    assert found.parts == 5 and found.momentum
    assert (found.rescale, found.threshold, found.zero_star, found.sag, found.freeu) == (None,) * 5
    assert {a.shape for a in jax.tree.leaves(found)} == {(11, 3)}
    assert [w[0].tolist() for w in found.perp_neg] == [[0, 1, 2], [0, 0, 3]]
    assert found.pag[0].tolist() == [0, 3, 0] and found.apg.norm[0].tolist() == [np.inf, np.inf, 15]
    assert found.apg.momentum[-1, 2] == 1 and found.apg.gain[-1, 2] == 0  # no model call there


def test_blur_where_is_a_gaussian_on_what_is_attended_to():
    x0 = np.zeros((1, 24, 24, 1), np.float32)
    x0[0, 12, 12] = 1
    received = np.zeros((1, 36), np.float32)  # 6 x 6
    np.testing.assert_array_equal(guiding.blur_where(x0, received), x0)
    weights = np.exp(-np.arange(-4, 5) ** 2 / 2)
    weights /= weights.sum()
    expected = np.zeros((24, 24))
    expected[8:17, 8:17] = np.outer(weights, weights)
    blurred = np.asarray(guiding.blur_where(x0, received + 2))
    np.testing.assert_allclose(blurred[0, ..., 0], expected, atol=1e-7)
    received[0, 21] = 2  # position (3, 3): pixels 12 to 15
    part = np.array(guiding.blur_where(x0, received))
    np.testing.assert_array_equal(part[0, 12:16, 12:16], blurred[0, 12:16, 12:16])
    part[0, 12:16, 12:16] = 0
    assert not part.any()


def gaussian(mean, deviation):
    def denoise(x, sigma, i=None):
        share = deviation**2 / (deviation**2 + jnp.reshape(sigma, (-1, 1)) ** 2)
        return mean + share * (x - mean)
    return denoise


def test_autoguidance():
    good, weak = gaussian(1.0, 0.5), gaussian(0.0, 2.0)
    x = jnp.asarray(PICTURES[0, :, 0, 0])
    out = guiding.autoguided(good, weak, np.array([1.0, 3.0]))(x, SIGMA, 0)
    a, b = good(x, SIGMA), weak(x, SIGMA)
    np.testing.assert_allclose(out[0], a[0], rtol=1e-6)
    np.testing.assert_allclose(out[1], (3 * a - 2 * b)[1], rtol=1e-5)


def test_steering_samples_the_posterior():
    """N(m, s^2) times exp(a x0) is N(m + a s^2, s^2), and the guided denoiser is exactly its own.

    20,000 numbers: three standard errors of the mean are 0.017, of the deviation 1.5 %.
    """
    mean, deviation, a = 0.3, 0.8, 1.5
    denoise = guiding.steered(gaussian(mean, deviation), lambda x0: a * x0.sum(1))
    x = jnp.linspace(-3, 3, 8).reshape(2, 4)
    tilted = gaussian(mean + a * deviation**2, deviation)
    np.testing.assert_allclose(denoise(x, SIGMA), tilted(x, SIGMA), atol=1e-5)

    sigmas = sampling.schedule('karras', 60, CONFIG, sigma_max=200.0)  # so that x is all noise
    keys = sampling.keys([1, 2])
    x = sampling.initial(keys, (10000,)) * sigmas[0]
    end = sampling.sample(denoise, x, sampling.plan('dpmpp_2m', sigmas), lambda i: x)
    assert abs(float(end.mean()) - (mean + a * deviation**2)) < 0.017
    assert abs(float(end.std()) / deviation - 1) < 0.015


def test_steering_keeps_the_unguided_output_and_has_a_scale():
    inner = gaussian(0.0, 1.0)
    plain = guiding.steered(inner, lambda x0: -jnp.square(x0 - 2).sum(1) / 2, np.array([0.0, 2.0]))
    both = guiding.steered(lambda *a: (inner(*a), a[0]), lambda x0: -jnp.square(x0 - 2).sum(1) / 2,
                           np.array([0.0, 2.0]))
    x = jnp.linspace(-1, 1, 6).reshape(2, 3)
    out, uncond = both(x, SIGMA, 0)
    np.testing.assert_array_equal(uncond, x)
    np.testing.assert_array_equal(out, plain(x, SIGMA, 0))
    share = 1 / (1 + SIGMA[:, None] ** 2)
    expected = share * x + np.array([[0.0], [2.0]]) * SIGMA[:, None] ** 2 * share * (2 - share * x)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('options, message', [
    ({'rescal': 1}, "unknown guidance option 'rescal': did you mean 'rescale'.*freeu"),
    ({'rescale': 1.5}, 'rescale=1.5: expected a number from 0 to 1'),
    ({'rescale': (0.1, 0.2)}, 'rescale: expected a number or 10 of them, one per step; found 2'),
    ({'interval': (0.8, 0.2)}, 'interval=.*: expected the first to be below the second'),
    ({'interval': 0.5}, 'interval=0.5: expected 2 numbers'),
    ({'pag': 'much'}, "pag='much': expected a finite number"),
    ({'pag': float('nan')}, 'pag=nan: expected a finite number'),
    ({'apg': {'nrom': 3}}, "unknown field of guidance option apg 'nrom': did you mean 'norm'"),
    ({'apg': 3}, 'apg=3: expected a mapping, of eta, norm, momentum'),
    ({'freeu': (1, 2, 3)}, 'freeu=.*: expected 4 numbers'),
    ({'perp_neg': 'dog'}, 'perp_neg=.*: expected'),
    ({'perp_neg': ('dog', 1)}, 'perp_neg=.*: expected'),
    ({'perp_neg': ()}, 'perp_neg=.*: expected'),
    ({'cfg_zero_star': {'init_steps': (1,) * 10}}, 'init_steps.*: expected'),
    ('pag', 'expected a mapping'),
])
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        written.check(options, 10)
