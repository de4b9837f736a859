"""Our own engine: one thread owns the model, requests join and leave its forwards at any step.

Continuous batching over ragged forwards: every step feeds the active block of each running request, the block it has
just finished, and a bounded piece of the prompts that are joining; nothing is padded, so that an answer does not
depend on who else is served.
"""

import atexit
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field

from hildanext.ar import Parent
from hildanext.core.config import config
from hildanext.core.errors import ConfigError, HildaError, LogitsNotFinite, PromptError
from hildanext.core.runtime import RuntimeConfig, available_memory
from hildanext.data.chat_template import opens_answers
from hildanext.decoding import Decoder, ExactConfig, make_method
from hildanext.decoding.trajectory import check_recordable
from hildanext.detokenization import TokenCells, special_ids
from hildanext.engine.base import (
    Cancelled,
    Cell,
    DeadlineExceeded,
    Engine,
    EngineBusy,
    EngineFacts,
    EngineFailed,
    EngineLoad,
    Failed,
    Finished,
    Overloaded,
    Request,
    RequestOutput,
    Sink,
    Started,
)
from hildanext.engine.exact_runner import PREFIX_BLOCK, ExactRunner
from hildanext.engine.local_models import LocalModels, check_served, one_by_one, told_scores
from hildanext.engine.runners import ARRunner, DiffusionRunner, RequestState, Runner, Totals, step_all
from hildanext.engine.scheduler import Admission, Scheduler
from hildanext.exact import ExactStats, LoadedDrafter, only_exact
from hildanext.inference import context_length, length_limit
from hildanext.kv_cache import bytes_per_token
from hildanext.kv_cache.prefix_cache import PrefixCache
from hildanext.kv_cache.prune import Prune
from hildanext.kv_cache.prune.pruned_cache import slots_for
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.card import fast_section
from hildanext.models.draft_card import holds_drafts
from hildanext.models.loading.load import load_parent
from hildanext.models.packed_linear import pack_linears
from hildanext.runtimes.onnx_blocks import OnnxDiffusion
from hildanext.runtimes.onnx_open import open_diffusion

logger = logging.getLogger(__name__)

EMBEDDED = "tiny"

_open: "weakref.WeakSet[LocalEngine]" = weakref.WeakSet()
"""Engines whose threads live: a forward that goes on while the interpreter ends would abort the program."""


@config
class LocalEngineConfig:
    """How many requests at a time, and how much memory they may take."""

    slots: int = Field(default=8, ge=1)
    """Requests that are decoded together."""
    queue: int = Field(default=64, ge=0)
    """Requests that may wait beyond those; one more is refused."""
    quantum: int = Field(default=4, ge=1)
    """Blocks a request may write before one that waits gets its place."""
    prefill_tokens: int = Field(default=256, ge=1)
    """Tokens of joining prompts that a forward may feed beside the running blocks."""
    cache_mib: int | None = Field(default=None, ge=1)
    """Keys and values of all requests and kept prefixes; None: a quarter of the memory that is free at the start."""
    adapters: str | None = None
    """Draft adapters of the parent, for exact mode beside a diffusion model: a folder. The embedded parent has its own;
    any other drafts from the text alone (drafter ngram) where none are given."""
    keep_prefixes: bool = True
    """Keep the blocks of ended requests for those that begin with the same ones, in what the running ones leave."""
    special_tokens_in_text: bool = False
    """Parse control tokens that a message spells (`<|im_end|>`), as those of the template. Usually they are text."""
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    runtime: Literal["auto", "torch", "onnx"] = "auto"
    """What computes: torch, or ONNX Runtime, which auto takes for q8 and q4."""

    def open(self, model: str, parent: str | None, reason: str) -> Engine:
        """Load the models and start the thread. Raises `ModelError`, `CheckpointError` or `ConfigError`."""
        config = RuntimeConfig(self.device, self.dtype, self.threads, self.runtime)
        if model != EMBEDDED and only_exact(model):
            return self.open_exact(model, parent, reason)
        opened = open_diffusion(model, config)
        runtime = opened.runtime
        if isinstance(opened.model, OnnxDiffusion):  # an exported folder decides for all
            config = replace(config, dtype=opened.model.network.card.dtype, runtime="onnx")
        adapters = self.adapters
        if adapters is None and parent == EMBEDDED and holds_drafts(EMBEDDED):
            adapters = EMBEDDED
        drafter, autoregressive = None, None
        if adapters is not None:
            drafter = LoadedDrafter.open(adapters, config, parent)
            autoregressive = drafter.parent
        elif parent is not None and config.is_onnx:
            drafter = LoadedDrafter.open(parent, config, adapters=False)
            autoregressive = drafter.parent
        elif parent is not None:
            causal_lm, tokenizer = load_parent(parent, runtime.dtype, runtime.device)
            pack_linears(causal_lm)
            autoregressive = Parent(causal_lm, tokenizer)
        return LocalEngine(
            opened.model, opened.tokenizer, autoregressive, self, model, parent, reason, runtime.threads, drafter
        )

    def open_exact(self, model: str, parent: str | None, reason: str, adapters: bool = True) -> "LocalEngine":
        """The same without a diffusion model: draft adapters beside their parent; or, where no `adapters` are needed,
        an autoregressive model by its own name."""
        config = RuntimeConfig(self.device, self.dtype, self.threads, self.runtime)
        drafter = LoadedDrafter.open(model, config, parent, adapters)
        own = parent if parent is not None else drafter.card.parent if drafter.card is not None else None
        threads = drafter.runtime.threads
        return LocalEngine(None, drafter.tokenizer, drafter.parent, self, model, own, reason, threads, drafter)


class LocalEngine(Engine):
    """See the module. `close` it; a program that forgets closes it at its end."""

    def __init__(
        self,
        model: DiffusionModel | None,
        tokenizer: Any,
        parent: Parent | None = None,
        settings: LocalEngineConfig | None = None,
        name: str = "",
        parent_name: str | None = None,
        reason: str = "chosen by hand",
        threads: int | None = None,
        drafter: LoadedDrafter | None = None,
    ) -> None:
        self.settings = settings = settings if settings is not None else LocalEngineConfig()
        self.models = models = LocalModels(model, tokenizer, parent, settings.special_tokens_in_text, drafter)
        self.model, self.tokenizer, self.parent = model, tokenizer, parent
        self.parent_tokenizer = models.parent_tokenizer
        self.token_bytes = bytes_per_token(models.first.causal_lm)
        self.limit_bytes = _cache_limit(settings, models.first.device)
        self.totals, self.weights = Totals(), 0
        self._build_runners(parent_name or "parent", threads)
        self._facts = EngineFacts(
            engine="transformers",
            reason=reason,
            model=name,
            parent=(parent_name if parent_name is not None else "parent") if parent is not None else None,
            device=str(models.first.device),
            dtype=models.weights,
            threads=threads,
            block_size=model.card.block_size if model is not None else None,
            context=context_length(models.first),
            slots=settings.slots,
            queue=settings.queue,
            supports_editing=True,
            supports_steps=True,
            supports_scores=True,
            chat_template=tokenizer.chat_template is not None,
            generation_prompt=None if tokenizer.chat_template is None else opens_answers(tokenizer),
            special_tokens=special_ids(tokenizer),
            modes=models.modes,
            fast=fast_section(model.card) if model is not None else None,
            drafts=drafter.drafter.places if drafter is not None else 0,
        )
        self._scheduler: Scheduler[RequestState] = Scheduler(settings.slots, settings.queue, settings.quantum)
        self._ids = itertools.count()
        self._encoding = threading.Lock()
        self._changed = threading.Condition()
        self._live: dict[int, RequestState] = {}
        self._closing = False
        self._give_up = float("inf")
        self._counts: dict[str, int] = dict.fromkeys(("eos", "stop", "length", "cancelled", "deadline", "error"), 0)
        self._tokens = {"prompt": 0, "cached": 0, "generated": 0, "edits": 0}
        self._drafted = ExactStats()
        self._thread = threading.Thread(target=self._run, name="hilda-model", daemon=True)
        self._thread.start()
        _open.add(self)

    def _build_runners(self, parent_name: str, threads: int | None) -> None:
        model, settings, totals = self.model, self.settings, self.totals
        turn = model.card.block_size if model is not None else PREFIX_BLOCK
        kept = self.limit_bytes if settings.keep_prefixes else 0
        self.prefixes, self.exact_prefixes = PrefixCache(turn, kept), PrefixCache(PREFIX_BLOCK, kept)
        self.diffusion = (
            DiffusionRunner(model, self.tokenizer, self.prefixes, settings.prefill_tokens, totals)
            if model is not None
            else None
        )
        own = model is not None and model.card.alignment == "parent"
        alone = one_by_one(model, self.tokenizer) if model is not None and own else None
        self.autoregressive, self.one_by_one = (
            ARRunner(parent, turn, settings.prefill_tokens, totals) if parent is not None else None
            for parent in (self.parent, alone)
        )
        drafts = self.models.drafts(parent_name, threads)
        self.exact = (
            ExactRunner(drafts, self.exact_prefixes, turn, settings.prefill_tokens, totals)
            if drafts is not None
            else None
        )
        if self.exact is not None and drafts is not None and drafts.card is not None:
            self.exact.warm(ExactConfig())

    @property
    def facts(self) -> EngineFacts:
        return self._facts

    def load(self) -> EngineLoad:
        with self._changed:
            return EngineLoad(
                waiting=len(self._scheduler.waiting),
                running=len(self._scheduler.running),
                alive=self._thread.is_alive() and not self._closing,
                cache_bytes=self._taken() + self.prefixes.bytes + self.exact_prefixes.bytes,
                cache_limit_bytes=self.limit_bytes,
                prompt_tokens=self._tokens["prompt"],
                cached_tokens=self._tokens["cached"],
                generated_tokens=self._tokens["generated"],
                forwards=self.totals.forwards,
                denoising_steps=self.totals.denoising_steps,
                edits=self._tokens["edits"],
                blocks=self.totals.blocks,
                drafts=self._drafted.verified,
                draft_tokens=self._drafted.drafted,
                accepted_tokens=self._drafted.confirmed,
                accepted_per_position=self._drafted.confirmed_per_place,
                finished=dict(self._counts),
            )

    def submit(self, request: Request, sink: Sink) -> "EngineTicket":
        return self.submit_all([(request, sink)])[0]

    def submit_all(self, requests: Sequence[tuple[Request, Sink]]) -> list["EngineTicket"]:
        """Submit several in one moment, or none: who shares whose forwards is then the same every time."""
        states = [self._checked(request, sink) for request, sink in requests]
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise Overloaded("the engine is closing", "ask another server, or this one after its restart", 5.0)
            self._scheduler.enqueue(*states)
            self._live |= {state.id: state for state in states}
            self._changed.notify_all()
        return [EngineTicket(self, state) for state in states]

    def _checked(self, request: Request, sink: Sink) -> RequestState:
        prompt = self.models.encode(request)
        if request.max_new_tokens == 0 and not request.scores:
            raise ConfigError("0 new tokens leave nothing to do", "ask for one or more")
        limit = length_limit(self.models.asked(request)[0], len(prompt), request.max_new_tokens)
        decoder = make_method(self.models.section(request))
        read = None if request.parent or request.scores else self.model
        check_served(decoder, self.models.section(request), read)
        if request.given:
            self.models.check_given(request, decoder, limit - len(prompt))
        if request.trajectory:
            check_recordable(None if request.parent or request.scores else decoder)
        prune = self.models.prune(request, decoder)
        size = self._cache_bytes(request, decoder, limit, prune, len(prompt))
        if size > self.limit_bytes:
            raise PromptError(
                f"{limit} tokens take {size >> 20} MiB of keys and values, the limit is {self.limit_bytes >> 20}",
                "ask for fewer new tokens, or raise engine.cache_mib",
            )
        return RequestState(
            id=next(self._ids),
            request=request,
            sink=sink,
            prompt=prompt,
            limit=limit,
            decoder=decoder,
            prune=prune,
            bytes=size,
            submitted=time.perf_counter(),
        )

    def weights_changed(self) -> int:
        """Tell that the model's weights are others now, or hold still until they are: every kept prefix is dropped.

        Returns their new version, which answers carry. Raises `EngineBusy` while requests run or wait, `ConfigError`
        for a model that computes with copies of its weights.
        """
        self.models.check_changeable()
        with self._changed:
            if self._live:
                raise EngineBusy(
                    f"the weights changed while {len(self._live)} requests run or wait", "let them end, or cancel them"
                )
            for prefixes in (self.prefixes, self.exact_prefixes):
                prefixes.shrink(0)
            self.weights += 1
            return self.weights

    def close(self, drain_seconds: float = 0.0) -> None:
        with self._changed:
            self._closing = True
            self._give_up = min(self._give_up, time.perf_counter() + drain_seconds)
            self._changed.notify_all()
        self._thread.join()
        _open.discard(self)

    def cancel(self, state: RequestState) -> None:
        """Called by tickets."""
        with self._changed:
            state.cancelled = True
            self._changed.notify_all()

    def _cache_bytes(
        self, request: Request, decoder: Decoder | ExactConfig, limit: int, prune: Prune | None, prompt: int
    ) -> int:
        """Keys and values of `limit` tokens: of the diffusion model in whole blocks, less what is dropped. Raises
        `ConfigError` for more drafts than were learnt."""
        if isinstance(decoder, ExactConfig) and self.exact is not None and not request.parent:
            return self.exact.cache_bytes(decoder, limit)
        if request.parent and self.autoregressive is not None:
            return limit * self.autoregressive.token_bytes
        if request.scores or self.model is None:
            return limit * self.token_bytes
        block = self.model.card.block_size
        window = decoder.window if isinstance(decoder, Decoder) else 0
        return slots_for(prune, prompt, -(-limit // block) * block, block, window) * self.token_bytes

    def _run(self) -> None:
        """The model thread. Whatever ends it, nobody is left waiting."""
        try:
            with torch.inference_mode():
                while self._wait():
                    self._turn()
        finally:
            with self._changed:
                self._closing = True
                left = list(self._live.values())
            closed = time.perf_counter() >= self._give_up
            for state in left:
                error = Overloaded("the engine has closed", "ask again after its restart", 5.0) if closed else _died()
                self._fail(state, error)

    def _wait(self) -> bool:
        """Sleep while there is nothing to do; False once the engine is to end."""
        with self._changed:
            while not self._live and not self._closing:
                self._changed.wait()
            return bool(self._live) and time.perf_counter() < self._give_up

    def _turn(self) -> None:
        """Let go whoever has gone, give places, move everybody by one step."""
        now = time.perf_counter()
        for state in [state for state in list(self._live.values()) if state.cancelled or now > state.deadline]:
            if state.cancelled:
                self._fail(state, Cancelled("the request was cancelled", "ask again"))
            else:
                seconds = state.request.deadline_seconds
                self._fail(
                    state, DeadlineExceeded(f"no whole answer within {seconds} s", "ask for less, or allow more")
                )
        with self._changed:
            resting = self._scheduler.preempt()
        for state in resting:
            self._runner(state).pause(state)
        while (started := self._admit()) is not None:
            self._start(started)
        runners: list[Runner | None] = [self.diffusion, self.autoregressive, self.one_by_one, self.exact]
        try:
            ended = step_all([runner for runner in runners if runner is not None])
        except LogitsNotFinite as problem:
            logger.error("%s, with %d requests", problem, len(self._scheduler.running))
            for state in [state for state in self._scheduler.running if state.id in problem.rows]:
                self._fail(state, problem)
            return
        except torch.cuda.OutOfMemoryError as problem:
            logger.error("out of memory with %d requests: %s", len(self._scheduler.running), problem)
            for state in list(self._scheduler.running):
                self._fail(state, EngineFailed("the device ran out of memory", "ask again; lower slots or cache_mib"))
            return
        for state in ended:
            self._finish(state)

    def _admit(self) -> RequestState | None:
        with self._changed:
            return self._scheduler.admit(self._judge)

    def _judge(self, state: RequestState) -> Admission:
        """Called under the lock: is there memory for it, and nobody feeding the same prompt already?"""
        taken = self._taken()
        if taken + state.bytes > self.limit_bytes:
            return Admission.STOP
        runner, left = self._runner(state), self.limit_bytes - taken - state.bytes
        if isinstance(runner, DiffusionRunner | ExactRunner) and runner.feeds_the_same(state):
            return Admission.LATER
        self.prefixes.shrink(left - self.exact_prefixes.bytes)
        self.exact_prefixes.shrink(left - self.prefixes.bytes)
        return Admission.GO

    def _taken(self) -> int:
        return sum(state.bytes for state in self._live.values() if state.begun)

    def _runner(self, state: RequestState) -> Runner:
        exact, scores = isinstance(state.decoder, ExactConfig), state.request.scores
        # The likelihoods of exact mode's text are the parent's, who writes the same one.
        runner: Runner | None
        if state.request.parent or (exact and scores):
            runner = self.autoregressive
        else:
            runner = self.exact if exact else self.one_by_one if scores else self.diffusion
        assert runner is not None, "a request that nobody here can answer"
        return runner

    def _start(self, state: RequestState) -> None:
        first = not state.started
        if first:
            state.started = time.perf_counter()
        self._runner(state).resume(state)
        if not first:
            return
        with self._changed:
            self._tokens["prompt"] += len(state.prompt)
            self._tokens["cached"] += state.cached
        tokenizer = self.models.asked(state.request)[1]
        state.cells = TokenCells(tokenizer, state.prompt) if state.request.steps else None
        cells = [Cell(**cell) for cell in state.cells.prompt()] if state.cells is not None else []
        state.sink(Started(len(state.prompt), state.cached, state.started - state.submitted, cells))

    def _finish(self, state: RequestState) -> None:
        assert state.ending is not None
        now = time.perf_counter()
        tokenizer = self.models.asked(state.request)[1]
        answer = RequestOutput(
            text=state.ending.text,
            tokens=state.ending.tokens,
            finish_reason=state.ending.reason,
            prompt_tokens=len(state.prompt),
            cached_tokens=state.cached,
            stats=state.stats(),
            trajectory=state.row.trajectory() if state.row is not None else None,
            queue_seconds=state.started - state.submitted,
            first_piece_seconds=(state.first_piece or now) - state.submitted,
            seconds=now - state.submitted,
            scores=told_scores(tokenizer, state.prompt, state.ending, state.scores) if state.request.scores else None,
            weights=self.weights,
        )
        self._let_go(state, state.ending.reason)
        with self._changed:
            self._tokens["generated"] += len(answer.tokens)
            self._tokens["edits"] += answer.stats.edits
            if isinstance(answer.stats, ExactStats):
                self._drafted = ExactStats.total([self._drafted, answer.stats])
        state.sink(Finished(answer))

    def _fail(self, state: RequestState, error: HildaError) -> None:
        kinds: Mapping[type, str] = {Cancelled: "cancelled", DeadlineExceeded: "deadline"}
        self._let_go(state, kinds.get(type(error), "error"))
        state.sink(Failed(error))

    def _let_go(self, state: RequestState, reason: str) -> None:
        self._runner(state).finish(state)
        with self._changed:
            self._scheduler.remove(state)
            self._live.pop(state.id, None)
            self._counts[reason] += 1


class EngineTicket:
    """A request in our engine."""

    def __init__(self, engine: LocalEngine, state: RequestState) -> None:
        self._engine, self._state = engine, state

    def cancel(self) -> None:
        self._engine.cancel(self._state)


@atexit.register
def _close_all() -> None:
    for engine in list(_open):
        engine.close()


def _died() -> EngineFailed:
    return EngineFailed("the model thread has ended", "see the server's log and start it again")


def _cache_limit(settings: LocalEngineConfig, device: torch.device) -> int:
    """Bytes for keys and values."""
    if settings.cache_mib is not None:
        return settings.cache_mib * 2**20
    return available_memory(device) // 4
