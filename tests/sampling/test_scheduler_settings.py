"""What a scheduler_config.json can say that is refused, and which scheduler a model needs."""

import json

import numpy as np
import pytest

from jaxsd import sampling
from jaxsd.config import ScheduleConfig
from jaxsd.sampling import schedulers

EDM = ScheduleConfig(edm=True, sigma_max=120.0)


@pytest.mark.parametrize('config, options, match', [
    (EDM, {}, 'EDM model, without betas: expected the scheduler EDMEuler or EDMDPM.*, found DPM'),
    (ScheduleConfig(), {'scheduler': 'EDMEuler'}, 'with betas, not of EDM: expected .*SASolver'),
    (EDM, {'scheduler': 'EDMEuler', 'steps_offset': 1, 'use_karras_sigmas': True},
     'EDMEulerScheduler has no option steps_offset, use_karras_sigmas'),
    (ScheduleConfig(), {'rho': 5.0}, 'DPMSolverMultistepScheduler has no option rho'),
    (EDM, {'scheduler': 'EDMEuler', 'sigma_schedule': 'karas'}, "did you mean 'karras'"),
    (EDM, {'scheduler': 'EDMEuler', 'final_sigmas_type': 'min'}, "did you mean 'sigma_min'"),
    (EDM, {'scheduler': 'EDMEuler', 'rho': 0}, 'rho=0: expected a finite number above 0'),
    (EDM, {'scheduler': 'EDMEuler', 'sigma_min': 200.0}, 'sigma_min=200.0, sigma_max=120.0')])
def test_schedulers_that_do_not_fit(config, options, match):
    with pytest.raises(ValueError, match=match) as error:
        sampling.schedule('diffusers', 8, config, **options)
    assert '\n' not in str(error.value)


def test_ends_of_edm_models():
    """Those of the model without a file, and its class's where a file leaves them out."""
    levels = sampling.schedule('diffusers', 4, EDM, scheduler='EDMEuler')
    np.testing.assert_allclose(levels[[0, -2, -1]], [120, 0.002, 0], rtol=1e-6)
    found = schedulers.level_options({'_class_name': 'EDMEulerScheduler', 'steps_offset': 1})
    assert found == {'scheduler': 'EDMEuler', 'sigma_min': 0.002, 'sigma_max': 80.0}


def test_a_file_is_for_the_models_sigma_data(tmp_path):
    file = tmp_path / schedulers.FILE
    file.write_text(json.dumps({'_class_name': 'EDMEulerScheduler', 'sigma_data': 1.0}))
    with pytest.raises(ValueError, match='is for sigma_data=1.0, and this model has 0.5'):
        schedulers.read_scheduler(tmp_path, EDM)
    assert schedulers.read_scheduler(tmp_path, ScheduleConfig(edm=True, sigma_data=1.0))
    with pytest.raises(ValueError, match='this is a model with betas, not of EDM'):
        sampling.schedule(f'diffusers:{tmp_path}', 8, ScheduleConfig())


@pytest.mark.parametrize('name, settings, match', [
    ('SASolver', {'tau_func': 'lambda t: 1'}, "tau_func='lambda t: 1' of a SASolverScheduler is"),
    ('UniPCMultistep', {'lower_order_final': False}, 'lower_order_final=False .* expected True'),
    ('DPMSolverSDE', {'noise_sampler_seed': 0}, 'noise_sampler_seed=0 .* expected None'),
    ('EDMDPMSolverMultistep', {'thresholding': True}, 'thresholding=True .* expected False'),
    ('EulerDiscrete', {'euler_at_final': True}, 'euler_at_final=True .* expected False')])
def test_settings_that_are_not_implemented(name, settings, match):
    with pytest.raises(ValueError, match=match):
        schedulers.sampler_of({'_class_name': name, **settings})


def test_timesteps_of_edm_models():
    """log(sigma) / 4, in full: no row needs one of its own."""
    found = sampling.called_at('diffusers', 5, EDM, scheduler='EDMDPMSolverMultistep')
    np.testing.assert_allclose(found.timesteps, np.log(found.sigmas[:-1]) / 4)
    assert found.start == np.hypot(120, 1) and not found.unit
