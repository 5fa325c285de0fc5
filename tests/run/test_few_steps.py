"""Models of few steps: the guidance scale as an input, pictures without a second one, and what a
folder says of how its model is sampled. tests/parity/test_few_steps_parity.py has diffusers'
pipelines."""

import dataclasses
import json
import warnings

import jax
import numpy as np
import pytest
from conftest import TINY

import jaxsd
from jaxsd.models import spec
from jaxsd.run import Request, inputs, latents, networks, resolve
from jaxsd.run.resolving import suit

_latents = jax.jit(latents, static_argnums=(2, 3, 4))
TEXTS = {'prompt': 'red apple', 'seed': 3, 'width': 64, 'height': 64}


@pytest.fixture(scope='module')
def lcm(tiny_model):
    model = tiny_model('sd1')
    config = model.config.replace(unet=dataclasses.replace(
        model.config.unet, time_cond_proj_dim=32))
    return model.replace(config=config, params=spec.init(1, config))


def trailing(name, **more):
    return {'_class_name': f'{name}Scheduler', 'timestep_spacing': 'trailing', **more}


@pytest.mark.slow
def test_the_scale_as_an_input(lcm):
    """Each picture has its own, in one program; the negative prompt does not count; a batch is its
    pictures."""
    requests = [Request(**TEXTS, guidance=scale, steps=steps, **more) for scale, steps, more in (
        (8.5, 4, {}), (1.5, 4, {}), (1.5, 4, {'negative_prompt': 'cat'}), (1.0, 2, {}),
        ([8.5, 2.0, 1.0], 3, {}), (8.5, 4, {'guidance_options': {'interval': (0.0, 0.5)}}))]
    images = jaxsd.generate(lcm, requests)
    np.testing.assert_array_equal(images[1], images[2])
    assert all((images[0] != images[k]).any() for k in (1, 3, 4, 5))
    for request, image in zip(requests, images):
        np.testing.assert_array_equal(jaxsd.generate(lcm, [request])[0], image)
    data = inputs(lcm, resolve(requests, lcm.config))
    assert data.steps.guidance.parts == 1 and data.steps.guidance.embedded.shape == (4, 6)


@pytest.mark.parametrize('fields, named', [
    (dict(guidance_options={'rescale': 0.5}), 'rescale'),
    (dict(sampler='euler_cfg_pp'), r'a CFG\+\+ sampler'),
    (dict(prompt='red AND apple'), 'AND or regions'), (dict(guidance_options={'pag': 1.0}), 'pag')])
def test_what_needs_a_second_picture_is_refused(lcm, fields, named):
    request, = resolve([Request(**TEXTS | fields)], lcm.config)
    with pytest.raises(ValueError, match=f'{named}: expected none with this model, which'):
        inputs(lcm, [request])


@pytest.mark.slow
def test_guidance_of_one_needs_no_second_picture(tiny_model):
    """And comes, beside others, to what it does alone."""
    model = tiny_model('sd1')
    plain = Request(**TEXTS, guidance=1, steps=2, sampler='lcm')

    def parts(*requests):
        data = inputs(model, resolve(requests, model.config))
        return data.steps.guidance.parts, data

    def made(*requests):
        params, config = networks(model, data := parts(*requests)[1])
        return np.asarray(_latents(params, data, config, 64, 64))

    assert parts(plain)[0] == parts(plain.replace(guidance_options={'freeu': (1, 1, 1, 1)}))[0] == 1
    assert parts(plain.replace(sampler='euler'))[0] == 2  # shares the programs of guided pictures
    turbo = model.replace(config=model.config.replace(defaults={'guidance': 1.0}))
    [request] = resolve([plain.replace(sampler='euler')], turbo.config)
    assert inputs(turbo, [request]).steps.guidance.parts == 1
    others = [plain.replace(guidance=4), plain.replace(guidance_options={'rescale': 0.5}),
              plain.replace(sampler='euler_cfg_pp'), plain.replace(guidance=[1, 2])]
    assert [parts(other)[0] for other in others] == [2] * 4
    both = made(plain, others[0])
    assert np.abs(made(plain) - both[:1]).max() <= 1e-6 * np.abs(both).max()
    assert np.abs(both[0] - both[1]).max() > 0.1


def test_what_suits_a_model(tiny_model):
    """USUAL, GUIDANCE by version, what the folder says, what was asked for: the last one counts."""
    config = TINY['sd1']

    def suited(config, **asked):
        found = suit(asked, config)
        return [found.get(name) for name in ('sampler', 'schedule', 'steps', 'guidance')]

    assert suited(config) == ['dpmpp_2m', 'karras', 25, 7.0]
    assert suited(config, sampler='heun', steps=3) == ['heun', 'karras', 3, 7.0]
    turbo = config.replace(defaults={'scheduler': trailing('EulerAncestralDiscrete')})
    assert suited(turbo) == ['euler_ancestral', 'diffusers', 25, 7.0]
    said = turbo.replace(defaults={**turbo.defaults, 'steps': 1, 'guidance': 1.0})
    assert suited(said) == ['euler_ancestral', 'diffusers', 1, 1.0]
    assert suited(said, steps=4, schedule='normal') == ['euler_ancestral', 'normal', 4, 1.0]
    mixed = turbo.replace(defaults={'scheduler': trailing('DDIM', clip_sample=False),
                                    'sampler': 'euler', 'schedule': 'simple'})
    assert suited(mixed) == ['euler', 'simple', 25, 7.0]
    assert suit({}, mixed)['sampler_options'] == suit({}, mixed)['schedule_options'] == {}
    own = config.replace(defaults={'sampler': 'tcd', 'sampler_options': {'gamma': 0.5}, 'steps': 8})
    assert suited(own) == ['tcd', 'karras', 8, 7.0]
    assert suit({}, own)['sampler_options'] == {'gamma': 0.5}
    assert suit({'sampler_options': {'s_noise': 1.1}}, own)['sampler_options'] == {
        'gamma': 0.5, 's_noise': 1.1}
    assert suit({'sampler': 'euler'}, own).get('sampler_options', {}) == {}
    lcm = config.replace(defaults={'scheduler': {'_class_name': 'LCMScheduler'}})
    assert suited(lcm) == ['lcm', 'diffusers', 4, 1.0]
    embedded = config.replace(unet=dataclasses.replace(config.unet, time_cond_proj_dim=8))
    assert suited(embedded) == ['lcm', 'diffusers', 4, 8.5]
    snr = config.replace(schedule=dataclasses.replace(
        config.schedule, rescale_betas_zero_snr=True))
    assert suited(snr) == ['ddim', 'diffusers', 25, 7.0]
    request, = resolve([Request(**TEXTS)], snr)
    assert request.schedule_options['timestep_spacing'] == 'trailing'
    assert request.steps == 25 and resolve([request], snr)[0].sampler == 'ddim'
    with pytest.warns(UserWarning, match="left out: unknown scheduler of diffusers 'DDIMInverse'"):
        assert suited(config.replace(defaults={'scheduler': trailing('DDIMInverse')})) == [
            'dpmpp_2m', 'karras', 25, 7.0]
    with pytest.raises(ValueError, match="unknown sampler in _jaxsd, the defaults .* 'eular'"):
        suit({}, config.replace(defaults={'sampler': 'eular'}))


def test_lists_over_the_steps_wait_for_their_number():
    """Where the model decides the steps, so many values count as it has; others are an error."""
    config = TINY['sd1'].replace(defaults={'steps': 2})
    request = Request(**TEXTS, guidance=[4, 1], guidance_options={'rescale': [0.1, 0.2]})
    assert resolve([request], config)[0].guidance == (4, 1)
    with pytest.raises(ValueError, match='guidance: expected a number or 25 of them'):
        resolve([request], TINY['sd1'])


@pytest.mark.parametrize('layout', ['diffusers', 'single-file'])
@pytest.mark.parametrize('defaults', [
    {}, {'steps': 8, 'guidance': 1.5, 'sampler': 'euler', 'schedule': 'simple'},
    {'schedule': [9.0, 2.0, 0.0], 'steps': 2, 'sampler_options': {'s_churn': 0.5}},
    {'scheduler': {'_class_name': 'TCDScheduler', 'original_inference_steps': 40}, 'steps': 3}])
def test_files_keep_what_suits_the_model(tiny_model, layout, defaults, tmp_path):
    path = tmp_path / ('a' if layout == 'diffusers' else 'a.safetensors')
    model = tiny_model('sd1')
    jaxsd.save(model.replace(config=model.config.replace(defaults=defaults)), path, layout)
    assert jaxsd.load(path, config=None).config.defaults == defaults
    found, = resolve([Request(**TEXTS)], jaxsd.load(path).config)
    assert found.steps == defaults.get('steps', 25)


@pytest.mark.parametrize('entry, said', [
    ([], '_jaxsd: expected an object'),
    ({'step': 4}, "'step' is unknown; expected some of sampler"),
    ({'steps': '4'}, "steps='4' is of the wrong kind"), ({'steps': True}, 'steps=True is of the'),
    ({'schedule': '/etc/a.json'}, 'expected a name, or a list of noise levels'),
    ({'schedule': 'diffusers:/etc'}, 'expected a name, or a list of noise levels'),
    ({'sampler_options': 3}, 'sampler_options=3 is of the wrong kind')])
def test_what_a_folder_may_not_say(tiny_model, entry, said, tmp_path):
    jaxsd.save(tiny_model('sd1'), tmp_path / 'a')
    file = tmp_path / 'a' / 'model_index.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | {'_jaxsd': entry}))
    with pytest.raises(ValueError, match=f'model_index.json: .*{said}') as error:
        jaxsd.load(tmp_path / 'a')
    assert '\n' not in str(error.value)


@pytest.mark.slow
def test_zero_snr_is_sampled_as_its_folder_says(tiny_model, tmp_path):
    """The same before it is written and after."""
    model = tiny_model('sd1')
    config = model.config.replace(schedule=dataclasses.replace(
        model.config.schedule, rescale_betas_zero_snr=True, prediction_type='v_prediction'))
    jaxsd.save(model.replace(config=config), tmp_path / 'a')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        before, after = (resolve([Request(**TEXTS, steps=30)], c)[0]
                         for c in (config, jaxsd.load(tmp_path / 'a').config))
    for name in ('sampler', 'schedule', 'steps', 'guidance', 'sampler_options'):
        assert getattr(before, name) == getattr(after, name)
    assert np.isfinite(jaxsd.generate(model.replace(config=config), [before])).all()


@pytest.mark.slow
def test_timesteps_of_diffusers_beside_others(tiny_model):
    """A batch in which some pictures have timesteps of their own, and each as it is alone."""
    model = tiny_model('sd1')
    plain = Request(**TEXTS, steps=3, sampler='euler', schedule='karras')
    rounded = plain.replace(schedule='diffusers', schedule_options={'use_karras_sigmas': True})
    both = inputs(model, resolve([plain, rounded], model.config))
    assert (both.steps.timestep[:, 0] == -1).all()
    assert (both.steps.timestep[:, 1] == np.round(both.steps.timestep[:, 1])).all()
    assert inputs(model, resolve([plain], model.config)).steps.timestep is None
    images = jaxsd.generate(model, [plain, rounded])
    for request, image in zip((plain, rounded), images):
        np.testing.assert_array_equal(jaxsd.generate(model, [request])[0], image)
    params, config = networks(model, both)
    together = np.asarray(_latents(params, both, config, 64, 64))
    alone = np.asarray(_latents(params, inputs(model, resolve([rounded], model.config)), config,
                                64, 64))
    assert np.abs(together[1] - alone[0]).max() <= 1e-5 * np.abs(alone).max()
