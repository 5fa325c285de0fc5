"""A queue in front of an Engine: bounds, pictures that several ask for, what is going on."""

import concurrent.futures
import math
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxsd.batch.identity import Identity
from jaxsd.run.engine import Engine, Task
from jaxsd.run.request import Request
from jaxsd.serve.metrics import Metrics


class Busy(Exception):
    """The queue is full. seconds: when to come again, from the rate that was measured."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f'the queue is full: come again in {seconds} s')
        self.seconds = seconds


class Stopped(Exception):
    """The server stops, or cannot go on."""


class Result(NamedTuple):
    """image: uint8 [H,W,3]; id: 32 hex digits, see Identity; slots: of the program that made it."""

    image: Any
    id: str
    slots: int


class Job:
    """Pictures asked for together. future: a list of Result, or of what went wrong."""

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids, self.future = ids, concurrent.futures.Future()


class Queue:
    """Takes jobs for an Engine. most: pictures that may wait.

    A short picture passes a longer one that was asked for earlier where fewer pictures came
    between them than it takes fewer model calls.
    """

    def __init__(self, engine: Engine, identity: Identity, metrics: Metrics,
                 most: int = 64) -> None:
        if most < 1:
            raise ValueError(f'queue={most}: expected 1 or more')
        self.engine, self.identity, self.metrics, self.most = engine, identity, metrics, most
        self._lock = threading.RLock()  # guards everything below
        self._tasks, self._jobs = {}, {}  # {id: its run.engine.Task}, {id: [Job that wants it]}
        self._found = {}  # {id: what it came to}, as long as a job wants it
        self._asked = 0  # pictures ever
        self._done = 0  # pictures since there were none
        self._each, self._last = 1.0, None  # s for a picture, a running mean; when one was done
        self._stopping = False

    def warm(self, request: Request) -> None:
        """Make a resolved request's picture, so that its kind is compiled, for one and for many."""
        self.engine.make([request])
        self.engine.warm([request])

    @property
    def alive(self) -> bool:
        """Whether pictures are made and wanted."""
        return not self._stopping and self.engine.alive

    def counts(self) -> tuple[int, int, int, float]:
        """-> pictures that wait, that are being made, that are done since there were none of
        either, and seconds until all are there."""
        waiting, running = self.engine.counts()
        with self._lock:
            return waiting, running, self._done, (waiting + running) * self._each

    def check(self, count: int) -> None:
        """Raise Busy or Stopped where a job of so many new pictures has no chance now."""
        if not self.alive:
            raise Stopped(self._why())
        waiting, _ = self.engine.counts()
        if waiting + count > self.most:
            raise Busy(max(1, math.ceil(waiting * self._each)))

    def _why(self):
        return 'the server is stopping' if self._stopping else (
            'the server cannot make pictures any more and must be restarted')

    def submit(self, requests: Sequence[Request]) -> Job:
        """Resolved requests -> Job. Takes milliseconds.

        Raises Busy, Stopped, and ValueError for what the model cannot make.
        """
        ids = [self.identity.of(r) for r in requests]
        asked, stages = dict(zip(ids, requests)), {}
        while True:  # what is on its way now may be done, and forgotten, when the others are ready
            with self._lock:
                new = [key for key in asked if key not in self._tasks]
                if all(key in stages for key in new):
                    job = self._begin(ids, [(key, Task(asked[key], *stages[key])) for key in new])
                    break
            stages |= {key: self.engine.prepare(asked[key]) for key in new if key not in stages}
        self._gauge()
        return job

    def _begin(self, ids, new):
        """A Job of these ids; new: [(id, Task)] of those that are not on their way. The lock is
        held."""
        self.check(len(new))
        if not self._tasks:
            self._done, self._last = 0, time.monotonic()
        job = Job(ids)
        for key in dict.fromkeys(ids):
            self._jobs.setdefault(key, []).append(job)
        for key, task in new:
            self._tasks[key] = task
            self._asked += 1
            task.turn = self._asked + task.total
            task.future.add_done_callback(lambda future, key=key: self._settle(key, future))
        self._count('shared', len(ids) - len(new))
        self.engine.add([task for _, task in new])
        return job

    def cancel(self, job: Job) -> bool:
        """Take back what nobody else wants, begun or not -> whether the job was still open."""
        with self._lock:
            if not job.future.cancel():
                return False
            for key in dict.fromkeys(job.ids):
                if job in self._jobs.get(key, ()):
                    self._jobs[key].remove(job)
                    if not self._jobs[key]:
                        self._tasks[key].cancel()
        self._gauge()
        return True

    def stop(self) -> None:
        """Take no more, give up jobs of which nothing has begun, finish the others."""
        with self._lock:
            self._stopping = True
            begun = self._found.keys() | {key for key, task in self._tasks.items() if task.begun}
            kept = {key for some in self._jobs.values() for job in some for key in job.ids
                    if not begun.isdisjoint(job.ids)}
            for key, task in list(self._tasks.items()):
                if key not in kept:
                    task.cancel()
            left = [task.future for task in self._tasks.values()]
        concurrent.futures.wait(left)

    def _settle(self, key, future):
        """A picture has come to its end: the jobs of which it was the last are done."""
        task = self._tasks[key]
        if future.cancelled():
            outcome, what = Stopped(self._why()), 'cancelled'
        elif error := future.exception():
            traceback.print_exception(error)
            outcome, what = error, 'failed'
        else:
            own = key if task.slots == self.engine.slots_of(task.request) else (
                self.identity.of(task.request, task.slots))
            outcome, what = Result(future.result(), own, task.slots), 'made'
        with self._lock:
            self._tasks.pop(key)
            jobs = self._jobs.pop(key)
            now = time.monotonic()
            if what != 'cancelled':
                self.metrics.queueing.observe((task.begun or now) - task.arrived)
                self.metrics.making.observe(now - (task.begun or now))
                self._each += 0.2 * (now - self._last - self._each)
                self._last = now
            self._done += 1
            self._count(what)
            if jobs:  # else it was taken back, and an earlier one may have been made
                self._found[key] = outcome
            for job in jobs:
                if not job.future.done() and all(k in self._found for k in job.ids):
                    job.future.set_result([self._found[k] for k in job.ids])
            wanted = {k for some in self._jobs.values() for job in some for k in job.ids}
            self._found = {k: found for k, found in self._found.items() if k in wanted}
        self._gauge()

    def _count(self, outcome, number=1):
        self.metrics.outcomes.labels(outcome).inc(number)

    def _gauge(self):
        waiting, running = self.engine.counts()
        self.metrics.queue.set(waiting)
        self.metrics.running.set(running)
