"""The engine: what a picture's bits do not depend on, how slots are filled and freed."""

import concurrent.futures
import functools
import re
import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mains import devices as on_devices
from mains import run_code

from jaxsd import Request
from jaxsd.run import Engine, replica, sharded
from jaxsd.run import engine as module
from jaxsd.run.programs import Programs

SAMPLERS = ('euler', 'dpmpp_2m', 'heun', 'euler_ancestral')


def _requests(count, **more):
    return [Request(('red apple', 'a cat', 'green dog')[i % 3], seed=i, steps=2 + i % 3,
                    sampler=SAMPLERS[i % 4], guidance=1.5 + i % 5, **more) for i in range(count)]


@pytest.fixture(scope='module')
def engine(tiny_model):
    with Engine(tiny_model('sd1'), slots=3, at_once=1, rows=3) as found:
        yield found


@pytest.fixture(scope='module')
def alone(engine):
    """A request's picture, made with nothing else in the engine; remembered."""
    @functools.cache
    def make(text, steps, sampler, seed):
        return engine.make(engine.resolve([Request(text, steps=steps, sampler=sampler,
                                                   seed=seed)]))[0]
    return make


ARRIVALS = st.lists(st.tuples(
    st.sampled_from(['cat', 'a (red:1.3) dog']), st.integers(1, 11),
    st.sampled_from([*SAMPLERS, 'unipc', 'dpmpp_sde']), st.integers(0, 3), st.sampled_from(
        [0, 0, 0.003, 0.02])), min_size=1, max_size=9)


@pytest.mark.slow
@pytest.mark.usefixtures('optimised')
@settings(max_examples=12, deadline=None, suppress_health_check=[
    HealthCheck.function_scoped_fixture])
@given(ARRIVALS)
def test_a_picture_is_the_same_in_any_slot_beside_any_neighbours(engine, alone, arrivals):
    """Pictures arrive one by one, while others are on their way, and leave when they are done."""
    tasks = []
    for *asked, pause in arrivals:
        text, steps, sampler, seed = asked
        request, = engine.resolve([Request(text, steps=steps, sampler=sampler, seed=seed)])
        tasks.append((asked, engine.submit(request)))
        time.sleep(pause)
    for asked, task in tasks:
        np.testing.assert_array_equal(task.future.result(300), alone(*asked))
        assert task.done == task.total


@pytest.mark.slow
@pytest.mark.parametrize('fields', [
    {'guidance_options': {'rescale': 0.5}}, {'noise': 'torch'}, {'clip_skip': 2},
    {'guidance_options': {'apg': {'momentum': -0.5}}}, {'prompt_2': None, 'prompt': '[cat:dog:2]'},
    {'sampler': 'dpm_adaptive', 'steps': 3},
    {'image': np.full((64, 64, 3), 90, np.uint8), 'strength': 0.5},
    {'image': np.full((64, 64, 3), 90, np.uint8), 'mask': np.eye(64, dtype=np.float32)}])
def test_pictures_of_all_kinds(engine, fields):
    requests = engine.resolve([r.replace(**fields) for r in _requests(5)])
    for image, request in zip(engine.make(requests), requests):
        np.testing.assert_array_equal(image, engine.make([request])[0])


def test_kinds_keep_apart_what_would_be_another_program(engine):
    plain = Request('a', seed=1)
    same = [Request('a', seed=1, steps=99), Request('b c d', seed=2, guidance=1.0),
            Request('a', sampler='heun', schedule='normal')]
    others = [Request('a', seed=1, width=72, height=64), Request('a AND b', seed=1),
              Request('a', seed=1, guidance=1.0, sampler='lcm'),  # no second picture
              Request('[a:b:2]', seed=1), Request('(a:1.2) (b:2) c', seed=1, weighting='compel'),
              Request('a', seed=1, clip_skip=2), Request('a', seed=1, noise='torch'),
              Request('a', seed=1, sampler='dpm_adaptive'), Request(' '.join(['cat'] * 40), seed=1),
              Request('a', seed=1, guidance_options={'rescale': 0.5}),
              Request('a', seed=1, image=np.zeros((64, 64, 3), np.uint8))]
    kinds = [engine.survey(r)[0] for r in engine.resolve([plain, *others])]
    assert len(set(kinds)) == len(kinds)
    assert {engine.survey(r)[0] for r in engine.resolve(same)} == {kinds[0]}


def test_a_lone_picture_costs_one(tiny_model):
    """lone=True: a picture that nothing else waits with has a program of its own, the others share
    one; each has the bits of the slots that its task names."""
    model, pictures = tiny_model('sd1'), {}
    with Engine(model, lone=True) as engine:
        requests = engine.resolve(_requests(9))
        tasks = [engine.submit(requests[0])]
        tasks[0].future.result()
        tasks += [module.Task(r, *engine.prepare(r)) for r in requests[1:]]
        engine.add(tasks[1:])
        for task in tasks:
            pictures.setdefault(task.slots, []).append((task.request, task.future.result()))
    assert [len(pictures[n]) for n in (1, module.CPU_SLOTS)] == [1, 8]
    for slots, made in pictures.items():
        with Engine(model, slots=slots) as engine:
            np.testing.assert_array_equal(engine.make([r for r, _ in made]), [p for _, p in made])


def test_slots_that_suit_a_device():
    assert [module.slots_for('cpu', cells) for cells in (64, 65)] == [module.CPU_SLOTS, 1]
    assert module.slots_for('gpu', 4096) == module.MOST_SLOTS


@pytest.mark.slow
def test_one_compilation_serves_all_of_a_kind(tiny_model, monkeypatch):
    programs = Programs()
    monkeypatch.setattr(replica, 'PROGRAMS', programs)
    for count in (1, 5, 3):
        with Engine(tiny_model('sd1'), slots=2) as engine:
            engine.make(engine.resolve(_requests(count)))
    assert sorted(programs.log) == ['_advance', '_decode', '_encode', '_encode_text']


def test_programs_that_are_not_used_go():
    programs = Programs(most=2)
    for size in (1, 2, 1, 3, 1, 2):
        found = programs.get(jax.numpy.negative, np.zeros(size))
        assert found.call(np.zeros(size)).shape == (size,) and found.result.shape == (size,)
    assert programs.log == ['negative'] * 4  # the second of size 1 was kept, that of 2 was not


def test_programs_are_traced_while_others_compile(monkeypatch):
    programs, gate = Programs(), threading.Event()
    compiled = programs._compile
    monkeypatch.setattr(programs, '_compile', lambda *args: gate.wait(60) and compiled(*args))
    found = [programs.get(jax.numpy.negative, np.zeros(size)) for size in (1, 2, 3)]
    assert [each.result.shape for each in found] == [(1,), (2,), (3,)] and not found[0].failed
    assert programs.get(jax.numpy.negative, np.zeros(2)) is found[1]  # as it is, on its way
    gate.set()
    assert [each.call(np.ones(size)).tolist() for size, each in enumerate(found, 1)] == [
        [-1.0] * size for size in (1, 2, 3)]


def test_what_did_not_compile_is_tried_again():
    programs = Programs(options={'no_such_option': '1'})
    failed = programs.get(jax.numpy.negative, np.zeros(2))
    with pytest.raises(Exception, match='no_such_option'):
        failed.call(np.ones(2))
    programs.options = None
    assert programs.get(jax.numpy.negative, np.zeros(2)).call(np.ones(2)).tolist() == [-1, -1]


@pytest.mark.slow
def test_a_base_and_its_refiner(tiny_model):
    with Engine(tiny_model('sdxl'), tiny_model('refiner'), slots=2) as engine:
        requests = engine.resolve([
            Request('red apple', seed=i, steps=4, switch=0.5, sampler=sampler)
            for i, sampler in enumerate(['euler', 'dpmpp_2m', 'heun'])])
        for image, request in zip(engine.make(requests), requests):
            np.testing.assert_array_equal(image, engine.make([request])[0])


def test_what_is_not_finite_fails_alone(tiny_model):
    model = tiny_model('sd1')
    params = jax.tree.map(lambda a: a, model.params)
    params['vae']['decoder']['conv_in']['bias'] *= np.nan
    with Engine(model.replace(params=params), slots=2) as engine:
        tasks = [engine.submit(r) for r in engine.resolve(_requests(2))]
        for i, task in enumerate(tasks):
            assert f'(seed {i}) is not finite' in str(task.future.exception(300))


@pytest.mark.slow
def test_a_cancelled_picture_frees_its_slot(tiny_model):
    """Half-way, within the rows that are on their way; those that wait go at once."""
    with Engine(tiny_model('sd1'), slots=1, at_once=1, rows=2) as engine:
        long, = engine.resolve([Request('cat', steps=900)])
        engine.make(engine.resolve([Request('cat', steps=1)]))
        half, reached = threading.Event(), []

        def watch(task, look):
            reached.append(task.done)
            if task.done > 20:
                half.set()

        first, second = engine.submit(long, watch), engine.submit(long.replace(seed=1))
        assert half.wait(60) and engine.counts() == (1, 1)
        assert second.cancel() and first.cancel()
        seen = first.done
        after = engine.submit(engine.resolve([Request('dog', steps=1)])[0])
        assert after.future.result(300).shape == (64, 64, 3)
        assert reached[-1] <= seen + 2 * 2 + 2 < 900 and engine.counts() == (0, 0)
        with pytest.raises(concurrent.futures.CancelledError):
            first.future.result()


@pytest.mark.slow
def test_nobody_starves(tiny_model):
    """A third kind waits for one of two to end, and none of theirs overtakes it."""
    with Engine(tiny_model('sd1'), slots=1, at_once=1, rows=2) as engine:
        kinds = [engine.resolve([Request('cat', width=w, steps=40)])[0] for w in (64, 72, 80)]
        engine.make([r.replace(steps=1) for r in kinds])
        ended = []
        tasks = []
        for number, request in enumerate([kinds[0], kinds[1], kinds[2], *kinds[:2] * 3]):
            task = engine.submit(request.replace(seed=number))
            task.future.add_done_callback(lambda _, n=number: ended.append(n))
            tasks.append(task)
        concurrent.futures.wait([task.future for task in tasks])
        assert ended.index(2) <= 3, ended


def test_errors_of_the_device_are_the_pictures(engine, monkeypatch):
    def broken(self, slot):
        raise RuntimeError('RESOURCE_EXHAUSTED: no memory')

    with monkeypatch.context() as patch:
        patch.setattr(module.Lane, '_begin', broken)
        with pytest.raises(RuntimeError, match='RESOURCE_EXHAUSTED'):
            engine.make(engine.resolve(_requests(2)))
    assert len(engine.make(engine.resolve(_requests(2)))) == 2


def test_a_closed_engine(tiny_model):
    engine = Engine(tiny_model('sd1'))
    request, = engine.resolve([Request('cat', steps=900)])
    task = engine.submit(request)
    engine.close()
    assert task.future.cancelled() and not engine.alive
    with pytest.raises(RuntimeError, match='the engine is closed'):
        engine.submit(request)
    with pytest.raises(ValueError, match='slots=0: expected at least one'):
        Engine(tiny_model('sd1'), slots=0)


def test_where_weights_are_spread():
    assert sharded.axis((3, 3, 64, 128), 4) == 3
    assert sharded.axis((1024, 77), 8) == 0
    assert sharded.axis((6, 10), 4) is None and sharded.axis((512,), 4) is None


DEVICES = """
import sys
import jax
import jaxsd
from jaxsd.run import Engine
model = jaxsd.load(sys.argv[1])
spread = sys.argv[2] == 'spread'
engine = Engine(model, slots=2, spread=spread)
assert (engine.slots, engine.capacity) == (2, 2 * len(engine.lanes) * len(engine.devices)
                                           // len(engine.replicas))  # a record keeps the first
requests = engine.resolve([jaxsd.Request(('red apple', 'cat')[i % 2], seed=i, steps=2 + i % 3,
    sampler=('euler', 'dpmpp_2m', 'heun', 'euler_ancestral')[i % 4]) for i in range(8)])
for image in engine.make(requests):
    print('picture', image.tobytes().hex())
params = engine.replicas[0].nets[0].params
print('devices', len(engine.devices), len(engine.replicas))
if spread:
    print('share', sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(params))
          / sum(a.nbytes for a in jax.tree.leaves(params)))
"""


def _pictures(checkpoint, count, how='whole'):
    out = run_code(DEVICES, checkpoint, how, **on_devices(count))
    lines = [line.split() for line in out.splitlines()]
    found = [np.frombuffer(bytes.fromhex(line[1]), np.uint8) for line in lines
             if line[0] == 'picture']
    assert len(np.unique(found, axis=0)) == 8
    return np.array(found), lines


@pytest.fixture(scope='module')
def one_device(checkpoint):
    return _pictures(checkpoint, 1)[0]


@pytest.mark.slow
@pytest.mark.parametrize('devices', [2, pytest.param(8, marks=pytest.mark.slow)])
def test_any_number_of_devices_makes_the_same_bits(checkpoint, one_device, devices):
    found, lines = _pictures(checkpoint, devices)
    assert ['devices', str(devices), str(devices)] in lines
    np.testing.assert_array_equal(found, one_device)


@pytest.mark.slow
def test_spread_weights_make_the_same_pictures(checkpoint, one_device):
    """By a program over several devices, whose last bits may be others; each holds a quarter."""
    found, lines = _pictures(checkpoint, 4, 'spread')
    assert ['devices', '4', '1'] in lines
    assert np.abs(found.astype(int) - one_device).max() <= 1
    assert float(lines[-1][1]) < 0.3


def test_the_loop_has_no_collectives_and_no_callbacks(engine):
    """As compiled for one device, which each of several runs."""
    request, = engine.resolve(_requests(1))
    stage, = engine.prepare(request)[0]
    (_, _, (loop, _), _) = engine.replicas[0].programs(stage).parts
    text = loop.call.as_text()
    assert 'while(' in text
    assert not re.search(r'all-(reduce|gather|to-all)|collective-|reduce-scatter', text)
    assert not re.search('custom_call_target="[^"]*callback', text)
