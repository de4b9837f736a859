"""Connections with a bound: for the head of a request, for an answer that nobody reads, and for their number.

Uvicorn waits for as long as a client likes in all three. (Bodies are bounded by `middleware.BodyLimit`.)
"""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from hildanext.serve.errors import shape
from hildanext.serve.middleware import BROKEN_BODY
from hildanext.serve.settings import ServeConfig

LINGER_SECONDS = 1.0
"""How long a refused client may go on sending before it is cut off."""


class BoundedProtocol(H11Protocol):
    """One connection. `bounded_by` makes the class that a server uses."""

    # `H11Protocol` is uvicorn's own affair: it may change with any minor version, which is why the requirement ends
    # before the first one that was not tried (VERSIONS.md). From outside the bounds cannot be had: no option of
    # uvicorn's limits the time of a head or of an unread answer; a middleware runs only once the head is there; around
    # a protocol of uvicorn's one would have to guess from the bytes what it already knows (whether a request is being
    # answered), and could not give a refusal our shape. A proxy in front has such limits, and a laptop has no proxy.
    bounds: ServeConfig

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._heard = self._refused = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        super().connection_made(transport)  # type: ignore[arg-type]
        if len(self.connections) > 2 * self.bounds.max_connections:  # no room even for refusals
            self.transport.abort()
            return
        if len(self.connections) > self.bounds.max_connections:
            message = f"{self.bounds.max_connections} connections are open: try again"
            self._say(503, shape(message, 503, "too_many_connections"), {"retry-after": "5"})
            return
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._heard = True
        super().data_received(data)
        if self._busy():
            self._head_is_there()
        elif self._head_timer is None:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_there()
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read what it is sent."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.bounds.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state is h11.IDLE:
            self._say(400, shape("this is no HTTP request: send one", 400, "invalid_http"))
        elif self.cycle is not None and not self.cycle.response_started:
            self.scope.setdefault("state", {})[BROKEN_BODY] = True
            self._say(400, shape("the body is no HTTP: mend its chunks", 400, "invalid_http"))
            self.cycle.disconnected = True  # whoever reads the body, or would answer, is told that nobody is there
            self.cycle.message_event.set()
        else:  # an answer has begun: all that is left is to hang up
            self.transport.close()

    def _busy(self) -> bool:
        """A request is being answered, or its body read."""
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.bounds.header_seconds, self._too_slow)

    def _head_is_there(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        if self._busy() or self._refused or self.transport.is_closing():
            return
        if self._heard and self.conn.our_state is h11.IDLE:
            message = f"no whole request within {self.bounds.header_seconds:g} s: send it faster"
            self._say(408, shape(message, 408, "request_timeout"))
        else:
            self.transport.close()

    def _say(self, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
        """Answer without a request, and hang up: at first on our side alone, since a system that still gets what the
        client is sending would throw the answer away."""
        text = json.dumps(body).encode()
        lines = {"content-type": "application/json", "content-length": str(len(text)), "connection": "close"}
        head = "".join(f"{name}: {value}\r\n" for name, value in {**lines, **(headers or {})}.items())
        self.transport.write(f"HTTP/1.1 {status} \r\n{head}\r\n".encode() + text)
        self._refused = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)


def bounded_by(settings: ServeConfig) -> type[BoundedProtocol]:
    """The protocol of a server with these settings."""
    return type("Protocol", (BoundedProtocol,), {"bounds": settings})
