"""How requests are computed: the diffusion model's rows in one forward, the parent's a token at a time.

Both belong to the engine's one model thread; nothing here is safe to call from another.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from hildanext.ar import Parent
from hildanext.data.generation_result import GenerationStats
from hildanext.decoding import per_row as mixed
from hildanext.decoding.base import StepDecoder
from hildanext.decoding.detokenizer import IncrementalDetokenizer, Stop
from hildanext.decoding.state import DecodeState, SequenceState, Step
from hildanext.decoding.threshold_edit import ThresholdEdit
from hildanext.decoding.trace import step_record
from hildanext.engine.base import Piece, Request, Sink, Stepped
from hildanext.engine.scheduler import Schedulable
from hildanext.inference import eos_ids, stats_of
from hildanext.kv_cache.prefix_cache import PrefixCache
from hildanext.models.bidirectional import DiffusionModel


@dataclass(eq=False, kw_only=True)
class RequestState(Schedulable):
    """A request inside the engine, from submission to its end."""

    id: int
    request: Request
    sink: Sink
    prompt: list[int]
    limit: int
    """Tokens of the finished document."""
    decoder: StepDecoder
    bytes: int
    """Keys and values it will take."""
    submitted: float
    started: float = 0.0
    prefilled: float = 0.0
    first_piece: float = 0.0
    cached: int = 0
    cancelled: bool = False
    row: SequenceState | None = None
    lent: int | None = None
    """Its key in the prefix store while it lives."""
    tokens: Iterator[int | None] | None = None
    """The parent's answer as it is drawn; None where a piece of the prompt was fed."""
    drawn: list[int] = field(default_factory=list)
    prompt_forwards: int = 0
    """Forwards of the parent that were fed a piece of the prompt and drew nothing."""
    transcript: IncrementalDetokenizer | None = None
    ending: Stop | None = None

    @property
    def deadline(self) -> float:
        """On the clock of `time.perf_counter`."""
        seconds = self.request.deadline_seconds
        return float("inf") if seconds is None else self.submitted + seconds

    def show(self, text: str) -> None:
        """Send a piece of final text."""
        self.first_piece = self.first_piece or time.perf_counter()
        self.sink(Piece(text))

    def stats(self) -> GenerationStats:
        now = time.perf_counter()
        kept = len(self.ending.tokens) if self.ending is not None else 0
        prefill = self.prefilled - self.started if self.prefilled else 0.0
        if self.row is not None:
            return stats_of(self.row, kept, now - self.started, prefill)
        return GenerationStats(self.prompt_forwards, len(self.drawn), 0, 0, kept, 0, now - self.started, prefill)


@dataclass
class Totals:
    """What the engine has done since it started."""

    forwards: int = 0
    denoising_steps: int = 0
    blocks: int = 0


class DiffusionRunner:
    """Rows of the diffusion model: one forward moves all of them, whatever block, decoder and length each has."""

    def __init__(
        self, model: DiffusionModel, tokenizer: object, prefixes: PrefixCache, prefill_budget: int, totals: Totals
    ) -> None:
        self.model, self.tokenizer, self.prefixes, self.totals = model, tokenizer, prefixes, totals
        self.session = DecodeState(model, [], [], self._ended)
        self.session.prefill_budget = self.prefill_budget = max(prefill_budget, model.card.block_size)
        self._works: dict[int, RequestState] = {}

    def resume(self, work: RequestState) -> None:
        """A request's turn begins: for the first time, or again."""
        if work.row is None:
            work.row = self.session.row(work.prompt, work.limit, work.request.seed, work.id)
            eos = frozenset() if work.request.ignore_eos else eos_ids(self.model, self.tokenizer)  # type: ignore[arg-type]
            work.transcript = IncrementalDetokenizer(self.tokenizer, eos, work.request.stop, work.show)  # type: ignore[arg-type]
            self._adopt(work, work.row)
        self._works[work.id] = work
        self.session.add(work.row)
        self._watch()

    def pause(self, work: RequestState) -> None:
        """Its turn is over, or it is given up: it keeps what it has."""
        if work.row is not None and self._works.pop(work.id, None) is not None:
            self.session.remove(work.row)
            self._watch()

    def end(self, work: RequestState) -> None:
        """It will not come again: what its cache holds may serve others."""
        self.pause(work)
        if work.lent is not None:
            self.prefixes.drop(work.lent)
            work.lent = None
        if work.row is not None and work.row.cache is not None:
            cache, row = work.row.cache, work.row
            self.prefixes.keep(cache, row.last_clean_hidden, row.tokens[: cache.length].tolist())
            row.cache = None

    def feeds_the_same(self, prompt: list[int]) -> bool:
        """Whether a prompt being fed right now shares blocks with this one that nobody has yet."""
        size = self.model.card.block_size
        found = self.prefixes.find(prompt)
        have = 0 if found is None else found[1]
        if len(prompt) < have + size:
            return False
        return any(
            self._works[row.index].prompt[: have + size] == prompt[: have + size] for row in self.session.joining
        )

    def step(self) -> list[RequestState]:
        """One forward. Returns the requests whose text is whole."""
        session = self.session
        joining = list(session.joining)
        canvas = session.canvas()
        if canvas is None:
            if not joining:
                return []
            session.prefill_step(self.prefill_budget)
        else:
            works = [self._works[row.index] for row in session.rows]
            decoders = [work.decoder for work in works]
            where = mixed.needs(decoders, canvas)
            session.write(mixed.edit(decoders, session.logits(where), where, canvas))
            self._after(works)
        self.totals.forwards += 1
        session.retire_finished()
        for row in joining:
            if row not in session.joining:
                self._fed(self._works[row.index], row)
        return [work for work in list(self._works.values()) if work.ending is not None]

    def _after(self, works: list[RequestState]) -> None:
        """Count, and offer finished blocks for editing where a decoder asks for it."""
        self.totals.denoising_steps += len(works)
        for work in works:
            row = work.row
            if row is None or not self.session.finished(row):
                continue
            work.blocks += 1
            self.totals.blocks += 1
            if isinstance(work.decoder, ThresholdEdit) and work.decoder.window > 0:
                self.session.revise(work.decoder.window, work.decoder.edit, row)

    def _adopt(self, work: RequestState, row: SequenceState) -> None:
        """Take over the blocks of the prompt that another request has left or is writing behind."""
        found = self.prefixes.find(work.prompt[: row.start])
        if found is None or row.cache is None:
            return
        prefix, length = found
        row.cache.adopt(prefix.cache, length, row.tokens)
        blocks = length // self.model.card.block_size
        row.last_clean_hidden[: blocks + 1] = prefix.last_clean_hidden[: blocks + 1]
        work.cached = length

    def _fed(self, work: RequestState, row: SequenceState) -> None:
        """Its prompt is in its cache: from now on others may begin with it."""
        work.prefilled = time.perf_counter()
        if row.cache is not None:
            work.lent = self.prefixes.lend(row.cache, row.last_clean_hidden, work.prompt[: row.cache.length])

    def _ended(self, row: SequenceState, tokens: list[int]) -> bool:
        work = self._works[row.index]
        assert work.transcript is not None
        held = work.decoder.window * self.model.card.block_size
        work.ending = work.transcript.add(tokens[row.prompt : row.limit], row.start >= row.limit, held)
        return work.ending is not None

    def _watch(self) -> None:
        watched = any(work.request.steps for work in self._works.values())
        self.session.observe = self._observe if watched else None

    def _observe(self, step: Step) -> None:
        work = self._works[step.row]
        if work.request.steps:
            work.sink(Stepped({**step_record(step, self.tokenizer), "row": 0}))  # type: ignore[arg-type]


class ARRunner:
    """The autoregressive parent: each request feeds a piece of its prompt or draws one token a step, between the
    diffusion model's forwards."""

    def __init__(self, parent: Parent, block_size: int, totals: Totals) -> None:
        self.parent, self.block_size, self.totals = parent, block_size, totals
        self._works: dict[int, RequestState] = {}

    def resume(self, work: RequestState) -> None:
        if work.tokens is None:
            sampling = {
                name: value
                for name in ("temperature", "top_p", "top_k")
                if (value := work.request.decoder.get(name)) is not None
            }
            new = work.limit - len(work.prompt)
            work.tokens = self.parent.stream(work.prompt, new, seed=work.request.seed, **sampling)
            eos = frozenset() if work.request.ignore_eos else eos_ids(self.parent, self.parent.tokenizer)
            work.transcript = IncrementalDetokenizer(self.parent.tokenizer, eos, work.request.stop, work.show)
        self._works[work.id] = work

    def pause(self, work: RequestState) -> None:
        self._works.pop(work.id, None)

    def end(self, work: RequestState) -> None:
        self.pause(work)
        work.tokens = None

    def step(self) -> list[RequestState]:
        """One forward for each request. Returns the requests whose text is whole."""
        for work in list(self._works.values()):
            assert work.tokens is not None and work.transcript is not None
            token = next(work.tokens)
            self.totals.forwards += 1
            work.prompt_forwards += token is None
            if token is None:
                continue
            work.drawn.append(token)
            work.prefilled = work.prefilled or time.perf_counter()
            full = len(work.prompt) + len(work.drawn) >= work.limit
            work.ending = work.transcript.add(work.drawn, full)
            work.blocks += len(work.drawn) % self.block_size == 0
        return [work for work in self._works.values() if work.ending is not None]


@torch.inference_mode()
def step_all(runners: list[DiffusionRunner | ARRunner]) -> list[RequestState]:
    """One step of every lane; the requests that have ended with it."""
    return [work for runner in runners for work in runner.step()]
