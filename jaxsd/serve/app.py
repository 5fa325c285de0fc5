"""The server's HTTP: routes, limits, keys, time-outs. One process, one model."""

import asyncio
import concurrent.futures
import functools
import json
import multiprocessing
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import fastapi
import numpy as np
import pebble
import prometheus_client
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from jaxsd import images
from jaxsd.run import picture
from jaxsd.run.request import Request
from jaxsd.run.text_conditioning import arrange_texts, count_blocks, parse_prompts
from jaxsd.serve import a1111, schemas
from jaxsd.serve.metrics import Metrics
from jaxsd.serve.middleware import (
    LOOPBACK,
    Disconnected,
    HTTPError,
    Middleware,
    error_response,
    read_body,
)
from jaxsd.serve.queue import Busy, Job, Queue, Stopped

PARTS = 8  # prompts joined by AND, the negative one too: each is one more picture for the U-Net
TEXTS = 128  # blocks of 75 tokens that a picture's text encoders read, of all texts of all steps


class Settings(NamedTuple):
    """What a server is told.

    defaults: arguments of Request. key: None lets everybody in. body: bytes. timeout: seconds for
    a request, queueing included. read: seconds for its head, for its body, and to take the answer.
    decode: seconds to decode a picture that is sent.
    connections: at once; more are turned away with 503.
    hosts: names that requests may call this server by, which keeps out web pages that have led a
    browser here (DNS rebinding); None: any. addresses: any IP address too, which no page can fake.
    """

    defaults: Mapping[str, Any]
    limits: a1111.Limits = a1111.Limits()
    key: str | None = None
    body: int = 2**24
    timeout: float = 300
    read: float = 30
    decode: float = 10
    hosts: tuple | None = LOOPBACK
    addresses: bool = False
    connections: int = 128


class Loaded(NamedTuple):
    """model, vae, refiner: names. run: what `picture.record` tells beside the request."""

    queue: Queue
    model: str
    vae: str
    refiner: str
    run: Mapping[str, Any]


class Service:
    """What the routes share.

    load() -> Loaded, called in a thread of its own. failed: what it, or the first picture, raised.
    """

    def __init__(self, settings: Settings, metrics: Metrics, load: Callable[[], Loaded]) -> None:
        self.settings, self.metrics = settings, metrics
        self.loaded: Loaded | None = None
        self.failed: Exception | None = None
        self.tasks = {}  # {force_task_id: Job}
        # Requests with pictures have threads of their own, and pictures are decoded in processes
        # that end when the time is up: made-up ones keep nobody else waiting.
        self.pool = concurrent.futures.ThreadPoolExecutor(4, 'prepare')
        self.picture_pool = concurrent.futures.ThreadPoolExecutor(4, 'pictures')
        self.decoders = pebble.ProcessPool(2, context=multiprocessing.get_context('spawn'))
        threading.Thread(target=self._load, args=[load], daemon=True).start()

    def _load(self, load):
        try:
            loaded = load()
            engine = loaded.queue.engine
            needs = engine.config.task in ('depth', 'upscaler')
            image = np.full((64, 64, 3), 127, np.uint8) if needs else None
            [first] = engine.resolve([Request(**self.settings.defaults, image=image)])
            loaded.queue.warm(first)
            self.loaded = loaded
        except Exception as error:
            self.failed = error

    def ready(self) -> Loaded:
        """-> Loaded. Raises Stopped before there is a first picture, and when there come no more.
        """
        if self.loaded is None:
            raise Stopped('the model is being loaded')
        self.loaded.queue.check(0)
        return self.loaded

    def stop(self) -> None:
        """Begin no more; returns when what runs is done."""
        if self.loaded is not None:
            self.loaded.queue.stop()
        self.decoders.stop()

    def decode(self, read: Callable[..., Any], data: bytes, name: str, *args: Any,
               **options: Any) -> Any:
        """read(data, name, ...), of jaxsd.images, in a process that has settings.decode seconds."""
        try:
            return self.decoders.schedule(read, [data, name, *args], options,
                                          timeout=self.settings.decode).result()
        except concurrent.futures.TimeoutError:
            raise ValueError(f'{name}: could not be decoded in {self.settings.decode:g} s'
                             ) from None
        except pebble.ProcessExpired:
            raise ValueError(f'{name}: could not be decoded') from None
        except (concurrent.futures.CancelledError, RuntimeError):
            raise Stopped('the server stops') from None

    def prepare(self, loaded: Loaded, model: type[schemas.Body],
                data: bytes) -> tuple[schemas.Body, list[Request], Job]:
        """A body's bytes -> it, its Requests, and their Job. Milliseconds: off the event loop."""
        settings, queue = self.settings, loaded.queue
        body = a1111.parse(model, data)
        requests = queue.engine.resolve(a1111.requests(
            body, settings.defaults, settings.limits, loaded.model, loaded.vae, loaded.refiner,
            functools.partial(self.decode, images.read_bytes)))
        requests = [r.replace(wildcards=None) for r in requests]  # they have had their say
        for request in requests:
            _check(request, settings.limits, queue.engine.nets[0])
        job = queue.submit(requests)
        name = body.force_task_id
        if name is not None and self.tasks.setdefault(name, job) is not job:
            queue.cancel(job)
            raise ValueError(f'force_task_id={a1111.brief(name)}: expected one that is not in use')
        return body, requests, job

    def drop(self, prepared: Future) -> None:
        """A request is over, however: what it still wanted is not made. prepared: a future."""
        if not prepared.cancelled() and not prepared.exception():
            body, _, job = prepared.result()
            self.loaded.queue.cancel(job)
            if self.tasks.get(body.force_task_id) is job:
                del self.tasks[body.force_task_id]

    def answer(self, loaded: Loaded, body: schemas.Body, requests: Sequence[Request],
               found: Sequence[Any]) -> bytes:
        """-> the answer's JSON as bytes. PNG files take their time: off the event loop."""
        _raise_failed(found)
        names = {'vae': loaded.vae, 'refiner': loaded.refiner}
        lines = [picture.parameters(r, loaded.model, **names if r.switch < 1 else
                                    names | {'refiner': ''}) for r in requests]
        files = [picture.png(made.image, {
            'parameters': line, 'jaxsd': picture.record(
                request, id=made.id, slots=made.slots, **loaded.run)})
            for made, line, request in zip(found, lines, requests)]
        return json.dumps(a1111.answer(body, list(zip(requests, files)), lines, loaded.model),
                          allow_nan=False).encode()


def _check(request, limits, model):
    """ValueError for a resolved request that is too much."""
    if request.width * request.height > limits.pixels:
        raise ValueError(f'{request.width}x{request.height}: expected at most {limits.pixels} '
                         'pixels')
    parsed = parse_prompts(request)
    if (parts := sum(map(len, parsed.roles.values()))) > PARTS:
        raise ValueError(f'prompt: {parts} parts: expected at most {PARTS}, the negative prompt '
                         'and those between AND')
    count = len(arrange_texts([parsed]).texts[0]) * count_blocks(model, request)
    if count > TEXTS:
        raise ValueError(f'prompt: {count} blocks of 75 tokens in all of its steps: expected at '
                         f'most {TEXTS}')


def _raise_failed(found):
    """Raise what a job came to, where that is no pictures."""
    for error in found:
        if isinstance(error, (ValueError, Stopped)):  # ValueError: not finite
            raise error
        if isinstance(error, Exception):
            line = str(error).strip().partition('\n')[0] or type(error).__name__
            raise HTTPError(500, 'failed', f'the picture could not be made: {line}')


def build(service: Service) -> Middleware:
    """A Service -> its ASGI application."""
    app = fastapi.FastAPI(title='jaxsd', docs_url=None, redoc_url=None)
    for kind in (HTTPError, Disconnected, Stopped, Busy, ValueError, RecursionError,
                 RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, error_response)
    settings = service.settings

    def errors(*codes):
        return {code: {'model': schemas.Error} for code in (
            401, 403, *codes, *([408, 413, 415, 422] if 413 in codes else []))}

    def reads(model):
        return {'requestBody': {'required': True, 'content': {
            'application/json': {'schema': model.model_json_schema()}}}}

    async def pictures(request, model):
        loop, loaded = asyncio.get_running_loop(), service.ready()
        loaded.queue.check(1)
        data = await read_body(request, settings)
        until = loop.time() + settings.timeout
        gone = asyncio.ensure_future(_hung_up(request))
        pool = service.picture_pool if model is schemas.Img2Img else service.pool
        prepared = loop.run_in_executor(pool, service.prepare, loaded, model, data)
        try:
            body, requests, job = await _first(prepared, gone, until)
            found = await _first(asyncio.wrap_future(job.future), gone, until)
            content = await loop.run_in_executor(
                service.pool, service.answer, loaded, body, requests, found)
        finally:
            gone.cancel()
            prepared.add_done_callback(service.drop)
        return fastapi.Response(content, media_type='application/json')

    busy = errors(409, 413, 429, 500, 503, 504)

    @app.post('/sdapi/v1/txt2img', response_model=schemas.Images, responses=busy,
              openapi_extra=reads(schemas.Txt2Img))
    async def txt2img(request: fastapi.Request) -> fastapi.Response:
        return await pictures(request, schemas.Txt2Img)

    @app.post('/sdapi/v1/img2img', response_model=schemas.Images, responses=busy,
              openapi_extra=reads(schemas.Img2Img))
    async def img2img(request: fastapi.Request) -> fastapi.Response:
        return await pictures(request, schemas.Img2Img)

    @app.post('/sdapi/v1/png-info', response_model=schemas.PngInfo, responses=errors(413),
              openapi_extra=reads(schemas.PngInfoBody))
    async def png_info(request: fastapi.Request) -> dict[str, Any]:
        def read(data):
            return a1111.png_info(a1111.parse(schemas.PngInfoBody, data).image, settings.limits,
                                  functools.partial(service.decode, images.read_texts))
        data = await read_body(request, settings)
        found = await asyncio.get_running_loop().run_in_executor(service.picture_pool, read, data)
        return dict(zip(schemas.PngInfo.model_fields, found))

    @app.post('/sdapi/v1/interrupt', responses=errors(404, 413),
              openapi_extra=reads(schemas.InterruptBody))
    async def interrupt(request: fastapi.Request) -> dict[str, str]:
        name = a1111.parse(schemas.InterruptBody, await read_body(request, settings)).force_task_id
        job = service.tasks.get(name)
        if job is None or not service.loaded.queue.cancel(job):
            raise HTTPError(404, 'not_found', f'force_task_id={a1111.brief(name)}: no such task')
        return {}

    @app.get('/sdapi/v1/progress', responses=errors(422, 503))
    async def progress(skip_current_image: bool = False) -> schemas.Progress:
        waiting, running, done, seconds = service.ready().queue.counts()
        count = waiting + running and waiting + running + done
        return schemas.Progress(
            progress=done / count if count else 0, eta_relative=seconds, textinfo='',
            state=schemas.State(job=f'{running} running, {waiting} waiting' if count else '',
                        job_count=count, job_no=done if count else 0))

    @app.get('/sdapi/v1/samplers', responses=errors())
    async def samplers() -> list[schemas.Sampler]:
        return [schemas.Sampler(**one) for one in a1111.samplers()]

    @app.get('/sdapi/v1/schedulers', responses=errors())
    async def schedulers() -> list[schemas.Scheduler]:
        return [schemas.Scheduler(**one) for one in a1111.schedulers()]

    @app.get('/sdapi/v1/sd-models', responses=errors(503))
    async def sd_models() -> list[schemas.SDModel]:
        name = service.ready().model
        return [schemas.SDModel(title=name, model_name=name, filename=name)]

    @app.get('/sdapi/v1/options', responses=errors(503))
    async def options() -> schemas.Options:
        loaded = service.ready()
        return schemas.Options(sd_model_checkpoint=loaded.model, sd_vae=loaded.vae or 'Automatic',
                       CLIP_stop_at_last_layers=settings.defaults.get('clip_skip', 1))

    @app.get('/healthz', responses={403: {'model': schemas.Error}, 503: {'model': schemas.Error}})
    async def healthz() -> schemas.Health:
        service.ready()
        return schemas.Health(status='ok')

    @app.get('/metrics', responses=errors(), response_class=fastapi.responses.PlainTextResponse)
    async def metrics():
        return fastapi.Response(prometheus_client.generate_latest(service.metrics.registry),
                                media_type=prometheus_client.CONTENT_TYPE_LATEST)

    return Middleware(app, service)


async def _hung_up(request):
    while (await request.receive())['type'] != 'http.disconnect':
        pass


async def _first(future, gone, until):
    """The future's result, unless the client goes or the time is up before."""
    left = until - asyncio.get_running_loop().time()
    await asyncio.wait({future, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
    if future.cancelled():
        raise HTTPError(409, 'interrupted', 'the task was interrupted')
    if future.done():
        return future.result()
    if gone.done():
        raise Disconnected
    raise HTTPError(504, 'timeout', 'the pictures were not there in time')
