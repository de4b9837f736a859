"""Between the engine's threads and the event loop: requests given to the engine, and what becomes of them."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from anyio import to_thread

from hildanext.engine.base import Cancelled, Engine, EngineEvent, Failed, Finished, Request, Ticket

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class EngineCall:
    """Requests of one call, and all their events, each with its request's index.

    with await EngineCall.of(engine, receive, requests) as call: ...      whatever has not ended then is cancelled
    `receive` is the connection's: whoever asked and goes away ends the call with `Cancelled`.
    """

    def __init__(self, engine: Engine, receive: Receive) -> None:
        self.engine = engine
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, EngineEvent] | None] = asyncio.Queue()
        self._lock = threading.Lock()
        self._tickets: dict[int, Ticket] = {}
        self._closed = False
        self._watch = asyncio.create_task(self._until_gone(receive))

    @classmethod
    async def of(cls, engine: Engine, receive: Receive, requests: Sequence[Request]) -> "EngineCall":
        """Give the requests to the engine. Raises the engine's errors; then none of them goes on."""
        call = cls(engine, receive)
        with ExitStack() as undo:
            undo.callback(call.close)
            for index, request in enumerate(requests):
                await to_thread.run_sync(call._give, index, request)
            undo.pop_all()
        return call

    async def next(self, patience: float | None = None) -> tuple[int, EngineEvent] | None:
        """What happens next; None where nothing did for so many seconds. Raises `Cancelled` once nobody listens."""
        try:
            happening = await asyncio.wait_for(self._events.get(), patience)
        except TimeoutError:
            return None
        if happening is None:
            raise Cancelled("whoever asked has gone away", "ask again")
        index, event = happening
        if isinstance(event, Finished | Failed):
            self._tickets.pop(index, None)
        return happening

    def close(self) -> None:
        """Cancel what has not ended."""
        self._watch.cancel()
        with self._lock:
            self._closed = True
            left = list(self._tickets.values())
        for ticket in left:
            ticket.cancel()

    def __enter__(self) -> "EngineCall":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _give(self, index: int, request: Request) -> None:
        """In a thread: tokenising takes its time, and submitting waits for the engine's lock."""
        ticket = self.engine.submit(request, partial(self._hear, index))
        with self._lock:
            self._tickets[index] = ticket
            closed = self._closed
        if closed:
            ticket.cancel()

    def _hear(self, index: int, event: EngineEvent) -> None:
        """In the engine's thread: hand over, and never fail."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))
        except RuntimeError:  # the loop has ended, and with it everybody who listened
            return

    async def _until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(None)
