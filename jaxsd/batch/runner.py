"""From requests to a folder of pictures: microbatches in order, devices and writers at work."""

import collections
import concurrent.futures
import datetime
import os
import pathlib
import threading
from typing import NamedTuple

from jaxsd.batch import folder
from jaxsd.batch.engine import Kind, Work
from jaxsd.run import picture
from jaxsd.run.request import Request

ALWAYS = ('prompt', 'seed', 'sampler', 'schedule', 'steps', 'guidance', 'width', 'height')
_DEFAULTS = vars(Request())


class Job(NamedTuple):
    """One picture to make. number: its place in the plan; error: why it cannot be made."""

    number: int
    id: str
    request: Request
    kind: Kind | None = None
    calls: int = 0
    error: Exception | None = None


def jobs(engine, identity, requests, done=frozenset()):
    """Requests -> a Job for each picture that is not done, requests of one id once.

    done: ids. Requests that the model cannot make become jobs with an error.
    """
    found, surveys = {}, {}  # of pictures that differ in their seeds alone, one survey
    for number, asked in enumerate(requests):
        try:
            request, = engine.resolve([asked])
            key = identity.of(request)
            if key not in done and key not in found:
                like = identity.of(request.replace(seed=0))
                if like not in surveys:
                    surveys[like] = engine.survey(request)
                found[key] = Job(number, key, request, *surveys[like])
        except Exception as error:
            key = identity.unmade(asked)
            found.setdefault(key, Job(number, key, asked, error=_own(error)))
    return list(found.values())


def _own(error):
    """What one job came to, in a line. Raises anything else, which stops the run."""
    text = str(error).strip().partition('\n')[0]
    if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in text:  # the host's, the device's
        return MemoryError(f'out of memory ({text or "of the host"}): make it smaller, or fewer at '
                           'once, --microbatch=1')
    if not isinstance(error, (ValueError, OSError)):
        raise error
    return error


def pack(some, size):
    """Jobs -> microbatches: lists of at most `size` jobs of one kind, long ones first.

    Neighbours take about as many model calls, so that few wait for others of their microbatch. Jobs
    with an error come first, each alone.
    """
    packed = [[job] for job in some if job.error is not None]
    for job in sorted((job for job in some if job.error is None),
                      key=lambda job: (job.kind, -job.calls, job.number)):
        if packed and packed[-1][0].kind == job.kind and len(packed[-1]) < size:
            packed[-1].append(job)
        else:
            packed.append([job])
    return packed


def described(request):
    """A request as records show it: what is not as by default, and what everybody looks for."""
    return {name: value for name, value in vars(request).items()
            if name in ALWAYS or value != _DEFAULTS[name]
            and (name != 'strength' or request.image is not None)}


def begin(engine, batch, lane=0):
    """Start a microbatch of jobs -> [(its Work, its jobs)]; where jobs fail together they are tried
    one by one, and the one at fault has its error for a Work."""
    if batch[0].error is not None:
        return [(batch[0].error, batch)]
    try:
        return [(engine.start([job.request for job in batch], batch[0].kind, lane), batch)]
    except Exception as error:
        error = _own(error)
        if len(batch) == 1:
            return [(error, batch)]
        return [pair for job in batch for pair in begin(engine, [job], lane)]


def fetch(work, batch):
    """A Work and its jobs, of `begin` -> for each its picture, or the error that it came to."""
    try:
        return work.images() if isinstance(work, Work) else [work]
    except Exception as error:
        return [_own(error)] * len(batch)


def encode(job, image, how):
    """A job's picture, uint8 [H,W,3] -> what Folder.add takes; how: as of Runner."""
    names = {name: pathlib.Path(how.get(name) or '').stem for name in ('vae', 'refiner')}
    texts = {'parameters': picture.parameters(job.request, how.get('model', ''), **names),
             'jaxsd': picture.record(job.request, **how, id=job.id)}
    return folder.encode(image, texts)


def record(job):
    """A job's line in the manifest, but for its picture."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
    return {'index': job.number, 'request': described(job.request), 'time': now}


class Runner:
    """Makes jobs and keeps them in a Folder.

    how: what a picture's record holds beside its request, see launch.engine. on_done(job, error)
    is called after each, by any thread.
    """

    def __init__(self, engine, run, how, on_done=lambda job, error: None):
        self.engine, self.folder, self.how, self.on_done = engine, run, how, on_done
        self.made = self.failed = 0
        self._lock, self._stopped = threading.Lock(), threading.Event()

    def stop(self):
        """Begin no more microbatches; those that are begun are finished."""
        self._stopped.set()

    def run(self, packed):
        """Make microbatches of jobs -> (pictures made, jobs failed). Raises what stopped it: the
        OSError of a full disk, the RuntimeError of a broken device."""
        waiting = collections.deque(packed)
        with (concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as writers,
              concurrent.futures.ThreadPoolExecutor(self.engine.lanes) as pool):
            running = [pool.submit(self._work, lane, waiting, writers)
                       for lane in range(self.engine.lanes)]
            while concurrent.futures.wait(running, 0.2).not_done:
                pass  # in short waits, so that signals are heard
        for worker in running:
            worker.result()
        return self.made, self.failed

    def _work(self, lane, waiting, writers):
        """Keep a lane at work: the next microbatch begins before the last one is fetched."""
        begun, writing = collections.deque(), []
        try:
            while waiting and not self._stopped.is_set():
                try:
                    batch = waiting.popleft()
                except IndexError:  # another lane was faster
                    break
                begun.extend(begin(self.engine, batch, lane))
                while len(begun) > 1:
                    writing = self._keep(*begun.popleft(), writing, writers)
            while begun:
                writing = self._keep(*begun.popleft(), writing, writers)
            _all_done(writing)
        except BaseException:
            self.stop()
            raise

    def _keep(self, work, batch, writing, writers):
        """Fetch a microbatch and have its pictures written, when those of the last one are ->
        futures."""
        found = fetch(work, batch)
        _all_done(writing)
        return [writers.submit(self._write, job, image) for job, image in zip(batch, found)]

    def _write(self, job, image):
        if isinstance(image, Exception):
            return self._fail(job, image)
        self.folder.add(job.id, encode(job, image, self.how), record(job))
        with self._lock:
            self.made += 1
        self.on_done(job, None)

    def _fail(self, job, error):
        self.folder.fail(job.id, error, record(job))
        with self._lock:
            self.failed += 1
        self.on_done(job, error)


def _all_done(futures):
    for future in futures:
        future.result()
