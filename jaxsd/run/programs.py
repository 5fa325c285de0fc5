"""Compiled programs, kept as long as they are used."""

import collections
import contextlib
import functools
import json
import logging
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

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

    def get(self, function: Callable, /, *arguments: Any, **static: Any) -> 'Program':
        """`function(*arguments, **static)` compiled -> Program.

        arguments: pytrees of arrays, or of jax.ShapeDtypeStruct with where they will lie.
        Compiles at most once at a time for the same shapes; others go on meanwhile.
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
            if entry.program is None:
                name = static.get('function', function).__name__
                run = functools.partial(function, **static)
                with _announced(name, len(leaves)):
                    lowered = jax.jit(run).lower(*arguments)
                    program = lowered.compile(self.options)
                entry.program = Program(run, program, lowered.out_info)
                self.log.append(name)
        return entry.program


@contextlib.contextmanager
def _announced(name, size):
    """Say what is compiled, and about how long that takes, where it takes long: as long as the last
    time, which is kept beside JAX's compilation cache."""
    folder = jax.config.jax_compilation_cache_dir
    path = pathlib.Path(folder or '.') / 'seconds.json'
    try:
        seconds = json.loads(path.read_text()) if folder else {}
        last = float(seconds.get(f'{name} {size}', 0))
    except (OSError, ValueError, AttributeError, TypeError):
        seconds, last = {}, 0
    about = f'about {last:.0f} s' if last >= 1 else 'seconds to minutes'
    what = WHAT.get(name, name)
    timer = threading.Timer(PATIENCE, log.info, [
        f'compiling {what}, once for each size and kind of picture: {about}'])
    start = time.perf_counter()
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    took = time.perf_counter() - start
    if folder and took > PATIENCE:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(seconds | {f'{name} {size}': round(max(took, last), 1)}))


class Program(NamedTuple):
    """A compiled program: call(*arguments). function: what it was compiled from; result: a pytree
    of shapes and dtypes."""

    function: Callable
    call: Callable
    result: Any


class _Entry:
    def __init__(self):
        self.lock, self.program = threading.Lock(), None


PROGRAMS = Programs()  # of this process
