"""Before the routes: keys, hosts, bodies and their limits; and errors as answers."""

import asyncio
import base64
import binascii
import hmac
import ipaddress
import time
from typing import Any

import fastapi
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from jaxsd.serve.a1111 import brief
from jaxsd.serve.queue import Busy, Stopped

LOOPBACK = ('127.0.0.1', '::1', 'localhost')
OPEN = ('/healthz',)  # without a key


class HTTPError(Exception):
    """An answer that is none: status, a word for programs, a line for people."""

    def __init__(self, status, error, detail, **headers):
        super().__init__(detail)
        self.status, self.error, self.headers = status, error, headers


class Disconnected(Exception):
    """The client has hung up."""


async def read_body(request: fastapi.Request, settings: Any, needed: bool = True) -> bytes:
    """The body's bytes, counted as they come, whatever the head says of their number. needed:
    without one it is an error; else b''."""
    kind = request.headers.get('content-type', '').partition(';')[0].strip().lower()
    if not needed and not kind and request.headers.get('content-length', '0') == '0' and (
            'transfer-encoding' not in request.headers):
        origin = request.headers.get('origin')  # browsers name the page that sends such a request
        if origin is not None and origin.partition('://')[2] != request.headers.get('host'):
            raise HTTPError(403, 'forbidden', f'origin {brief(origin)}: expected a page of this '
                            'server')
        return b''
    if kind != 'application/json':  # which no web page can send to another host unasked
        raise HTTPError(415, 'unsupported', f'content-type {brief(kind)}: expected '
                      'application/json')
    size, parts = 0, []
    try:
        async with asyncio.timeout(settings.read):
            async for part in request.stream():
                size += len(part)
                if size <= settings.body:
                    parts.append(part)
                elif size > 4 * settings.body:  # up to here, so that clients hear the answer
                    break
    except TimeoutError:
        raise HTTPError(408, 'slow', f'the body took longer than {settings.read:g} s',
                      connection='close') from None
    except ClientDisconnect:
        raise Disconnected from None
    if size > settings.body:
        raise HTTPError(413, 'too_large', f'the body has more than {settings.body} bytes',
                      connection='close')
    return b''.join(parts)


async def error_response(request: fastapi.Request | None,
                         error: Exception) -> fastapi.responses.JSONResponse:
    """An exception as an answer: {"detail": a line, "error": a word}."""
    status, word, headers = 422, 'invalid', {}
    detail = ' '.join(str(error).split())
    if isinstance(error, HTTPError):
        status, word, headers = error.status, error.error, error.headers
    elif isinstance(error, Busy):
        status, word, headers = 429, 'busy', {'retry-after': str(error.seconds)}
    elif isinstance(error, Stopped):
        status, word, headers = 503, 'unavailable', {'retry-after': '5'}
    elif isinstance(error, Disconnected):  # nobody hears it
        status, word = 499, 'gone'
    elif isinstance(error, HTTPException):
        status, word, headers = error.status_code, 'http', dict(error.headers or {})
        detail = str(error.detail)
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        detail = f'{".".join(map(str, first["loc"][1:]))}: {first["msg"]}'
    elif isinstance(error, RecursionError):
        detail = 'brackets in brackets: too deep'
    elif not isinstance(error, ValueError):
        status, word, detail = 500, 'internal', 'an error of the server, see its log'
    return fastapi.responses.JSONResponse({'detail': detail, 'error': word}, status, headers)


class Middleware:
    """Who may come in, and how it went: ASGI around all routes."""

    def __init__(self, app: fastapi.FastAPI, service: Any) -> None:
        self.app, self.service = app, service
        key = service.settings.key
        self.key = key and key.encode()

    async def __call__(self, scope, receive, send):
        """ASGI."""
        if scope['type'] != 'http':
            return await self.app(scope, receive, send)
        began, status = time.monotonic(), 499  # nginx's: the client has gone

        async def tell(message):
            nonlocal status
            status = message.get('status', status)
            await send(message)

        try:
            refused = self._refused(scope, dict(scope['headers']))
            answer = await error_response(None, refused) if refused else self.app
            await answer(scope, receive, tell)
        finally:
            metrics, route = self.service.metrics, getattr(scope.get('route'), 'path', 'other')
            metrics.requests.labels(route, status).inc()
            metrics.answering.observe(time.monotonic() - began)

    def _refused(self, scope, headers):
        """Why not, or None."""
        settings = self.service.settings
        if settings.hosts is not None:
            host = headers.get(b'host', b'').decode('latin-1')
            name, _, port = host.rpartition(':')
            name = (name if port.isdigit() else host).strip('[]').lower()
            if name not in settings.hosts and not (settings.addresses and _is_address(name)):
                return HTTPError(403, 'forbidden', f'host {brief(host)}: expected a name of this '
                               'machine, or one that --hosts lists')
        if self.key is None or scope['path'] in OPEN:
            return None
        kind, _, given = headers.get(b'authorization', b'').partition(b' ')
        if kind.lower() == b'basic':
            try:
                given = base64.b64decode(given, validate=True).partition(b':')[2]
            except binascii.Error:
                given = b''
        if kind.lower() in (b'basic', b'bearer') and hmac.compare_digest(given, self.key):
            return None
        return HTTPError(401, 'unauthorized', 'expected the API key, as a Bearer token or as the '
                       'password of Basic', **{'www-authenticate': 'Basic realm="jaxsd"'})


def _is_address(name):
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False
