"""Mains run as a user runs them."""

import base64
import contextlib
import io
import multiprocessing
import os
import pathlib
import re
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback

import httpx
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]


def environment(**more):
    """The environment of a main on CPU; more: what is set beside it, or not at all where None."""
    more = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', **more}
    return {name: value for name, value in more.items() if value is not None}


def devices(count):
    """XLA_FLAGS for so many devices on CPU."""
    flag = f'--xla_force_host_platform_device_count={count}'
    return {'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {flag}'}


# A process that has imported what jaxsd imports, and forks for each main: 1 s less for each start.
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload([
    'absl.app', 'cv2', 'fastapi', 'flax.linen', 'huggingface_hub', 'jax.numpy', 'jaxtyping', 'lark',
    'ml_collections.config_flags', 'optax', 'pebble', 'PIL.Image', 'prometheus_client',
    'safetensors.numpy', 'scipy.integrate', 'tokenizers', 'tqdm', 'uvicorn'])


def run_main(*arguments, cwd=ROOT, fresh=False, **more):
    """-> exit code, stdout, stderr of python with these arguments (-m or -c first), on CPU; more:
    environment. fresh: by a new interpreter, for what JAX reads while it is imported."""
    if fresh:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=cwd, text=True, capture_output=True,
            timeout=600, env=environment(**more))
        return done.returncode, done.stdout, done.stderr
    with tempfile.TemporaryDirectory() as folder:
        out, error = pathlib.Path(folder, 'out'), pathlib.Path(folder, 'error')
        process = FORKS.Process(target=_run, args=(
            tuple(map(str, arguments)), cwd, environment(**more), out, error))
        process.start()
        process.join(600)
        if process.exitcode is None:
            process.kill()
            process.join()
        return process.exitcode, out.read_text(), error.read_text()


def _run(arguments, cwd, environment, *files):
    _enter(cwd, environment)
    _execute(arguments, *files)


def _enter(cwd, environment):
    """Be a new process there."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = ['', *filter(None, environment['PYTHONPATH'].split(os.pathsep))]


def _execute(arguments, *files):
    """What python does with -m or -c; stdout and stderr go to the files."""
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    kind, what, *rest = arguments
    sys.argv = [what if kind == '-m' else kind, *rest]
    if kind == '-m':
        runpy.run_module(what, run_name='__main__', alter_sys=True)
    else:
        exec(compile(what, '<string>', 'exec'), {'__name__': '__main__'})


class Session:
    """A process in which mains run one after the other: a program is traced and compiled once."""

    def __init__(self, folder, cwd, environment):
        self.files = folder / 'out', folder / 'error'
        self.pipe, other = FORKS.Pipe()
        self.process = FORKS.Process(target=_session, args=(other, cwd, environment, *self.files))
        self.process.start()
        other.close()

    def run(self, *arguments):
        """-> exit code, stdout, stderr, as of run_main."""
        self.pipe.send(arguments)
        assert self.pipe.poll(600), f'no end after 10 minutes: {arguments}'
        return self.pipe.recv(), *(file.read_text() for file in self.files)

    def stop(self):
        """End it."""
        self.process.kill()
        self.process.join()


def _session(pipe, cwd, environment, *files):
    from absl import app, flags
    _enter(cwd, environment)
    app.define_help_flags()
    before = set(flags.FLAGS)
    while True:
        arguments, code = pipe.recv(), 0
        try:
            _execute(arguments, *files)
        except SystemExit as stop:
            code = stop.code or 0
            if isinstance(code, str):
                code = print(code, file=sys.stderr) or 1
        except BaseException:
            traceback.print_exc()
            code = 1
        mine = flags.FlagValues()
        for name in set(flags.FLAGS) - before:  # --config.steps and the like among them
            mine[name] = flags.FLAGS[name]
        flags.FLAGS.remove_flag_values(mine)
        flags.FLAGS.unparse_flags()
        for name in [name for name in sys.modules if re.match(r'(jaxsd\.)?launch\b', name)]:
            del sys.modules[name]
        sys.stdout.flush()
        sys.stderr.flush()
        pipe.send(code)


def run_code(code, *arguments, **more):
    """-> stdout of a Python program, which must succeed; more: as of run_main."""
    status, out, error = run_main('-c', code, *arguments, **more)
    assert status == 0, error
    return out


@contextlib.contextmanager
def serving(*flags, command=(sys.executable, '-m', 'launch.serve'), cwd=ROOT, **more):
    """A server with the shipped model, once it is healthy -> its address, and the process."""
    port = free_port()
    with subprocess.Popen([*command, f'--port={port}', *flags], cwd=cwd,
                          env=environment(**more)) as run:
        try:
            url = f'http://127.0.0.1:{port}'
            wait_for(lambda: healthy(url, run), 180)
            yield url, run
        finally:
            run.kill()


def healthy(url, run):
    """Whether /healthz says so; before, the model is loaded and no picture there: 503."""
    assert run.poll() is None, 'the server has ended'
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f'{url}/healthz').status_code == 200


def wait_for(condition, seconds=10):
    """Until the condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, 'it did not come to that'
        time.sleep(0.02)


def free_port():
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


def opened(text):
    """A picture of an answer, base64 -> PIL.Image with its texts."""
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image
