"""Pictures that many people ask for at once, put together into microbatches.

In each lane of the engine one thread starts microbatches and another waits for them, so that the
next one is on its way before the last is done. The oldest picture always goes first, with others of
its kind.
"""

import concurrent.futures
import contextlib
import functools
import math
import threading
import time
import traceback
from typing import Any, NamedTuple

import numpy as np

from jaxsd import sampling
from jaxsd.run.request import PROMPTS

WINDOW = 4  # microbatches' worth of the oldest pictures from which one is put together
AHEAD = 2  # microbatches in a lane: one runs, one is ready to


class Busy(Exception):
    """The queue is full. seconds: when to come again, from the rate that was measured."""

    def __init__(self, seconds):
        super().__init__(f'the queue is full: come again in {seconds} s')
        self.seconds = seconds


class Stopped(Exception):
    """The server stops, or cannot go on."""


class Made(NamedTuple):
    """image: uint8 [H,W,3]; id: 32 hex digits, see Identity."""

    image: Any
    id: str


class Picture:
    """One picture on its way, made once for all jobs that ask for it meanwhile."""

    def __init__(self, request, kind, id, cost):
        self.request, self.kind, self.id, self.cost = request, kind, id, cost
        self.jobs, self.outcome, self.arrived = [], None, time.monotonic()


class Job:
    """Pictures asked for together. future: a list of Made, or for each what went wrong with it."""

    def __init__(self, pictures):
        self.pictures, self.future = pictures, concurrent.futures.Future()


class Batcher:
    """A queue in front of an Engine.

    queue: most pictures that wait. linger: seconds for which a place that is free waits for more
    pictures, where there is reason to think that they come.
    """

    def __init__(self, engine, identity, metrics, queue=64, linger=0.01):
        if queue < 1 or linger < 0:
            raise ValueError(f'queue={queue}, linger={linger}: expected 1 or more, and 0 or more')
        self.engine, self.identity, self.metrics = engine, identity, metrics
        self.queue, self.linger = queue, linger
        places, lanes = range(len(engine.places)), range(engine.lanes)
        self._changed = threading.Condition()  # guards everything below
        self._waiting, self._running = {}, {}  # {id: Picture} in the order of arrival
        self._done = 0  # pictures since there were none
        self._coming = 0  # jobs that are being looked at
        self._crowd = False  # the last microbatch was for several jobs, who may come again
        self._known, self._compiling = set(), set()  # (place, kind)
        self._flying, self._freed = [0 for _ in lanes], [0.0 for _ in places]
        self._each = 1.0  # s that a place takes for a picture, a running mean
        self._stopping = self._dead = False
        self._finishers = [concurrent.futures.ThreadPoolExecutor(1) for _ in lanes]
        self._workers = [threading.Thread(target=self._work, args=[lane], daemon=True)
                         for lane in lanes]
        for worker in self._workers:
            worker.start()

    def warm(self, request):
        """Make a resolved request's picture at every place, so that its kind is compiled there."""
        kind = self.engine.kind(request)

        def make(place):
            [image] = self.engine.start([request], kind, place).images()
            if isinstance(image, Exception):
                raise image
            with self._changed:
                self._known.add((place, kind))

        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(make, range(len(self._freed))))

    @property
    def alive(self):
        """Whether pictures are made and wanted."""
        return not (self._dead or self._stopping) and all(w.is_alive() for w in self._workers)

    def counts(self):
        """-> pictures that wait, that are being made, that are done since there were none of
        either, and seconds until all are there."""
        with self._changed:
            waiting, running = len(self._waiting), len(self._running)
            return waiting, running, self._done, self._seconds(waiting + running)

    def _seconds(self, pictures):
        return pictures * self._each / len(self._freed)

    def check(self, count):
        """Raise Busy or Stopped where a job of so many new pictures has no chance now."""
        with self._changed:
            if not self.alive:
                raise Stopped('the server is stopping' if not self._dead else
                              'the server cannot make pictures any more and must be restarted')
            if len(self._waiting) + count > self.queue:
                raise Busy(max(1, math.ceil(self._seconds(len(self._waiting)))))

    def submit(self, requests):
        """Resolved requests that differ in seed and prompts alone -> Job. Takes milliseconds.

        Raises Busy, Stopped, and ValueError for what the model cannot make.
        """
        with self._on_its_way():
            kinds = {prompts: self.engine.kind(request) for prompts, request in
                     {_prompts(request): request for request in requests}.items()}
            found = [Picture(r, kinds[_prompts(r)], self.identity.of(r), self._cost(r))
                     for r in requests]
        with self._changed:
            new = {p.id for p in found} - self._waiting.keys() - self._running.keys()
            self.check(len(new))
            pictures = [self._running.get(p.id) or self._waiting.setdefault(p.id, p)
                        for p in found]
            job = Job(pictures)
            if len(new) == len(self._waiting) and not self._running:
                self._done = 0
            for picture in dict.fromkeys(pictures):
                picture.jobs.append(job)
            self._count('shared', len(found) - len(new))
            self._notify()
        return job

    def cancel(self, job):
        """Take back what has not begun and nobody else wants -> whether the job was still open."""
        with self._changed:
            if not job.future.cancel():
                return False
            for picture in dict.fromkeys(job.pictures):
                picture.jobs = [other for other in picture.jobs if other is not job]
                if not picture.jobs and self._waiting.pop(picture.id, None):
                    self._count('cancelled')
            self._notify()
            return True

    def stop(self):
        """Take no more, give up what has not begun, finish what has."""
        self._give_up('the server is stopping')
        for worker in self._workers:
            worker.join()
        with self._changed:
            self._changed.wait_for(lambda: self._dead or not self._running)

    def _give_up(self, why, dead=False):
        with self._changed:
            self._stopping, self._dead = True, self._dead or dead
            left = list(self._waiting.values()) + (list(self._running.values()) if dead else [])
            self._waiting.clear()
            for picture in left:
                self._settle(picture, Stopped(why))
            self._notify()

    @contextlib.contextmanager
    def _on_its_way(self):
        with self._changed:
            self._coming += 1
        try:
            yield
        finally:
            with self._changed:
                self._coming -= 1
                self._notify()

    def _cost(self, request):
        """Model calls of a request, roughly: pictures of like length go well together."""
        return request.steps * (request.strength or 1) * _calls(request.sampler,
                                                                self.engine.config.schedule)

    def _work(self, lane):
        try:
            while batch := self._take(lane):
                if self._key(lane, batch) in self._known:
                    self._start(batch, lane)
                else:  # compiles for seconds or minutes: others go on meanwhile
                    threading.Thread(target=self._start, args=[batch, lane], daemon=True).start()
        except BaseException:
            traceback.print_exc()
            self._give_up('the server cannot make pictures any more', dead=True)

    def _place(self, lane):
        return lane % len(self._freed)

    def _key(self, lane, batch):
        return self._place(lane), batch[0].kind

    def _take(self, lane):
        """Wait until a microbatch is worth starting -> its pictures; None at the end."""
        place = self._place(lane)
        with self._changed:
            while True:
                if self._stopping:
                    return None
                batch, patience = self._next(place), None
                idle = not any(self._flying[place::len(self._freed)])
                full = len(batch) == self.engine.capacity
                new = batch and self._key(lane, batch) not in self._known  # to compile, beside
                if batch and (new or idle or full and self._flying[lane] < AHEAD):
                    hope = not full and (self._coming or self._crowd)
                    since = max(batch[0].arrived, self._freed[place])
                    patience = since + self.linger - time.monotonic() if hope else 0
                    if patience <= 0:
                        return self._begin(batch, lane)
                self._changed.wait(patience)

    def _next(self, place):
        """The oldest picture and, of those of its kind that came soon after, the ones whose walks
        are most like its own in length."""
        busy = {kind for at, kind in self._compiling if at == place}
        ready = [p for p in self._waiting.values() if p.kind not in busy
                 and (not busy or (place, p.kind) in self._known)]
        if not ready:
            return []
        first = ready[0]
        size = self.engine.capacity
        others = [p for p in ready[1:] if p.kind == first.kind][:WINDOW * size]
        others.sort(key=lambda p: abs(math.log(p.cost / first.cost)))
        return [first, *others[:size - 1]]

    def _begin(self, batch, lane):
        now = time.monotonic()
        for picture in batch:
            self._running[picture.id] = self._waiting.pop(picture.id)
            self.metrics.queueing.observe(now - picture.arrived)
        if self._key(lane, batch) in self._known:
            self._flying[lane] += 1
        else:
            self._compiling.add(self._key(lane, batch))
        self.metrics.fill.observe(len(batch))
        self._notify()
        return batch

    def _start(self, batch, lane):
        key, called = self._key(lane, batch), time.monotonic()
        try:
            work, error = self.engine.start([p.request for p in batch], batch[0].kind, lane), None
        except Exception as problem:
            traceback.print_exc()
            work, error = None, problem
        begun = time.monotonic()
        with self._changed:
            if key in self._compiling:
                self._compiling.remove(key)
                self.metrics.compiling.observe(begun - called)
                self._flying[lane] += 1
                if work:
                    self._known.add(key)
                self._notify()
        self._finishers[lane].submit(self._finish, batch, work, error, lane, begun)

    def _finish(self, batch, work, error, lane, begun):
        try:
            found = work.images() if work else [error] * len(batch)
        except Exception as problem:  # the device's
            traceback.print_exc()
            found = [problem] * len(batch)
        with self._changed:
            now, place = time.monotonic(), self._place(lane)
            took = now - max(begun, self._freed[place])
            self._freed[place] = now
            self._flying[lane] -= 1
            self._each += 0.2 * (took / len(batch) - self._each)
            self._crowd = len({job for p in batch for job in p.jobs}) > 1
            self.metrics.making.observe(took)
            for picture, image in zip(batch, found):
                self._settle(picture, image if isinstance(image, Exception)
                             else Made(image, picture.id))
            self._notify()

    def _settle(self, picture, outcome):
        """A picture has come to its end: the jobs of which it was the last are done."""
        self._running.pop(picture.id, None)
        picture.outcome = outcome
        self._done += 1
        self._count('cancelled' if isinstance(outcome, Stopped) else
                    'failed' if isinstance(outcome, Exception) else
                    'made' if picture.jobs else 'unwanted')
        for job in picture.jobs:
            if not job.future.done() and all(p.outcome is not None for p in job.pictures):
                job.future.set_result([p.outcome for p in job.pictures])

    def _count(self, outcome, number=1):
        self.metrics.outcomes.labels(outcome).inc(number)

    def _notify(self):
        self.metrics.queue.set(len(self._waiting))
        self.metrics.running.set(len(self._running))
        self._changed.notify_all()


def _prompts(request):
    return tuple(getattr(request, name) for name in PROMPTS)


@functools.cache
def _calls(sampler, schedule):
    """Model calls that a sampler makes for a step."""
    sigmas = np.append(np.geomspace(10, 0.1, 16), 0)
    rows = sampling.plan(sampler, sigmas, config=schedule)
    return 4 if isinstance(rows, sampling.Adaptive) else float(sampling.calls(rows)) / 16
