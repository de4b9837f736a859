"""An engine around dInfer, which runs LLaDA models on NVIDIA GPUs; every known trap of its has a guard.

It decodes one request at a time, cannot edit, and fixes its threshold when it starts. It is asked for a few blocks at
a time, so that an end of text, a stop string and whoever leaves are noticed between two calls. Its `generate` waits
without end: here it waits in a thread of its own, watched by the clock and by the life of its processes.
"""

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from hildanext.core.config import plain
from hildanext.core.errors import ConfigError, HildaError, PromptError
from hildanext.data.chat_template import encode_chat
from hildanext.data.generation_result import GenerationStats
from hildanext.decoding import decoder_section, make_decoder
from hildanext.decoding.detokenizer import IncrementalDetokenizer, Stop
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
    Piece,
    Request,
    RequestOutput,
    Sink,
    Started,
    Ticket,
    refuse_given,
)
from hildanext.engine.dinfer.config import DInferConfig
from hildanext.engine.dinfer.server import TROUBLES, DInferServer
from hildanext.inference import DEFAULT_NEW_TOKENS
from hildanext.tokenization import encode_prompt

logger = logging.getLogger(__name__)

GLANCE_SECONDS = 0.1


@dataclass(eq=False)
class DInferRequest:
    """A request of ours."""

    request: Request
    sink: Sink
    prompt: list[int]
    submitted: float
    ended: bool = False
    lock: Any = field(default_factory=threading.RLock)
    """Held while the sink is called, so that nothing reaches it behind its end."""

    def late(self) -> DeadlineExceeded | None:
        """The error of a request whose time is over."""
        limit = self.request.deadline_seconds
        if limit is None or time.perf_counter() - self.submitted <= limit:
            return None
        return DeadlineExceeded(f"no whole answer within {limit} s", "ask for less, or allow more")


@dataclass
class CallState:
    """What the thread that asks has found out."""

    ending: Stop | None = None
    error: HildaError | None = None
    forwards: int = 0
    first: float | None = None
    """When its first text was there."""


class DInferEngine(Engine):
    """See the module. `close` it; there can be one in a process."""

    def __init__(self, settings: DInferConfig, model: str, tokenizer: Any, reason: str) -> None:
        self.settings, self.model, self.tokenizer = settings, model, tokenizer
        preset = make_decoder(decoder_section(settings.mode))
        self.threshold: float = plain(preset)["tau_mask"]
        mask = settings.mask_id if settings.mask_id is not None else tokenizer.mask_token_id
        if mask is None or tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer names no mask or no end of text", "give engine.mask_id; mend the model")
        self.mask_id, self.eos_id = int(mask), int(tokenizer.eos_token_id)
        gpus = {"num_gpus": settings.num_gpus, "dp_size": 1, "tpep_size": settings.num_gpus}
        self._server = DInferServer(
            model,
            {"threshold": self.threshold, "max_length": settings.max_length},
            {**gpus, "server_port": settings.server_port, "backend": settings.backend},
            self.mask_id,
        )
        self._facts = EngineFacts(
            engine="dinfer",
            reason=reason,
            model=model,
            parent=None,
            device="cuda",
            dtype="bfloat16",
            threads=None,
            block_size=settings.block_length,
            context=settings.max_length,
            slots=1,
            queue=settings.queue,
            supports_editing=False,
            supports_steps=False,
        )
        self._changed = threading.Condition()
        self._waiting: deque[DInferRequest] = deque()
        self._current: DInferRequest | None = None
        self._closing = False
        self._dead = ""
        self._forwards = 0
        self._counts = dict.fromkeys(("eos", "stop", "length", "cancelled", "deadline", "error"), 0)
        self._tokens = {"prompt": 0, "generated": 0}
        self._thread = threading.Thread(target=self._run, name="hilda-dinfer", daemon=True)
        self._thread.start()

    @property
    def facts(self) -> EngineFacts:
        if not self._dead:
            return self._facts
        return replace(self._facts, ready=False, reason=f"{self._facts.reason}; stopped: {self._dead}")

    def load(self) -> EngineLoad:
        with self._changed:
            return EngineLoad(
                waiting=len(self._waiting),
                running=int(self._current is not None),
                alive=not self._closing and not self._dead,
                prompt_tokens=self._tokens["prompt"],
                generated_tokens=self._tokens["generated"],
                forwards=self._forwards,
                denoising_steps=self._forwards,
                finished=dict(self._counts),
            )

    def submit(self, request: Request, sink: Sink) -> Ticket:
        refuse_given(request, "dinfer")
        self._check(request)
        work = DInferRequest(request, sink, self._encode(request), time.perf_counter())
        if (length := self._whole(work)) > self.settings.max_length:
            size = f"prompt and text take {length} tokens in whole blocks of {self.settings.block_length}"
            raise PromptError(f"{size}, and there is room for {self.settings.max_length}", "ask for fewer new tokens")
        with self._changed:
            if self._closing or self._dead:
                raise Overloaded(f"dinfer has stopped: {self._dead or 'it is closing'}", "see the server's log", 60.0)
            if len(self._waiting) + (self._current is not None) > self.settings.queue:
                raise Overloaded(f"{len(self._waiting)} requests wait", "ask again later, or raise queue")
            self._waiting.append(work)
            self._changed.notify_all()
        return DInferTicket(self, work)

    def fail(self, work: DInferRequest, error: HildaError) -> None:
        """End a request for whoever asked. dInfer cannot be interrupted: it goes on, and its text is thrown away."""
        with self._changed:
            if work in self._waiting:
                self._waiting.remove(work)
                self._changed.notify_all()
        self._tell(work, Failed(work.late() or error))

    def close(self, drain_seconds: float = 0.0) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting and self._current is None, drain_seconds)
            left = [*self._waiting, *([self._current] if self._current is not None else [])]
        for work in left:
            self.fail(work, Overloaded("the engine has closed", "ask again after its restart", 5.0))
        self._thread.join()
        self._server.stop()

    def _check(self, request: Request) -> None:
        """Raise `ConfigError` for what dInfer would ignore."""
        if request.parent:
            raise ConfigError("the engine dinfer has no autoregressive parent", "leave parent out")
        if request.trajectory:
            raise ConfigError("the engine dinfer tells no trajectory", "use the engine local, or leave out trajectory")
        section: dict[str, Any] = plain(make_decoder(dict(request.decoder))) if request.decoder else {}
        fixed = {"tau_mask": self.threshold, "temperature": 0.0, "tau_cautious": None, "top_p": None, "top_k": None}
        for name, value in fixed.items():
            if section.get(name, value) != value:
                raise ConfigError(f"{name} {section[name]}: dinfer was started with {value}", "start another with it")
        if self.settings.edits == "refuse" and section.get("tau_edit") is not None:
            raise ConfigError("dinfer cannot edit written tokens", "give tau_edit off, or use the engine local")
        for name in ("steps", "ignore_eos", "scores"):
            if getattr(request, name):
                raise ConfigError(f"dinfer cannot be asked for {name}", "leave it out, or use the engine local")

    def _encode(self, request: Request) -> list[int]:
        sources = [request.prompt is not None, bool(request.messages), request.tokens is not None]
        if sum(sources) != 1:
            raise ConfigError("a request has one of prompt, messages and tokens", f"this one has {sum(sources)}")
        ids = list(request.tokens or ())
        if request.messages:
            ids = encode_chat(self.tokenizer, request.messages, self.settings.special_tokens_in_text)
        elif request.prompt is not None:
            ids = encode_prompt(self.tokenizer, request.prompt)
        if not ids or self.mask_id in ids:
            raise PromptError("the prompt is empty or holds the mask token", "give text; leave the mask out")
        return ids

    def _run(self) -> None:
        """The only thread that asks dInfer."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._closing or bool(self._dead))
                if not self._waiting or self._dead:
                    break
                self._current = work = self._waiting.popleft()
            self._answer(work)
            with self._changed:
                self._current = None
                self._changed.notify_all()
        with self._changed:
            left = list(self._waiting)
        for work in left:
            self.fail(work, EngineFailed(f"dinfer has stopped: {self._dead or 'closing'}", "see the server's log"))

    def _answer(self, work: DInferRequest) -> None:
        started = time.perf_counter()
        if (late := work.late()) is not None:
            self.fail(work, late)
        if not self._tell(work, Started(len(work.prompt), 0, started - work.submitted)):
            return
        call = CallState()
        caller = threading.Thread(target=self._call, args=(work, call), name="hilda-dinfer-call", daemon=True)
        caller.start()
        while caller.is_alive():
            caller.join(GLANCE_SECONDS)
            self._fail_the_late(work)
            against = self._trouble(time.perf_counter() - started) if caller.is_alive() else ""
            if against or (self._closing and work.ended):
                self._give_up(work, against)
                return
        if call.error is not None:
            self.fail(work, call.error)
        elif call.ending is not None:
            self._tell(work, Finished(self._whole_answer(work, call, call.ending, started)))

    def _fail_the_late(self, current: DInferRequest) -> None:
        with self._changed:
            here = [current, *self._waiting]
        for work in here:
            if (late := work.late()) is not None:
                self.fail(work, late)

    def _call(self, work: DInferRequest, call: CallState) -> None:
        """In a thread of its own, as it may never return."""
        try:
            call.ending = self._write(work, call)
        except HildaError as problem:
            call.error = problem
        except TROUBLES as problem:
            call.error = EngineFailed(f"dinfer failed ({type(problem).__name__}: {problem})", "see the server's log")

    def _write(self, work: DInferRequest, call: CallState) -> Stop | None:
        """Ask for blocks until the text ends; None where whoever asked has left."""

        def show(text: str) -> None:
            call.first = call.first if call.first is not None else time.perf_counter()
            self._tell(work, Piece(text))

        detokenizer = IncrementalDetokenizer(
            self.tokenizer, work.prompt, frozenset({self.eos_id}), work.request.stop, show
        )
        row, size, last = list(work.prompt), self.settings.block_length, self._whole(work)
        while not work.ended:
            before = self._server.forwards
            row = self._server.write(row, min((len(row) // size + self.settings.call_blocks) * size, last), size)
            call.forwards += self._server.forwards - before
            written = row[len(work.prompt) :][: _new_tokens(work.request)]
            ending = detokenizer.add(written, full=len(row) >= last)
            if ending is not None:
                return ending
        return None

    def _whole(self, work: DInferRequest) -> int:
        """Length of prompt and text, rounded up to whole blocks: what is fed at last."""
        size = self.settings.block_length
        return -(-(len(work.prompt) + _new_tokens(work.request)) // size) * size

    def _trouble(self, seconds: float) -> str:
        """Why waiting on makes no sense; empty while it does."""
        if seconds > self.settings.request_seconds:
            return f"a text took more than {self.settings.request_seconds:g} s"
        return self._server.trouble()

    def _give_up(self, work: DInferRequest, against: str) -> None:
        if against:
            logger.error("dinfer is stopped: %s", against)
            with self._changed:
                self._dead = against
        self._server.stop()
        self.fail(work, EngineFailed(f"dinfer was stopped: {against}", "serve the model with another engine"))

    def _whole_answer(self, work: DInferRequest, call: CallState, ending: Stop, started: float) -> RequestOutput:
        now = time.perf_counter()
        first = call.first if call.first is not None else now
        return RequestOutput(
            text=ending.text,
            tokens=ending.tokens,
            finish_reason=ending.reason,
            prompt_tokens=len(work.prompt),
            cached_tokens=0,
            stats=GenerationStats(denoise_forwards=call.forwards, tokens=len(ending.tokens), seconds=now - started),
            queue_seconds=started - work.submitted,
            first_piece_seconds=first - work.submitted,
            seconds=now - work.submitted,
            edits_supported=False,
        )

    def _tell(self, work: DInferRequest, event: EngineEvent) -> bool:
        """Whether the sink heard it: nothing reaches one behind the end of its request."""
        with work.lock:
            if work.ended:
                return False
            work.ended = isinstance(event, Finished | Failed)
            if work.ended:
                self._count(event)
            work.sink(event)
            return True

    def _count(self, event: EngineEvent) -> None:
        with self._changed:
            if isinstance(event, Finished):
                self._counts[event.answer.finish_reason] += 1
                self._tokens["prompt"] += event.answer.prompt_tokens
                self._tokens["generated"] += len(event.answer.tokens)
                self._forwards += event.answer.stats.forwards
            elif isinstance(event, Failed):
                kinds: dict[type, str] = {Cancelled: "cancelled", DeadlineExceeded: "deadline"}
                self._counts[kinds.get(type(event.error), "error")] += 1


def _new_tokens(request: Request) -> int:
    return request.max_new_tokens if request.max_new_tokens is not None else DEFAULT_NEW_TOKENS


class DInferTicket:
    """A request to dInfer."""

    def __init__(self, engine: DInferEngine, work: DInferRequest) -> None:
        self._engine, self._work = engine, work

    def cancel(self) -> None:
        self._engine.fail(self._work, Cancelled("the request was cancelled", "ask again"))
