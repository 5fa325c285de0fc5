"""Samplers, schedules and guidance of one's own: the page's examples against their formulas, in
numpy, and what is wrong with a file told in a line."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import plugin_page
import pytest
from golden_cases import denoise, start

import jaxsd
from jaxsd import sampling
from jaxsd.config import ScheduleConfig
from jaxsd.sampling import guidance_options, plugins
from jaxsd.sampling.guidance import Guidance

CONFIG = ScheduleConfig()
X, NOISES = start()


@pytest.fixture(scope='module', autouse=True)
def examples(tmp_path_factory):
    with plugin_page.forgotten():
        yield {path.stem: jaxsd.load_plugin(path)
               for path in plugin_page.write(tmp_path_factory.mktemp('plugins'))}


@pytest.fixture
def load(tmp_path):
    """load(text) -> the module, whose names are forgotten after the test."""
    def load(text, name='mine'):
        path = tmp_path / f'{name}.py'
        path.write_text(text)
        return jaxsd.load_plugin(path)

    with plugin_page.forgotten():
        yield load


def analytic(x, sigma, i):
    return denoise(x, jnp.reshape(sigma, (-1, *(1,) * (x.ndim - 1))), jnp)


@jax.jit
def run(x, rows, pool):
    """-> the end, and the noise level of each call [rows,B]."""
    return sampling.sample(analytic, x, rows, lambda i: pool[i % len(pool)],
                           info=lambda call: jnp.broadcast_to(call.sigma, len(x)))


def sample(tables):
    """One picture for each table, from X and the noises [calls,...] of the goldens, in float64."""
    with jax.enable_x64(True):
        x = np.stack([X * table.sigma[0] for table in tables])
        pool = np.repeat(NOISES[:, None], len(tables), 1)
        return [np.asarray(a) for a in run(x, sampling.stack(tables), pool)]


@pytest.fixture(scope='module')
def sigmas():
    return sampling.schedule('karras', 12, CONFIG)


def test_examples_are_short():
    assert len(plugin_page.EXAMPLES) == 5
    assert max(len(text.splitlines()) for text in plugin_page.EXAMPLES.values()) <= 30


@pytest.mark.parametrize('beta', [0.8, 0.3, 1.0])
def test_ghvb(sigmas, beta):
    """sWizad/momentum-diffusion, GHVBScheduler of order 1 + beta; beta 1: Adams-Bashforth."""
    x, velocities = X * sigmas[0], []
    for a, b in zip(sigmas[:-1], sigmas[1:]):
        slope = (x - denoise(x, a, np)) / a
        before = velocities[-1] if velocities else slope
        velocities.append((1 - beta) * before + beta * slope)
        if len(velocities) == 1:
            prime = velocities[-1]
        else:
            prime = ((2 + beta) * velocities[-1] - (2 - beta) * velocities[-2]) / 2 / beta
        x = x + (b - a) * prime
    found, _ = sample([sampling.plan('ghvb', sigmas, beta=beta)])
    np.testing.assert_allclose(found[0], x, rtol=0, atol=1e-12 * np.abs(x).max())


def predictor_corrector(sigmas, snr):
    x, noises = X * sigmas[0], iter(NOISES)

    def score(sigma):
        return (denoise(x, sigma, np) - x) / sigma**2

    for a, b in zip(sigmas[:-1], sigmas[1:]):
        z = next(noises)
        x = x + (a**2 - b**2) * score(a) + (np.sqrt(a**2 - b**2) * z if b > 0 else 0)
        if b > 0:
            z, g = next(noises), score(b)
            eps = 2 * (snr * np.linalg.norm(z) / np.linalg.norm(g)) ** 2
            x = x + eps * g + np.sqrt(2 * eps) * z
    return x


def test_predictor_corrector_in_one_batch(sigmas):
    """Algorithms 2 and 4 of the paper, pictures of other steps and options beside each other."""
    cases = [(sigmas, 0.16), (sigmas[::3], 0.05), (sigmas[4:], 0.3)]
    found, called = sample([sampling.plan('predictor_corrector', s, snr=snr) for s, snr in cases])
    assert (called > 0).sum(0).tolist() == [2 * len(s) - 3 for s, _ in cases]
    for x, (s, snr) in zip(found, cases):
        expected = predictor_corrector(s, snr)
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-11 * np.abs(expected).max())


def gotta_go_fast(sigmas, rtol, atol):
    """Algorithm 1 with both errors' maximum, as the authors' code, and r = 0.9, theta = 0.9."""
    start, end = sigmas[sigmas > 0][[0, -1]] ** 2
    x, time, h, calls = X * np.sqrt(start), start, 0.01 * start, 0
    last = x
    while time > end:
        z = NOISES[calls % len(NOISES)]

        def move(x, time, h=h, z=z):
            return h * (denoise(x, np.sqrt(time), np) - x) / time + np.sqrt(h) * z

        k1 = move(x, time)
        k2 = move(x + k1, time - h)
        calls += 2
        low, high = x + k1, x + (k1 + k2) / 2
        delta = np.maximum(atol, rtol * np.maximum(abs(low), abs(last)))
        error = np.sqrt(np.mean(((low - high) / delta) ** 2))
        if error <= 1:
            x, time, last = high, time - h, low
        h = min(time - end, 0.9 * h * error**-0.9 if error else np.inf)
    return x, calls


def test_gotta_go_fast(sigmas):
    cases = [(sigmas, 0.05, 0.0078), (sigmas, 0.3, 0.05), (sigmas[5:], 0.1, 0.01)]
    found, called = sample([sampling.plan('gotta_go_fast', s, rtol=rtol, atol=atol)
                            for s, rtol, atol in cases])
    for i, case in enumerate(cases):
        x, calls = gotta_go_fast(*case)
        assert (called[:, i] > 0).sum() == calls
        np.testing.assert_allclose(found[i], x, rtol=0, atol=1e-9 * np.abs(x).max())


def test_tcfg():
    """diffusers' TangentialClassifierFreeGuidance: uncond by the first right singular vector, here
    from the 2x2 Gram matrix; through `guided`, with a plain picture beside it."""
    rng = np.random.default_rng(0)
    x, both = rng.normal(size=(2, 4, 4, 3)), rng.normal(size=(2, 2, 4, 4, 3))  # [B,parts,...]
    sigma, scale = np.array([0.7, 3.0]), np.array([4.0, 2.5])
    tables = [guidance_options.table(s, guidance_options.check(options, 1), [1.0, 0.0], [1.0])
              for s, options in zip(scale, ({'tcfg': {}}, {'rescale': 0.0}))]
    guidance = jax.tree.map(lambda a: a[0], guidance_options.stack(tables))
    with jax.enable_x64(True):
        guide = sampling.guided(lambda *_: jnp.asarray(both.reshape(-1, 4, 4, 3)), guidance)
        found, uncond = map(np.asarray, guide(jnp.asarray(x), jnp.asarray(sigma)))
    np.testing.assert_array_equal(uncond, both[:, 0])
    plain = both[1, 0] + scale[1] * (both[1, 1] - both[1, 0])
    np.testing.assert_allclose(found[1], plain, atol=1e-13)
    eps = (x[0] - both[0]).reshape(2, -1)[::-1] / sigma[0]  # cond, uncond
    values, vectors = np.linalg.eigh(eps @ eps.T)
    direction = vectors[:, -1] @ eps / np.sqrt(values[-1])
    damped = eps[1] @ direction * direction
    expected = damped + scale[0] * (eps[0] - damped)
    np.testing.assert_allclose((x[0] - found[0]).ravel() / sigma[0], expected, atol=1e-11)


def test_guidance_stands_where_the_scale_does(load):
    """Its options may change over the steps, an interval switches it off, others act on what it
    gives; of two functions in one request or batch one is refused."""
    load('import jaxsd\n\n@jaxsd.guidance\ndef twice(cond, uncond, scale, gain=2.0):\n'
         '    return uncond + gain * scale * (cond - uncond)\n\n'
         '@jaxsd.guidance\ndef other(cond):\n    return cond\n')
    options = guidance_options.check({'twice': {'gain': [1, 2, 3, 4]}, 'interval': (0, 0.75)}, 4)
    levels = np.array([4.0, 3, 2, 1])
    table = guidance_options.table(2.0, options, np.append(levels, 0), levels)
    cond, uncond = jnp.full((1, 2, 2, 1), 5.0), jnp.full((1, 2, 2, 1), 3.0)
    guidance = guidance_options.stack([table])
    for i, expected in enumerate([2 * 1, 2 * 2, 2 * 3, 1]):
        row = jax.tree.map(lambda a, i=i: a[i], guidance)
        found, _ = sampling.guided(lambda *_: sampling.pair(uncond, cond), row)(cond, levels[i])
        np.testing.assert_allclose(found, 3 + 2 * expected)
    for wrong, match in (({'twice': {}, 'other': {}}, 'other and twice: expected one'),
                         ({'twice': {'gian': 1}}, "'gian': did you mean 'gain'"),
                         ({'twice': {'gain': 'x'}}, "gain='x': expected a finite number"),
                         ({'other': 1}, 'expected a mapping, of nothing')):
        with pytest.raises(ValueError, match=match):
            guidance_options.check(wrong, 4)
    second = guidance_options.table(2.0, guidance_options.check({'other': {}}, 4),
                                    np.append(levels, 0), levels)
    with pytest.raises(ValueError, match='twice and another function: expected one'):
        guidance_options.stack([table, second])
    assert Guidance().function is None


@pytest.mark.parametrize('shift', [1.0, 2.0])
def test_shifted_cosine(shift):
    found = sampling.schedule('shifted_cosine', 9, CONFIG, shift=shift)
    levels = sampling.model_sigmas(CONFIG)

    def time(sigma):  # log SNR = -2 log sigma
        return 2 / np.pi * np.arctan(sigma / shift)

    t = np.linspace(time(levels[-1]), time(levels[0]), 9)
    log_snr = -2 * np.log(np.tan(np.pi * t / 2)) - 2 * np.log(shift)
    np.testing.assert_allclose(found, np.append(np.exp(-log_snr / 2), 0), rtol=1e-12)


def test_gradients_pass_through_steps(sigmas):
    """Also where rows of one picture, or of all, are idle."""
    tables = [sampling.plan('predictor_corrector', sigmas[-n:]) for n in (4, 3)]

    def size(x):
        rows = sampling.stack(tables, 8)
        return jnp.square(sampling.sample(analytic, x, rows, lambda i: jnp.asarray(NOISES[:2])))

    with jax.enable_x64(True):
        x = jnp.asarray(np.stack([X, X]))
        slope = np.asarray(jax.jit(jax.grad(lambda x: size(x).sum()))(x))
        step = 1e-6 * np.ones_like(slope)
        change = (size(x + step).sum() - size(x - step).sum()) / 2
    assert np.isfinite(slope).all()
    np.testing.assert_allclose((slope * step).sum(), change, rtol=1e-6)


def test_names_are_free_or_refused(load):
    text = ('@jaxsd.sampler(name="NAME")\ndef f(sigmas):\n'
            '    return sampling.plan("euler", sigmas)\n')
    head = 'import jaxsd\nfrom jaxsd import sampling\n\n'
    module = load(head + text.replace('NAME', 'mine'))
    assert load(head + text.replace('NAME', 'mine')) is module  # read once
    load('# changed\n' + head + text.replace('NAME', 'mine'))  # and again where it has changed
    for name, found in (('heun', "'heun': there is one"), ('uni_pc', "'uni_pc': there is one"),
                        ('mine', "'mine': there is one"), ('a b', 'letters, digits')):
        with pytest.raises(ValueError, match=f'other.py:4: sampler .*{found}'):
            load(head + text.replace('NAME', name), 'other')
    with pytest.raises(ValueError, match="did you mean 'mine'"):
        jaxsd.Request(sampler='mien')
    request = jaxsd.Request(sampler='mine Karras', guidance_options={'tcfg': {}})
    assert (request.sampler, request.schedule) == ('mine', 'karras')
    assert set(plugins.used(request)) == {'sampler mine', 'guidance tcfg'}


HEAD = 'import jaxsd\nfrom jaxsd.sampling import mix, row\n\n'


@pytest.mark.parametrize('text, match', [
    ('def f(:\n', r'mine.py:4: SyntaxError'),
    ('x = 1 / 0\n', 'mine.py:4: ZeroDivisionError: division by zero'),
    ('@jaxsd.sampler\ndef f(sigmas):\n    return 7\n', "sampler 'f': expected it to yield .*'7'"),
    ('@jaxsd.sampler\ndef f(sigmas):\n    yield row(sigmas[0], mix(x=1))\n    yield sigmas[9]\n',
     'mine.py:7: IndexError: index 9'),
    ('@jaxsd.sampler\ndef f(sigmas):\n    yield dict(sigma=1)\n', 'dicts need a step='),
    ('@jaxsd.sampler\ndef f(sigmas):\n    yield row(sigmas[0], mix(x=float("nan")))\n',
     'its table is not finite'),
    ('@jaxsd.sampler(step=lambda x, y: (x, ()))\ndef f(sigmas):\n    yield dict(sigma=1)\n',
     "takes y, expected some of x, state, row"),
    ('@jaxsd.sampler(step=lambda x, state: x)\ndef f(sigmas):\n    yield dict(sigma=1)\n',
     r'expected its step to give a pair'),
    ('@jaxsd.sampler(step=lambda x, state: (x[:2], state))\ndef f(sigmas):\n'
     '    yield dict(sigma=1)\n', r'first an array like x, \(8, 8, 4\)'),
    ('@jaxsd.sampler(step=lambda x, state: (x, (x, 1)))\ndef f(sigmas):\n'
     '    yield dict(sigma=1)\n', r'a state like the one that it took, \(\)'),
    ('@jaxsd.sampler(step=lambda x, row: (x * row.too, ()))\ndef f(sigmas):\n'
     '    yield dict(sigma=1, to=0)\n', 'mine.py:4: AttributeError.*too'),
    ('@jaxsd.sampler(step=lambda x: (x, ()))\ndef f(sigmas):\n    yield dict(to=0)\n',
     'a dict with sigma in it'),
    ('@jaxsd.sampler(step=lambda x: (x, ()))\ndef f(sigmas):\n    yield dict(sigma=0)\n',
     'expected a sigma above 0 in each row'),
    ('@jaxsd.sampler(init=lambda x: x)\ndef f(sigmas):\n    yield 1\n', 'expected step= beside'),
    ('@jaxsd.schedule\ndef f(steps, config):\n    return [3, 2, 1]\n', 'expected 5 noise levels'),
    ('@jaxsd.schedule\ndef f(steps, config):\n    return range(5)\n', 'strictly decrease'),
    ('@jaxsd.guidance\ndef f(cond, gain):\n    return cond\n', 'a number as the default of gain'),
    ('@jaxsd.guidance\ndef f(cond):\n    return cond.sum()\n', 'expected a picture like cond'),
    ('@jaxsd.guidance\ndef pag(cond):\n    return cond\n', "'pag': there is one of this name"),
])
def test_what_is_wrong_is_told_in_a_line(load, text, match):
    known = [dict(registry) for registry in plugin_page.REGISTRIES]
    with pytest.raises(ValueError, match=match) as error:
        load(HEAD + text)
    assert re.match(r'/\S+/mine\.py:\d+: ', str(error.value)) and '\n' not in str(error.value)
    assert [dict(registry) for registry in plugin_page.REGISTRIES] == known


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match='plugin .*none.py: No such file'):
        jaxsd.load_plugin(tmp_path / 'none.py')


def test_the_hash_is_of_the_code(load):
    text = ('import jaxsd\n\n@jaxsd.sampler\ndef mine(sigmas):\n    """What."""\n'
            '    return jaxsd.sampling.plan("euler", sigmas)\n')
    hashes = []
    for changed in (text, text + '# end\n', text.replace('What', 'Which'),
                    text.replace('euler', 'heun')):
        load('from jaxsd import sampling\n' + changed)
        hashes.append(plugins.used(jaxsd.Request(sampler='mine'))['sampler mine'])
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]


def test_of_a_console_the_code_counts():
    with plugin_page.forgotten():
        found = {}
        exec('import jaxsd\n@jaxsd.schedule\ndef mine(steps, config):\n'
             '    return [*range(steps, 0, -1)]\n', found)
        assert sampling.schedule('mine', 3, CONFIG).tolist() == [3, 2, 1, 0]
        assert len(plugins.used(jaxsd.Request(schedule='mine'))['schedule mine']) == 16
