"""Prompt in, the parent's own text out, several tokens a forward. No command runs it yet.

`generate_exact` takes token ids; `LoadedDrafter` is a parent with its draft adapters, ready to be asked. Greedy text is
the parent's greedy text token for token; sampled text has the parent's distribution. A seed gives the same sampled text
for the same drafter and placement alone, since what was drafted decides which uniform number a token is drawn with.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hildanext.ar import Parent
from hildanext.core.errors import ConfigError, PromptError
from hildanext.core.runtime import Runtime, RuntimeConfig, machine
from hildanext.data.generation_result import GenerationResult, GenerationStats
from hildanext.decoding.detokenizer import IncrementalDetokenizer
from hildanext.decoding.exact.costs import row_costs
from hildanext.decoding.exact.network import Network, network_of
from hildanext.decoding.exact.policy import ExactConfig, Placing
from hildanext.decoding.exact.state import ExactRow, ExactState
from hildanext.decoding.sequence import Step
from hildanext.inference import DEFAULT_NEW_TOKENS, Event, GenerationConfig, OnCompletion, OnEvent, eos_ids
from hildanext.models.draft_card import DraftCard
from hildanext.models.draft_checkpoint import load_drafts
from hildanext.models.drafter import Drafter


@dataclass(frozen=True)
class LoadedDrafter:
    """A kept parent with the adapters that draft for it, and what it runs on."""

    name: str
    drafter: Drafter
    tokenizer: PreTrainedTokenizerBase
    card: DraftCard
    runtime: Runtime

    @classmethod
    def open(cls, name: str, config: RuntimeConfig, parent: str | None = None) -> "LoadedDrafter":
        """Raises `ConfigError`, `UnknownChoice`, `ModelError` or `CheckpointError`, each with what to do about it."""
        runtime = config.resolve()
        return cls(name, *load_drafts(name, runtime.dtype, runtime.device, parent), runtime)

    @property
    def parent(self) -> Parent:
        """The parent alone; its rows run through the same layers with the adapters off."""
        return Parent(self.drafter.causal_lm, self.tokenizer)

    def placing(self, config: ExactConfig) -> Placing:
        """Raises `ConfigError` for more drafts than the checkpoint has learnt."""
        return placing_for(self.drafter, config, self.card.acceptance, self.runtime)

    def machine(self) -> dict[str, Any]:
        """What a result was measured on, for its record."""
        return machine(self.runtime.device, self.runtime.dtype)


def placing_for(
    drafter: Drafter | Network, config: ExactConfig, acceptance: tuple[float, ...] = (), runtime: Runtime | None = None
) -> Placing:
    """How masks are placed under `config`; `auto` measures the device where `runtime` says which it is.

    Raises `ConfigError` for more drafts than the drafter has places.
    """
    most = config.drafts if config.drafts is not None else drafter.places
    if most > drafter.places and config.drafter in ("adapters", "both"):
        raise ConfigError(
            f"drafts {most}, and the adapters have learnt {drafter.places}", f"ask for 1 to {drafter.places} drafts"
        )
    if config.fixed_rows is None:
        config = replace(config, fixed_rows=drafter.dtype in (torch.bfloat16, torch.float16))
    measured = config.after == "auto" and config.drafter in ("adapters", "both") and runtime is not None
    return Placing(
        config, most, acceptance, row_costs(network_of(drafter), runtime) if measured and runtime is not None else None
    )


def generate_exact(
    drafter: Drafter | Network,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Sequence[int]],
    config: ExactConfig,
    settings: GenerationConfig | None = None,
    placing: Placing | None = None,
    on_event: OnEvent | None = None,
    on_completion: OnCompletion | None = None,
) -> list[GenerationResult]:
    """Continue every prompt (token ids); `settings.batch_size` of them share a forward, and row i draws from
    `settings.seed` + i. Raises `PromptError` for a prompt that is empty or leaves no room, `ConfigError`.
    """
    settings = settings if settings is not None else GenerationConfig()
    placing = placing if placing is not None else placing_for(drafter, config)
    parent = Parent(drafter.causal_lm, tokenizer)
    limits = [_limit(parent, len(prompt), settings.max_new_tokens) for prompt in prompts]
    writing = _Writing(drafter, tokenizer, config, settings, placing, on_event, on_completion)
    results: list[GenerationResult] = []
    for first in range(0, len(prompts), settings.batch_size):
        batch = range(first, min(first + settings.batch_size, len(prompts)))
        results += writing.batch([(i, prompts[i], limits[i]) for i in batch])
    return results


def _limit(parent: Parent, prompt: int, new: int | None) -> int:
    """Tokens of the finished document."""
    context = int(parent.causal_lm.config.max_position_embeddings)
    if 0 < prompt >= context:
        raise PromptError(
            f"the prompt has {prompt} tokens, the model's context is {context}", f"shorten it to {context - 1} or fewer"
        )
    wanted = new if new is not None else min(DEFAULT_NEW_TOKENS, context - prompt)
    parent.check_length(prompt, wanted)
    return prompt + wanted


class _Writing:
    """Turns rows into text, events and results."""

    def __init__(
        self,
        drafter: Drafter | Network,
        tokenizer: PreTrainedTokenizerBase | None,
        config: ExactConfig,
        settings: GenerationConfig,
        placing: Placing,
        on_event: OnEvent | None,
        on_completion: OnCompletion | None,
    ) -> None:
        self.drafter, self.tokenizer, self.config = drafter, tokenizer, config
        self.settings, self.placing = settings, placing
        self.on_event, self.on_completion = on_event, on_completion
        self.detokenizers: dict[int, IncrementalDetokenizer] = {}
        self.steps: dict[int, list[Step]] = {}
        self.results: dict[int, GenerationResult] = {}
        self.began = self.prefilled = 0.0

    def batch(self, prompts: Sequence[tuple[int, Sequence[int], int]]) -> list[GenerationResult]:
        settings = self.settings
        self.began = time.perf_counter()
        observes = settings.trace or self.on_event is not None
        state = ExactState(self.drafter, self.config, self.placing, self._ended, self._observe if observes else None)
        eos = frozenset() if settings.ignore_eos else eos_ids(Parent(self.drafter.causal_lm, None), self.tokenizer)
        for index, prompt, limit in prompts:
            self.detokenizers[index] = IncrementalDetokenizer(
                self.tokenizer, prompt, eos, settings.stop, self._show(index)
            )
            self.steps[index] = []
            state.prefill(state.row(prompt, limit, settings.seed + index, index))
        self.prefilled = time.perf_counter() - self.began
        while state.rows:
            state.step()
        return [self.results[index] for index, _, _ in prompts]

    def _observe(self, step: Step) -> None:
        if self.settings.trace:
            self.steps[step.row].append(step)
        if self.on_event is not None:
            self.on_event(Event(step.row, "step", step=step))

    def _show(self, row: int) -> Callable[[str], None] | None:
        on_event = self.on_event
        return None if on_event is None else lambda text: on_event(Event(row, "text", text=text))

    def _ended(self, row: ExactRow) -> bool:
        new = row.tokens[row.prompt : row.limit]
        ending = self.detokenizers[row.index].add(new, len(row.tokens) >= row.limit)
        if ending is None:
            return False
        seconds = time.perf_counter() - self.began
        stats = exact_stats(row, len(ending.tokens), seconds, self.prefilled)
        result = GenerationResult(ending.tokens, ending.text, ending.reason, stats, self.steps[row.index])
        self.results[row.index] = result
        if self.on_event is not None:
            self.on_event(Event(row.index, "end"))
        if self.on_completion is not None:
            self.on_completion(row.index, result)
        return True


@dataclass(frozen=True)
class ExactStats(GenerationStats):
    """What exact decoding counts besides."""

    rows: int = 0
    """Of all forwards but the prefill's, clean and masked ones."""
    drafted: int = 0
    """Drafts that the parent was asked about ..."""
    confirmed: int = 0
    """... and that it kept."""


def exact_stats(row: ExactRow, tokens: int, seconds: float, prefill_seconds: float) -> ExactStats:
    """What `row` counted, of which `tokens` were kept."""
    return ExactStats(
        prefill_forwards=row.prefill,
        denoise_forwards=row.forwards,
        tokens=tokens,
        edits=row.edits,
        rows=row.rows,
        drafted=sum(row.offered),
        confirmed=sum(row.confirmed),
        seconds=seconds,
        prefill_seconds=prefill_seconds,
    )
