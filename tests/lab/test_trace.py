"""The trace of one picture."""

import io

import numpy as np
import pytest
from PIL import Image

import jaxsd
from jaxsd import sampling
from jaxsd.lab import trace

REQUEST = jaxsd.Request('red apple', seed=5, steps=4, schedule='karras', guidance=2.0, width=64,
                        height=64)


@pytest.fixture(scope='module')
def model(tiny_model):
    return tiny_model('sd2')


@pytest.mark.slow
def test_walk_ends_in_the_picture_of_generate(model):
    found = trace.trace(model, REQUEST)
    alone = jaxsd.generate(model, [REQUEST])[0]
    assert abs(found.final.astype(int) - alone).max() <= 1  # rounding to uint8
    # the last step to noise level 0 takes what the model predicts
    np.testing.assert_array_equal(found.final, found.denoised[-1])
    sigmas = sampling.schedule('karras', 4, model.config.schedule)
    np.testing.assert_allclose(found.sigma, sigmas[:-1], rtol=1e-6)
    np.testing.assert_allclose(found.timestep[[0, -1]], (999, 0), atol=1e-3)
    assert found.step.tolist() == found.call.tolist() == [1, 2, 3, 4]


def test_samplers_of_two_calls_repeat_a_step(model):
    found = trace.trace(model, REQUEST.replace(sampler='heun'))
    assert found.call.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert found.step.tolist() == [1, 1, 2, 2, 3, 3, 4]


def test_samplers_that_mix_in_the_unguided_output(model):
    request = REQUEST.replace(sampler='euler_cfg_pp', guidance=1.5)
    found, alone = trace.trace(model, request), jaxsd.generate(model, [request])[0]
    assert abs(found.final.astype(int) - alone).max() <= 1


def test_a_sampler_without_a_table_cannot_be_shown(model):
    with pytest.raises(ValueError, match="'dpm_adaptive' chooses its own steps"):
        trace.trace(model, REQUEST.replace(sampler='dpm_adaptive'))


def test_picture_is_a_png_of_the_shown_columns(model):
    found = trace.trace(model, REQUEST)
    sizes = [Image.open(io.BytesIO(trace.picture(found, REQUEST, n))).size for n in (2, 4, 9)]
    assert sizes[0][0] < sizes[1][0] == sizes[2][0]  # there are four calls to show, no more
    assert sizes[0][1] == sizes[1][1]
