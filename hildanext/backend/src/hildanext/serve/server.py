"""An app on a socket: bound before anything is loaded, and ended with grace."""

import asyncio
import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from hildanext.core.errors import HildaError
from hildanext.core.logging_setup import StandardError
from hildanext.serve.connection_limits import bounded_by
from hildanext.serve.service import Service
from hildanext.serve.settings import ServeConfig

GRACE_SECONDS = 2.0
"""For the last answers, which say that the engine has closed, to leave."""


class AddressError(HildaError):
    """The service cannot listen there."""


def bind(settings: ServeConfig) -> socket.socket:
    """A socket on the address, not listening yet. Raises `AddressError`."""
    where = f"{settings.host}:{settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as problem:
        raise AddressError(f"no address {settings.host!r} ({problem})", "give --host a name or a number") from None
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as problem:
        made.close()
        hints = {
            errno.EADDRINUSE: "something listens there already: give another --port",
            errno.EACCES: "that needs rights: give a --port above 1023",
        }
        hint = hints.get(problem.errno or 0, "give another --host or --port")
        raise AddressError(f"cannot listen at {where} ({problem.strerror})", hint) from None
    return made


def address_of(bound: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class GracefulServer(uvicorn.Server):
    """Told to end, it takes no new requests, lets those in it go on for a while, and tells the rest why not."""

    def __init__(self, app: FastAPI, announce: Callable[[], None] | None = None) -> None:
        service: Service = app.state.service
        self.service, self.announce = service, announce
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                app,
                http=bounded_by(settings),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=max(128, settings.max_connections),
                timeout_keep_alive=max(1, round(settings.idle_seconds)),
                timeout_graceful_shutdown=round(settings.shutdown_seconds + GRACE_SECONDS),
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.announce is not None:
            self.announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.closing.set()
        loop = asyncio.get_running_loop()
        drained = loop.run_in_executor(None, self.service.engine.close, self.service.settings.shutdown_seconds)
        await super().shutdown(sockets)
        await loop.run_in_executor(None, self.service.engine.close, 0.0)  # nobody is left to wait for an answer
        await drained

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but the end that was asked for is no failure: the signal is not raised again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        names = ("SIGINT", "SIGTERM", "SIGBREAK")  # the last one is Windows'
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        handlers = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def configure_access_log() -> None:
    """Access lines are JSON and nothing else, on stderr."""
    handler = StandardError()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("hildanext.access")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def serve(app: FastAPI, bound: socket.socket, announce: Callable[[], None] | None = None) -> None:
    """Answer until Ctrl-C or SIGTERM."""
    GracefulServer(app, announce).run([bound])
