"""The queue in front of an engine that waits to be told."""

import concurrent.futures
import threading

import numpy as np
import pytest
from mains import wait_for
from servers import colour, gated

import jaxsd
from jaxsd.serve.metrics import Metrics
from jaxsd.serve.queue import Busy, Interrupted, Queue, Stopped


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
        made.append(Queue(engine, parts[1], Metrics(), **options))
        engine.gate.clear()
        return made[-1]
    yield make
    engine.gate.set()
    for queue in made:
        queue.stop()


def ask(engine, queue, *seeds, **fields):
    fields = {'steps': 4, 'width': 64, 'height': 64, **fields}
    return queue.submit(engine.resolve([jaxsd.Request('cat', seed=s, **fields) for s in seeds]))


def outcomes(queue, name):
    return queue.metrics.outcomes.labels(name)._value.get()


def test_pictures_come_in_the_order_in_which_they_were_asked_for(engine, make):
    queue = make()
    jobs = [(seeds, ask(engine, queue, *seeds)) for seeds in ((0,), (1, 2), (3,))]
    wait_for(lambda: engine.started == [0])
    assert queue.counts()[:2] == (3, 1)
    engine.gate.set()
    for seeds, job in jobs:
        for seed, made in zip(seeds, job.future.result(10), strict=True):
            np.testing.assert_array_equal(made.image, colour(seed))
    assert engine.started == [0, 1, 2, 3]
    assert outcomes(queue, 'made') == 4
    ids = [job.ids[0] for _, job in jobs]
    assert len(set(ids)) == 3 and jobs[0][1].future.result()[0].id == ids[0]


def test_the_same_picture_is_made_once(engine, make):
    queue = make()
    ask(engine, queue, 50)
    wait_for(lambda: engine.started == [50])
    jobs = [ask(engine, queue, 7), ask(engine, queue, 7, 8), ask(engine, queue, 50)]
    assert queue.cancel(jobs[0])  # the second wants it still
    engine.gate.set()
    assert len(jobs[1].future.result(10)) == 2 and len(jobs[2].future.result(10)) == 1
    assert engine.started == [50, 7, 8]
    assert outcomes(queue, 'shared') == 2 and outcomes(queue, 'cancelled') == 0
    assert len(ask(engine, queue, 7, 7).future.result(10)) == 2
    assert not queue._jobs and not queue._tasks


def test_what_is_cancelled_is_not_made(engine, make):
    """Neither before it began nor after."""
    queue = make()
    begun = ask(engine, queue, 0)
    wait_for(lambda: engine.started == [0])
    waiting = ask(engine, queue, 1, 2)
    assert queue.cancel(waiting) and queue.cancel(begun)
    wait_for(lambda: queue.counts()[:2] == (0, 0))
    engine.gate.set()
    ask(engine, queue, 3).future.result(10)
    assert engine.started == [0, 3]
    assert [outcomes(queue, n) for n in ('cancelled', 'made')] == [3, 1]


def test_what_is_interrupted_comes_as_it_is_by_now(engine, make):
    """To the job that was interrupted; who else wants the picture gets it whole."""
    queue = make()
    job, other = ask(engine, queue, 1, 2, 3), ask(engine, queue, 1)
    wait_for(lambda: engine.started == [1])
    task, seen = queue._tasks[job.ids[0]], threading.Event()
    task.done, half = 2, colour(77)
    task.decode = lambda: (seen.wait(30), (half[None], np.True_))[1]
    assert queue.interrupt(job, 1) and not job.future.done()
    assert queue.interrupt(job, 1) and not job.future.done()
    engine.gate.set()
    assert other.future.result(10)[0].unfinished is None
    assert ask(engine, queue, 3).future.result(10)  # the third is done, the first being decoded
    assert not job.future.done() and not queue.interrupt(other)
    seen.set()
    first, second, third = job.future.result(10)
    assert first.unfinished == (2, task.total) and first.id == '' and isinstance(
        second, Interrupted)
    np.testing.assert_array_equal(first.image, half)
    np.testing.assert_array_equal(third.image, colour(3))
    assert third.unfinished is None and engine.started[:2] == [1, 3]
    np.testing.assert_array_equal(other.future.result()[0].image, colour(1))
    assert not queue._jobs and not queue._tasks


@pytest.mark.parametrize('decoded', [(colour(1)[None], np.False_), None])
def test_what_is_interrupted_and_cannot_be_seen(engine, make, decoded):
    """Latents that are not finite; a decoder that fails."""
    queue = make()
    job = ask(engine, queue, 1)
    wait_for(lambda: engine.started == [1])
    queue._tasks[job.ids[0]].decode = lambda: decoded
    assert queue.interrupt(job)
    assert isinstance(job.future.result(10)[0], Interrupted if decoded else TypeError)


def test_a_full_queue_says_when_to_come_again(engine, make):
    queue = make(most=4)
    ask(engine, queue, 0)
    wait_for(lambda: engine.started == [0])
    queue._each = 3.0  # seconds a picture
    ask(engine, queue, 1, 2, 3)
    with pytest.raises(Busy) as error:
        ask(engine, queue, 4, 5)
    assert error.value.seconds == 9
    assert queue.counts()[:2] == (3, 1)  # none of the job was taken
    ask(engine, queue, 3)  # the same one takes no place


def test_what_the_device_raises_is_told_and_ends_nothing(engine, make):
    queue = make()
    engine.gate.set()
    engine.broken = RuntimeError('RESOURCE_EXHAUSTED: out of memory')
    [found] = ask(engine, queue, 0).future.result(10)
    assert isinstance(found, RuntimeError)
    engine.broken = None
    [found] = ask(engine, queue, 1).future.result(10)
    assert found.id and queue.alive
    with pytest.raises(ValueError, match='adapter'):
        queue.submit(engine.resolve([jaxsd.Request('<lora:x:1>', width=64, height=64)]))


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_a_worker_that_dies_gives_everything_up(monkeypatch):
    engine, identity = gated()
    engine.gate.clear()
    queue = Queue(engine, identity, Metrics())
    running = ask(engine, queue, 0)
    wait_for(lambda: engine.started == [0])
    waiting = ask(engine, queue, 1)
    monkeypatch.setattr(engine, '_wait', lambda lane: 1 / 0)
    engine.gate.set()
    assert running.future.result(10)
    assert isinstance(waiting.future.result(10)[0], Stopped)
    assert not queue.alive
    with pytest.raises(Stopped, match='cannot make pictures any more'):
        ask(engine, queue, 2)


def test_stop_finishes_what_runs(engine, make):
    queue = make()
    running = ask(engine, queue, 0)
    wait_for(lambda: engine.started == [0])
    waiting = ask(engine, queue, 1)
    stopping = threading.Thread(target=queue.stop)
    stopping.start()
    assert isinstance(waiting.future.result(10)[0], Stopped)
    assert stopping.is_alive() and not running.future.done()
    with pytest.raises(Stopped):
        ask(engine, queue, 2)
    engine.gate.set()
    assert running.future.result(10)[0].id
    stopping.join(10)
    assert not stopping.is_alive()


def test_a_shared_picture_that_is_done_before_the_others_are_prepared(engine, make, monkeypatch):
    queue, prepare = make(), engine.prepare
    engine.gate.clear()
    first = ask(engine, queue, 1)

    def slow(request):
        engine.gate.set()
        first.future.result(30)
        wait_for(lambda: not queue._tasks)
        return prepare(request)

    monkeypatch.setattr(engine, 'prepare', slow)
    both = ask(engine, queue, 1, 2)
    assert [made.id for made in both.future.result(30)] == both.ids


def test_a_picture_that_is_asked_for_again_and_taken_back_stays_made(engine, make):
    queue = make()
    engine.gate.clear()
    both = ask(engine, queue, 1, 2)
    wait_for(lambda: engine.started == [1])
    task = queue._tasks[both.ids[0]]
    task.settle(colour(1))
    wait_for(lambda: both.ids[0] in both.found)
    assert queue.cancel(ask(engine, queue, 1))
    engine.gate.set()
    for made, seed in zip(both.future.result(30), (1, 2), strict=True):
        np.testing.assert_array_equal(made.image, colour(seed))


def test_many_threads_lose_nothing(engine, make):
    queue = make(most=1000)
    engine.gate.set()

    def client(number):
        for seed in range(10):
            seeds = 10 * number + seed, 500 + seed
            job = ask(engine, queue, *seeds, steps=4 + seed % 3)
            if seed % 4 == 3 and queue.cancel(job):
                continue
            for made, asked in zip(job.future.result(30), seeds, strict=True):
                np.testing.assert_array_equal(made.image, colour(asked))
        return number

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(client, range(8))) == list(range(8))
    wait_for(lambda: queue.counts()[:2] == (0, 0))
    assert not queue._jobs and not queue._tasks
