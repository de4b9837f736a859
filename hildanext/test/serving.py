"""Servers for the tests of the service: around the embedded model, and around an engine that does as it is told."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from hildanext.api import create_app
from hildanext.data.generation_result import GenerationStats
from hildanext.engine.base import (
    Cancelled,
    Engine,
    EngineFacts,
    EngineLoad,
    Failed,
    Finished,
    Piece,
    RequestOutput,
    Started,
)
from hildanext.serve.server import GracefulServer, address_of, bind
from hildanext.serve.settings import ServeConfig


class ScriptedEngine(Engine):
    """Answers each request by calling `act(request, sink)` in a thread of its own; remembers who was cancelled."""

    def __init__(self, act: Callable[..., None] | None = None) -> None:
        self.act = act if act is not None else at_once
        self.cancelled: list[Any] = []
        self.requests: list[Any] = []
        self.closed_with: list[float] = []

    facts = EngineFacts("scripted", "for a test", "scripted", None, "cpu", "fp32", 1, 4, 512, 1, 1, True, False)

    def load(self) -> EngineLoad:
        return EngineLoad(alive=not self.closed_with)

    def submit(self, request, sink):
        self.requests.append(request)
        threading.Thread(target=self.act, args=(request, sink), daemon=True).start()
        engine = self

        class Ticket:
            def cancel(self) -> None:
                engine.cancelled.append(request)
                sink(Failed(Cancelled("cancelled", "ask again")))

        return Ticket()

    def close(self, drain_seconds: float = 0.0) -> None:
        self.closed_with.append(drain_seconds)


def at_once(request, sink) -> None:
    sink(Started(1, 0, 0.0))
    sink(Piece("well"))
    sink(Finished(answer("well")))


def never(request, sink) -> None:
    sink(Started(1, 0, 0.0))


def answer(text: str) -> RequestOutput:
    stats = GenerationStats(prefill_forwards=1, denoise_forwards=1, tokens=1, seconds=0.1, prefill_seconds=0.05)
    counts = {"prompt_tokens": 1, "cached_tokens": 0, "queue_seconds": 0.0, "first_piece_seconds": 0.1, "seconds": 0.1}
    return RequestOutput([1], text, "length", stats, **counts)


@contextmanager
def live(settings: ServeConfig, engine: Engine, service=None) -> Iterator[str]:
    """A real server in a thread; its address. Ends gracefully, and the engine with it."""
    bound = bind(settings)
    ready = threading.Event()
    server = GracefulServer(create_app(settings, engine, service), ready.set)
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield address_of(bound)
    finally:
        server.should_exit = True
        thread.join(30)
        bound.close()
        assert not thread.is_alive()


def ask(app, method: str, path: str, **more: Any) -> httpx.Response:
    """One request to an app in this process; what it fails to catch is answered, as by a server."""

    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, **more)

    return asyncio.run(call())


def events(text: str) -> list[tuple[str, Any]]:
    """Name and data of the server-sent events in a text."""
    received = []
    for part in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in part.splitlines() if line and not line.startswith(":"))
        if "data" in lines:
            data = lines["data"]
            received.append((lines.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return received
