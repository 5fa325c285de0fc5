"""Servers for tests: with the real model in a process, or with one that waits to be told."""

import contextlib
import hashlib
import io
import os
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import httpx
import numpy as np
from mains import ROOT
from PIL import Image

import jaxsd
from jaxsd.batch.engine import Engine
from jaxsd.batch.identity import Identity
from jaxsd.serve.app import Loaded, Service, Settings
from jaxsd.serve.batcher import Batcher
from jaxsd.serve.metrics import Metrics
from jaxsd.serve.server import Server

DEFAULTS = {'steps': 4, 'guidance': 4.0, 'width': 64, 'height': 64, 'sampler': 'dpmpp_2m',
            'schedule': 'karras'}
MICROBATCH = 4


class Gated(Engine):
    """An Engine whose pictures come when `gate` is set, each of one colour, its seed's."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.gate, self.started, self.broken = threading.Event(), [], None
        self.gate.set()

    def start(self, requests, kind, lane=0):
        """As Engine's, without the model."""
        self.started.append([r.seed for r in requests])
        if self.broken:
            raise self.broken

        def images():
            assert self.gate.wait(60)
            return [colour(r.seed, r.width, r.height) for r in requests]
        return SimpleNamespace(images=images)


def colour(seed, width=64, height=64):
    """The picture that a Gated engine makes."""
    return np.full((height, width, 3), seed % 251, np.uint8)


def gated(**options):
    """-> a Gated engine with the shipped model, and its Identity."""
    model = jaxsd.load(ROOT / 'checkpoints' / 'emoji', 'float32')
    return (Gated(model, microbatch=MICROBATCH, **{'at_once': 1, **options}),
            Identity(model, microbatch=MICROBATCH))


def service(engine, identity, queue=16, load=None, **settings):
    """A Service of them, loaded."""
    metrics = Metrics(engine.microbatch)

    def loaded():
        batcher = Batcher(engine, identity, metrics, queue)
        return Loaded(batcher, 'emoji', '', '', {'model': 'emoji'})
    found = Service(Settings(DEFAULTS, **settings), metrics, load or loaded)
    until = time.monotonic() + 60
    while load is None and not found.loaded:
        assert not found.failed, found.failed
        assert time.monotonic() < until
        time.sleep(0.01)
    return found


def slow(data, name, *_):
    """A picture that takes a minute to decode."""
    time.sleep(60)


def ending(data, name, *_):
    """A picture at which the decoder dies."""
    os._exit(3)


@contextlib.contextmanager
def listening(found):
    """A Service behind uvicorn in a thread -> its address."""
    port = free_port()
    server = Server(found, '127.0.0.1', port)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f'http://127.0.0.1:{port}'
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@contextlib.contextmanager
def process(*flags, env=None):
    """`launch.serve` with the shipped model, once it is healthy -> its address, and the process."""
    port = free_port()
    command = [sys.executable, '-m', 'launch.serve', f'--port={port}',
               f'--microbatch={MICROBATCH}', *flags]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT),
                                                  'JAX_PLATFORMS': 'cpu', **(env or {})}) as run:
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
    import base64
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image


def pixels(image):
    """A hash of an image's pixels."""
    return hashlib.sha256(np.ascontiguousarray(image, np.uint8)).hexdigest()


def counted(url, name, **labels):
    """A value of /metrics."""
    wanted = ','.join(f'{k}="{v}"' for k, v in labels.items())
    line = f'{name}{{{wanted}}} ' if wanted else f'{name} '
    for found in httpx.get(f'{url}/metrics').text.splitlines():
        if found.startswith(line):
            return float(found.removeprefix(line))
    return 0.0
