"""Prompt in, text and timings out: batches of prompts through a decoder, with events while it runs.

A prompt's whole blocks are prefilled; its tail shares the first active block and is never written. A row ends
when a finished block holds the end of text or a stop string, or at its length; tokens beyond are cut.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from hildanext.ar import Parent
from hildanext.core.config import AnySeed, config
from hildanext.core.errors import ConfigError, PromptError
from hildanext.core.runtime import available_memory
from hildanext.data.generation_result import GenerationResult, GenerationStats
from hildanext.decoding.base import Decoder, run
from hildanext.decoding.commit import Commit
from hildanext.decoding.detokenizer import IncrementalDetokenizer
from hildanext.decoding.order_token_search import OrderTokenSearch
from hildanext.decoding.sequence import SequenceState, Step
from hildanext.decoding.state import DecodeState
from hildanext.decoding.trajectory import check_recordable, recorder_for
from hildanext.kv_cache import bytes_per_token
from hildanext.kv_cache.prune import Prune, make_prune
from hildanext.models.bidirectional import DiffusionModel

DEFAULT_NEW_TOKENS = 256


@config
class GenerationConfig:
    """What does not depend on the decoder."""

    max_new_tokens: int | None = Field(default=None, ge=1)
    """None: 256, or what the context leaves."""
    seed: AnySeed = 0
    """Row i of the prompts draws from seed + i, whatever batch it runs in."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    ignore_eos: bool = False
    batch_size: int = Field(default=8, ge=1)
    commit: Commit = "auto"
    cached: bool = True
    """False runs every forward from position 0 on: the reference for tests."""
    trace: bool = False
    debug: bool = False
    """Check before every forward that the cache belongs to the tokens."""
    cache: dict[str, Any] | str | None = None
    """What a row keeps of its keys and values (FULL), a name or a section such as {"name": "knorm", "ratio": 0.5}:
    knorm, keydiff, streaming, noncausal or mask_guided. Off (None) keeps all."""

    def __post_init__(self) -> None:
        # Once, in the context whose profile admits it.
        object.__setattr__(self, "_prune", make_prune(self.cache))
        if self.prune is not None and not self.cached:
            raise ConfigError("cache says what is kept, and cached is false", "leave one of them out")

    @property
    def prune(self) -> Prune | None:
        """What `cache` names."""
        prune: Prune | None = self.__dict__["_prune"]
        return prune


GenerationKnobs = GenerationConfig
"""The name under which it was promised."""


Completion = GenerationResult
"""The name under which it was promised."""


@dataclass(frozen=True)
class Event:
    """Something that happened to one row. `text`: a piece of final text; `step`: a forward; `end`: the row is done."""

    row: int
    kind: Literal["text", "step", "end"]
    text: str = ""
    step: Step | None = None


OnEvent = Callable[[Event], None]
OnCompletion = Callable[[int, GenerationResult], None]
"""Called with the prompt's number as soon as its row has ended, in whatever order rows end."""


def generate(
    model: DiffusionModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Sequence[int]],
    decoder: Decoder,
    settings: GenerationConfig | None = None,
    on_event: OnEvent | None = None,
    on_completion: OnCompletion | None = None,
    seeds: Sequence[int] | None = None,
    trajectories: bool = False,
) -> list[GenerationResult]:
    """Complete every prompt (token ids; an empty one starts from BOS). Without a tokenizer there is no text and no EOS.

    `seeds`, one per prompt, replace `settings.seed` + i. `trajectories` records each (`GenerationResult.trajectory`).
    Raises `PromptError` for a prompt that does not fit the context or holds ids that are no tokens, `ConfigError` for
    trajectories of a decoder that has none, as `check_prunable`, and for a search whose beams have no room.
    """
    settings = settings if settings is not None else GenerationConfig()
    check_prunable(settings.prune, model, decoder)
    decoder.check_model(model)
    if trajectories:
        check_recordable(decoder)
    prompts = [checked_prompt(model, tokenizer, prompt) for prompt in prompts]
    limits = [length_limit(model, len(prompt), settings.max_new_tokens) for prompt in prompts]
    if isinstance(decoder, OrderTokenSearch):
        check_room(model, decoder, limits, settings)
    seeds = seeds if seeds is not None else range(settings.seed, settings.seed + len(prompts))
    completions: list[GenerationResult] = []
    for first in range(0, len(prompts), settings.batch_size):
        batch = range(first, min(first + settings.batch_size, len(prompts)))
        drawn = [seeds[i] for i in batch]
        rows = _Batch(model, tokenizer, decoder, settings, on_event, batch, drawn, on_completion, trajectories)
        completions += rows.complete([prompts[i] for i in batch], [limits[i] for i in batch])
    return completions


def context_length(model: DiffusionModel | Parent) -> int:
    """Positions the model can address; of a diffusion model in whole blocks."""
    context = int(model.causal_lm.config.max_position_embeddings)
    return context if isinstance(model, Parent) else context // model.card.block_size * model.card.block_size


class _Batch:
    """Prompts that are decoded together: turns their finished blocks into text, events and completions."""

    def __init__(
        self,
        model: DiffusionModel,
        tokenizer: PreTrainedTokenizerBase | None,
        decoder: Decoder,
        settings: GenerationConfig,
        on_event: OnEvent | None,
        batch: range,
        seeds: Sequence[int],
        on_completion: OnCompletion | None,
        trajectories: bool,
    ) -> None:
        self.model, self.tokenizer, self.decoder, self.settings = model, tokenizer, decoder, settings
        self.on_event, self.batch, self.seeds, self.on_completion = on_event, batch, seeds, on_completion
        self.trajectories = trajectories
        self.steps: dict[int, list[Step]] = {i: [] for i in range(len(batch))}
        self.eos = frozenset() if settings.ignore_eos else eos_ids(model, tokenizer)
        self.detokenizers: list[IncrementalDetokenizer] = []
        self.done: dict[int, GenerationResult] = {}
        self.began = self.prefilled = 0.0

    @torch.inference_mode()
    def complete(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[GenerationResult]:
        self.detokenizers = [
            IncrementalDetokenizer(self.tokenizer, prompt, self.eos, self.settings.stop, self._show(i))
            for i, prompt in zip(self.batch, prompts, strict=True)
        ]
        search = self.decoder if isinstance(self.decoder, OrderTokenSearch) else None
        observing = self.settings.trace or self.on_event is not None
        self.began = time.perf_counter()
        state = DecodeState(
            self.model,
            prompts,
            limits,
            self._ended if search is None else self._would_end,
            seeds=self.seeds,
            commit=self.settings.commit,
            cached=self.settings.cached,
            observe=self._observe if observing else None,
            debug=self.settings.debug,
            prune=self.settings.prune,
            window=self.decoder.window,
        )
        for row in [*state.joining, *state.rows]:
            if self.trajectories:
                row.recorder = recorder_for(self.decoder, len(row.tokens))
            if self.decoder.window == 0:
                row.eos = self.eos
        state.prefill()
        self.prefilled = time.perf_counter() - self.began
        if search is None:
            run(self.decoder, state)
        else:
            search.search(state, lambda row, _: self._chosen(row))
        return [self.done[i] for i in range(len(prompts))]

    def _observe(self, step: Step) -> None:
        if self.settings.trace:
            self.steps[step.row].append(step)
        self._send(Event(self.batch[step.row], "step", step=step))

    def _send(self, event: Event) -> None:
        if self.on_event is not None:
            self.on_event(event)

    def _show(self, row: int) -> Callable[[str], None] | None:
        """Sends the new text of a row."""
        return None if self.on_event is None else lambda text: self._send(Event(row, "text", text=text))

    def _would_end(self, row: SequenceState, tokens: list[int]) -> bool:
        """As `_ended`, of a beam that may not be the one that is kept: nothing is shown or told."""
        fresh = IncrementalDetokenizer(self.tokenizer, tokens[: row.prompt], self.eos, self.settings.stop)
        return fresh.add(tokens[row.prompt : row.limit], row.start >= row.limit) is not None

    def _chosen(self, row: SequenceState) -> None:
        ended = self._ended(row, row.tokens[: row.start].tolist())
        assert ended, "a beam was chosen before it had ended"

    def _ended(self, row: SequenceState, tokens: list[int]) -> bool:
        held = self.decoder.window * self.model.card.block_size
        new = tokens[row.prompt : row.limit]
        ending = self.detokenizers[row.index].add(new, row.start >= row.limit, held)
        if ending is None:
            return False
        stats = stats_of(row, len(ending.tokens), time.perf_counter() - self.began, self.prefilled)
        result = GenerationResult(
            ending.tokens, ending.text, ending.reason, stats, self.steps[row.index], row.trajectory()
        )
        self.done[row.index] = result
        self._send(Event(self.batch[row.index], "end"))
        if self.on_completion is not None:
            self.on_completion(self.batch[row.index], result)
        return True


def check_prunable(prune: Prune | None, model: DiffusionModel, decoder: Decoder) -> None:
    """Raises `ConfigError` where somebody reads whole caches: another runtime, or a decoder that verifies."""
    if prune is None:
        return
    if model.slots_first is not None:
        raise ConfigError(
            "the ONNX runtime reads whole caches, and cache drops parts", "set runtime torch, or no cache"
        )
    if type(decoder).verify is not Decoder.verify:
        raise ConfigError(
            f"{type(decoder).__name__} verifies against whole caches, and cache drops parts",
            "choose another decoder, or no cache",
        )
    if decoder.searches:
        raise ConfigError(
            f"beams of {type(decoder).__name__} copy whole caches, and cache drops parts",
            "choose another decoder, or no cache",
        )


def check_room(
    model: DiffusionModel, search: OrderTokenSearch, limits: Sequence[int], settings: GenerationConfig
) -> None:
    """Raise `ConfigError` where the caches of all beams that are written at a time do not fit into what is free."""
    if not settings.cached:
        return
    together = sum(sorted(limits)[-settings.batch_size :])
    size, free = search.rows * together * bytes_per_token(model.causal_lm), available_memory(model.device)
    if size > free:
        raise ConfigError(
            f"{search.rows} beams of {min(settings.batch_size, len(limits))} prompts at a time take {size >> 20} MiB "
            f"of keys and values, {free >> 20} are free",
            "give fewer beams, a smaller batch_size or fewer new tokens",
        )


def stats_of(row: SequenceState, tokens: int, seconds: float, prefill_seconds: float) -> GenerationStats:
    """What `row` counted, of which `tokens` were kept."""
    return GenerationStats(
        prefill_forwards=row.prefill,
        denoise_forwards=row.denoise,
        commit_forwards=row.commit,
        revise_forwards=row.revise,
        tokens=tokens,
        edits=row.edits,
        seconds=seconds,
        prefill_seconds=prefill_seconds,
        rows=row.rows,
    )


def eos_ids(model: DiffusionModel | Parent, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """Ids that end a text: the tokenizer's, and those of the model's own generation settings."""
    ids: set[int] = set()
    if tokenizer is not None:
        listed = getattr(model.causal_lm.generation_config, "eos_token_id", None)
        ids.update([listed] if isinstance(listed, int) else listed or [])
        if tokenizer.eos_token_id is not None:
            ids.add(tokenizer.eos_token_id)
    return frozenset(ids)


def checked_prompt(model: DiffusionModel | Parent, tokenizer: Any, prompt: Iterable[int]) -> list[int]:
    """The prompt, or BOS (else EOS, which separates documents) in place of an empty one. Raises `PromptError` for an
    id that `model` has no row for, and for a diffusion model's mask."""
    ids = list(prompt)
    if not ids:
        first = getattr(tokenizer, "bos_token_id", None)
        first = first if first is not None else getattr(tokenizer, "eos_token_id", None)
        if first is None:
            raise PromptError("the prompt is empty and the tokenizer has no BOS token", "give at least one token")
        ids = [first]
    if isinstance(model, DiffusionModel):
        rows, mask = model.card.vocab_rows, model.card.mask_id
    else:
        rows, mask = len(model.head), -1
    wrong = [token for token in ids if not 0 <= token < rows or token == mask]
    if wrong:
        raise PromptError(f"the prompt holds id {wrong[0]}, which is no token", "encode it with this model's tokenizer")
    return ids


def length_limit(model: DiffusionModel | Parent, prompt: int, new: int | None) -> int:
    """Tokens of the finished document. Raises `PromptError` where they do not fit the context."""
    context = context_length(model)
    left = context - prompt
    if left < 1:
        raise PromptError(
            f"the prompt has {prompt} tokens, the model's context is {context}", f"shorten it to {context - 1} or fewer"
        )
    if new is not None and new > left:
        raise PromptError(
            f"prompt ({prompt} tokens) and {new} new tokens exceed the context of {context}",
            f"ask for at most {left} new tokens",
        )
    return prompt + (new if new is not None else min(DEFAULT_NEW_TOKENS, left))
