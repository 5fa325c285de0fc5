"""The queue and its microbatches, with an engine that waits to be told."""

import concurrent.futures
import threading

import numpy as np
import pytest
from servers import MICROBATCH, colour, gated, wait_for

import jaxsd
from jaxsd.serve import batcher as room
from jaxsd.serve.metrics import Metrics


@pytest.fixture(scope='module')
def parts():
    return gated()


@pytest.fixture
def engine(parts):
    engine = parts[0]
    engine.started.clear()
    engine.gate.set()
    engine.broken = None
    return engine


@pytest.fixture
def make(engine, parts):
    made = []

    def make(**options):
        made.append(room.Batcher(engine, parts[1], Metrics(MICROBATCH), **options))
        [first] = engine.resolve([jaxsd.Request('cat', seed=999, steps=4, width=64, height=64)])
        made[-1].warm(first)
        engine.started.clear()
        engine.gate.clear()
        return made[-1]
    yield make
    engine.gate.set()
    for batcher in made:
        batcher.stop()


def ask(engine, batcher, *seeds, **fields):
    fields = {'steps': 4, 'width': 64, 'height': 64, **fields}
    return batcher.submit(engine.resolve([jaxsd.Request('cat', seed=s, **fields) for s in seeds]))


def outcomes(batcher, name):
    return batcher.metrics.outcomes.labels(name)._value.get()


def test_microbatches_fill_while_the_device_is_busy(engine, make):
    batcher = make(linger=0)
    jobs = [ask(engine, batcher, 0)]
    wait_for(lambda: engine.started == [[0]])
    jobs += [ask(engine, batcher, seed) for seed in (1, 2, 3)]
    assert engine.started == [[0]]  # three are no full microbatch: they wait for more
    jobs.append(ask(engine, batcher, 4))
    wait_for(lambda: len(engine.started) == 2)  # a full one is started ahead
    assert sorted(engine.started[1]) == [1, 2, 3, 4]
    jobs.append(ask(engine, batcher, 5, 6, 7, 8))
    assert len(engine.started) == 2  # not two ahead
    engine.gate.set()
    for job in jobs:
        for made, picture in zip(job.future.result(10), job.pictures):
            np.testing.assert_array_equal(made.image, colour(picture.request.seed))
            assert made.id == batcher.identity.of(picture.request)
    assert outcomes(batcher, 'made') == 9


def test_lingering_only_where_more_is_on_its_way(engine, make):
    batcher = make(linger=30)
    ask(engine, batcher, 0)
    wait_for(lambda: engine.started == [[0]], 5)  # nobody else about: at once
    engine.gate.set()
    with batcher._on_its_way():  # somebody's request is being read
        ask(engine, batcher, 1)
        ask(engine, batcher, 2)
        assert not [s for s in engine.started if 1 in s or 2 in s]
    wait_for(lambda: [1, 2] in engine.started, 5)


def test_the_oldest_goes_first_and_like_lengths_together(engine, make):
    batcher = make(queue=64, linger=0)
    ask(engine, batcher, 0)
    wait_for(lambda: engine.started == [[0]])
    ask(engine, batcher, 1, steps=20, width=32)  # another kind, which nothing is known of
    for seed in range(2, 14):
        ask(engine, batcher, seed, steps=(4, 20)[seed % 2])
    wait_for(lambda: engine.started == [[0], [1]])  # the unknown kind compiles beside
    engine.gate.set()
    wait_for(lambda: sum(map(len, engine.started)) == 14)
    assert [1] in engine.started
    rest = [sorted(s) for s in engine.started if s not in ([0], [1])]
    assert rest[0] == [2, 4, 6, 8]  # the oldest, and those of its steps
    assert rest[1] == [3, 5, 7, 9]


def test_nothing_starves(engine, make):
    """One of a rare kind, among others without end."""
    batcher = make(queue=64, linger=0)
    ask(engine, batcher, 0, width=32)  # its kind is known from here
    engine.gate.set()
    wait_for(lambda: outcomes(batcher, 'made') == 1)
    engine.gate.clear()
    for seed in range(1, 9):
        ask(engine, batcher, seed)
    rare = ask(engine, batcher, 100, width=32)
    more = [ask(engine, batcher, seed) for seed in range(9, 40)]
    engine.gate.set()
    rare.future.result(10)
    wait_for(lambda: all(job.future.done() for job in more))
    place = next(i for i, seeds in enumerate(engine.started) if 100 in seeds)
    assert place <= 10, engine.started


def test_every_device_works(engine, parts):
    two = gated(devices=engine.devices * 2)[0]
    batcher = room.Batcher(two, parts[1], Metrics(MICROBATCH), queue=64, linger=0)
    [first] = two.resolve([jaxsd.Request('cat', seed=0, steps=4, width=64, height=64)])
    batcher.warm(first)
    assert two.started == [[0], [0]]
    two.gate.clear()
    jobs = [ask(two, batcher, seed) for seed in range(1, 30)]
    wait_for(lambda: batcher.counts()[1] >= 8)
    two.gate.set()
    for seed, job in enumerate(jobs, 1):
        np.testing.assert_array_equal(job.future.result(10)[0].image, colour(seed))
    assert sorted(sum(two.started[2:], [])) == list(range(1, 30))
    batcher.stop()


def test_a_second_lane_takes_full_microbatches_only(parts):
    """Beside another a part of one would take time from it, and might have grown full."""
    both = gated(at_once=2)[0]
    batcher = room.Batcher(both, parts[1], Metrics(MICROBATCH), queue=64, linger=0)
    [first] = both.resolve([jaxsd.Request('cat', seed=0, steps=4, width=64, height=64)])
    batcher.warm(first)
    both.gate.clear()
    ask(both, batcher, 1)
    wait_for(lambda: both.started == [[0], [1]])
    last = ask(both, batcher, 2)
    for seed in range(3, 6):
        assert len(both.started) == 2
        last = ask(both, batcher, seed)
    wait_for(lambda: [sorted(s) for s in both.started[2:]] == [[2, 3, 4, 5]])
    both.gate.set()
    np.testing.assert_array_equal(last.future.result(10)[0].image, colour(5))
    batcher.stop()


def test_the_same_picture_is_made_once(engine, make):
    batcher = make(linger=0)
    ask(engine, batcher, 50)
    wait_for(lambda: engine.started == [[50]])
    jobs = [ask(engine, batcher, 7), ask(engine, batcher, 7, 8), ask(engine, batcher, 50)]
    assert batcher.cancel(jobs[0])  # the second wants it still
    engine.gate.set()
    assert len(jobs[1].future.result(10)) == 2 and len(jobs[2].future.result(10)) == 1
    assert engine.started == [[50], [7, 8]]
    assert outcomes(batcher, 'shared') == 2 and outcomes(batcher, 'cancelled') == 0


def test_cancelled_before_it_began_is_not_made(engine, make):
    batcher = make(linger=0)
    begun = ask(engine, batcher, 0)
    wait_for(lambda: engine.started == [[0]])
    waiting = ask(engine, batcher, 1, 2)
    assert batcher.cancel(waiting) and batcher.cancel(begun)
    assert batcher.counts()[:2] == (0, 1)
    engine.gate.set()
    ask(engine, batcher, 3).future.result(10)
    assert engine.started == [[0], [3]]
    assert [outcomes(batcher, n) for n in ('cancelled', 'unwanted', 'made')] == [2, 1, 1]


def test_a_full_queue_says_when_to_come_again(engine, make):
    batcher = make(queue=4, linger=0)
    ask(engine, batcher, 0)
    wait_for(lambda: engine.started == [[0]])
    batcher._each = 3.0  # seconds a picture
    ask(engine, batcher, 1, 2, 3)
    with pytest.raises(room.Busy) as error:
        ask(engine, batcher, 4, 5)
    assert error.value.seconds == 9
    assert batcher.counts()[:2] == (3, 1)  # none of the job was taken
    ask(engine, batcher, 3)  # the same one takes no place


def test_what_the_device_raises_is_told_and_ends_nothing(engine, make):
    batcher = make(linger=0)
    engine.gate.set()
    engine.broken = RuntimeError('RESOURCE_EXHAUSTED: out of memory')
    [found] = ask(engine, batcher, 0).future.result(10)
    assert isinstance(found, RuntimeError)
    engine.broken = None
    [found] = ask(engine, batcher, 1).future.result(10)
    assert found.id and batcher.alive
    with pytest.raises(ValueError, match='adapter'):
        batcher.submit(engine.resolve([jaxsd.Request('<lora:x:1>', width=64, height=64)]))


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_a_worker_that_dies_gives_everything_up(engine, make, monkeypatch):
    batcher = make(linger=0)
    running = ask(engine, batcher, 0)
    wait_for(lambda: engine.started == [[0]])
    waiting = ask(engine, batcher, 1)
    monkeypatch.setattr(batcher, '_next', lambda device: 1 / 0)
    with batcher._changed:
        batcher._notify()
    for job in (running, waiting):
        assert isinstance(job.future.result(10)[0], room.Stopped)
    assert not batcher.alive
    with pytest.raises(room.Stopped):
        ask(engine, batcher, 2)


def test_stop_finishes_what_runs(engine, make):
    batcher = make(linger=0)
    running = ask(engine, batcher, 0)
    wait_for(lambda: engine.started == [[0]])
    waiting = ask(engine, batcher, 1)
    stopping = threading.Thread(target=batcher.stop)
    stopping.start()
    assert isinstance(waiting.future.result(10)[0], room.Stopped)
    assert stopping.is_alive() and not running.future.done()
    with pytest.raises(room.Stopped):
        ask(engine, batcher, 2)
    engine.gate.set()
    assert running.future.result(10)[0].id
    stopping.join(10)
    assert not stopping.is_alive()


def test_many_threads_lose_nothing(engine, make):
    batcher = make(queue=1000)
    engine.gate.set()

    def client(number):
        for seed in range(10):
            job = ask(engine, batcher, 10 * number + seed, 500 + seed, steps=4 + seed % 3)
            if seed % 4 == 3 and batcher.cancel(job):
                continue
            for made, picture in zip(job.future.result(30), job.pictures, strict=True):
                np.testing.assert_array_equal(made.image, colour(picture.request.seed))
        return number

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(client, range(8))) == list(range(8))
    assert all(len(seeds) <= MICROBATCH for seeds in engine.started)
    wait_for(lambda: batcher.counts()[:2] == (0, 0))
