"""Requests in exact mode: rows of a parent that drafts for itself, those with the same knobs in one forward."""

import time
from collections.abc import Sequence

import torch

from hildanext.ar import Parent
from hildanext.core.errors import ConfigError
from hildanext.decoding.detokenizer import IncrementalDetokenizer
from hildanext.decoding.exact.policy import ExactConfig
from hildanext.decoding.exact.state import ExactRow, ExactState
from hildanext.decoding.sequence import Step
from hildanext.decoding.trace import step_record
from hildanext.engine.base import Stepped
from hildanext.engine.runners import RequestState, Totals
from hildanext.exact import LoadedDrafter, placing_for
from hildanext.inference import eos_ids
from hildanext.kv_cache import bytes_per_token
from hildanext.kv_cache.prefix_cache import PrefixCache

PREFIX_BLOCK = 16
"""Tokens of a beginning that is shared or not as a whole."""


class ExactRunner:
    """Belongs to the engine's one model thread. Prompts are fed in pieces, between the forwards of those that write."""

    def __init__(
        self, loaded: LoadedDrafter, prefixes: PrefixCache, turn: int, prefill_budget: int, totals: Totals
    ) -> None:
        """`turn`: tokens that count as a block where the scheduler counts them."""
        self.loaded, self.prefixes, self.turn, self.totals = loaded, prefixes, turn, totals
        self.prefill_budget = prefill_budget
        self.token_bytes = bytes_per_token(loaded.drafter.causal_lm)
        self._states: dict[ExactConfig, ExactState] = {}
        self._requests: dict[int, RequestState] = {}
        self._joining: list[RequestState] = []

    def warm(self, config: ExactConfig) -> None:
        """Look up, or measure, what rows cost here, before anybody waits for it; while no request is being answered."""
        self._state(config)

    def cache_bytes(self, config: ExactConfig, limit: int) -> int:
        """Keys and values of a document of `limit` tokens, and of the masks behind them. Any thread may ask: nothing is
        measured. Raises `ConfigError` for knobs that do not fit the adapters."""
        most = placing_for(self.loaded.drafter, config).most
        return (limit + most + (most + 1) * most) * self.token_bytes

    def resume(self, request: RequestState) -> None:
        """A request's turn begins: for the first time, or again."""
        state = self._state(_config(request))
        if request.exact is None:
            spec = request.request
            request.exact = state.row(request.prompt, request.limit, spec.seed, request.id)
            tokenizer = self.loaded.tokenizer
            eos = frozenset() if spec.ignore_eos else eos_ids(Parent(self.loaded.drafter.causal_lm, None), tokenizer)
            request.detokenizer = IncrementalDetokenizer(tokenizer, request.prompt, eos, spec.stop, request.show)
            if not state.placing.fixed:  # with fixed rows the pieces of the prompt are part of what is computed
                self._adopt(request, request.exact)
        self._requests[request.id] = request
        if request.prefilled:
            state.rows.append(request.exact)
        else:
            self._joining.append(request)

    def pause(self, request: RequestState) -> None:
        """Its turn is over, or it is given up: it keeps what it has."""
        if self._requests.pop(request.id, None) is None:
            return
        self._joining = [other for other in self._joining if other is not request]
        state = self._state(_config(request))
        state.rows = [row for row in state.rows if row is not request.exact]

    def finish(self, request: RequestState) -> None:
        """It will not come again: what its cache holds may serve others."""
        self.pause(request)
        if request.prefix_key is not None:
            self.prefixes.drop(request.prefix_key)
            request.prefix_key = None
        config = _config(request)
        if request.exact is not None and not placing_for(self.loaded.drafter, config).fixed:
            cache = request.exact.cache
            self.prefixes.keep(cache, torch.empty(0, 0), request.exact.tokens[: cache.length])
        request.exact = None
        if config not in map(_config, self._requests.values()):
            self._states.pop(config, None)  # clients may ask for any number of temperatures

    def feeds_the_same(self, request: RequestState) -> bool:
        """Whether a prompt being fed right now shares a beginning with this one that nobody has yet."""
        if placing_for(self.loaded.drafter, _config(request)).fixed:
            return False
        match = self.prefixes.find(request.prompt)
        wanted = (0 if match is None else match[1]) + PREFIX_BLOCK
        begin = request.prompt[:wanted]
        return len(begin) == wanted and any(other.prompt[:wanted] == begin for other in self._joining)

    def step(self) -> list[RequestState]:
        """A piece of the prompts that join, then one forward of each group that writes. Returns whose text is whole."""
        self._feed()
        for state in self._states.values():
            if not state.rows:
                continue
            rows = list(state.rows)
            steps = any(self._requests[row.index].request.steps for row in rows)
            state.observe = self._observe if steps else None
            state.step()
            self.totals.forwards += len(rows) if state.placing.fixed else 1
            self.totals.denoising_steps += len(rows)
            self._count_blocks(rows)
        return [request for request in self._requests.values() if request.ending is not None]

    def _feed(self) -> None:
        budget = self.prefill_budget
        for request in list(self._joining):
            assert request.exact is not None
            state, row = self._state(_config(request)), request.exact
            before = row.cache.length
            # A prompt with fixed rows is cut where it always is, whatever others leave of the budget.
            piece = self.prefill_budget if state.placing.fixed else budget
            left = state.feed(row, piece)
            fed = row.cache.length - before
            budget -= fed
            self.totals.forwards += fed > 0
            if left == 0:
                self._joining.remove(request)
                request.prefilled = time.perf_counter()
                request.prefix_key = self.prefixes.register_live(
                    row.cache, torch.empty(0, 0), request.prompt[: row.cache.length]
                )
                state.rows.append(row)
            if budget <= 0:
                return

    def _count_blocks(self, rows: Sequence[ExactRow]) -> None:
        for row in rows:
            request = self._requests[row.index]
            written = (len(row.tokens) - row.prompt) // self.turn
            request.blocks += written - request.turns
            request.turns = written

    def _adopt(self, request: RequestState, row: ExactRow) -> None:
        """Take over the beginning of the prompt that another request has left or is writing behind."""
        match = self.prefixes.find(request.prompt[:-1])
        if match is not None:
            prefix, length = match
            row.cache.adopt(prefix.cache, length)
            request.cached = length

    def _state(self, config: ExactConfig) -> ExactState:
        if config not in self._states:
            placing = self.loaded.placing(config)
            self._states[config] = ExactState(self.loaded.drafter, config, placing, self._ended)
        return self._states[config]

    def _ended(self, row: ExactRow) -> bool:
        request = self._requests[row.index]
        assert request.detokenizer is not None
        new = row.tokens[row.prompt : row.limit]
        request.ending = request.detokenizer.add(new, len(row.tokens) >= row.limit)
        return request.ending is not None

    def _observe(self, taken: Step) -> None:
        request = self._requests[taken.row]
        if request.request.steps:
            request.sink(Stepped({**step_record(taken, request.cells), "row": 0}))


def _config(request: RequestState) -> ExactConfig:
    if not isinstance(request.decoder, ExactConfig):
        raise ConfigError("a request of a diffusion model", "ask its runner")
    return request.decoder
