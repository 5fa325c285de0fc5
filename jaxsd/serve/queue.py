"""A queue in front of an Engine: bounds, pictures that several ask for, what is going on."""

import concurrent.futures
import math
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsd.batch.identity import Identity
from jaxsd.images.reading import Picture
from jaxsd.run.engine import Engine, Task
from jaxsd.run.image_conditioning import InitImage, paste_back
from jaxsd.run.replica import Stage
from jaxsd.run.request import Request
from jaxsd.serve.metrics import Metrics
from jaxsd.serve.previews import Previews
from jaxsd.weights.model import Network

PAUSE = 5  # seconds, see Queue.warm


class Busy(Exception):
    """The queue is full. seconds: when to come again, from the rate that was measured."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f'the queue is full: come again in {seconds} s')
        self.seconds = seconds


class Stopped(Exception):
    """The server stops, or cannot go on."""


class Interrupted(Exception):
    """A picture was taken back before there was anything to see."""


class Result(NamedTuple):
    """image: uint8 [H,W,3]; id: 32 hex digits, see Identity; slots: of the program that made it.
    unfinished: of a picture that was interrupted, the model calls that were done, and all of them;
    nothing makes it again, it has no id."""

    image: Any
    id: str
    slots: int
    unfinished: tuple[int, int] | None = None


class Job:
    """Pictures asked for together. future: a list of Result, or of what went wrong."""

    def __init__(self, queue: 'Queue', ids: Sequence[str], tasks: Sequence[Task]) -> None:
        self.queue, self.ids, self.tasks = queue, ids, tasks
        self.future = concurrent.futures.Future()
        self.found: dict[str, Any] = {}  # {id: what it came to; None: interrupted, and decoded now}
        self.batch = 1  # pictures that a client thinks are made at once

    def progress(self) -> tuple[int, int]:
        """-> model calls that are done, and all that there will be, over all of its pictures."""
        return sum(t.done for t in self.tasks), sum(t.total for t in self.tasks)

    def previews(self) -> list[Picture | None]:
        """What each of its pictures is by now -> uint8 [h,w,3], or None before there is anything
        to see, see Previews.of."""
        return [self.queue.looks.of(task) for task in self.tasks]

    def state(self) -> str:
        """-> 'done', or, by the picture that is furthest, 'running', 'compiling' or 'waiting'."""
        if self.future.done():
            return 'done'
        if any(task.done or task.future.done() for task in self.tasks):
            return 'running'
        if any(self.queue.engine.compiles(task) for task in self.tasks):
            return 'compiling'
        return 'running' if any(task.begun for task in self.tasks) else 'waiting'


class Queue:
    """Takes jobs for an Engine. most: pictures that may wait. preview: a small VAE, see Previews.

    A short picture passes a longer one that was asked for earlier where fewer pictures came
    between them than it takes fewer model calls.
    """

    def __init__(self, engine: Engine, identity: Identity, metrics: Metrics, most: int = 64,
                 preview: Network | None = None) -> None:
        if most < 1:
            raise ValueError(f'queue={most}: expected 1 or more')
        self.engine, self.identity, self.metrics, self.most = engine, identity, metrics, most
        self.looks = Previews(engine, preview)
        self._lock = threading.RLock()  # guards everything below
        self._tasks, self._jobs = {}, {}  # {id: its run.engine.Task}, {id: [Job that wants it]}
        self._asked = 0  # pictures ever
        self._done = 0  # pictures since there were none
        self._each, self._last = 1.0, None  # s for a picture, a running mean; when one was done
        self._stopping = ''  # why nothing more is taken
        self._decoder = concurrent.futures.ThreadPoolExecutor(1)

    def warm(self, request: Request, draw: bool = True) -> None:
        """Have a resolved request's kind compiled, for one picture and for many; draw: with its
        picture, so that it is known to work. Else somebody may wait for a first one already: it has
        PAUSE seconds before the programs for many are made beside it."""
        if draw:
            task = self.engine.submit(request)
            task.future.result()
            self.looks.learn(task)
        else:
            self.engine.warm([request], 1 if self.engine.lone else None)
            time.sleep(PAUSE)
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

    def progress(self) -> float:
        """-> the part of all pictures that is done, since there were none; 0 where there are none.
        """
        with self._lock:
            parts = [task.done / max(task.total, 1) for task in self._tasks.values()]
            return (self._done + sum(parts)) / (self._done + len(parts)) if parts else 0.0

    def check(self, count: int) -> None:
        """Raise Busy or Stopped where a job of so many new pictures has no chance now."""
        if not self.alive:
            raise Stopped(self._why())
        waiting, _ = self.engine.counts()
        if waiting + count > self.most:
            raise Busy(max(1, math.ceil(waiting * self._each)))

    def _why(self):
        return self._stopping or (
            'the server cannot make pictures any more and must be restarted')

    def submit(self, requests: Sequence[Request]) -> Job:
        """Resolved requests -> Job. Takes milliseconds.

        Raises Busy, Stopped, and ValueError for what the model cannot make.
        """
        ids = [self.identity.of(r) for r in requests]
        asked = dict(zip(ids, requests))
        stages: dict[str, tuple[list[Stage], InitImage]] = {}
        while True:  # what is on its way now may be done, and forgotten, when the others are ready
            with self._lock:
                new = [key for key in asked if key not in self._tasks]
                if all(key in stages for key in new):
                    watch = self.looks.watch
                    job = self._begin(ids, [(key, Task(asked[key], *stages[key], watch))
                                            for key in new])
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
        self._tasks |= new
        job = Job(self, ids, [self._tasks[key] for key in ids])
        for key in dict.fromkeys(ids):
            self._jobs.setdefault(key, []).append(job)
        for key, task in new:
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

    def interrupt(self, job: Job, most: int | None = None) -> bool:
        """End a job with the pictures that are done, and those under way as they are by now, as
        soon as they are decoded -> whether it was still open; the others are Interrupted. most:
        take back only so many of them, the first, and go on with the rest."""
        with self._lock:
            if job.future.done():
                return False
            going = {key: self._tasks[key] for key in dict.fromkeys(job.ids)
                     if key not in job.found}
            for key, task in [(key, task) for key, task in going.items()
                              if task.done < task.total and not task.future.done()][:most]:
                job.found[key] = None if task.decode else Interrupted()
                if task.decode:
                    self._decoder.submit(self._look, job, key, task, task.decode, task.done)
                self._jobs[key].remove(job)
                if not self._jobs[key]:
                    self._tasks[key].cancel()
            self._conclude([job])
        self._gauge()
        return True

    def _look(self, job, key, task, decode, done):
        """What an interrupted picture is by now: a job has waited for it."""
        found = Interrupted()
        try:
            image, finite = map(np.asarray, decode())
            if finite.all():
                found = Result(paste_back(task.init_image, image[0]), '', task.slots,
                               (done, task.total))
        except Exception as error:
            traceback.print_exception(error)
            found = error
        with self._lock:
            job.found[key] = found
            self._conclude([job])

    def _conclude(self, jobs):
        """Those of which nothing is left to make are done. The lock is held."""
        for job in jobs:
            found = [job.found.get(key) for key in job.ids]
            if not job.future.done() and all(one is not None for one in found):
                job.future.set_result(found)

    def stop(self) -> None:
        """Take no more, give up jobs of which nothing has begun, finish the others."""
        with self._lock:
            self._stopping = 'the server is stopping'
            begun = {key for key, task in self._tasks.items() if task.begun}
            kept = {key for some in self._jobs.values() for job in some for key in job.ids
                    if job.found or not begun.isdisjoint(job.ids)}
            for key, task in list(self._tasks.items()):
                if key not in kept:
                    task.cancel()
        self.finish(self._stopping)

    def finish(self, why: str) -> None:
        """Take no more, as errors then say why, and make all that was asked for."""
        with self._lock:
            self._stopping = why
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
            self.looks.learn(task)
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
            for job in jobs:
                job.found[key] = outcome
            self._conclude(jobs)
        self._gauge()

    def _count(self, outcome, number=1):
        self.metrics.outcomes.labels(outcome).inc(number)

    def _gauge(self):
        waiting, running = self.engine.counts()
        self.metrics.queue.set(waiting)
        self.metrics.running.set(running)
