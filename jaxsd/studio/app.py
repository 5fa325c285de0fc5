"""The studio's routes: a page, and what it asks of the server's one engine and queue.

All stand behind the server's Middleware. Bodies are JSON (`read_body`), pictures in them base64;
the only files that are sent are the page's three, by name.
"""

import asyncio
import base64
import functools
import json
import pathlib
import secrets
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import fastapi
import numpy as np
from fastapi.responses import JSONResponse, Response

from jaxsd import images, sampling
from jaxsd.models.controlnet import modes_of
from jaxsd.run import infotext, inputs, picture
from jaxsd.run.detectors import hint, possible
from jaxsd.run.request import FILLS, MASK_MODES, RESIZE, UPSCALERS, Hires, Request
from jaxsd.run.resolving import BUCKETS
from jaxsd.sampling.choice import one_of
from jaxsd.sampling.names import A1111_SAMPLERS, A1111_SCHEDULES
from jaxsd.serve import a1111
from jaxsd.serve.app import Loaded, Service
from jaxsd.serve.middleware import HTTPError, read_body
from jaxsd.serve.queue import Job
from jaxsd.studio import plans, settings

FOLDER = pathlib.Path(__file__).parent
FILES = {'/': ('page.html', 'text/html'), '/studio/page.css': ('page.css', 'text/css'),
         '/studio/page.js': ('page.js', 'text/javascript')}
HEADERS = {  # the page runs its own script and asks its own server, nothing else
    'content-security-policy': "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    'x-content-type-options': 'nosniff', 'referrer-policy': 'no-referrer',
    'cache-control': 'no-cache'}
KEPT = 2**26  # pixels of jobs that are done; the page has its own copies by then


class Drawing(NamedTuple):
    """What the page asked for at once. job: of the requests, and of `references` after them, with
    None for pictures that approach nothing."""

    job: Job
    requests: list[Request]
    loaded: Loaded  # what makes them
    references: list[Request | None]

    def distances(self) -> list[float | None]:
        """Of pictures that are done: how far each is from its reference, the root mean square of
        the differences, of 255."""
        images = [getattr(each, 'image', None) for each in self.job.future.result()]
        others, found = iter(images[len(self.requests):]), []
        for image, reference in zip(images, self.references):
            other = None if reference is None else next(others)
            found.append(None if image is None or other is None else float(
                np.sqrt(np.mean(np.square(image.astype(float) - other)))))
        return found


class Studio:
    """What the routes share: the Service, and the jobs that pages asked for, by names that nobody
    guesses."""

    def __init__(self, service: Service) -> None:
        self.service, self._drawings = service, {}
        self._lock, self._tracing = threading.Lock(), threading.Lock()

    def state(self) -> dict[str, Any]:
        """What the page offers, and of the model what is known by now."""
        service = self.service
        loaded, found = service.loaded, dict(OFFERED)
        limits = service.settings.limits
        found |= {'defaults': {name: value for name, value in service.suited(loaded).items()
                               if name != 'wildcards'},
                  'limits': limits._asdict(), 'ready': loaded is not None,
                  'models': [{'name': one.name, 'hash': one.hash, 'loaded': loaded is not None
                              and one.name == loaded.model} for one in service.models()],
                  'error': None if service.failed is None else ' '.join(
                      str(service.failed).split())}
        if loaded is not None:
            found |= self._model(loaded)
        return found

    def _model(self, loaded):
        engine, config = loaded.queue.engine, loaded.queue.engine.config
        native = config.unet.sample_size * config.vae.factor
        net = engine.nets[0]
        sizes = BUCKETS if config.unet.added_dim else [
            (native * w // 4, native * h // 4) for w, h in ((4, 4), (6, 4), (4, 6), (5, 4), (4, 5))]
        return {'model': loaded.model, 'version': config.version, 'native': native,
                'factor': config.vae.factor,
                'sizes': [size for size in sizes
                          if not any(side % config.vae.factor for side in size)],
                'nets': sorted(net.controlnets),
                'preprocessors': [*images.PREPROCESSORS, *possible(net.detectors)],
                'modes': {name: modes_of(one.config) for name, one in net.controlnets.items()
                          if getattr(one.config, 'num_control_type', 0)},
                'adapters': sorted(net.adapters),
                'embeddings': sorted(net.embeddings), 'networks': sorted(net.upscalers),
                'vae': loaded.vae, 'refiner': loaded.refiner,
                'weights': loaded.queue.identity.settings['weights'],
                'dtype': loaded.run.get('dtype')}

    def base(self, given: Any) -> Request:
        """The page's settings -> a Request."""
        service = self.service
        return settings.request(given, service.suited(service.loaded), service.settings.limits,
                                functools.partial(service.decode, images.read_bytes))

    def _expanded(self, loaded, body):
        base, along = self.base(body.get('settings')), settings.axes(body.get('axes') or ())
        return base, along, settings.expand(base, body.get('count', 1), along,
                                            self.service.settings.limits, loaded.queue.most)

    def draw(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """{'settings', 'count', or 'axes' and 'reference'} -> a job's name, its pictures' settings,
        and of a grid its axes. reference: steps of the picture that each one is compared with, see
        lab.sweep.target; 0: none. Raises ValueError, Busy and Stopped."""
        loaded = self.service.ready()
        _, along, requests = self._expanded(loaded, body)
        requests = self.service.resolve(loaded, requests)
        references = self._references(loaded, requests, body.get('reference') or 0)
        _, job = self.service.submit(loaded, [*requests, *filter(None, references)])
        name = secrets.token_urlsafe(16)
        with self._lock:
            self._drawings[name] = Drawing(job, requests, loaded, references)
            self._forget()
        return {'job': name, 'settings': [settings.shown(request) for request in requests],
                'axes': [{'field': axis.field, 'labels': axis.labels()} for axis in along]}

    def _references(self, loaded, requests, steps):
        """What each picture approaches with ever more steps, with so many."""
        if not steps:
            return []
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f'reference={steps!r}: expected a number of steps, or 0')
        from jaxsd.lab import sweep
        found = [sweep.target(request, sweep.kind(self._rows(loaded, request)), steps)
                 for request in requests]
        for reference in filter(None, found):
            settings.check(reference, self.service.settings.limits)
        queue = loaded.queue
        count = len({queue.identity.of(one) for one in [*requests, *filter(None, found)]})
        if count > queue.most:
            raise ValueError(f'a grid and its references are {count} pictures: expected at most '
                             f'{queue.most}, as many as may wait (--queue)')
        return found

    def _rows(self, loaded, request):
        """The sampler's table for a resolved request."""
        return inputs(loaded.queue.engine.nets[0], [request.replace(controls=())]).rows

    def _forget(self):
        """Drop the oldest pictures that are done. The lock is held."""
        def pixels(each):
            return sum(request.width * request.height for request in each.requests)

        left = sum(map(pixels, self._drawings.values()))
        for name, each in list(self._drawings.items())[:-1]:
            if left > KEPT and each.job.future.done():
                del self._drawings[name]
                left -= pixels(each)

    def _drawing(self, name):
        with self._lock:
            found = self._drawings.get(name)
        if found is None:
            raise HTTPError(404, 'not_found', 'no such job: the server keeps the newest alone')
        return found

    def progress(self, name: str) -> dict[str, Any]:
        """How a job goes; of each picture how many model calls are done, and what it came to."""
        drawing = self._drawing(name)
        job, count = drawing.job, len(drawing.requests)
        done, total = job.progress()
        state = 'cancelled' if job.future.cancelled() else job.state()
        found = job.future.result() if state == 'done' else ()
        return {'state': state, 'done': done, 'total': total,
                'pictures': [task.done for task in job.tasks[:count]],
                'distances': drawing.distances() if state == 'done' else [],
                'errors': [_line(each) if isinstance(each, Exception) else None
                           for each in found[:count]]}

    def cancel(self, name: str) -> None:
        """Take a job back, where it is not done."""
        job = self._drawing(name).job
        job.queue.cancel(job)

    def picture(self, name: str, number: int) -> bytes | None:
        """A picture of a job -> its PNG file; before it is done, what it is by now, or None."""
        job, requests, loaded, _ = self._drawing(name)
        if not 0 <= number < len(requests):
            raise HTTPError(404, 'not_found', f'no picture {number} in this job')
        if job.future.done() and not job.future.cancelled():
            made = job.future.result()[number]
            if not isinstance(made, Exception):
                return self.service.file(loaded, requests[number], made)[1]
        elif (preview := job.previews()[number]) is not None:
            return picture.png(preview)
        return None

    def export(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """As `draw`, but what makes the same pictures: a plan for launch.batch, and Python."""
        loaded = self.service.ready()
        base, along, requests = self._expanded(loaded, body)
        found = plans.export(self.service.resolve(loaded, requests), base, along,
                             tuple(self.service.defaults), loaded.model)
        return found | {'zip': base64.b64encode(found['zip']).decode()}

    def read(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """{'image': base64} of a picture that says how it was made -> its settings, and notes."""
        limits = self.service.settings.limits
        data = a1111.decode(body.get('image') or '', 'image')
        texts, comment = self.service.decode(images.read_texts, data, 'the picture',
                                             4 * limits.pixels)
        if comment:
            texts = {'parameters': infotext.comment(comment)} | texts
        found = infotext.from_texts('the picture', texts)
        fields, notes = dict(found.fields), list(found.notes)
        for name in [name for name in fields if name not in settings.AXES]:
            if fields.pop(name):
                notes.append(f'{name}: a file of whoever made the picture; give it here')
        if not isinstance(fields.get('schedule', ''), str) or str(
                fields.get('schedule')).endswith('.json'):
            notes.append(f'schedule={infotext.brief(fields.pop("schedule"))}: is not read here')
        fields.pop('strength', None)
        request = Request(**fields)
        if 'versions' not in found.run and self.service.loaded is not None:
            [request], more = infotext.fit([request], self.service.loaded.queue.engine.config)
            notes += more
        return {'settings': settings.shown(request), 'notes': notes,
                'model': found.run.get('model')}

    def hint(self, body: Mapping[str, Any]) -> dict[str, str]:
        """{'image', 'kind', 'width', 'height', 'options'} -> {'image': a PNG as base64}: what a
        ControlNet will see."""
        there = self.service.detectors()
        kind = one_of('preprocessor', body.get('kind'), [*images.PREPROCESSORS, *possible(there)])
        limits, options = self.service.settings.limits, body.get('options') or {}
        data = a1111.decode(body.get('image') or '', 'image')
        pixels = self.service.decode(images.read_bytes, data, 'image', 4 * limits.pixels)
        width, height = body.get('width'), body.get('height')
        if not (isinstance(width, int) and isinstance(height, int)
                and 0 < width * height <= limits.pixels and isinstance(options, dict)):
            raise ValueError(f'width={width!r}, height={height!r}: expected whole numbers with at '
                             f'most {limits.pixels} pixels')
        try:
            found = hint(kind, pixels, width, height, there, **options)
        except TypeError:
            raise ValueError(f'{kind} takes no {", ".join(options)}') from None
        return {'image': base64.b64encode(picture.png(found)).decode()}

    def switch(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """{'name'} -> `state`, when this model is loaded; pictures that are on their way come
        first."""
        self.service.switch(str(body.get('name') or ''))
        return self.state()

    def levels(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """{'settings'} -> the sampler's table: the noise level of each model call, and what it
        mixes, as `jaxsd.sampling.Row` has it."""
        loaded = self.service.ready()
        [request] = self.service.resolve(loaded, [self.base(body.get('settings'))])
        rows = self._rows(loaded, request)
        found = {'sampler': request.sampler, 'schedule': str(request.schedule),
                 'sigma': np.asarray(rows.sigma)[:, 0].tolist(), 'columns': [], 'mix': []}
        if isinstance(rows, sampling.Row):
            found |= {'columns': ['x', 'y', 'noise', *(f'e{i}' for i in range(sampling.HISTORY)),
                                  'uncond'], 'mix': np.asarray(rows.mix)[:, 0, 0].tolist()}
        return found

    def trace(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """{'settings'} -> what every model call saw and said, as PNGs; one picture at a time, by a
        program of its own (`jaxsd.lab.trace`)."""
        from jaxsd.lab.trace import ROWS, trace
        loaded = self.service.ready()
        [request] = self.service.resolve(loaded, [self.base(body.get('settings'))])
        if request.hires is not None:
            raise ValueError('hires: expected none, a trace is of one pass')
        if not self._tracing.acquire(blocking=False):
            raise HTTPError(429, 'busy', 'another trace is being drawn: come again in a moment')
        try:
            found = trace(loaded.queue.engine.nets[0], request)
        finally:
            self._tracing.release()
        return {'settings': settings.shown(request),
                'calls': [{'step': int(found.step[i]), 'sigma': float(found.sigma[i]),
                           'timestep': float(found.timestep[i]),
                           **{name: base64.b64encode(picture.png(getattr(found, name)[i])).decode()
                              for name in ROWS}} for i in range(len(found.sigma))]}


def _labels(names: Sequence[str], known: Mapping[str, str]) -> list[list[str]]:
    return [[name, known.get(name, name)] for name in names]


OFFERED: dict[str, Any] = {
    'samplers': _labels(tuple(sampling.SAMPLERS), A1111_SAMPLERS),
    'schedules': _labels(tuple(sampling.SCHEDULES), A1111_SCHEDULES),
    'hires': settings.plain(Hires()), 'upscalers': _labels(UPSCALERS, picture.UPSCALERS),
    'axes': settings.AXES, 'fills': FILLS, 'mask_modes': MASK_MODES, 'resize': RESIZE,
    'preprocessors': list(images.PREPROCESSORS)}


def _line(error):
    return str(error).strip().partition('\n')[0] or type(error).__name__


def extend(app: fastapi.FastAPI, service: Service) -> None:
    """Add the page and its routes to the server's application."""
    studio = Studio(service)

    async def answer(function, *args, slow=False):
        """function(*args) off the event loop, as JSON or as it is; slow: it decodes pictures."""
        pool = service.picture_pool if slow else service.pool
        found = await asyncio.get_running_loop().run_in_executor(pool, function, *args)
        return found if isinstance(found, Response) else JSONResponse(found)

    def posts(path, function, slow=False):
        async def route(request: fastapi.Request) -> Response:
            data = await read_body(request, service.settings)
            return await answer(lambda: function(_object(data)), slow=slow)
        app.post(path, include_in_schema=False)(route)

    for path, (name, kind) in FILES.items():
        file = Response((FOLDER / name).read_bytes(), headers=HEADERS, media_type=kind)
        app.get(path, include_in_schema=False)(functools.partial(_sent, file))
    for path, function, slow in (
            ('/studio/draw', studio.draw, True), ('/studio/export', studio.export, True),
            ('/studio/read', studio.read, True), ('/studio/hint', studio.hint, True),
            ('/studio/levels', studio.levels, False),
            ('/studio/switch', studio.switch, False), ('/studio/trace', studio.trace, True)):
        posts(path, function, slow)

    @app.get('/studio/state', include_in_schema=False)
    async def state() -> Response:
        return await answer(studio.state)

    @app.get('/studio/jobs/{name}', include_in_schema=False)
    async def progress(name: str) -> Response:
        return await answer(studio.progress, name)

    @app.post('/studio/jobs/{name}/cancel', include_in_schema=False)
    async def cancel(name: str, request: fastapi.Request) -> Response:
        await read_body(request, service.settings)
        return await answer(studio.cancel, name)

    @app.get('/studio/jobs/{name}/{number}.png', include_in_schema=False)
    async def shown(name: str, number: int) -> Response:
        def found():
            data = studio.picture(name, number)
            return Response(data, 204 if data is None else 200, {'cache-control': 'no-store'},
                            'image/png')
        return await answer(found)


def _object(data: bytes) -> dict:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'the body: expected JSON: {error}') from None
    if not isinstance(found, dict):
        raise ValueError('the body: expected an object of JSON')
    return found


async def _sent(file: Response) -> Response:
    return file
