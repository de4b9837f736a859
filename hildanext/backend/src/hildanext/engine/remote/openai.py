"""An engine that asks an OpenAI-compatible server: SGLang, vLLM, llama.cpp, or another `hildanext serve`.

One thread with one event loop owns all connections, so that a cancelled or late request closes its stream at once.
A request is repeated a bounded number of times, and only while nothing of its answer has come.
"""

import asyncio
import logging
import random
import threading
import time
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import Field

from hildanext.core.config import config
from hildanext.core.errors import ConfigError, HildaError
from hildanext.core.json_text import check_prompt_text
from hildanext.engine.base import (
    Cancelled,
    DeadlineExceeded,
    Engine,
    EngineEvent,
    EngineFacts,
    EngineFailed,
    EngineLoad,
    Failed,
    Finished,
    Overloaded,
    Request,
    RequestOutput,
    Sink,
    refuse_given,
)
from hildanext.engine.remote.dialects import Conversation, Native, Published, Times, refuse_extras
from hildanext.engine.remote.http import (
    ServerInfo,
    SSEDecoder,
    address_of,
    key_header,
    probe_server,
    refusal,
    retry_after,
    unreachable,
)

logger = logging.getLogger(__name__)

AGAIN = (429, 502, 503, 504)
"""Answers that may be others in a moment."""
LONGEST_ERROR = 64 << 10


@config
class OpenAIConfig:
    """Which server, and how much patience with it."""

    base_url: str
    """Address, with or without /v1."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key."""
    slots: int = Field(default=8, ge=1)
    """Requests that are open there at the same time."""
    queue: int = Field(default=64, ge=0)
    """Requests that may wait beyond those; one more is refused."""
    connect_seconds: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    read_seconds: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    """Longest silence before the first byte, and between two."""
    request_seconds: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    """Longest that one text may take from its turn on, connection and repetitions included; a request's own deadline
    counts from its submission on, and beside this."""
    retries: int = Field(default=2, ge=0, le=10)
    retry_seconds: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    """Before the first repetition, doubled each time; a server's Retry-After counts instead."""
    retry_most_seconds: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    """A server that wants a longer pause is not asked again."""
    extras: tuple[str, ...] = ()
    """Fields beyond OpenAI's that a server other than HILDA takes, such as top_k and ignore_eos."""
    ignore_extras: bool = False
    """Leave out what such a server cannot be asked for, instead of refusing the request."""
    usage: bool = True
    """Ask for token counts (stream_options); False for servers that do not know them."""

    def open(self, model: str, parent: str | None, reason: str) -> Engine:
        """Look at the server. Raises `ConfigError`, `ModelError` for a model it does not have, `EngineFailed`."""
        return self.connect(model, parent, reason)

    def connect(self, model: str | None = None, parent: str | None = None, reason: str = "asked for") -> "OpenAIEngine":
        """As `open`; `model` None is the server's own first one, `parent` "auto" the one that a HILDA server tells."""
        address, headers = address_of(self.base_url), key_header(self.api_key_env)
        timeout = httpx.Timeout(self.read_seconds, connect=self.connect_seconds)
        with httpx.Client(base_url=address, headers=headers, timeout=timeout) as client:
            server = probe_server(client, address, model, parent)
        return OpenAIEngine(self, address, headers, server, reason)


@dataclass(eq=False)
class RemoteRequest:
    """A request of ours."""

    request: Request
    sink: Sink
    submitted: float
    deadline: float | None
    """Of the event loop's clock: the request's own, and from its turn on the engine's where that is earlier."""
    task: asyncio.Task[None] | None = None
    why: HildaError | None = None
    """Why it was stopped from outside."""
    running: bool = False


class _Again(Exception):  # noqa: N818 - no error, but a way to ask once more
    """Nothing has come, and another attempt makes sense after so many seconds (None: our own pause)."""

    def __init__(self, error: HildaError, wait: float | None = None) -> None:
        super().__init__(str(error))
        self.error, self.wait = error, wait


class OpenAIEngine(Engine):
    """See the module. `close` it."""

    def __init__(
        self, settings: OpenAIConfig, address: str, headers: dict[str, str], server: ServerInfo, reason: str = ""
    ) -> None:
        self.settings, self.address, self.server = settings, address, server
        engine = server.hilda.get("engine", {})
        kind = f"a HILDA server, engine {engine.get('name')}" if server.hilda else "an OpenAI-compatible server"
        self._facts = EngineFacts(
            engine="openai",
            reason=f"{reason}; {address} is {kind}",
            model=server.model,
            parent=server.parent,
            device=str(server.hilda.get("device", "elsewhere")),
            dtype=str(server.hilda.get("dtype", "not told")),
            threads=None,
            block_size=engine.get("block_size"),
            context=server.context,
            slots=settings.slots,
            queue=settings.queue,
            supports_editing=bool(engine.get("supports_editing", False)),
            supports_steps=bool(engine.get("supports_steps", False)),
        )
        self._lock = threading.Condition()
        self._works: set[RemoteRequest] = set()
        self._closing = False
        self._counts: dict[str, int] = dict.fromkeys(("eos", "stop", "length", "cancelled", "deadline", "error"), 0)
        self._totals = {"prompt": 0, "cached": 0, "generated": 0, "forwards": 0, "steps": 0, "edits": 0}
        self._loop = asyncio.new_event_loop()
        self._places = asyncio.Semaphore(settings.slots)
        limits = httpx.Limits(max_connections=settings.slots + 1, max_keepalive_connections=settings.slots)
        timeout = httpx.Timeout(settings.read_seconds, connect=settings.connect_seconds)
        self._client = httpx.AsyncClient(base_url=address, headers=headers, timeout=timeout, limits=limits)
        self._thread = threading.Thread(target=self._loop.run_forever, name="hilda-remote", daemon=True)
        self._thread.start()

    @property
    def facts(self) -> EngineFacts:
        return self._facts

    def load(self) -> EngineLoad:
        with self._lock:
            running, totals = sum(work.running for work in self._works), self._totals
            return EngineLoad(
                waiting=len(self._works) - running,
                running=running,
                alive=self._thread.is_alive() and not self._closing,
                prompt_tokens=totals["prompt"],
                cached_tokens=totals["cached"],
                generated_tokens=totals["generated"],
                forwards=totals["forwards"],
                denoising_steps=totals["steps"],
                edits=totals["edits"],
                finished=dict(self._counts),
            )

    def submit(self, request: Request, sink: Sink) -> "OpenAITicket":
        refuse_given(request, "a server elsewhere")
        self._check(request)
        now = time.perf_counter()
        seconds = request.deadline_seconds
        work = RemoteRequest(request, sink, now, self._loop.time() + seconds if seconds is not None else None)
        with self._lock:
            if self._closing:
                raise Overloaded("the engine is closing", "ask another server, or this one after its restart", 5.0)
            if len(self._works) >= self.settings.slots + self.settings.queue:
                raise Overloaded(f"{len(self._works)} requests are open or wait", "ask again later, or raise queue")
            self._works.add(work)
            self._loop.call_soon_threadsafe(self._begin, work)
        return OpenAITicket(self, work)

    def stop(self, work: RemoteRequest, why: HildaError) -> None:
        """End a request from outside, from any thread."""
        with self._lock:
            if work in self._works:
                self._loop.call_soon_threadsafe(self._stop, work, why)

    def close(self, drain_seconds: float = 0.0) -> None:
        with self._lock:
            self._closing = True
            self._lock.wait_for(lambda: not self._works, drain_seconds)
            left = list(self._works)
        for work in left:
            self.stop(work, Overloaded("the engine has closed", "ask again after its restart", 5.0))
        with self._lock:
            self._lock.wait_for(lambda: not self._works)
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _check(self, request: Request) -> None:
        sources = [request.prompt is not None, bool(request.messages), request.tokens is not None]
        if sum(sources) != 1:
            raise ConfigError("a request has one of prompt, messages and tokens", f"this one has {sum(sources)}")
        if request.scores:
            raise ConfigError("a server elsewhere is asked for no likelihoods", "use the engine local")
        if request.trajectory:
            raise ConfigError("a server elsewhere tells no trajectory", "use the engine local, or leave out trajectory")
        if request.parent and self.server.parent is None:
            raise ConfigError("this engine has no autoregressive parent", "name one that the server has")
        for text in (request.prompt or "", *(message.content for message in request.messages), *request.stop):
            check_prompt_text(text)
        if not self.server.hilda and not self.settings.ignore_extras:
            refuse_extras(request, self.settings.extras)

    def _begin(self, work: RemoteRequest) -> None:
        work.task = self._loop.create_task(self._run(work))
        work.task.add_done_callback(lambda task: self._ended(work, task))
        if work.why is not None:
            work.task.cancel()

    def _stop(self, work: RemoteRequest, why: HildaError) -> None:
        if work.why is None:
            work.why = why
            if work.task is not None:
                work.task.cancel()

    def _ended(self, work: RemoteRequest, task: asyncio.Task[None]) -> None:
        """Whatever happened, the sink hears an end; a task that was cancelled before it began is told of here."""
        if task.cancelled():
            self._let_go(work, Failed(work.why if work.why is not None else _cancelled()))
        elif (problem := task.exception()) is not None:
            logger.error("a request to %s failed", self.address, exc_info=problem)
            self._let_go(work, Failed(EngineFailed("a fault of the engine openai", "report it with the log")))

    async def _run(self, work: RemoteRequest) -> None:
        seconds = work.request.deadline_seconds
        try:
            async with asyncio.timeout_at(work.deadline) as limit, self._places:
                work.running = True
                longest = self._loop.time() + self.settings.request_seconds
                if work.deadline is None or longest < work.deadline:
                    seconds, work.deadline = self.settings.request_seconds, longest
                    limit.reschedule(longest)
                ended: EngineEvent = Finished(await self._ask(work))
        except TimeoutError:
            ended = Failed(DeadlineExceeded(f"no whole answer within {seconds:g} s", "ask for less, or allow more"))
        except HildaError as error:
            ended = Failed(error)
        self._let_go(work, ended)

    async def _ask(self, work: RemoteRequest) -> RequestOutput:
        times = Times(work.submitted, time.perf_counter())
        for attempt in range(self.settings.retries + 1):
            try:
                return await self._attempt(work, times)
            except _Again as again:
                pause = self.settings.retry_seconds * 2**attempt * random.uniform(0.75, 1.25)
                wait = again.wait if again.wait is not None else min(pause, self.settings.retry_most_seconds)
                if attempt == self.settings.retries or wait > self.settings.retry_most_seconds:
                    raise again.error from None
                await asyncio.sleep(wait)
        raise AssertionError("the last attempt answers or raises")

    async def _attempt(self, work: RemoteRequest, times: Times) -> RequestOutput:
        talk, body = self._talk(work, times)
        heard = False
        try:
            async with self._client.stream("POST", talk.path, json=body) as response:
                await _check_response(response)
                decoder = SSEDecoder()
                async for arrived in response.aiter_bytes():
                    heard = heard or bool(arrived)
                    for event in decoder.feed(arrived):
                        for happened in talk.take(event):
                            work.sink(happened)
                        if talk.answer is not None:
                            return talk.answer
        except httpx.HTTPError as problem:
            error = unreachable(self.address, problem)
            if heard or isinstance(problem, httpx.ReadTimeout):  # a server that is slow would be asked twice
                raise error from None
            raise _Again(error) from None
        raise EngineFailed(f"{self.address} ended the stream before the text", "see the server's log; ask again")

    def _talk(self, work: RemoteRequest, times: Times) -> tuple[Conversation, dict[str, Any]]:
        server, settings, request = self.server, self.settings, work.request
        if not server.hilda:
            published = Published(request, times)
            name = server.parent if request.parent and server.parent is not None else server.model
            return published, published.body(name, settings.extras, settings.usage)
        native = Native(request, times)
        left = max(work.deadline - self._loop.time(), 0.001) if work.deadline is not None else None
        most = server.hilda["limits"].get("request_seconds")
        parent = request.parent or server.model == server.hilda.get("parent")
        return native, native.body(parent, min(left, most) if left is not None and most else left)

    def _let_go(self, work: RemoteRequest, ended: EngineEvent) -> None:
        with self._lock:
            if work not in self._works:
                return
            self._works.discard(work)
            if isinstance(ended, Finished):
                answer, stats = ended.answer, ended.answer.stats
                self._counts[answer.finish_reason] += 1
                forwards, steps = stats.forwards, stats.denoise_forwards + stats.revise_forwards
                counts = (answer.prompt_tokens, answer.cached_tokens, stats.tokens, forwards, steps, stats.edits)
                for name, count in zip(self._totals, counts, strict=True):
                    self._totals[name] += count
            elif isinstance(ended, Failed):
                kinds: dict[type, str] = {Cancelled: "cancelled", DeadlineExceeded: "deadline"}
                self._counts[kinds.get(type(ended.error), "error")] += 1
        work.sink(ended)
        with self._lock:
            self._lock.notify_all()


class OpenAITicket:
    """A request to a server."""

    def __init__(self, engine: OpenAIEngine, work: RemoteRequest) -> None:
        self._engine, self._work = engine, work

    def cancel(self) -> None:
        self._engine.stop(self._work, _cancelled())


async def _check_response(response: httpx.Response) -> None:
    """Raise for what is no stream of events; `_Again` for what may be one in a moment."""
    if response.status_code == 200:
        kind = response.headers.get("content-type", "")
        if not kind.startswith("text/event-stream"):
            raise EngineFailed(f"the server answers with {kind or 'nothing'!r}", "it must stream server-sent events")
        return
    body = b""
    async for part in response.aiter_bytes():
        body += part
        if len(body) > LONGEST_ERROR:
            break
    error = refusal(response.status_code, response.headers, body)
    if response.status_code not in AGAIN:
        raise error
    raise _Again(error, retry_after(response.headers))


def _cancelled() -> Cancelled:
    return Cancelled("the request was cancelled", "ask again")
