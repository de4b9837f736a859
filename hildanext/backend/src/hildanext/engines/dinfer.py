"""An engine around dInfer, which runs LLaDA models on NVIDIA GPUs; every known trap of its has a guard.

It decodes one request at a time, cannot edit, stop or stream, and fixes its threshold when it starts. Its `generate`
waits without end: here it waits in a thread of its own, watched by the clock and by the life of its processes.
"""

import importlib
import inspect
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field

from hildanext.ar import PromptError
from hildanext.config import knobs, plain
from hildanext.conversations import encode_chat
from hildanext.decode import MODES, make_decoder, mode_name
from hildanext.engines.base import (
    Answer,
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
    Sink,
    Started,
    Ticket,
)
from hildanext.engines.dinfer_output import ending_of
from hildanext.engines.guards import PINNED, model_type, probe, why_not_here, why_not_model
from hildanext.errors import ConfigError, HildaError, ModelError
from hildanext.inference import DEFAULT_NEW_TOKENS, DecodeStats
from hildanext.tokenization import encode_prompt

logger = logging.getLogger(__name__)

STARTING = (ImportError, OSError, RuntimeError, AttributeError, TypeError, AssertionError)
"""What importing and starting dInfer was seen to raise, and what may be expected of it."""
GLANCE_SECONDS = 0.1
ALWAYS = {"use_bd": True, "cache": "prefix", "cont_weight": 0.0, "temperature": 0.0, "early_stop": True}
"""Of its parameters for models of blocks: its defaults are for others (with blocks and no cache it crashes)."""


@knobs
class DInferKnobs:
    """How dInfer is started; all of it holds for every request."""

    mode: str = "S_MODE"
    """Its threshold is this mode's; requests of another mode are refused. A second mode is a second server."""
    backend: Literal["sglang", "vllm"] = "sglang"
    block_length: int = Field(default=32, ge=1)
    max_length: int = Field(default=4096, ge=64)
    num_gpus: int = Field(default=1, ge=1)
    server_port: int = Field(default=12345, ge=1, le=65000)
    mask_id: int | None = Field(default=None, ge=0)
    """None: the tokenizer's."""
    edits: Literal["answer", "refuse"] = "answer"
    """A request that wants editing is answered without, and the answer says so; or it is refused."""
    queue: int = Field(default=16, ge=0)
    probe_seconds: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    request_seconds: float = Field(default=300.0, gt=0, allow_inf_nan=False)
    """Longest that one text may take; after it dInfer is stopped for good. The first waits for the weights, too."""
    commit: str | None = PINNED
    """The commit it must be; None takes any, at one's own risk."""

    def open(self, model: str, parent: str | None, reason: str) -> Engine:
        """Start it. Raises `ModelError` and `ConfigError` with what stands against it, `EngineFailed`."""
        if parent is not None:
            raise ConfigError("the engine dinfer runs no autoregressive parent", "leave the parent out")
        against = why_not_model(model, self.backend)
        if against:
            raise ModelError(f"dinfer cannot run this model: {against}", "use the engine transformers")
        against = why_not_here(probe(self.probe_seconds), self.backend, self.commit)
        if against:
            raise ConfigError(f"dinfer cannot be used here: {against}", "use the engine transformers")
        from transformers import AutoTokenizer

        return DInferEngine(self, model, AutoTokenizer.from_pretrained(model), reason)


@dataclass(eq=False)
class Work:
    """A request of ours."""

    request: Request
    sink: Sink
    prompt: list[int]
    submitted: float
    ended: bool = False


class DInferEngine(Engine):
    """See the module. `close` it; there can be one in a process, as dInfer's server is a singleton."""

    _there_is_one = threading.Lock()

    def __init__(self, settings: DInferKnobs, model: str, tokenizer: Any, reason: str) -> None:
        self.settings, self.model, self.tokenizer = settings, model, tokenizer
        self.threshold: float = MODES[mode_name(settings.mode)]["tau_mask"]
        mask = settings.mask_id if settings.mask_id is not None else tokenizer.mask_token_id
        if mask is None or tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer names no mask or no end of text", "give engine.mask_id; mend the model")
        self.mask_id, self.eos_id = int(mask), int(tokenizer.eos_token_id)
        if not self._there_is_one.acquire(blocking=False):
            raise ConfigError("this process runs dinfer already", "its server is one for a process: start another")
        self._serving: Any = None
        try:
            self._serving = self._start()
        finally:
            if self._serving is None:
                self._there_is_one.release()
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
        self._waiting: deque[Work] = deque()
        self._current: Work | None = None
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

    def count_tokens(self, request: Request) -> int:
        return len(self._encode(request))

    def submit(self, request: Request, sink: Sink) -> Ticket:
        self._check(request)
        work = Work(request, sink, self._encode(request), time.perf_counter())
        if len(work.prompt) + _new_tokens(request) > self.settings.max_length:
            raise PromptError(f"prompt and text are longer than {self.settings.max_length}", "ask for fewer new tokens")
        with self._changed:
            if self._closing or self._dead:
                raise Overloaded(f"dinfer has stopped: {self._dead or 'it is closing'}", "see the server's log", 60.0)
            if len(self._waiting) > self.settings.queue:
                raise Overloaded(f"{len(self._waiting)} requests wait", "ask again later, or raise queue")
            self._waiting.append(work)
            self._changed.notify_all()
        return DInferTicket(self, work)

    def fail(self, work: Work, error: HildaError) -> None:
        """End a request for whoever asked. dInfer cannot be interrupted: it goes on, and its text is thrown away."""
        self._end(work, Failed(error))

    def close(self, drain_seconds: float = 0.0) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting and self._current is None, drain_seconds)
            left = [*self._waiting, *([self._current] if self._current is not None else [])]
        for work in left:
            self.fail(work, Overloaded("the engine has closed", "ask again after its restart", 5.0))
        self._thread.join()
        self._stop_server()

    def _start(self) -> Any:
        """A `DiffusionLLMServing` of our own. Raises `ConfigError`, `EngineFailed`."""
        settings = self.settings
        own = {"threshold": self.threshold, "mask_id": self.mask_id, "eos_id": self.eos_id}
        wanted = {**ALWAYS, **own, "max_length": settings.max_length}
        try:
            dinfer = importlib.import_module("dinfer")
            self._handle = importlib.import_module("dinfer.decoding.serving").handle
            if self._handle.is_running():
                raise ConfigError("somebody else's dinfer runs in this process", "its server is one for a process")
            known = inspect.signature(dinfer.SamplingParams.__init__).parameters
            sampling = dinfer.SamplingParams(**{name: value for name, value in wanted.items() if name in known})
            return dinfer.DiffusionLLMServing(
                self.model,
                model_type=model_type(self.model),
                sample_params=sampling,
                server_port=settings.server_port,
                num_gpus=settings.num_gpus,
                dp_size=1,
                tpep_size=settings.num_gpus,
                backend=settings.backend,
            )
        except STARTING as problem:
            raise EngineFailed(f"dinfer does not start ({type(problem).__name__}: {problem})", "see its log") from None

    def _check(self, request: Request) -> None:
        """Raise `ConfigError` for what dInfer would ignore."""
        if request.parent:
            raise ConfigError("the engine dinfer has no autoregressive parent", "leave parent out")
        section: dict[str, Any] = plain(make_decoder(dict(request.decoder))) if request.decoder else {}
        fixed = {"tau_mask": self.threshold, "temperature": 0.0, "tau_cautious": None, "top_p": None, "top_k": None}
        for name, value in fixed.items():
            if section.get(name, value) != value:
                raise ConfigError(f"{name} {section[name]}: dinfer was started with {value}", "start another with it")
        if self.settings.edits == "refuse" and section.get("tau_edit") is not None:
            raise ConfigError("dinfer cannot edit written tokens", "give tau_edit off, or use the engine transformers")
        for name in ("steps", "ignore_eos"):
            if getattr(request, name):
                raise ConfigError(f"dinfer cannot be asked for {name}", "leave it out, or use the engine transformers")

    def _encode(self, request: Request) -> list[int]:
        given = [request.prompt is not None, bool(request.messages), request.tokens is not None]
        if sum(given) != 1:
            raise ConfigError("a request has one of prompt, messages and tokens", f"this one has {sum(given)}")
        try:
            ids = list(request.tokens or ())
            if request.messages:
                ids = encode_chat(self.tokenizer, request.messages)
            elif request.prompt is not None:
                ids = encode_prompt(self.tokenizer, request.prompt)
        except UnicodeEncodeError:
            raise PromptError("the text holds half a character", "send whole characters") from None
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
            if not work.ended:
                self._answer(work)
            with self._changed:
                self._current = None
                self._changed.notify_all()
        with self._changed:
            left = list(self._waiting)
            self._waiting.clear()
        for work in left:
            self.fail(work, EngineFailed(f"dinfer has stopped: {self._dead or 'closing'}", "see the server's log"))

    def _answer(self, work: Work) -> None:
        started = time.perf_counter()
        work.sink(Started(len(work.prompt), 0, started - work.submitted))
        got: dict[str, Any] = {}
        caller = threading.Thread(target=self._call, args=(work, got), name="hilda-dinfer-call", daemon=True)
        caller.start()
        while caller.is_alive():
            caller.join(GLANCE_SECONDS)
            seconds, limit = time.perf_counter() - work.submitted, work.request.deadline_seconds
            if limit is not None and seconds > limit:
                self.fail(work, DeadlineExceeded(f"no whole answer within {limit} s", "ask for less, or allow more"))
            against = self._trouble(time.perf_counter() - started) if caller.is_alive() else ""
            if against or (self._closing and work.ended):
                self._give_up(work, against)
                return
        if "error" in got:
            self.fail(work, EngineFailed(f"dinfer failed ({got['error']})", "see the server's log"))
            return
        try:
            answer = self._normal(work, got, started)
        except HildaError as error:
            self.fail(work, error)
            return
        if not work.ended and answer.text:
            work.sink(Piece(answer.text))
        self._end(work, Finished(answer))

    def _call(self, work: Work, got: dict[str, Any]) -> None:
        """In a thread of its own, as it may never return."""
        import torch

        try:
            before = int(self._serving.num_forwards)
            whole = self._serving.generate(
                torch.tensor([work.prompt]),
                gen_length=_new_tokens(work.request),
                block_length=self.settings.block_length,
            )
            after = int(self._serving.num_forwards)  # of all calls so far
            got["forwards"], got["tokens"] = after - before if after >= before else after, whole[0].tolist()
        except (*STARTING, ValueError, LookupError) as problem:
            got["error"] = f"{type(problem).__name__}: {problem}"

    def _trouble(self, seconds: float) -> str:
        """Why waiting on makes no sense; empty while it does."""
        if seconds > self.settings.request_seconds:
            return f"a text took more than {self.settings.request_seconds:g} s"
        dead = [process for process in self._processes() if not process.is_alive()]
        return f"one of its processes ended with {dead[0].exitcode}" if dead else ""

    def _processes(self) -> list[Any]:
        return [process for group in self._handle.groups for process in group.procs]

    def _give_up(self, work: Work, against: str) -> None:
        if against:
            logger.error("dinfer is stopped: %s", against)
            with self._changed:
                self._dead = against
        self._stop_server()
        self.fail(work, EngineFailed(f"dinfer was stopped: {against}", "serve the model with another engine"))

    def _stop_server(self) -> None:
        """End its processes and forget them; its own way to stop would wait for them without end."""
        if self._serving is None:
            return
        self._serving = None
        for process in self._processes():
            process.terminate()
            process.join(5.0)
            if process.is_alive():
                process.kill()
        self._handle.groups = []
        self._there_is_one.release()

    def _normal(self, work: Work, got: dict[str, Any], started: float) -> Answer:
        most = _new_tokens(work.request)
        ending = ending_of(got["tokens"], work.prompt, most, self.tokenizer, self.mask_id, work.request.stop)
        now = time.perf_counter()
        return Answer(
            text=ending.text,
            tokens=ending.tokens,
            finish_reason=ending.reason,
            prompt_tokens=len(work.prompt),
            cached_tokens=0,
            stats=DecodeStats(0, got["forwards"], 0, 0, len(ending.tokens), 0, now - started, 0.0),
            queue_seconds=started - work.submitted,
            first_piece_seconds=now - work.submitted,
            seconds=now - work.submitted,
            edits_supported=False,
        )

    def _end(self, work: Work, event: EngineEvent) -> None:
        with self._changed:
            if work.ended:
                return
            work.ended = True
            if isinstance(event, Finished):
                self._counts[event.answer.finish_reason] += 1
                self._tokens["prompt"] += event.answer.prompt_tokens
                self._tokens["generated"] += len(event.answer.tokens)
                self._forwards += event.answer.stats.forwards
            elif isinstance(event, Failed):
                kinds: dict[type, str] = {Cancelled: "cancelled", DeadlineExceeded: "deadline"}
                self._counts[kinds.get(type(event.error), "error")] += 1
        work.sink(event)


def _new_tokens(request: Request) -> int:
    return request.max_new_tokens if request.max_new_tokens is not None else DEFAULT_NEW_TOKENS


class DInferTicket:
    """A request to dInfer."""

    def __init__(self, engine: DInferEngine, work: Work) -> None:
        self._engine, self._work = engine, work

    def cancel(self) -> None:
        self._engine.fail(self._work, Cancelled("the request was cancelled", "ask again"))
