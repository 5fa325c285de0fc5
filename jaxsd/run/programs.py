"""Compiled programs, kept as long as they are used."""

import collections
import concurrent.futures
import contextlib
import functools
import json
import logging
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

log = logging.getLogger('jaxsd')
PATIENCE = 2  # seconds before it is said that something compiles
WHAT = {'_encode_text': 'the text encoders', '_encode': 'the start of pictures', '_advance':
        'the denoise loop', '_decode': 'the decoder'}
MOST = 64  # programs that are kept; of those that are not, the next use compiles again


class Programs:
    """Programs by what they are compiled for; those used least recently are dropped first.

    most: how many are kept. options: the compiler's. log: the names of all that were compiled, in
    order.
    """

    def __init__(self, most=MOST, options=None):
        self.most, self.options, self.log = most, options, []
        self._lock, self._kept = threading.Lock(), collections.OrderedDict()
        self._compilers = concurrent.futures.ThreadPoolExecutor(2, 'compiler')

    def get(self, function: Callable, /, *arguments: Any, **static: Any) -> 'Program':
        """`function(*arguments, **static)` traced, and soon compiled -> Program.

        arguments: pytrees of arrays, or of jax.ShapeDtypeStruct with where they will lie. The
        compiler works beside, and needs no Python: whoever wants several programs gets them all
        before calling one. Compiles at most once at a time for the same shapes.
        """
        leaves, tree = jax.tree.flatten(arguments)
        key = (function, tuple(static.items()), tree, tuple(
            (a.shape, a.dtype, getattr(a, 'sharding', None)) for a in leaves))
        with self._lock:
            entry = self._kept.setdefault(key, _Entry())
            self._kept.move_to_end(key)
            while len(self._kept) > self.most:
                self._kept.popitem(last=False)
        with entry.lock:
            if entry.program is None or entry.program.failed:
                name, start = static.get('function', function).__name__, time.perf_counter()
                run = functools.partial(function, **static)
                lowered = jax.jit(run).lower(*arguments)
                entry.program = Program(run, lowered.out_info, self._compilers.submit(
                    self._compile, lowered, name, len(leaves), time.perf_counter() - start))
                self.log.append(name)
        return entry.program

    def _compile(self, lowered, name, size, traced):
        with _announced(name, size, traced):
            return lowered.compile(self.options)


@contextlib.contextmanager
def _announced(name, size, traced):
    """Say what is compiled, and about how long that takes, where it takes long: as long as the last
    time, which is kept. traced: seconds that it took so far."""
    try:
        last = float(recall('seconds.json').get(f'{name} {size}', 0))
    except (ValueError, TypeError):
        last = 0
    about = f'about {last:.0f} s' if last >= 1 else 'seconds to minutes'
    what = WHAT.get(name, name)
    timer = threading.Timer(max(0, PATIENCE - traced), log.info, [
        f'compiling {what}, once for each size and kind of picture: {about}'])
    start = time.perf_counter() - traced
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    took = time.perf_counter() - start
    if took > PATIENCE:
        remember('seconds.json', **{f'{name} {size}': round(max(took, last), 1)})


_remembering = threading.Lock()


def _beside(file):
    """Where a file of JAX's compilation cache is, or None."""
    folder = jax.config.jax_compilation_cache_dir
    return pathlib.Path(folder) / file if folder else None


def recall(file: str) -> dict[str, Any]:
    """What `remember` kept in a file; {} where there is none, or none that makes sense."""
    path = _beside(file)
    try:
        found = json.loads(path.read_text()) if path else {}
    except (OSError, ValueError):
        found = {}
    return found if isinstance(found, dict) else {}


def remember(file: str, **values: Any) -> None:
    """Keep values for the next start in a file beside JAX's compilation cache, where there is one.
    """
    path = _beside(file)
    if path:
        with _remembering, contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(recall(file) | values))


class Program:
    """A program. function: what it is compiled from; result: a pytree of shapes and dtypes."""

    def __init__(self, function: Callable, result: Any, compiled: concurrent.futures.Future
                 ) -> None:
        self.function, self.result, self._compiled = function, result, compiled

    @property
    def call(self) -> Any:
        """The compiled program, call(*arguments). Waits for the compiler, and raises what it did.
        """
        return self._compiled.result()

    @property
    def failed(self) -> bool:
        """Whether it could not be compiled."""
        return self._compiled.done() and self._compiled.exception() is not None


class _Entry:
    def __init__(self):
        self.lock, self.program = threading.Lock(), None


PROGRAMS = Programs()  # of this process
