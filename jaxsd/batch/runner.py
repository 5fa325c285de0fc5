"""From requests to a folder of pictures: jobs in order, an Engine and writers at work."""

import concurrent.futures
import datetime
import os
import pathlib
import threading
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from jaxsd.batch import folder
from jaxsd.batch.identity import Identity
from jaxsd.images.reading import Picture
from jaxsd.run import hashes, picture
from jaxsd.run.engine import Engine
from jaxsd.run.request import Request

ALWAYS = ('prompt', 'seed', 'sampler', 'schedule', 'steps', 'guidance', 'width', 'height')
_DEFAULTS = vars(Request())
WRITERS = min(16, os.cpu_count() or 1)


class Job(NamedTuple):
    """One picture to make. number: its place in the plan; error: why it cannot be made."""

    number: int
    id: str
    request: Request
    kinds: tuple = ()  # of its stages, see run.engine.Kind
    calls: int = 0
    error: Exception | None = None


def jobs(engine: Engine, identity: Identity, requests: Iterable[Request],
         done: Collection[str] = frozenset()) -> list[Job]:
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
                           'once, --slots=1')
    if not isinstance(error, (ValueError, OSError)):
        raise error
    return error


def in_order(some: Iterable[Job]) -> list[Job]:
    """Jobs in the order in which they are best made: those with an error first, then kind by kind,
    so that slots stay full, and long ones before short ones."""
    return sorted(some, key=lambda job: (job.error is None, job.kinds, -job.calls, job.number))


def described(request: Request) -> dict[str, Any]:
    """A request as records show it: what is not as by default, and what everybody looks for."""
    return {name: value for name, value in vars(request).items()
            if name in ALWAYS or value != _DEFAULTS[name]
            and (name != 'strength' or request.image is not None)}


def begin(engine: Engine, job: Job) -> concurrent.futures.Future:
    """Submit a job -> a future of its picture, for `outcome`."""
    try:
        if job.error is not None:
            raise job.error
        return engine.submit(job.request).future
    except Exception as error:
        future = concurrent.futures.Future()
        future.set_exception(error)
        return future


def outcome(future: concurrent.futures.Future) -> Picture | Exception:
    """Wait for a job's picture -> uint8 [H,W,3], or the ValueError, OSError or MemoryError that it
    came to. Raises whatever else goes wrong, which stops the run."""
    try:
        return future.result()
    except Exception as error:
        return _own(error)


def encode(job: Job, image: Picture, how: dict[str, Any]) -> dict[str, Any]:
    """A job's picture, uint8 [H,W,3] -> what Folder.add takes; how: as of Runner."""
    vae, refiner = (pathlib.Path(how.get(name) or '').stem for name in ('vae', 'refiner'))
    own = {'id': job.id, 'slots': job.kinds[0].slots}
    known = hashes.of_files(how)
    texts = {'parameters': picture.parameters(job.request, how.get('model', ''), vae, refiner,
                                              hashes=known),
             'jaxsd': picture.record(job.request, **how | own | {'hashes': known})}
    return folder.encode(image, texts)


def record(job: Job) -> dict[str, Any]:
    """A job's line in the manifest, but for its picture."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
    return {'index': job.number, 'request': described(job.request), 'time': now}


class Runner:
    """Makes jobs and keeps them in a Folder.

    how: what a picture's record holds beside its request, see launch.engine. on_done(job, error)
    is called after each, by any thread.
    """

    def __init__(self, engine: Engine, run: folder.Folder, how: dict[str, Any],
                 on_done: Callable[[Job, Exception | None], object] = lambda *_: None) -> None:
        self.engine, self.folder, self.how, self.on_done = engine, run, how, on_done
        self.made = self.failed = 0
        self._lock, self._stopped = threading.Lock(), threading.Event()

    def stop(self) -> None:
        """Begin no more pictures; those that are begun are finished."""
        self._stopped.set()

    def run(self, jobs: Iterable[Job]) -> tuple[int, int]:
        """Make jobs -> (pictures made, jobs failed). Raises what stopped it: the OSError of a full
        disk, the RuntimeError of a broken device."""
        ahead = 2 * self.engine.capacity + WRITERS  # so many are begun and not yet written
        going = set()
        with concurrent.futures.ThreadPoolExecutor(WRITERS) as writers:
            try:
                for job in in_order(jobs):
                    while len(going) >= ahead:
                        going = self._settled(going)
                    if self._stopped.is_set():
                        break
                    going.add(self._kept(job, writers))
                while going:
                    if self._stopped.is_set():
                        self.engine.drop_waiting()
                    going = self._settled(going)
            except BaseException:
                self.stop()
                self.engine.drop_waiting()
                concurrent.futures.wait(going)  # what is begun still needs the writers
                raise
        return self.made, self.failed

    def _settled(self, going):
        """Wait a while for some of the futures, so that signals are noticed -> those not done."""
        done, going = concurrent.futures.wait(going, 0.2, 'FIRST_COMPLETED')
        for future in done:
            future.result()
        return going

    def _kept(self, job, writers):
        """Begin a job -> a future that is done when its picture is written."""
        written = concurrent.futures.Future()

        def write(image):
            try:
                if not image.cancelled():
                    self._write(job, outcome(image))
                written.set_result(None)
            except BaseException as error:
                written.set_exception(error)

        begin(self.engine, job).add_done_callback(lambda image: writers.submit(write, image))
        return written

    def _write(self, job, image):
        error = image if isinstance(image, Exception) else None
        if error is None:
            self.folder.add(job.id, encode(job, image, self.how), record(job))
        else:
            self.folder.fail(job.id, error, record(job))
        with self._lock:
            self.made += error is None
            self.failed += error is not None
        self.on_done(job, error)
