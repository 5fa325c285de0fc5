"""Jobs and their ids, what goes wrong with them, what they cost, how much memory a run takes."""

import functools
import json
import pathlib
import re

import jax
import numpy as np
import pytest
import tiny_ip_adapters
from flax import traverse_util
from mains import ROOT, run_code
from run.test_engine import _requests

import jaxsd
from jaxsd import Request
from jaxsd.batch import cost, folder, plan, runner
from jaxsd.batch.identity import Identity
from jaxsd.models import spec, unet, vae
from jaxsd.run import Engine
from jaxsd.run import engine as module


@pytest.fixture(scope='module')
def engine(tiny_model):
    with Engine(tiny_model('sd1'), slots=3) as found:
        yield found


def test_jobs_in_order(engine):
    requests = _requests(8) + [Request('a AND b', seed=1), Request('a', seed=2, width=63)]
    some = runner.jobs(engine, Identity(engine.nets[0], slots=3), requests + requests[:2])
    assert len(some) == 10  # the same request twice is one picture
    ordered = runner.in_order(some)
    assert 'width=63: expected a multiple of 8' in str(ordered[0].error)
    assert sorted(job.number for job in ordered) == list(range(10))
    kinds = [job.kinds for job in ordered[1:]]
    assert len(set(kinds)) == 2 == 1 + sum(a != b for a, b in zip(kinds, kinds[1:]))
    for kind in set(kinds):
        calls = [job.calls for job in ordered if job.kinds == kind]
        assert calls == sorted(calls, reverse=True)


def test_one_survey_for_all_seeds(engine, monkeypatch):
    seen = []
    monkeypatch.setattr(engine, 'survey', lambda r: seen.append(r) or Engine.survey(engine, r))
    requests = [Request(prompt, seed=i, steps=2) for prompt in ('a', 'b [c:d:1]') for i in range(5)]
    some = runner.jobs(engine, Identity(engine.nets[0], slots=3), requests)
    assert [r.prompt for r in seen] == ['a', 'b [c:d:1]']
    assert [(job.request.seed, job.kinds, job.calls) for job in some] == [
        (r.seed, *Engine.survey(engine, r)) for r in engine.resolve(requests)]


@pytest.mark.slow
def test_wrong_values_stop_nothing(engine, tmp_path):
    """Each field with values that it cannot have: an entry or a job with one line that says why."""
    values = (5, 'x', '', [1], {'a': 1}, None, True, -1, 0.5, [[1]], [], {}, 2**70, [1, 2, 3, 4],
              [None], {'a': [1]}, '\0', '\ud800', 1e30, [[1, 2]], [[['a', 1.0]]], [['a', 1]])
    picture = str(ROOT / 'docs/examples/apple.png')
    bases = ({'prompt': 'cat'}, {'prompt': 'cat', 'image': picture,
                                 'mask': str(ROOT / 'docs/examples/mask.png')})
    nested = [{'controls': [{'net': 'x', 'image': 'y', name: value}]} for value in values
              for name in ('net', 'image', 'scale', 'start', 'end', 'guess')]
    nested += [{'guidance_options': {name: value}} for value in values
               for name in ('rescale', 'perp_neg', 'freeu', 'apg', 'interval', 'pag', 'sag')]
    nested += [{'sampler': sampler, 'sampler_options': {name: value}} for value in values
               for sampler in ('dpmpp_2m', 'restart', 'unipc', 'dpm_adaptive')
               for name in ('order', 'eta', 's_noise', 'variant', 'segments', 'rtol')]
    nested += [{'schedule_options': {name: value}} for value in values
               for name in ('rho', 'denoise', 'convention', 'discard_penultimate')]
    lines = [{**base, **more} for base in bases for more in (*nested, *(
        {name: value} for name in Request.__dataclass_fields__ for value in values))]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    items, bad = plan.read(tmp_path / 'a.jsonl', {'steps': 4, 'width': 64, 'height': 64})
    jobs = runner.jobs(engine, Identity(engine.nets[0], slots=3),
                       plan.expand(items, [0], {}))
    failed = [str(job.error) for job in jobs if job.error is not None]
    assert len(items) + len(bad) == len(lines) > 3000
    assert len(bad) > 1000 and 10 < len(failed) < len(jobs)
    assert not [text for text in (*failed, *(each.error for each in bad)) if '\n' in text]


@pytest.mark.slow
@pytest.mark.parametrize('where', ['resolve', 'survey', 'prepare', 'device'])
@pytest.mark.parametrize('error', [
    MemoryError(), MemoryError('Unable to allocate 7.45 GiB'),
    jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\nAt:')])
def test_a_job_that_fills_memory_fails_alone(tiny_model, tmp_path, monkeypatch, where, error):
    """Of the host or of the device; two good ones beside it are made."""
    kind = Engine if where != 'device' else module.Lane
    name = where if where != 'device' else '_begin'
    method = getattr(kind, name)

    def full(self, what, *more):
        some = what if isinstance(what, list) else [getattr(what, 'task', what)]
        if any(getattr(r, 'request', r).width == 72 for r in some):
            raise error
        return method(self, what, *more)

    with Engine(tiny_model('sd1')) as engine:
        requests = [Request('a', seed=i, steps=1, width=w) for i, w in enumerate((64, 72, 64))]
        run = folder.Folder(tmp_path, {'settings': {}})
        some = runner.jobs(engine, Identity(engine.nets[0], slots=1), requests)
        monkeypatch.setattr(kind, name, full)
        if where in ('resolve', 'survey'):
            some = runner.jobs(engine, Identity(engine.nets[0], slots=1), requests)
        assert runner.Runner(engine, run, {}).run(some) == (2, 1)
    told, = (r['error'] for r in folder.read(tmp_path).values() if 'error' in r)
    assert told.startswith('out of memory (') and '\n' not in told
    run.close()


def test_other_errors_stop_the_run(engine, monkeypatch):
    def broken(self, request):
        raise TypeError('a mistake in the code')

    monkeypatch.setattr(Engine, 'survey', broken)
    with pytest.raises(TypeError, match='a mistake'):
        runner.jobs(engine, Identity(engine.nets[0], slots=3), [Request('a')])


def test_ids(tiny_model, tmp_path):
    model = tiny_model('sd1')
    ids = Identity(model, slots=8)
    engine = Engine(model)
    one, = engine.resolve([Request('red apple', seed=1)])
    again, = engine.resolve([Request('red apple', seed=1)])
    assert ids.of(one) == ids.of(again) and re.fullmatch('[0-9a-f]{32}', ids.of(one))
    others = [one.replace(seed=2), one.replace(prompt='red  apple'), one.replace(steps=24),
              one.replace(guidance=7.5), one.replace(sampler_options={'order': 3})]
    assert len({ids.of(r) for r in [one, *others]}) == 6
    assert Identity(model, slots=4).of(one) != ids.of(one)
    params = jax.tree.map(lambda a: a, model.params)
    params['unet']['conv_in']['bias'] = params['unet']['conv_in']['bias'].at[0].add(1e-3)
    assert Identity(model.replace(params=params), slots=8).of(one) != ids.of(one)


def test_ids_are_of_what_files_hold_not_of_their_names(tiny_model, tmp_path):
    from PIL import Image
    model = tiny_model('sd1')
    for name, value in (('a.png', 10), ('b.png', 10), ('c.png', 11)):
        Image.new('RGB', (64, 64), (value, 0, 0)).save(tmp_path / name)
    ids = Identity(model, slots=8)
    a, b, c = (ids.of(r) for r in Engine(model).resolve([
        Request('x', seed=1, image=str(tmp_path / name)) for name in ('a.png', 'b.png', 'c.png')]))
    assert a == b != c


def test_ids_know_image_prompts(tiny_model, tmp_path):
    from PIL import Image
    model, kinds = tiny_model('sd1'), {'base': 'base', 'plus': 'plus'}
    nets = [tiny_ip_adapters.adapters(model.config.unet, tmp_path, tiny_ip_adapters.encoder(seed),
                                      **kinds) for seed in (0, 1)]
    for name, value in (('a.png', 10), ('b.png', 10), ('c.png', 11)):
        Image.new('RGB', (64, 64), (value, 0, 0)).save(tmp_path / name)

    def of(name='a.png', net='base', look=0, **fields):
        own = model.replace(ip_adapters=nets[look])
        prompt = jaxsd.ImagePrompt(net, str(tmp_path / name), **fields)
        one, = Engine(own).resolve([Request('x', seed=1, image_prompts=[prompt])])
        return Identity(own, slots=8).of(one)

    assert of() == of('b.png')
    assert len({of(), of('c.png'), of(net='plus'), of(look=1), of(weight=2), of(end=0.5)}) == 6


def test_ids_know_the_embeddings_in_adapters(tiny_model):
    def of(value, prompt):
        inside = {'mine': jaxsd.Embedding('mine', {'text_encoder': np.full((1, 32), value, 'f4')})}
        model = tiny_model('sd1').replace(adapters={'one': jaxsd.Adapter({}, embeddings=inside)})
        one, = Engine(model).resolve([Request(prompt, seed=1)])
        return Identity(model, slots=8).of(one)

    named = 'a mine <lora:one:1>'
    assert of(1, named) == of(1, named) != of(2, named)
    assert of(1, 'a mine') == of(2, 'a mine')


def test_operations_are_counted():
    def f(x, w):
        def body(x, _):
            return jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x), None
        return jax.lax.scan(body, x, None, length=5)[0] @ w

    x, w = np.zeros((3, 7), np.float32), np.zeros((7, 7), np.float32)
    assert cost.count(f, x, w) == (6 * 2 * 3 * 7 * 7, 0)
    conv = functools.partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding='SAME',
                             dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    image, kernel = np.zeros((2, 8, 8, 5), np.float32), np.zeros((3, 3, 5, 11), np.float32)
    assert cost.count(conv, image, kernel) == (2 * 2 * 8 * 8 * 11 * 3 * 3 * 5, 0)


def test_operations_of_released_models(monkeypatch):
    """SD 1.5's U-Net at 64 x 64 and its decoder, as counted elsewhere: 0.803 and 2.51 TFLOP."""
    monkeypatch.setattr(vae, 'prepared', lambda p: p)  # on CPU that saves operations
    config = jaxsd.read_config('sd15')

    def abstract(part):
        def shape(name, found):
            turned = spec.to_jax(name, np.broadcast_to(np.float32(0), found))
            return jax.ShapeDtypeStruct(turned.shape, np.float32)
        return traverse_util.unflatten_dict({name: shape(name, found) for name, found in spec.spec(
            config)[part].items()}, sep='.')

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, np.float32)

    found, _ = cost.count(lambda p, x, t, c: unet.apply(p, config.unet, x, t, c), abstract('unet'),
                          array(1, 64, 64, 4), array(1), array(1, 77, 768))
    assert found / 1e12 == pytest.approx(0.803, abs=5e-4)
    found, _ = cost.count(lambda p, z: vae.decode(p, config.vae, z), abstract('vae'),
                          array(1, 64, 64, 4))
    assert found / 1e12 == pytest.approx(2.51, abs=5e-3)


MEMORY = """
import os
import sys
import jaxsd
from jaxsd.batch import folder, runner
from jaxsd.batch.identity import Identity
from jaxsd.run import Engine
model, count = jaxsd.load(sys.argv[1]), int(sys.argv[3])
engine, identity = Engine(model), Identity(model, slots=1)
run, held = folder.Folder(sys.argv[2]), []
requests = [jaxsd.Request('red apple', seed=i, steps=1, sampler='euler', width=192, height=192)
            for i in range(count)]
jobs = runner.jobs(engine, identity, requests)

def on_done(job, error):
    with open('/proc/self/statm') as file:
        held.append(int(file.read().split()[1]) * os.sysconf('SC_PAGESIZE'))

assert runner.Runner(engine, run, {}, on_done).run(jobs) == (count, 0)
print(max(held[:count // 4]), max(held))
"""


@pytest.mark.skipif(not pathlib.Path('/proc/self/statm').exists(), reason='reads /proc')
@pytest.mark.slow
def test_memory_does_not_grow_with_the_run(checkpoint, tmp_path):
    """Three quarters of its pictures would be 33 MB."""
    early, late = map(int, run_code(MEMORY, checkpoint, tmp_path / 'run', 400,
                                    XLA_FLAGS='').split())  # compiled as for users: faster pictures
    assert late - early < 16e6
