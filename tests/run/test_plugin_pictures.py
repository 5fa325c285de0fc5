"""Samplers and guidance of one's own in the engine: a picture is the same alone and in any slot."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import plugin_page
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxsd
from jaxsd import Request
from jaxsd.run import Engine, inputs, latents, lengthened, networks, resolve

TEXT = '''
import jaxsd


@jaxsd.guidance
def shrunk(cond, uncond, scale, x, sigma, gain=0.9):
    """Not linear, and each picture by its own norms."""
    out = uncond + scale * (cond - uncond)
    return out * (1 + gain * ((cond**2).mean() / (out**2).mean()) ** 0.5) / (1 + gain)
'''


@pytest.fixture(scope='module', autouse=True)
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp('plugins')
    (folder / 'shrunk.py').write_text(TEXT)
    with plugin_page.forgotten():
        for path in [*plugin_page.write(folder), folder / 'shrunk.py']:
            jaxsd.load_plugin(path)
        yield


@pytest.fixture(scope='module')
def engine(tiny_model, examples):
    with Engine(tiny_model('sd1'), slots=3, at_once=1, rows=3) as found:
        yield found


PICTURES = st.tuples(
    st.sampled_from(['ghvb', 'euler', 'predictor_corrector', 'predictor_corrector',
                     'gotta_go_fast']),
    st.integers(2, 9), st.integers(0, 3), st.sampled_from([None, 0.5, 2.0]))


def request_of(sampler, steps, seed, gain):
    options = {'gotta_go_fast': {'rtol': 0.3 + seed, 'max_calls': 10 * steps}}.get(sampler, {})
    guidance = {} if gain is None else {'shrunk': {'gain': gain}}
    if gain == 2 and sampler != 'gotta_go_fast':
        guidance = {'shrunk': {'gain': [gain * i for i in range(steps)]}}
    return Request('a cat', sampler=sampler, steps=steps, seed=seed, sampler_options=options,
                   guidance=1.5 + seed, guidance_options=guidance)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[
    HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(PICTURES, st.sampled_from([0, 0, 0.003, 0.02])), min_size=1, max_size=7))
def test_a_picture_is_the_same_in_any_slot_beside_any_neighbours(engine, arrivals):
    tasks = []
    for asked, pause in arrivals:
        request, = engine.resolve([request_of(*asked)])
        tasks.append((request, engine.submit(request)))
        time.sleep(pause)
    for request, task in tasks:
        image = task.future.result(300)
        np.testing.assert_array_equal(image, engine.make([request])[0])
        assert task.done == task.total


def test_kinds(engine):
    """A table shares the program of all tables, whatever its options; a step or a function has one
    of its own, whatever theirs."""
    def kinds(**fields):
        request, = engine.resolve([Request('a', seed=1, **fields)])
        return engine.survey(request)[0]

    plain, step = kinds(), kinds(sampler='predictor_corrector')
    function = kinds(guidance_options={'shrunk': {}})
    assert kinds(sampler='ghvb', sampler_options={'beta': 0.3}, schedule='shifted_cosine') == plain
    assert kinds(sampler='predictor_corrector', sampler_options={'snr': 0.3}, steps=3) == step
    assert kinds(guidance_options={'shrunk': {'gain': 3}}) == function
    assert len({plain, step, function, kinds(sampler='gotta_go_fast'),
                kinds(sampler='predictor_corrector', guidance_options={'shrunk': {}})}) == 5


@pytest.mark.slow
def test_what_goes_with_steps_of_ones_own(engine):
    """All that changes over the steps, and pictures to start from, where the rows are known."""
    picture, ramp = np.full((64, 64, 3), 90, np.uint8), np.linspace(0, 1, 64)[None].repeat(64, 0)
    fields = [dict(prompt='[cat:dog:2]', guidance=[1.0, 2.0, 3.0, 4.0], noise='torch'),
              dict(image=picture, strength=0.5), dict(image=picture, strength=0.0),
              dict(image=picture, mask=ramp, mask_mode='strength')]
    for more in fields:
        request, = engine.resolve([Request('a cat', seed=3, steps=4).replace(
            sampler='predictor_corrector', **more)])
        other = request.replace(seed=4)
        images = engine.make([other, request, other])
        np.testing.assert_array_equal(images[0], images[2])
        np.testing.assert_array_equal(images[1], engine.make([request])[0])
    free = Request('[cat:dog:2]', seed=1, steps=4, sampler='gotta_go_fast')
    with pytest.raises(ValueError, match='no change over the steps with gotta_go_fast'):
        engine.prepare(*engine.resolve([free]))


@pytest.mark.slow
def test_many_in_one_program(tiny_model):
    """Without the engine: other steps and options side by side, and gradients through them."""
    model = tiny_model('sd1')
    requests = resolve([
        Request('cat', seed=i, steps=2 + i, sampler='predictor_corrector', guidance=1.5 + i,
                guidance_options={'shrunk': {'gain': 0.5}} if i else {}) for i in range(2)],
        model.config)
    data = inputs(model, requests)
    params, config = networks(model, data)

    def ends(scale, data=data):
        guidance = data.steps.guidance._replace(scale=scale)
        return latents(params, data._replace(steps=data.steps._replace(guidance=guidance)), config,
                       64, 64)

    scale = jnp.asarray(data.steps.guidance.scale)
    both = jax.jit(ends)(scale)
    for i, request in enumerate(requests):
        own = inputs(model, [request])
        alone = jax.jit(lambda data: latents(params, data, config, 64, 64))(lengthened(own))
        np.testing.assert_allclose(both[i], alone[0], atol=1e-5 * np.abs(alone[0]).max())
    slope = np.asarray(jax.jit(jax.grad(lambda s: jnp.square(ends(s)).sum()))(scale))
    called = data.rows.sigma > 0
    assert np.isfinite(slope).all() and (np.abs(slope[called]) > 0).all()
    assert not slope[~called].any()


def test_where_weights_are_spread(tiny_model):
    with Engine(tiny_model('sd1'), spread=True) as engine:
        request, = engine.resolve([Request('cat', seed=1, sampler='predictor_corrector')])
        with pytest.raises(ValueError, match='predictor_corrector: expected a sampler without a'):
            engine.prepare(request)
