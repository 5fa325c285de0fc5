"""Variation seeds, other sizes' seeds, ENSD and generators of the steps, in pictures."""

import dataclasses
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

from jaxsd.run import infotext, invokeai, picture
from jaxsd.run.inputs import inputs
from jaxsd.run.pipeline import advance, encode, encode_text, start
from jaxsd.run.request import Request
from jaxsd.run.resolving import resolve
from jaxsd.sampling import initial, keys, sample, sources

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / 'sampling'))
from golden_cases import denoise  # noqa: E402

SIZE = dict(width=32, height=32, steps=3, seed=7, force_size=True)
SHAPE = 4, 4, 4
GOLDENS = np.load(ROOT / 'goldens' / 'brownian.npz')


def prepared(model, *requests):
    return inputs(model, resolve([Request(**SIZE | fields) for fields in requests], model.config))


@pytest.fixture(scope='module')
def model(tiny_model):
    return tiny_model('sd1')


def latent(model):
    factor = model.config.vae.factor
    return SIZE['height'] // factor, SIZE['width'] // factor, model.config.vae.latent_channels


def test_they_are_data_and_cost_others_nothing(model):
    plain = prepared(model, {})
    assert plain.noise is None and plain.given is None and plain.given_steps is None
    shape = latent(model)
    drawn = np.asarray(initial(keys([7]), shape))
    near, far = (prepared(model, {'subseed': 9, 'subseed_strength': strength}).noise
                 for strength in (1e-6, 1.0))
    np.testing.assert_allclose(near, drawn, atol=1e-4)
    np.testing.assert_allclose(far, np.asarray(initial(keys([9]), shape)), atol=1e-5)
    other = prepared(model, {'seed_resize_from': (16, 16)})
    assert other.noise.shape == drawn.shape and (other.noise != drawn).any()


@pytest.mark.slow
def test_a_batch_with_and_without(model):
    """Each as it is alone: the noise to start from and that of a step."""
    some = [{}, {'subseed': 9, 'subseed_strength': 0.4}, {'noise': 'torch'},
            {'noise': 'philox', 'eta_noise_seed_delta': 31337, 'subseed': 1,
             'subseed_strength': 0.1}, {'eta_noise_seed_delta': 5}]
    some = [one | {'sampler': 'ddpm'} for one in some]
    mixed = prepared(model, *some)
    assert mixed.given.tolist() == [False, True, True, True, True]
    assert mixed.given_steps.tolist() == [False, False, True, True, False]

    def noises(data):
        encoded, x = encode(model.params, model.config, data, encode_text(
            model.params, model.config, data), 32, 32)
        _, seen = advance(model.params, model.config, start(x, data.steps, model.config), encoded,
                          data.steps, info=lambda call: call.noise)
        return np.asarray(x / data.sigma[:, None, None, None]), np.asarray(seen)[:-1]

    together = noises(mixed)
    for i in (1, 2, 4):
        alone = noises(prepared(model, some[i]))
        np.testing.assert_allclose(together[0][i], alone[0][0], atol=1e-6)
        np.testing.assert_allclose(together[1][:, i], alone[1][:, 0], atol=1e-6)
    h, w, c = latent(model)
    expected = [sources.randn('philox', 7 + 31337, (c, h, w), number) for number in range(2)]
    np.testing.assert_allclose(together[1][:2, 3], expected, atol=1e-6)  # begins anew
    expected = [sources.randn('torch', 7, (c, h, w), number) for number in (1, 2)]
    np.testing.assert_allclose(together[1][:2, 2], expected, atol=1e-6)  # goes on
    np.testing.assert_allclose(together[0][4], np.asarray(initial(keys([7]), (h, w, c)))[0],
                               atol=1e-6)
    assert abs(together[1][0, 4] - together[1][0, 0]).max() > 0.5


def test_samplers_with_a_brownian_tree(model):
    """torchsde's numbers stand in the rows that ask for noise."""
    levels = (14.6146, 9.7, 4.25, 1.5, 0.6, 0.0292, 0.0)
    factor = model.config.vae.factor
    fields = {'sampler': 'dpmpp_2m_sde', 'schedule': levels, 'steps': 6, 'noise': 'torch',
              'width': 4 * factor, 'height': 4 * factor}
    data = prepared(model, fields)
    noisy = data.rows.noisy[:, 0]
    assert noisy.sum() == 5
    expected = np.moveaxis(GOLDENS['7 (4, 4, 4)'][[0, 1, 2, 4, 5]], 1, -1)
    np.testing.assert_allclose(data.steps.noise[noisy, 0], expected, atol=1e-6)
    # ENSD does not count there, and a tree may be of another generator.
    same = prepared(model, fields | {'eta_noise_seed_delta': 3})
    np.testing.assert_array_equal(same.steps.noise, data.steps.noise)
    gpu = prepared(model, fields | {'step_noise': 'philox'})
    np.testing.assert_array_equal(gpu.noise, data.noise)
    [one] = sources.brownian('philox', 7, SHAPE, [levels[:2]], (levels[-2], levels[0]))
    np.testing.assert_array_equal(gpu.steps.noise[0, 0], one)
    # A1111's tree is over all levels where a picture to start from leaves out the first.
    image = np.zeros((32, 32, 3), np.uint8)
    a1111 = prepared(model, {
        'sampler': 'dpmpp_2m_sde', 'noise': 'torch', 'image': image, 'strength': 0.5, 'steps': 8,
        'schedule_options': {'convention': 'a1111'}})
    whole = prepared(model, {'sampler': 'dpmpp_2m_sde', 'noise': 'torch', 'steps': 8})
    np.testing.assert_allclose(a1111.steps.noise[0], whole.steps.noise[3], atol=1e-6)


@pytest.mark.parametrize('sampler', ['dpmpp_sde', 'dpmpp_2m_sde', 'dpmpp_3m_sde'])
def test_sde_samplers_are_k_diffusions(model, sampler):
    """From the same seed: its own samplers with torchsde's tree, run once for goldens."""
    factor = model.config.vae.factor
    data = prepared(model, {
        'sampler': sampler, 'schedule': (14.6146, 9.7, 4.25, 1.5, 0.6, 0.0292, 0.0), 'steps': 6,
        'noise': 'torch', 'width': 4 * factor, 'height': 4 * factor,
        'schedule_options': {'discard_penultimate': False} if '3m' in sampler else {}})

    def denoiser(x, sigma, i):
        return denoise(x, sigma.reshape(-1, 1, 1, 1), jnp)

    noise = jnp.asarray(data.steps.noise)
    found = sample(denoiser, data.noise * data.sigma[:, None, None, None], data.rows,
                   lambda i: noise[i])
    expected = np.moveaxis(GOLDENS[f'7 {sampler}'], 1, -1)
    np.testing.assert_allclose(found, expected, atol=4e-6)  # float32's unit at 40, where it begins


@pytest.mark.parametrize('fields, message', [
    ({'subseed_strength': 1.5}, 'subseed_strength=1.5: expected'),
    ({'subseed': -2}, 'subseed=-2: expected a whole number between -1'),
    ({'seed_resize_from': 512}, 'seed_resize_from=512: expected two whole numbers'),
    ({'seed_resize_from': (512, 4)}, 'seed_resize_from=4: expected a whole number between 8'),
    ({'eta_noise_seed_delta': 0.5}, 'eta_noise_seed_delta=0.5: expected a whole number'),
    ({'step_noise': 'threefry'}, "unknown step_noise 'threefry'"),
    ({'noise': 'torch', 'noise_batch': (0, 2), 'subseed_strength': 0.1}, r'noise_batch=\(0, 2\)')])
def test_what_no_picture_can_have(fields, message):
    with pytest.raises(ValueError, match=message):
        Request(**fields)


def test_several_pictures():
    """A1111: the seed counts up, or the subseed where that has a strength."""
    assert [Request(seed=5).numbered(i).seed for i in range(3)] == [5, 6, 7]
    varied = [Request(seed=5, subseed=2**64 - 1, subseed_strength=0.1).numbered(i)
              for i in range(2)]
    assert [(one.seed, one.subseed) for one in varied] == [(5, 2**64 - 1), (5, 0)]
    drawn = resolve([Request(seed=5, subseed_strength=0.1), Request(seed=5)], TINY['sd1'])
    assert drawn[0].subseed >= 0 and drawn[1].subseed == -1


def test_they_are_told_and_read_back():
    request = Request('cat', seed=1, width=64, height=48, guidance=4, steps=3, sampler='dpmpp_sde',
                      schedule='karras', subseed=5, subseed_strength=0.1, step_noise='philox',
                      seed_resize_from=(512, 768), eta_noise_seed_delta=31337, noise='torch')
    text = picture.parameters(request)
    assert ('Variation seed: 5, Variation seed strength: 0.1, Seed resize from: 512x768, '
            'ENSD: 31337, RNG: CPU, Step RNG: NV') in text
    past = infotext.foreign(text)
    assert not past.notes and Request(**past.fields) == request
    ours = infotext.from_texts('a', {'jaxsd': picture.record(request)})
    found = Request(**ours.fields)
    assert all(getattr(found, field.name) == getattr(request, field.name)
               for field in dataclasses.fields(request))


def test_programs_that_draw_steps_elsewhere():
    def a1111(settings):
        return infotext.foreign(f'x\nSteps: 9, Sampler: {settings}, Seed: 1').fields

    assert a1111('DPM++ SDE, RNG: CPU')['step_noise'] == 'philox'  # A1111's tree is on the GPU
    assert 'step_noise' not in a1111('DPM++ SDE') and 'step_noise' not in a1111('Euler a, RNG: CPU')
    new = {'invokeai_metadata': '{"seed": 3, "scheduler": "%s", "rand_device": "cpu"}'}
    for name, noisy in (('euler_a', True), ('dpmpp_2m_sde_k', True), ('euler', False)):
        fields, _, _ = invokeai.read({key: text % name for key, text in new.items()})
        assert (fields.get('step_noise') == 'philox') is noisy
        assert fields.get('eta_noise_seed_delta', 0) == (2**32 - 1 - 3 - 3) * noisy
