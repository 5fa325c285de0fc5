"""The server's HTTP: routes, limits, keys, time-outs. One process, one model."""

import asyncio
import base64
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
from jaxsd.run.faces import restore_faces
from jaxsd.run.hires import passes
from jaxsd.run.request import USUAL, Request
from jaxsd.run.resolving import GUIDANCE, suit
from jaxsd.run.text_conditioning import arrange_texts, count_blocks, parse_prompts
from jaxsd.serve import a1111, lists, schemas
from jaxsd.serve.choices import KINDS, Choices, Weights
from jaxsd.serve.metrics import Metrics
from jaxsd.serve.middleware import (
    LOOPBACK,
    Disconnected,
    HTTPError,
    Middleware,
    error_response,
    read_body,
)
from jaxsd.serve.queue import Busy, Interrupted, Job, Queue, Result, Stopped
from jaxsd.weights.model import Network

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
    """model, vae, refiner: names. run: what `picture.record` tells beside the request. restorer: of
    `load_face_restorer`, where the model's detectors find faces for it."""

    queue: Queue
    model: str
    vae: str
    refiner: str
    run: Mapping[str, Any]
    restorer: Network | None = None


class Service:
    """What the routes share.

    load(checkpoint, vae) -> Loaded, called in a thread of its own; both are Weights of `choices`
    or None, those of the start; a VAE without a path is the checkpoint's own. failed: what the
    first call of it, or the first picture, raised. early: requests are taken before the first
    picture is there, as soon as the model is.
    """

    def __init__(self, settings: Settings, metrics: Metrics, load: Callable[..., Loaded],
                 choices: Choices | None = None, early: bool = False) -> None:
        self.settings, self.metrics, self.early = settings, metrics, early
        self.defaults = dict(settings.defaults)  # of requests; POST /sdapi/v1/options changes them
        self.choices = choices or Choices(dict)
        self.loaded: Loaded | None = None
        self.failed: Exception | None = None
        self.tasks: dict[str | Job, Job] = {}  # of requests: {force_task_id, or itself: Job}
        self._load, self._chosen = load, ()  # its arguments
        self._changing = threading.Lock()  # held while what is loaded changes
        # Requests with pictures have threads of their own, and pictures are decoded in processes
        # that end when the time is up: made-up ones keep nobody else waiting.
        self.pool = concurrent.futures.ThreadPoolExecutor(4, 'prepare')
        self.picture_pool = concurrent.futures.ThreadPoolExecutor(4, 'pictures')
        self.decoders = pebble.ProcessPool(2, context=multiprocessing.get_context('spawn'))
        threading.Thread(target=self._begin, daemon=True).start()

    def _begin(self):
        with self._changing:
            try:
                self._load_now()
            except Exception as error:
                self.failed = error

    def _load_now(self, *chosen):
        """Load, and draw the first picture."""
        loaded = self._load(*chosen)
        engine = loaded.queue.engine
        needs = engine.config.task in (
            'depth', 'pix2pix', 'unclip', 'upscaler', 'latent_upscaler')
        image = np.full((64, 64, 3), 127, np.uint8) if needs else None
        try:
            [first] = engine.resolve([Request(**self.defaults, image=image)])
            if self.early:
                self.loaded = loaded
            loaded.queue.warm(first, draw=not self.early)
        except Exception:
            self.loaded = None
            engine.close()
            raise
        self.loaded, self._chosen = loaded, chosen

    def models(self) -> list[Weights]:
        """The checkpoints that `switch` takes, the one that is loaded among them."""
        found = self.choices.all('checkpoints')
        loaded = self.loaded
        if loaded is not None and loaded.model not in (one.name for one in found):
            found.append(Weights(loaded.model, ''))
        return found

    def current(self) -> Weights:
        """The checkpoint that is loaded. Raises Stopped."""
        name = self.ready().model
        return next((one for one in self.models() if one.name == name), Weights(name, ''))

    def switch(self, name: str | None = None, vae: str | None = None) -> None:
        """Load the checkpoint of this name, title, file name or hash (None: the same again), with
        the VAE of this name ('None': the checkpoint's own; 'Automatic': that of the start; None:
        the same). Blocks until the first picture is drawn; before it begins, what was asked for is
        made. Meanwhile requests get 503. Raises ValueError for names that there are not, and
        HTTPError where loading failed; then the one before is loaded again."""
        chosen: list[Weights | None] = [None, None]
        if name is not None:
            chosen[0] = self.choices.find('checkpoints', 'sd_model_checkpoint', name)
        if vae == 'None':
            chosen[1] = Weights('', '')
        elif vae not in (None, 'Automatic'):
            chosen[1] = self.choices.find('vaes', 'sd_vae', vae)
        with self._changing:
            before = self._chosen or (None, None)
            if name is None:
                chosen[0] = before[0]
            if vae is None:
                chosen[1] = before[1]
            self._unload()
            try:
                self._load_now(*chosen)
            except Exception as error:
                text = str(error).strip().partition('\n')[0]
                for kind in KINDS:
                    for one in self.choices.all(kind):
                        text = text.replace(one.path, one.filename)
                try:
                    self._load_now(*before)
                except Exception as worse:
                    self.failed = worse
                raise HTTPError(500, 'failed', f'what was there before is loaded again: {text}'
                                ) from error

    def unload(self) -> None:
        """Make what was asked for, and give the memory back; until `switch` requests get 503."""
        with self._changing:
            self._unload()

    def _unload(self):
        loaded, self.loaded = self.loaded, None
        if loaded is not None:
            loaded.queue.finish('another model is being loaded')
            loaded.queue.engine.close()

    def ready(self) -> Loaded:
        """-> Loaded. Raises Stopped before there is a first picture, and when there come no more.
        """
        if self.loaded is None:
            raise Stopped('no model is loaded now: it is being loaded, or was unloaded')
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
        requests, job = self.submit(loaded, a1111.requests(
            body, self.suited(loaded), settings.limits, (loaded.model, *self.current().aliases),
            loaded.vae, loaded.refiner, functools.partial(self.decode, images.read_bytes),
            queue.engine.nets[0].controlnets, queue.engine.nets[0].upscalers,
            queue.engine.nets[0].ip_adapters, queue.engine.config.task == 'pix2pix',
            queue.engine.nets[0].detectors))
        job.batch = body.batch_size or 1
        name = body.force_task_id
        if self.tasks.setdefault(job if name is None else name, job) is not job:
            queue.cancel(job)
            raise ValueError(f'force_task_id={a1111.brief(name)}: expected one that is not in use')
        return body, requests, job

    def suited(self, loaded: Loaded | None) -> dict[str, Any]:
        """Arguments of Request for what requests leave open, with what suits the model; None: with
        what suits most."""
        if loaded is None:
            usual = {**USUAL, 'guidance': GUIDANCE['']}
            return {**self.defaults, **{name: value for name, value in usual.items()
                                        if self.defaults.get(name) is None}}
        return suit(self.defaults, loaded.queue.engine.config)

    def resolve(self, loaded: Loaded, requests: Sequence[Request]) -> list[Request]:
        """Requests -> them as they are made. Raises ValueError for what is wrong or too much."""
        resolved = [request.replace(wildcards=None)  # they have had their say
                    for request in loaded.queue.engine.resolve(requests)]
        for request in resolved:
            _check(request, self.settings.limits, loaded.queue.engine.nets[0])
        return resolved

    def submit(self, loaded: Loaded, requests: Sequence[Request]) -> tuple[list[Request], Job]:
        """Requests -> `resolve`'s, and their Job. Raises as it, and Busy and Stopped."""
        resolved = self.resolve(loaded, requests)
        return resolved, loaded.queue.submit(resolved)

    def detect(self, data: bytes) -> dict[str, Any]:
        """POST /controlnet/detect: a body's bytes -> the hints of its pictures."""
        body, found = a1111.parse(schemas.DetectBody, data), []
        for i, text in enumerate(body.controlnet_input_images or body.controlnet_images or ()):
            name = f'controlnet_input_images.{i}'
            image = self.decode(images.read_bytes, a1111.decode(text, name), name,
                                4 * self.settings.limits.pixels)
            hint = a1111.detect(body.controlnet_module, image, body.controlnet_processor_res,
                                body.controlnet_threshold_a, body.controlnet_threshold_b,
                                self.detectors())
            found.append(base64.b64encode(picture.png(hint)).decode())
        return {'images': found, 'info': 'Success'}

    def detectors(self) -> Mapping[str, Network]:
        """The networks for hints, {} while no model is loaded."""
        return self.loaded.queue.engine.nets[0].detectors if self.loaded else {}

    def extras(self, model: type[schemas.Extras], data: bytes) -> dict[str, Any]:
        """POST /sdapi/v1/extra-single-image, extra-batch-images: a body's bytes -> the answer."""
        loaded = self.ready()
        net, body, found = loaded.queue.engine.nets[0], a1111.parse(model, data), []
        faces = a1111.faces(body, loaded.restorer)
        if isinstance(body, schemas.ExtraBatch):
            sent = {f'imageList.{i}.data': one.data for i, one in enumerate(body.imageList)}
        else:
            assert isinstance(body, schemas.ExtraSingle)
            sent = {'image': body.image}
        for name, text in sent.items():
            image = self.decode(images.read_bytes, a1111.decode(text, name), name,
                                4 * self.settings.limits.pixels)
            large = a1111.enlarged(body, image, self.settings.limits, net.upscalers)
            if faces and loaded.restorer is not None:
                large = restore_faces(loaded.restorer, large, net.detectors, *faces)
            found.append(base64.b64encode(picture.png(large)).decode())
        return {'html_info': '', **({'image': found[0]} if 'image' in sent else {
            'images': found})}

    def drop(self, prepared: Future) -> None:
        """A request is over, however: what it still wanted is not made. prepared: a future."""
        if not prepared.cancelled() and not prepared.exception():
            body, _, job = prepared.result()
            job.queue.cancel(job)
            name = job if body.force_task_id is None else body.force_task_id
            if self.tasks.get(name) is job:
                del self.tasks[name]

    def interrupt(self, name: str | None, skip: bool = False) -> None:
        """End the request of this force_task_id, or all, with the pictures that are done, and those
        under way as they are; skip: so one batch of it, the first that is not done. Raises
        HTTPError for a name that there is not."""
        jobs = list(self.tasks.values()) if name is None else [
            job for key, job in list(self.tasks.items()) if key == name]
        # The newest first, so that none begins when an older one's slot is free.
        if not sum(job.queue.interrupt(job, job.batch if skip else None)
                   for job in reversed(jobs)) and name is not None:
            raise HTTPError(404, 'not_found', f'force_task_id={a1111.brief(name)}: no such task')

    def progress(self, image: bool = True) -> schemas.Progress:
        """How far all pictures are; image: with what those of the oldest request are by now."""
        queue = self.ready().queue
        waiting, running, done, seconds = queue.counts()
        count = waiting + running and waiting + running + done
        jobs = [job for job in list(self.tasks.values()) if not job.future.done()]
        found = schemas.Progress(
            progress=queue.progress(), eta_relative=seconds, textinfo='', state=schemas.State(
                job=f'{running} running, {waiting} waiting' if count else '',
                job_count=count, job_no=done if count else 0))
        if any(job.state() == 'compiling' for job in jobs):
            found.textinfo = ('compiling the programs for this size and kind of picture, once: '
                              'seconds to minutes')
        if jobs:
            found.state.sampling_step, found.state.sampling_steps = jobs[0].progress()
            seen = [one for one in jobs[0].previews() if one is not None] if image else []
            seen = [one for one in seen if one.shape == seen[-1].shape]
            if seen:
                file = picture.png(seen[0] if len(seen) == 1 else picture.grid(np.stack(seen)))
                found.current_image = base64.b64encode(file).decode()
        return found

    def file(self, loaded: Loaded, request: Request, made: Result) -> tuple[str, bytes]:
        """A picture -> the `parameters` in its file, and the PNG file."""
        hashes = self.choices.hashes(loaded.model, loaded.vae)
        line = picture.parameters(request, loaded.model, loaded.vae,
                                  loaded.refiner if request.switch < 1 else '', made.unfinished,
                                  hashes)
        texts = {'parameters': line}
        if made.unfinished is None:  # else nothing makes it again
            texts['jaxsd'] = picture.record(request, id=made.id, slots=made.slots,
                                            hashes=hashes, **loaded.run)
        return line, picture.png(made.image, texts)

    def answer(self, loaded: Loaded, body: schemas.Body, requests: Sequence[Request],
               found: Sequence[Any]) -> bytes:
        """-> the answer's JSON as bytes. PNG files take their time: off the event loop."""
        _raise_failed(found)
        requests = [r for r, one in zip(requests, found) if not isinstance(one, Interrupted)]
        found = [one for one in found if not isinstance(one, Interrupted)]
        if not found:
            raise HTTPError(409, 'interrupted', 'the request was interrupted before there was '
                            'anything to see of a picture')
        lines, files = zip(*(self.file(loaded, *one) for one in zip(requests, found)))
        return json.dumps(
            a1111.answer(body, list(zip(requests, files)), lines, loaded.model,
                         [made.unfinished for made in found]), allow_nan=False).encode()


def _check(request, limits, model):
    """ValueError for a resolved request that is too much."""
    width, height = request.final_size
    if width * height > limits.pixels:
        raise ValueError(f'{width}x{height}: expected at most {limits.pixels} pixels')
    for one in passes(request):
        _check_text(one, model)


def _check_text(request, model):
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
        if isinstance(error, Exception) and not isinstance(error, Interrupted):
            line = str(error).strip().partition('\n')[0] or type(error).__name__
            raise HTTPError(500, 'failed', f'the picture could not be made: {line}')


def build(service: Service,
          extend: Callable[[fastapi.FastAPI, Service], object] | None = None) -> Middleware:
    """A Service -> its ASGI application. extend(app, service) adds routes, behind the same
    Middleware."""
    app = fastapi.FastAPI(title='jaxsd', docs_url=None, redoc_url=None)
    for kind in (HTTPError, Disconnected, Stopped, Busy, ValueError, RecursionError,
                 RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, error_response)
    settings = service.settings

    def errors(*codes):
        return {code: {'model': schemas.Error} for code in (
            401, 403, *codes, *([408, 413, 415, 422] if 413 in codes else []))}

    def reads(model, required=True):
        return {'requestBody': {'required': required, 'content': {
            'application/json': {'schema': schemas.whole(model)}}}}

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

    async def task_id(request):
        data = await read_body(request, settings, needed=False)
        return a1111.parse(schemas.InterruptBody, data or b'{}').force_task_id

    ends = {'responses': errors(404, 413), 'openapi_extra': reads(schemas.InterruptBody, False)}

    @app.post('/sdapi/v1/interrupt', **ends)
    async def interrupt(request: fastapi.Request) -> dict[str, str]:
        service.interrupt(await task_id(request))
        return {}

    @app.post('/sdapi/v1/skip', **ends)
    async def skip(request: fastapi.Request) -> dict[str, str]:
        service.interrupt(await task_id(request), skip=True)
        return {}

    @app.get('/sdapi/v1/progress', responses=errors(422, 503))
    async def progress(skip_current_image: bool = False) -> schemas.Progress:
        return await asyncio.to_thread(service.progress, not skip_current_image)

    lists.add(app, service, errors, reads)

    @app.get('/healthz', responses={403: {'model': schemas.Error}, 503: {'model': schemas.Error}})
    async def healthz() -> schemas.Health:
        service.ready()
        return schemas.Health(status='ok')

    @app.get('/metrics', responses=errors(), response_class=fastapi.responses.PlainTextResponse)
    async def metrics():
        return fastapi.Response(prometheus_client.generate_latest(service.metrics.registry),
                                media_type=prometheus_client.CONTENT_TYPE_LATEST)

    if extend is not None:
        extend(app, service)
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
