"""Forward diffusion, its targets, weights and draws, against their definitions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY

from jaxsd import sampling
from jaxsd.config import ControlNetConfig, ScheduleConfig
from jaxsd.models import controlnet, spec
from jaxsd.train import config, losses, methods, optimizers
from jaxsd.train.config import LossConfig, OptimizerConfig

pytestmark = pytest.mark.usefixtures('forgets_programs')
ABAR = jnp.asarray(sampling.alphas_cumprod(ScheduleConfig()), jnp.float32)
T = jnp.array([0, 400, 999])
KINDS = ['epsilon', 'v_prediction', 'sample']


def pair():
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.normal(size=(3, 4, 4, 2)), jnp.float32) for _ in range(2))


@pytest.mark.parametrize('field, table', [
    ('timesteps', losses.TIMESTEPS), ('error', losses.ERRORS), ('objective', losses.OBJECTIVES),
    ('huber_schedule', losses.HUBER_SCHEDULES), ('weighting', losses.WEIGHTINGS)])
def test_settings_name_what_there_is(field, table):
    """The settings are read without JAX, so they list the tables' names themselves."""
    choices = LossConfig.__dataclass_fields__[field].metadata['choices']
    assert set(choices) - {'none'} == set(table)


def test_optimisers_and_methods_are_named_too():
    fields = OptimizerConfig.__dataclass_fields__
    assert set(fields['name'].metadata['choices']) == set(optimizers.OPTIMIZERS)
    assert set(fields['schedule'].metadata['choices']) == set(optimizers.SCHEDULES)
    assert config.METHODS.keys() == methods.METHODS.keys()
    kinds = config.AdapterConfig.__dataclass_fields__['kind'].metadata['choices']
    assert set(kinds) == set(methods.KINDS)


@pytest.mark.parametrize('most', [0.5, 1e3])
def test_gradients_are_clipped_as_by_optax(most):
    rng = np.random.default_rng(0)
    grads = {str(shape): jnp.asarray(rng.normal(size=shape), 'float32')
             for shape in [(), (7,), (5, 3), (64, 8), (3, 3, 32, 8)]}
    norm = np.sqrt(sum(np.square(np.asarray(a, float)).sum() for a in grads.values()))
    np.testing.assert_allclose(jax.jit(optimizers.global_norm)(grads), norm, rtol=1e-6)
    (ours, _), (theirs, _) = (tx.update(grads, tx.init(grads)) for tx in (
        optimizers.clip_by_global_norm(most), optax.clip_by_global_norm(most)))
    for name, a in ours.items():
        np.testing.assert_allclose(a, theirs[name], rtol=1e-6)


def test_noise_takes_over():
    x0, noise = pair()
    x = losses.add_noise(x0, noise, ABAR, T)
    assert np.abs(x[0] - x0[0]).max() < 0.12 < np.abs(x[0] - noise[0]).max()
    assert np.abs(x[2] - noise[2]).max() < 0.25 < np.abs(x[2] - x0[2]).max()


@pytest.mark.parametrize('kind', KINDS)
def test_the_sampler_inverts_the_target(kind):
    """What the loss asks for, the sampler turns back into x0: one convention on both sides."""
    x0, noise = pair()
    target = losses.target(x0, noise, ABAR, T, kind)
    denoise = sampling.denoiser(lambda x, t, i: target, ScheduleConfig(prediction_type=kind))
    sigma = jnp.sqrt((1 - ABAR[T]) / ABAR[T])
    x = x0 + sigma[:, None, None, None] * noise
    np.testing.assert_allclose(denoise(x, sigma), x0, atol=3e-5)


@pytest.mark.parametrize('weighting', list(losses.WEIGHTINGS))
@pytest.mark.parametrize('kind', KINDS)
def test_a_weighting_is_one_for_x0(kind, weighting):
    """A network that errs by d in x0 has the same weighted loss, whatever it predicts."""
    x0, noise = pair()
    signal, sigma = losses.signal_and_noise(ABAR, T)
    x = losses.add_noise(x0, noise, ABAR, T)
    wrong = x0 + 0.01
    said = {'sample': wrong, 'epsilon': (x - signal * wrong) / sigma,
            'v_prediction': (signal * x - wrong) / sigma}[kind]
    error = jnp.square(said - losses.target(x0, noise, ABAR, T, kind)).mean((1, 2, 3))
    weight = losses.weights(ABAR, T, kind, LossConfig(weighting=weighting))
    snr = np.float64(ABAR[T] / (1 - ABAR[T]))
    expected = {'sample': 1, 'epsilon': snr, 'v_prediction': snr + 1, 'min_snr': np.minimum(snr, 5),
                'soft_min_snr': 5 * snr / (snr + 5), 'p2': snr / (1 + snr), 'edm': snr + 4,
                'debiased': np.sqrt(snr)}[weighting]
    np.testing.assert_allclose(weight * error, 1e-4 * expected * np.ones(3), rtol=2e-2)


def test_without_weighting_all_count_the_same():
    for kind in KINDS:
        np.testing.assert_array_equal(losses.weights(ABAR, T, kind, LossConfig()), np.ones(3))


@pytest.mark.parametrize('name, mean', [('uniform', 0.5), ('stratified', 0.5), ('cubic', 0.75),
                                        ('logit_normal', 0.5)])
def test_timesteps_follow_their_distribution(name, mean):
    c = LossConfig(timesteps=name)
    t = np.asarray(losses.draw_timesteps(jax.random.key(0), 4000, c))
    assert t.min() >= 0 and t.max() < 1000
    np.testing.assert_allclose(t.mean() / 1000, mean, atol=0.02)
    spread = {'uniform': 0.289, 'stratified': 0.289, 'cubic': 0.2835, 'logit_normal': 0.208}[name]
    np.testing.assert_allclose(t.std() / 1000, spread, atol=0.01)
    if name == 'stratified':  # one in each of B parts
        np.testing.assert_array_equal(np.sort(losses.draw_timesteps(
            jax.random.key(1), 10, c)) // 100, np.arange(10))
    some = losses.draw_timesteps(jax.random.key(0), 500, dataclasses.replace(
        c, min_timestep=200, max_timestep=300))
    assert 200 <= some.min() and some.max() < 300


def test_noise_is_what_it_is_said_to_be():
    shape, key = (64, 16, 16, 4), jax.random.key(0)
    white = losses.draw_noise(key, shape, LossConfig())
    np.testing.assert_allclose([white.mean(), white.std()], [0, 1], atol=0.01)
    shifted = losses.draw_noise(key, shape, LossConfig(noise_offset=0.5))
    np.testing.assert_allclose(shifted.mean((1, 2)).std(), np.hypot(0.5, 1 / 16), atol=0.04)
    coarse = losses.draw_noise(key, shape, LossConfig(multires_noise_iterations=4))
    np.testing.assert_allclose(coarse.std(), 1, atol=1e-5)
    neighbours = (coarse[:, 1:] * coarse[:, :-1]).mean()
    assert neighbours > 0.03 > 3 * abs((white[:, 1:] * white[:, :-1]).mean())


def test_huber_is_square_below_its_width_and_straight_above():
    d = jnp.array([1e-3, 100.0])
    np.testing.assert_allclose(losses.ERRORS['huber'](d, 0.1), [1e-6, 0.2 * 99.9], rtol=1e-3)
    np.testing.assert_allclose(losses.ERRORS['smooth_l1'](d, 0.1), [1e-5, 2 * 99.9], rtol=1e-3)
    c, t, sigma = LossConfig(huber_c=0.1), jnp.array([0.0, 1.0]), jnp.array([0.0, 1e4])
    for name, first in {'constant': 0.1, 'exponential': 1, 'snr': 1}.items():
        np.testing.assert_allclose(losses.HUBER_SCHEDULES[name](t, sigma, c), [first, 0.1],
                                   rtol=1e-5)


def test_masks_are_boxes_or_whole():
    masks = np.asarray(losses.draw_masks(jax.random.key(0), (400, 32, 24, 3)))
    assert masks.shape == (400, 32, 24, 1) and set(np.unique(masks)) == {0, 1}
    painted = masks.mean((1, 2, 3))
    assert 0.2 < (painted == 1).mean() < 0.33 and painted.min() > 0
    assert 0.2 < painted[painted < 1].mean() < 0.6


@functools.cache
def tiny(version='sd1'):
    """(params, config, batch): a tiny model and four latents with captions."""
    config = TINY[version]
    rng = np.random.default_rng(0)
    return spec.init(0, config), config, {
        'latent': rng.normal(size=(4, 8, 8, 4)).astype(np.float32),
        'tokens': {'text_encoder': rng.integers(0, 500, (4, 1, 16))}}


@pytest.mark.slow
def test_the_caption_and_the_examples_weight_count():
    params, config, batch = tiny()
    loss = jax.jit(lambda b: losses.diffusion(params, config, b, jax.random.key(0))[0])
    other = {'tokens': {'text_encoder': batch['tokens']['text_encoder'][::-1]}}
    assert loss(batch) != loss(batch | other)
    weighted = loss(batch | {'weight': jnp.full(4, 0.5)})
    np.testing.assert_allclose(weighted, 0.5 * loss(batch), rtol=1e-5)


@pytest.mark.slow
def test_rematerialisation_and_given_noise_change_no_gradient():
    params, config, batch = tiny()
    batch = batch | {'noise': np.float32(np.random.default_rng(1).normal(size=(4, 8, 8, 4))),
                     'timesteps': np.array([0, 10, 500, 999])}

    def gradient(remat, key):
        return jax.jit(jax.grad(lambda p: losses.diffusion(
            params | {'unet': p}, config, batch, jax.random.key(key), remat=remat)[0]))(
                params['unet'])

    for a, b in zip(*(jax.tree.leaves(gradient(*case)) for case in ((False, 0), (True, 1)))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


NET = ControlNetConfig(**dataclasses.asdict(TINY['sd2'].unet),
                       conditioning_embedding_out_channels=(8, 8, 16, 16))
TX = optax.adam(1e-2)


@functools.cache
def controlled():
    """(ControlNet's params, batch, step): pictures whose hint says which of two latents they have.
    """
    params, model, _ = tiny('sd2')
    config = model.replace(controlnets=(('hint', NET),))
    kind = np.arange(8) % 2
    latents, hints = np.random.default_rng(0).normal(size=(2, 8, 8, 4)), np.uint8([0, 255])
    batch = {'latent': latents[kind].astype(np.float32),
             'tokens': {'text_encoder': np.random.default_rng(1).integers(0, 500, (8, 1, 16))},
             'hint': hints[kind][:, None, None, None] * np.ones((8, 64, 64, 3), np.uint8)}

    @jax.jit
    def step(net, state, batch, key):
        value, grads = jax.value_and_grad(lambda p: losses.diffusion(
            params | {'controlnet': {'hint': p}}, config, batch, key)[0])(net)
        updates, state = TX.update(grads, state)
        return optax.apply_updates(net, updates), state, value

    return controlnet.init_from_unet(params['unet'], NET, np.random.default_rng(2)), batch, step


@pytest.mark.slow
def test_a_fresh_controlnet_has_the_models_own_loss():
    net, batch, step = controlled()
    params, config, _ = tiny('sd2')
    own = losses.diffusion(params, config, batch, jax.random.key(3))[0]
    np.testing.assert_allclose(step(net, TX.init(net), batch, jax.random.key(3))[2], own, rtol=1e-5)


@pytest.mark.slow
def test_it_learns_what_the_hint_says():
    """With the hints of the other pictures it is wrong: it reads them."""
    net, batch, step = controlled()
    state = TX.init(net)
    for i in range(60):
        net, state, _ = step(net, state, batch, jax.random.key(i))
    other = batch | {'hint': batch['hint'][::-1]}
    own, wrong = (step(net, state, b, jax.random.key(99))[2] for b in (batch, other))
    assert own < 0.8 * wrong, (own, wrong)


@pytest.mark.slow
def test_consistency_wants_neighbouring_levels_to_agree():
    """A student that says the true latents at all levels, and a teacher that does, have no loss."""
    params, config, batch = tiny()
    batch = batch | {'uncond_tokens': batch['tokens']}

    def loss(student, teacher):
        return losses.consistency(student, config, batch, jax.random.key(0), teacher=teacher)[0]

    found = jax.jit(loss)(params, params)
    assert np.isfinite(found) and found > 0
    zero = jax.tree.map(jnp.zeros_like, params['unet'])
    # A network of zeros predicts no noise: x0 = x / signal, and DDIM goes along that line.
    still = jax.jit(loss)(params | {'unet': zero}, params | {'unet': zero})
    assert still < 1e-3 < found


@pytest.mark.slow
def test_preference_moves_away_from_the_rejected_picture():
    params, config, batch = tiny()
    rng = np.random.default_rng(5)
    images = {name: rng.integers(0, 256, (4, 64, 64, 3), np.uint8) for name in ('image', 'hint')}
    batch = {'tokens': batch['tokens']} | images
    c = LossConfig(objective='preference', beta=100.0)

    @jax.jit
    def step(p):
        (value, metrics), grads = jax.value_and_grad(lambda p: losses.preference(
            params | {'unet': p}, config, batch, jax.random.key(0), c, teacher=params),
            has_aux=True)(p)
        return jax.tree.map(lambda p, g: p - 1e-4 * jnp.sign(g), p, grads), value, metrics

    unet, value, metrics = step(params['unet'])
    np.testing.assert_allclose([value, metrics['margin']], [np.log(2), 0], atol=1e-4)
    for _ in range(10):
        unet, value, metrics = step(unet)
    assert value < 0.9 * np.log(2) and metrics['margin'] > 0 and metrics['accuracy'] == 1
