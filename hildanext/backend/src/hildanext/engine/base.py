"""What an engine is: something that takes requests at any time and tells each of them what happens to it.

One small interface for our own decoding and for servers elsewhere. A request goes in with a `sink`; the sink is
called, from a thread of the engine's, with `Started`, then `Stepped` and `Piece` as they come, then exactly one
of `Finished` and `Failed`. A sink must return at once and must not raise.
"""

import queue
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from hildanext.core.errors import ConfigError, HildaError
from hildanext.data.chat_template import Message
from hildanext.data.generation_result import GenerationResult
from hildanext.decoding import MODES


class Overloaded(HildaError):
    """The queue is full, or the engine is closing. `retry_after` says when to try again, in seconds."""

    status = 503

    def __init__(self, message: str, hint: str = "", retry_after: float = 1.0) -> None:
        super().__init__(message, hint)
        self.retry_after = retry_after


class DeadlineExceeded(HildaError):
    """The request's own time ran out before its text was whole."""

    status = 504


class Cancelled(HildaError):
    """Whoever asked has gone away."""

    status = 499


class EngineBusy(HildaError):
    """What was asked of the engine cannot be while it answers requests."""

    status = 409


class EngineFailed(HildaError):
    """The engine cannot answer any more, or an answer of an engine elsewhere makes no sense."""

    status = 502


@dataclass(frozen=True)
class Request:
    """One text to write. Exactly one of `prompt`, `messages` and `tokens` is given."""

    prompt: str | None = None
    """Text to continue."""
    messages: tuple[Message, ...] = ()
    """A conversation, put into the model's chat template."""
    tokens: tuple[int, ...] | None = None
    """A prompt that is encoded already."""
    decoder: Mapping[str, Any] = field(default_factory=dict)
    """Section of a decoder, as `decoding.decoder_section` makes it; ignored by the parent, but for its sampling."""
    cache: Mapping[str, Any] | str | None = None
    """What is kept of its keys and values (FULL), as `inference.GenerationConfig.cache`: of a diffusion model in this
    process."""
    max_new_tokens: int | None = None
    """None: 256, or what the context leaves."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    deadline_seconds: float | None = None
    """From submission on; what is not whole by then fails with `DeadlineExceeded`."""
    steps: bool = False
    """Send a `Stepped` for every forward."""
    trajectory: bool = False
    """Record every action of the text and how likely it was (`RequestOutput.trajectory`): of a diffusion model here."""
    given: tuple[tuple[int, int], ...] = ()
    """Tokens of the answer that are known beforehand, each as (place in the answer, id): seen from the first step on,
    never written and never edited. Of a diffusion model in this process."""
    parent: bool = False
    """The autoregressive parent answers, not the diffusion model."""
    scores: bool = False
    """Tell log p of every token given those before it (`RequestOutput.scores`): of the parent, or of a diffusion model
    of the `parent` alignment, which then writes one token at a time. `max_new_tokens` may be 0."""


def refuse_given(request: Request, engine: str) -> None:
    """Raises `ConfigError` where tokens of the answer, or what its cache keeps, are given to an engine that has no way
    to keep to them."""
    if request.cache is not None:
        raise ConfigError(
            f"cache names what is kept, which {engine} decides for itself", "ask an engine in this process"
        )
    if request.given:
        raise ConfigError(
            f"{len(request.given)} tokens of the answer are given, which {engine} cannot write around",
            "ask an engine in this process",
        )


@dataclass(frozen=True)
class TokenScore:
    """A token of a document and what the model says of its place, given the tokens before it. Natural logarithms."""

    text: str
    logprob: float | None
    """None for the first token, which nothing comes before."""
    raw: bytes = b""
    """The token's own bytes. Texts join to that of the document: of half a character the text is empty."""
    best: str | None = None
    """The most probable token in its place."""
    best_logprob: float | None = None
    best_raw: bytes = b""


@dataclass(frozen=True)
class Cell:
    """A position of the prompt or of a step, as text."""

    position: int
    token: int
    text: str
    probability: float | None = None
    bytes: list[int] | None = None
    """Where the token is no whole characters: what it is."""


@dataclass(frozen=True)
class Started:
    """The request left the queue."""

    prompt_tokens: int
    cached_tokens: int
    """Tokens of the prompt whose keys and values another request had left."""
    queue_seconds: float
    prompt: list[Cell] = field(default_factory=list)
    """The prompt's tokens, where steps were asked for."""


@dataclass(frozen=True)
class Stepped:
    """One forward's effect, as `decoding.trace.step_record` tells it (texts of tokens included)."""

    record: Mapping[str, Any]


@dataclass(frozen=True)
class Piece:
    """Text that is final. The pieces of a request, joined, are its answer's text."""

    text: str


@dataclass(frozen=True, kw_only=True)
class RequestOutput(GenerationResult):
    """The whole answer: a generation's result, and what only an engine knows of it. `stats` count from its start on."""

    prompt_tokens: int
    cached_tokens: int
    queue_seconds: float
    first_piece_seconds: float
    """From submission to the first committed block (of the parent: to its first token)."""
    seconds: float
    """From submission to the end."""
    edits_supported: bool = True
    scores: tuple[TokenScore, ...] | None = None
    """Of the prompt's tokens and the answer's, where they were asked for."""
    weights: int = 0
    """Version of the weights that wrote it: how often they had changed under the engine."""

    def to_record(self) -> dict[str, Any]:
        record = super().to_record()
        waited = {"first_piece_seconds": self.first_piece_seconds, "total_seconds": self.seconds}
        return {**record, "stats": {**record["stats"], **waited}}


@dataclass(frozen=True)
class Finished:
    answer: RequestOutput


@dataclass(frozen=True)
class Failed:
    error: HildaError


EngineEvent = Started | Stepped | Piece | Finished | Failed
Sink = Callable[[EngineEvent], None]


@dataclass(frozen=True)
class EngineFacts:
    """What does not change while an engine lives: shown in /health, /v1/models and `doctor`."""

    engine: str
    """Row of the table: transformers, openai, dinfer."""
    reason: str
    """Why this one was chosen."""
    model: str
    parent: str | None
    """Name under which the autoregressive parent answers; None where there is none."""
    device: str
    dtype: str
    threads: int | None
    block_size: int | None
    context: int | None
    slots: int
    """Requests that are decoded at the same time."""
    queue: int
    """Requests that may wait beyond those."""
    supports_editing: bool
    supports_steps: bool
    supports_scores: bool = False
    ready: bool = True
    chat_template: bool | None = None
    """Whether the model came with a chat template of its own; None: not known here."""
    generation_prompt: bool | None = None
    """Whether that template writes the header of the answer; without one the model must write it itself."""
    special_tokens: frozenset[int] = frozenset()
    """Ids that no text shows, as the end of text; empty where they are not known."""
    modes: tuple[str, ...] = tuple(MODES)
    """What a request may ask for, the usual one first."""
    drafts: int = 0
    """Tokens that draft adapters have learnt to draft at a time; 0: there are none, or it is not known."""
    fast: Mapping[str, Any] | None = None
    """The decoder's section of mode `fast`; None: the checkpoint's card has none, or it is not known."""


@dataclass(frozen=True)
class EngineLoad:
    """What changes: gauges now, and totals since the start."""

    waiting: int = 0
    running: int = 0
    alive: bool = True
    cache_bytes: int = 0
    """Keys and values of running requests and of kept prefixes."""
    cache_limit_bytes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    forwards: int = 0
    """Forwards of the engine; one of them may serve many requests."""
    denoising_steps: int = 0
    """Forwards that requests took part in, added up."""
    edits: int = 0
    blocks: int = 0
    drafts: int = 0
    """Forwards of exact mode that verified drafts, and below the drafts in them, those kept, those by place."""
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: tuple[int, ...] = ()
    finished: Mapping[str, int] = field(default_factory=dict)
    """Ended requests by reason: eos, stop, length, cancelled, deadline, error."""


@runtime_checkable
class Ticket(Protocol):
    """A request in an engine."""

    def cancel(self) -> None:
        """Stop as soon as possible; the sink hears `Failed(Cancelled)` unless the request has ended already."""


class Engine:
    """A way to answer requests. Every method may be called from any thread."""

    @property
    def facts(self) -> EngineFacts:
        raise NotImplementedError(f"{type(self).__name__} has no facts")

    def load(self) -> EngineLoad:
        raise NotImplementedError(f"{type(self).__name__} has no load")

    def submit(self, request: Request, sink: Sink) -> Ticket:
        """Queue a request. Raises `Overloaded` where the queue is full, and `PromptError`, `ConfigError` or
        `UnknownChoice` for a request that could never be answered; nothing reaches the sink then."""
        raise NotImplementedError(f"{type(self).__name__} has no submit")

    def close(self, drain_seconds: float = 0.0) -> None:
        """Take no more requests, give those in it so long to end, fail the rest. Returns when all is quiet."""
        raise NotImplementedError(f"{type(self).__name__} has no close")


def stream(engine: Engine, request: Request) -> Generator[EngineEvent, None, None]:
    """Submit and yield the events; leaving the iterator early cancels. `Failed` is yielded, not raised."""
    events: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()
    ticket = engine.submit(request, events.put)
    over = False
    try:
        while not over:
            event = events.get()
            over = isinstance(event, Finished | Failed)
            yield event
    finally:
        if not over:
            ticket.cancel()


def complete(engine: Engine, request: Request) -> RequestOutput:
    """Submit and wait. Raises the error of a request that failed."""
    for event in stream(engine, request):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            return event.answer
    raise EngineFailed("the engine ended a request without an answer", "this is a fault of the engine; report it")
