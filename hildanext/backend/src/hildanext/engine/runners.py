"""How requests are computed: all rows of the diffusion model in one forward, all of the parent's in another.

Runners belong to the engine's one model thread; nothing here is safe to call from another. That of exact mode is in
`exact_runner`.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from hildanext.ar import Parent, draw
from hildanext.core.runtime import send
from hildanext.data.generation_result import GenerationStats
from hildanext.decoding.base import Decoder, step
from hildanext.decoding.detokenizer import IncrementalDetokenizer, Stop
from hildanext.decoding.exact.policy import ExactConfig
from hildanext.decoding.exact.state import ExactRow
from hildanext.decoding.per_row import PerRow
from hildanext.decoding.sequence import SequenceState, Step
from hildanext.decoding.state import DecodeState
from hildanext.decoding.trace import step_record
from hildanext.decoding.trajectory import recorder_for
from hildanext.detokenization import TokenCells
from hildanext.engine.base import Piece, Request, Sink, Stepped
from hildanext.engine.scheduler import Schedulable
from hildanext.exact import exact_stats
from hildanext.inference import eos_ids, stats_of
from hildanext.kv_cache import BlockCache, CachedAttention, Segment, bytes_per_token
from hildanext.kv_cache.prefix_cache import PrefixCache
from hildanext.kv_cache.prune import Prune
from hildanext.likelihood.next_token import NextToken, score_tokens
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.sampling import next_tokens, read_tokens


@dataclass(eq=False, kw_only=True)
class RequestState(Schedulable):
    """A request inside the engine, from submission to its end."""

    id: int
    request: Request
    sink: Sink
    prompt: list[int]
    limit: int
    """Tokens of the finished document."""
    decoder: Decoder | ExactConfig
    bytes: int
    """Keys and values it will take."""
    submitted: float
    started: float = 0.0
    prefilled: float = 0.0
    first_piece: float = 0.0
    prune: Prune | None = None
    """What is dropped of its keys and values; None: nothing."""
    cached: int = 0
    cancelled: bool = False
    row: SequenceState | None = None
    exact: ExactRow | None = None
    """Its row in exact mode."""
    turns: int = 0
    """Blocks it has written in exact mode, where nothing else counts them."""
    prefix_key: int | None = None
    """Its key in the prefix cache while it lives."""
    cache: BlockCache | None = None
    """Of a request to the parent; `row` has that of one to the diffusion model."""
    generator: torch.Generator | None = None
    drawn: list[int] = field(default_factory=list)
    """The parent's answer so far."""
    scores: list[NextToken] = field(default_factory=list)
    """Of the document's tokens from the second on, where they are asked for."""
    prompt_forwards: int = 0
    """Forwards of the parent that were fed a piece of the prompt and drew nothing."""
    detokenizer: IncrementalDetokenizer | None = None
    cells: TokenCells | None = None
    """Texts of its tokens, where steps are told."""
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
        if self.exact is not None:
            return exact_stats(self.exact, kept, now - self.started, prefill)
        if self.row is not None:
            return stats_of(self.row, kept, now - self.started, prefill)
        return GenerationStats(
            prefill_forwards=self.prompt_forwards,
            denoise_forwards=len(self.drawn),
            rows=len(self.drawn),
            tokens=kept,
            seconds=now - self.started,
            prefill_seconds=prefill,
        )


@dataclass
class Totals:
    """What the engine has done since it started."""

    forwards: int = 0
    denoising_steps: int = 0
    blocks: int = 0


class DiffusionRunner:
    """Rows of the diffusion model: one forward moves all of them, whatever block, decoder and length each has."""

    def __init__(
        self, model: DiffusionModel, tokenizer: Any, prefixes: PrefixCache, prefill_budget: int, totals: Totals
    ) -> None:
        self.model, self.tokenizer, self.prefixes, self.totals = model, tokenizer, prefixes, totals
        self.state = DecodeState(model, [], [], self._ended)
        self.state.prefill_budget = self.prefill_budget = max(prefill_budget, model.card.block_size)
        self._requests: dict[int, RequestState] = {}
        self._watched: set[int] = set()
        """Of these requests every step is told."""
        self._eos = eos_ids(model, tokenizer)

    def resume(self, request: RequestState) -> None:
        """A request's turn begins: for the first time, or again."""
        if request.row is None:
            spec = request.request
            window = _decoder(request).window
            request.row = self.state.row(request.prompt, request.limit, spec.seed, request.id, request.prune, window)
            if spec.given:
                request.row.give(spec.given)
            if spec.trajectory:
                request.row.recorder = recorder_for(request.decoder, len(request.row.tokens))
            eos = frozenset() if spec.ignore_eos else self._eos
            if _decoder(request).window == 0:
                request.row.eos = eos
            request.detokenizer = IncrementalDetokenizer(self.tokenizer, request.prompt, eos, spec.stop, request.show)
            self._adopt(request, request.row)
        self._requests[request.id] = request
        self.state.add(request.row)
        if request.request.steps:
            self._watched.add(request.id)
        self._watch()

    def pause(self, request: RequestState) -> None:
        """Its turn is over, or it is given up: it keeps what it has."""
        if request.row is not None and self._requests.pop(request.id, None) is not None:
            self.state.remove(request.row)
            self._watched.discard(request.id)
            self._watch()

    def finish(self, request: RequestState) -> None:
        """It will not come again: what its cache holds may serve others."""
        self.pause(request)
        if request.prefix_key is not None:
            self.prefixes.drop(request.prefix_key)
            request.prefix_key = None
        if request.row is not None and request.row.cache is not None:
            cache, row = request.row.cache, request.row
            self.prefixes.keep(cache, row.last_clean_hidden, row.tokens[: cache.length].tolist())
            row.cache = None

    def feeds_the_same(self, request: RequestState) -> bool:
        """Whether a prompt being fed right now shares blocks with this one that nobody has yet and that it may take."""
        if request.prune is not None:
            return False
        size, prompt = self.model.card.block_size, request.prompt
        match = self.prefixes.find(prompt)
        have = 0 if match is None else match[1]
        if len(prompt) < have + size:
            return False
        feeding = (self._requests[row.index] for row in self.state.joining)
        return any(one.prompt[: have + size] == prompt[: have + size] for one in feeding if one.prune is None)

    def step(self) -> list[RequestState]:
        """One forward. Returns the requests whose text is whole."""
        state = self.state
        joining = list(state.joining)
        canvas = state.canvas()
        if canvas is not None:
            requests = [self._requests[row.index] for row in state.rows]
            self.totals.denoising_steps += len(requests)
            for row in step(PerRow([_decoder(request) for request in requests]), state, canvas):
                requests[row].blocks += 1
                self.totals.blocks += 1
        elif joining:
            state.prefill_step(self.prefill_budget)
        else:
            return self._whole()
        self.totals.forwards += 1
        state.retire_finished()
        for row_state in joining:
            if row_state not in state.joining:
                self._fed(self._requests[row_state.index], row_state)
        return self._whole()

    def _whole(self) -> list[RequestState]:
        return [request for request in self._requests.values() if request.ending is not None]

    def _adopt(self, request: RequestState, row: SequenceState) -> None:
        """Take over the blocks of the prompt that another request has left or is writing behind. A pruned one does not:
        its own keys depend on what was dropped before them, and its answer may not depend on who else is served."""
        if request.prune is not None:
            return
        match = self.prefixes.find(request.prompt[: row.start])
        if match is None or row.cache is None:
            return
        prefix, length = match
        row.cache.adopt(prefix.cache, length, row.tokens)
        blocks = length // self.model.card.block_size
        row.last_clean_hidden[: blocks + 1] = prefix.last_clean_hidden[: blocks + 1]
        request.cached = length

    def _fed(self, request: RequestState, row: SequenceState) -> None:
        """Its prompt is in its cache: from now on others may begin with it."""
        request.prefilled = time.perf_counter()
        if row.cache is not None and row.cache.lends:
            request.prefix_key = self.prefixes.register_live(
                row.cache, row.last_clean_hidden, request.prompt[: row.cache.length]
            )

    def _ended(self, row: SequenceState, tokens: list[int]) -> bool:
        request = self._requests[row.index]
        assert request.detokenizer is not None
        held = _decoder(request).window * self.model.card.block_size
        request.ending = request.detokenizer.add(tokens[row.prompt : row.limit], row.start >= row.limit, held)
        return request.ending is not None

    def _watch(self) -> None:
        self.state.observe = self._observe if self._watched else None

    def _observe(self, taken: Step) -> None:
        request = self._requests[taken.row]
        if request.request.steps:
            request.sink(Stepped({**step_record(taken, request.cells), "row": 0}))


class ARRunner:
    """The autoregressive parent: one forward feeds the last token of every request, or a piece of its prompt.

    A segment for each request, unpadded, in the block cache at a block size of 1, where a token sees those before it.
    """

    def __init__(self, parent: Parent, block_size: int, prefill_budget: int, totals: Totals) -> None:
        self.parent, self.block_size, self.prefill_budget, self.totals = parent, block_size, prefill_budget, totals
        self.token_bytes = bytes_per_token(parent.causal_lm)
        self._requests: dict[int, RequestState] = {}

    def resume(self, request: RequestState) -> None:
        if request.cache is None:
            spec = request.request
            request.cache = BlockCache.of_parent(self.parent, request.limit)
            request.generator = torch.Generator().manual_seed(spec.seed)
            eos = frozenset() if spec.ignore_eos else eos_ids(self.parent, self.parent.tokenizer)
            request.detokenizer = IncrementalDetokenizer(
                self.parent.tokenizer, request.prompt, eos, spec.stop, request.show
            )
        self._requests[request.id] = request

    def pause(self, request: RequestState) -> None:
        self._requests.pop(request.id, None)

    def finish(self, request: RequestState) -> None:
        self.pause(request)
        request.cache = None

    def step(self) -> list[RequestState]:
        """One forward. Returns the requests whose text is whole."""
        feeds = self._plan()
        if not feeds:
            return []
        hidden = self._forward(feeds)
        self.totals.forwards += 1
        ready, last, end = [], [], 0
        for request, tokens in feeds:
            end += len(tokens)
            assert request.cache is not None
            if request.cache.length < len(request.prompt):
                request.prompt_forwards += 1
            elif request.limit == len(request.prompt):  # nothing is to be written
                request.prompt_forwards += 1
                self._end(request)
            else:
                ready.append(request)
                last.append(end - 1)
        if ready:
            for request, token in zip(ready, self._draw(ready, hidden[send(last, hidden.device)]), strict=True):
                self._take(request, token)
        self._score(feeds, hidden)
        return [request for request in self._requests.values() if request.ending is not None]

    def _plan(self) -> list[tuple[RequestState, list[int]]]:
        """Each request and what it is fed; prompts, first come first served, as many tokens as the budget allows."""
        feeds, budget = [], self.prefill_budget
        for request in self._requests.values():
            assert request.cache is not None
            length = request.cache.length
            tokens = request.prompt[length : length + budget] if not request.drawn else request.drawn[-1:]
            budget -= 0 if request.drawn else len(tokens)
            if tokens:
                feeds.append((request, tokens))
        return feeds

    def _forward(self, feeds: Sequence[tuple[RequestState, list[int]]]) -> torch.Tensor:
        """Hidden states of the fed tokens, one behind another; all of them are final, and committed."""
        caches = [request.cache for request, _ in feeds if request.cache is not None]
        segments = [Segment(cache.length, len(tokens), 0) for cache, (_, tokens) in zip(caches, feeds, strict=True)]
        attention = CachedAttention(caches, segments)
        fed = send([token for _, tokens in feeds for token in tokens], self.parent.device)[None]
        hidden = self.parent.forward(fed, attention.positions, attention)[0]
        for cache, segment in zip(caches, segments, strict=True):
            cache.commit(segment.end)
        return hidden

    def _draw(self, requests: Sequence[RequestState], hidden: torch.Tensor) -> list[int]:
        """The next token of each request, by its own sampling and its own generator; equal samplings at once."""
        logits = self.parent.logits(hidden)
        groups: dict[tuple[float, float | None, int | None], list[int]] = {}
        for row, request in enumerate(requests):
            groups.setdefault(_sampling(request.request.decoder), []).append(row)
        drawn = torch.empty(len(requests), dtype=torch.int64, device=logits.device)
        for sampling, rows in groups.items():
            uniform = draw([generator for row in rows if (generator := requests[row].generator) is not None])
            there = send(rows, logits.device)
            drawn[there] = next_tokens(logits[there], uniform.to(logits.device, non_blocking=True), *sampling)
        return read_tokens(drawn, [request.id for request in requests])

    def _take(self, request: RequestState, token: int) -> None:
        request.drawn.append(token)
        self._end(request)
        request.blocks += len(request.drawn) % self.block_size == 0

    def _end(self, request: RequestState) -> None:
        """Note where its text ends, if it does."""
        assert request.detokenizer is not None
        request.prefilled = request.prefilled or time.perf_counter()
        full = len(request.prompt) + len(request.drawn) >= request.limit
        request.ending = request.detokenizer.add(request.drawn, full)

    def _score(self, feeds: Sequence[tuple[RequestState, list[int]]], hidden: torch.Tensor) -> None:
        """What was just fed says how likely the tokens behind it are, where that is asked for."""
        end = 0
        for request, fed in feeds:
            begin, end = end, end + len(fed)
            if request.request.scores:
                known = 1 + len(request.scores)
                tokens = (request.prompt + request.drawn)[known : known + len(fed)]
                request.scores += score_tokens(self.parent, hidden[begin : begin + len(tokens)], tokens)


def _decoder(request: RequestState) -> Decoder:
    assert isinstance(request.decoder, Decoder), "exact mode has a runner of its own"
    return request.decoder


def _sampling(decoder: Mapping[str, Any]) -> tuple[float, float | None, int | None]:
    """Temperature, top-p and top-k of a decoder's section, which is all of it that the parent heeds."""
    return decoder.get("temperature") or 0.0, decoder.get("top_p"), decoder.get("top_k")


@runtime_checkable
class Runner(Protocol):
    """Computes some of the requests; each is in the hands of one runner."""

    def resume(self, request: RequestState) -> None: ...
    def pause(self, request: RequestState) -> None: ...
    def finish(self, request: RequestState) -> None: ...
    def step(self) -> list[RequestState]: ...


@torch.inference_mode()
def step_all(runners: Sequence[Runner]) -> list[RequestState]:
    """One step of every runner; the requests that have ended with it. After `LogitsNotFinite` the requests that it
    does not name go on; what had ended is told by the next step."""
    return [request for runner in runners for request in runner.step()]
