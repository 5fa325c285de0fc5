"""Servers for tests: with the real model in a process, or with one that waits to be told."""

import contextlib
import hashlib
import os
import threading
import time

import httpx
import numpy as np
from mains import ROOT, free_port

import jaxsd
from jaxsd.batch.identity import Identity
from jaxsd.run import engine as engines
from jaxsd.serve.app import Loaded, Service, Settings
from jaxsd.serve.metrics import Metrics
from jaxsd.serve.queue import Queue
from jaxsd.serve.server import Server

DEFAULTS = {'steps': 4, 'guidance': 4.0, 'width': 64, 'height': 64, 'sampler': 'dpmpp_2m',
            'schedule': 'karras'}


class Lane(engines.Lane):
    """A lane that makes one picture after the other, without the model."""

    def advance(self, slots):
        """As Lane's."""
        for i, slot in enumerate(slots):
            if slot is None:
                continue
            task, engine = slot.task, self.engine
            engine.started.append(task.request.seed)
            task.begun = time.monotonic()
            if engine.broken:
                raise engine.broken
            while not engine.gate.wait(0.02) and not task.future.cancelled():
                pass
            slots[i] = None
            task.settle(colour(task.request.seed, task.request.width, task.request.height))


class Gated(engines.Engine):
    """An Engine whose pictures come when `gate` is set, each of one colour, its seed's; `started`
    are the seeds of those that have begun."""

    lane = Lane

    def __init__(self, *args, **options):
        self.gate, self.started, self.broken = threading.Event(), [], None
        self.gate.set()
        super().__init__(*args, **options)

    def compile(self, stage):
        """Nothing to do."""
        for replica in self.replicas:
            replica._programs[stage.kind] = None


def colour(seed, width=64, height=64):
    """The picture that a Gated engine makes."""
    return np.full((height, width, 3), seed % 251, np.uint8)


def gated(**options):
    """-> a Gated engine with the shipped model, and its Identity."""
    model = jaxsd.load(ROOT / 'checkpoints' / 'emoji', 'float32')
    return Gated(model, **{'at_once': 1, 'slots': 1, **options}), Identity(model, slots=1)


def service(engine, identity, queue=16, load=None, **settings):
    """A Service of them, loaded."""
    metrics = Metrics()

    def loaded(checkpoint=None, vae=None):
        made = engine if engine.alive else gated()[0]  # it was unloaded
        return Loaded(Queue(made, identity, metrics, queue), 'emoji', '', '', {'model': 'emoji'})

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
