"""generate: data does not recompile, pictures do not depend on their batch, errors are clear."""

import contextlib
import dataclasses
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mains import devices, run_code

import jaxsd
from jaxsd import Request, sampling
from jaxsd.run import replica
from jaxsd.run.inputs import inputs
from jaxsd.run.programs import Programs
from jaxsd.run.resolving import resolve

# Samplers, schedules, step counts, guidance and prompts all differ.
MIXED = [
    Request('red apple', seed=7, steps=4),
    Request('cat', 'dog', seed=2**64 - 1, steps=3, sampler='heun', schedule='normal', guidance=2),
    Request('', seed=4376845645, steps=5, sampler='euler_ancestral', schedule='simple'),
    Request('a dog', seed=0, steps=1, sampler='unipc', schedule='exponential', guidance=1),
    Request('a red cat', 'a', seed=1, steps=3, sampler='dpmpp_sde', eta=0.5),
]


@contextlib.contextmanager
def compilations():
    """Counts whatever XLA compiles inside the block."""
    count = []

    def listen(event, duration, **more):
        if event == '/jax/core/compile/backend_compile_duration':
            count.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _far(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max()


@pytest.mark.slow
def test_pictures_are_data(tiny_model, monkeypatch):
    model = tiny_model('sd1')
    first = Request('red apple', seed=7, steps=4)
    monkeypatch.setattr(replica, 'PROGRAMS', Programs())  # other tests' may be this one
    with compilations() as count:
        image = jaxsd.generate(model, [first])
    assert count, 'the listener must see the first compilation'
    assert image.shape == (1, 64, 64, 3) and image.dtype == np.uint8
    changes = [
        dict(prompt='cat'), dict(negative_prompt='dog'), dict(seed=2**64 - 1), dict(guidance=1.5),
        dict(steps=7), dict(schedule='normal'), dict(sampler='euler_ancestral', eta=0.3),
        dict(sampler='heun', steps=3),
    ]
    changes += [dict(sampler=name, steps=2) for name in sampling.SAMPLERS
                if name not in ('dpm_adaptive', 'pndm')]  # which have steps of their own
    changes += [dict(schedule=name, steps=3) for name in sampling.SCHEDULES if name != 'karras']
    changes += [dict(schedule=[9.0, 2.0, 0.5, 0.0], steps=3), dict(schedule='9,2,0.5,0', steps=3)]
    with compilations() as count:
        for change in changes:
            other = jaxsd.generate(model, [first.replace(**change)])
            assert _far(image, other) > 0, change
        np.testing.assert_array_equal(jaxsd.generate(model, [first]), image)
    assert not count


@pytest.mark.slow
def test_adaptive_steps_beside_tables(tiny_model):
    """dpm_adaptive has no table: its pictures have slots apart, and come back in their places."""
    model = tiny_model('sd1')
    requests = [Request('a', seed=i, steps=3, sampler=name, sampler_options=options)
                for i, (name, options) in enumerate([
                    ('dpm_adaptive', {}), ('euler', {}), ('dpm_adaptive', {'rtol': 0.5}),
                    ('heun', {})])]
    seen = []
    images = jaxsd.generate(model, requests, on_step=lambda *at: seen.append(at))
    assert images.shape == (4, 64, 64, 3) and seen[-1] == (2008, 2008)  # at most 1000 calls each
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    for request, image in zip(requests, images):
        np.testing.assert_array_equal(jaxsd.generate(model, [request])[0], image)


@pytest.mark.slow
@pytest.mark.parametrize('count', [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_picture_does_not_depend_on_its_batch(tiny_model, count, tmp_path):
    model = tiny_model('sd1')
    if count == 1:
        batch = jaxsd.generate(model, MIXED)
    else:
        batch = on_devices(count, tmp_path / 'batch.npy', """
from test_generate import MIXED
seen = []
images = jaxsd.generate(model, MIXED, on_step=lambda done, total: seen.append((done, total)))
assert seen[-1] == (20, 20) and seen == sorted(set(seen)), seen
np.save(path, images)
""")
    assert batch.shape == (5, 64, 64, 3)
    for picture, request in zip(batch, MIXED):
        np.testing.assert_array_equal(picture, jaxsd.generate(model, [request])[0])


def on_devices(count, path, code):
    """Run code in a process with that many devices, `model` being the tiny 1.x one -> what it saves
    at `path`."""
    code = f"""
import conftest, jax, numpy as np, pathlib
import jaxsd
from jaxsd.models import spec
from jaxsd.prompt.tokenizer import Tokenizer
assert jax.local_device_count() == {count}
path = pathlib.Path({str(path)!r})
conftest.write_tokenizer(path.parent / 'tokenizer')
config = conftest.TINY['sd1']
model = jaxsd.Model(config, spec.init(0, config),
                    {{'text_encoder': Tokenizer.from_folder(path.parent / 'tokenizer')}})
""" + code
    here = pathlib.Path(__file__).parent
    run_code(code, **devices(count),
             PYTHONPATH=os.pathsep.join(map(str, (here, here.parent, here.parents[1]))))
    return np.load(path)


@pytest.mark.parametrize('family', ['sdxl'])
def test_sdxl_hears_its_size_ids(tiny_model, family):
    model = tiny_model(family)
    request = Request('cat', seed=1, steps=2)
    image = jaxsd.generate(model, [request])
    assert _far(image, jaxsd.generate(model, [request.replace(original_size=(8, 8))])) > 0
    # No negative prompt is zeros here; a space has no tokens either, but is a prompt.
    assert _far(image, jaxsd.generate(model, [request.replace(negative_prompt=' ')])) > 0


def test_noise_can_be_given(tiny_model):
    model, request = tiny_model('sd1'), Request('cat', seed=3, steps=2)
    with pytest.raises(ValueError, match=r'noise \(1, 4, 8, 4\): expected the shape \(1, 8, 8, 4'):
        jaxsd.generate(model, [request], noise=np.zeros((1, 4, 8, 4)))
    noise = sampling.initial(sampling.keys([3]), (8, 8, 4))
    assert _far(jaxsd.generate(model, [request], noise=noise),
                jaxsd.generate(model, [request])) <= 1


@pytest.mark.slow
@pytest.mark.parametrize('family', ['sd1', 'sdxl'])
def test_float16_draws_what_float32_does(tiny_model, family):
    """With the same values in both; a CPU widens what it cannot compute in 16 bits."""
    model, request = tiny_model(family), Request('a (red:1.2) cat', seed=7, steps=4, guidance=2)
    half = jax.tree.map(lambda a: a.astype(jnp.float16), model.params)
    full = jax.tree.map(lambda a: a.astype(jnp.float32), half)
    found, expected = (jaxsd.generate(model.replace(params=p), [request]) for p in (half, full))
    assert _far(found, expected) <= 4
    assert np.abs(found.astype(int) - expected.astype(int)).mean() < 0.5


def test_nan_in_weights_is_reported(tiny_model):
    model = tiny_model('sd1')
    params = {**model.params, 'unet': jax.tree.map(lambda a: a * jnp.nan, model.params['unet'])}
    with pytest.raises(ValueError, match=r'the picture \(seed 5\) is not finite: the weights'):
        jaxsd.generate(model.replace(params=params), [Request(seed=5, steps=1)])


@pytest.mark.parametrize('requests, message', [
    ([], 'expected at least one, found none'),
    ([Request(width=60)], 'width=60: expected a multiple of 8'),
    ([Request(steps=2000)], 'steps=2000: expected a whole number from 1 to 1000'),
    ([Request(sampler='euler', eta=0.5)], "sampler 'euler' has no option 'eta'"),
    ([Request(schedule_options={'roh': 7})], "schedule 'karras' has no option 'roh'"),
])
def test_requests_that_do_not_fit(tiny_model, requests, message):
    with pytest.raises(ValueError, match=message):
        jaxsd.generate(tiny_model('sd1'), requests)


def test_a_tokenizer_of_another_model_is_refused(tiny_model):
    model = tiny_model('sd1')
    text = dataclasses.replace(model.config.text_encoder, vocab_size=100)
    with pytest.raises(ValueError, match='token 527 is outside its vocabulary of 100'):
        jaxsd.generate(model.replace(config=model.config.replace(text_encoder=text)), [Request()])


def test_inputs_hold_the_whole_seed(tiny_model):
    model = tiny_model('sd1')
    data = inputs(model, resolve([Request(seed=2**64 - 2), Request(seed=5)], model.config))
    assert data.keys.tolist() == [[2**32 - 1, 2**32 - 2], [0, 5]]
    keys = sampling.keys([2**64 - 2, 5])
    np.testing.assert_array_equal(jax.random.key_data(keys), data.keys)
    assert math.isclose(data.sigma[0], 14.6146, rel_tol=1e-4)


def test_a_prompt_is_a_request_and_sizes_may_differ(tiny_model):
    model = tiny_model('sd1')
    requests = [Request('cat', seed=3, steps=2, width=72), Request('cat', seed=3, steps=2)]
    wide, square = jaxsd.generate(model, requests)
    assert wide.shape == (64, 72, 3)
    np.testing.assert_array_equal(jaxsd.generate(model, requests[1])[0], square)
    assert jaxsd.generate(model, ['a', 'b']).shape == (2, 64, 64, 3)
