"""The process: uvicorn, with patience that ends and a stop that loses nothing."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import fastapi
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxsd.serve.app import Service, build

KEEP_ALIVE = 15  # s that an idle connection stays open


class Patient(H11Protocol):
    """Connections end that within `read` seconds neither take an answer nor come to a request."""

    read = deadline = None  # seconds, set by Server; a timer

    def connection_made(self, transport: Any) -> None:
        """The clock starts."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """It stops with the end of a request's head."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """It starts again."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """No more to watch."""
        super().connection_lost(exc)
        self._stop()

    def _watch(self):
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self.deadline is None:
            self.deadline = self.loop.call_later(self.read, self.transport.abort)

    def _stop(self):
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None


class Server(uvicorn.Server):
    """Stops when the model cannot be loaded; on a signal, when what runs is done.
    extend: as of `build`."""

    def __init__(self, service: Service, host: str, port: int,
                 extend: Callable[[fastapi.FastAPI, Service], object] | None = None) -> None:
        settings: Any = service.settings
        self.service = service
        super().__init__(uvicorn.Config(
            build(service, extend), host, port,
            http=type('Http', (Patient,), {'read': settings.read}), loop='asyncio', ws='none',
            lifespan='off', log_level='warning', access_log=False,
            timeout_keep_alive=min(KEEP_ALIVE, settings.read / 2),
            limit_concurrency=settings.connections,
            timeout_graceful_shutdown=int(settings.timeout)))

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second -> whether to end."""
        return await super().on_tick(counter) or self.service.failed is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Nothing new is begun; then as uvicorn does it."""
        await asyncio.to_thread(self.service.stop)
        await super().shutdown(sockets)
