"""Prompt in, the parent's own text out, several tokens a forward.

`generate_exact` takes token ids; `LoadedDrafter` is a parent with its draft adapters, ready to be asked. Greedy text is
the parent's greedy text token for token, and sampled text the one that the parent draws with the same seed, whatever
was drafted. Only with `sample_drafts` it is another text of the same distribution: what was drafted decides then which
uniform number a token is drawn with.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from typing import Any

from transformers import PreTrainedTokenizerBase

from hildanext.ar import Parent
from hildanext.core.errors import CheckpointError, ConfigError
from hildanext.core.runtime import Runtime, RuntimeConfig, machine
from hildanext.data.generation_result import GenerationResult, GenerationStats
from hildanext.decoding.detokenizer import IncrementalDetokenizer
from hildanext.decoding.exact.costs import running_costs
from hildanext.decoding.exact.network import Network, network_of
from hildanext.decoding.exact.policy import NGRAM_DRAFTS, ExactConfig, Placing
from hildanext.decoding.exact.state import ExactRow, ExactState
from hildanext.decoding.sequence import Step
from hildanext.export.onnx_card import Distance, is_onnx_folder, read_onnx_card
from hildanext.inference import (
    Event,
    GenerationConfig,
    OnCompletion,
    OnEvent,
    checked_prompt,
    eos_ids,
    length_limit,
)
from hildanext.models.draft_card import DraftCard, holds_drafts
from hildanext.models.draft_checkpoint import load_drafts, refuse_without_drafts
from hildanext.models.drafter import Drafter
from hildanext.models.loading.load import load_parent
from hildanext.models.packed_linear import pack_linears
from hildanext.runtimes.onnx_network import OnnxNetwork
from hildanext.runtimes.onnx_open import open_onnx
from hildanext.runtimes.onnx_parent import OnnxParent


@dataclass(frozen=True)
class LoadedDrafter:
    """A kept parent with the adapters that draft for it, and what it runs on."""

    name: str
    drafter: Drafter | Network
    tokenizer: PreTrainedTokenizerBase
    card: DraftCard | None
    """None for a parent without adapters, which drafts from the text itself."""
    runtime: Runtime
    quantized: str = ""
    """In ONNX Runtime the type of its weights: fp32, q8 or q4."""
    distance: Distance | None = None
    """Of such weights from the parent in fp32."""

    @classmethod
    def open(
        cls, name: str, config: RuntimeConfig, parent: str | None = None, adapters: bool = True
    ) -> "LoadedDrafter":
        """Draft adapters by their folder (or `tiny`), beside the parent of their card or the one that is named; or,
        where no `adapters` are needed, an autoregressive model by its own name.

        Raises `ConfigError`, `UnknownChoice`, `ModelError` or `CheckpointError`, each with what to do about it.
        """
        if config.is_onnx or is_onnx_folder(name):
            return cls._open_onnx(name, config, parent, adapters)
        runtime = config.resolve()
        if holds_drafts(name):
            drafter, tokenizer, card = load_drafts(name, runtime.dtype, runtime.device, parent)
            pack_linears(drafter.causal_lm)
            return cls(name, drafter, tokenizer, card, runtime)
        if adapters:
            refuse_without_drafts(name)
        if parent is not None:
            raise ConfigError(f"{name!r} has no draft adapters that the parent {parent!r} could be of", "leave it out")
        causal_lm, tokenizer = load_parent(name, runtime.dtype, runtime.device)
        pack_linears(causal_lm)
        return cls(name, Drafter(causal_lm, None).eval(), tokenizer, None, runtime)

    @classmethod
    def _open_onnx(cls, name: str, config: RuntimeConfig, parent: str | None, adapters: bool) -> "LoadedDrafter":
        if adapters and not is_onnx_folder(name) and not holds_drafts(name):
            refuse_without_drafts(name)
        opened = open_onnx(name, config, parent)
        network, card = opened.network, opened.card
        if adapters and card.drafts is None:
            raise CheckpointError(
                f"{name!r} was exported without draft adapters", "draft from the text: --drafter ngram"
            )
        runtime = Runtime(network.device, network.dtype, network.threads)
        return cls(name, network, opened.tokenizer, card.drafts, runtime, card.dtype, card.distance)

    @property
    def parent(self) -> Parent:
        """The parent alone; its rows run through the same layers with the adapters off."""
        if isinstance(self.drafter, Drafter):
            return Parent(self.drafter.causal_lm, self.tokenizer)
        assert isinstance(self.drafter, OnnxNetwork)
        return OnnxParent(self.drafter, self.tokenizer)

    def placing(self, config: ExactConfig) -> Placing:
        """Raises `ConfigError` for more drafts than the checkpoint has learnt."""
        acceptance = self.card.acceptance if self.card is not None else ()
        return placing_for(self.drafter, config, acceptance, self.runtime)

    def machine(self) -> dict[str, Any]:
        """What a result was measured on, for its record."""
        return machine(self.runtime.device, self.runtime.dtype, self.runtime.threads)

    def summary(self) -> dict[str, Any]:
        """The few facts that stand beside each text, as `LoadedModel.summary` has them."""
        return {
            "model": self.name,
            "dtype": self.quantized or str(self.runtime.dtype).removeprefix("torch."),
            "device": str(self.runtime.device),
            "threads": self.runtime.threads,
            "block_size": None,
            **({"runtime": "onnx"} if self.quantized else {}),
            **({"from_fp32": self.distance.line()} if self.distance is not None else {}),
        }


def only_exact(name: str) -> bool:
    """Whether that folder holds draft adapters, or the export of an autoregressive model: they write in exact mode
    alone."""
    return read_onnx_card(name).diffusion is None if is_onnx_folder(name) else holds_drafts(name)


def placing_for(
    drafter: Drafter | Network, config: ExactConfig, acceptance: tuple[float, ...] = (), runtime: Runtime | None = None
) -> Placing:
    """How masks are placed under `config`; `auto` measures the device where `runtime` says which it is, and
    follows what its steps show.

    Raises `ConfigError` for more drafts than the drafter has places, and for adapters where there are none.
    """
    most = config.drafts if config.drafts is not None else drafter.places or NGRAM_DRAFTS
    if config.uses_adapters and not drafter.places:
        raise ConfigError(
            "this model has no draft adapters",
            "train them (convert with convert.keep_parent), or take drafter ngram",
        )
    if config.drafter == "none" and not drafter.places:
        most = 0
    if config.uses_adapters and most > drafter.places:
        raise ConfigError(
            f"drafts {most}, and the adapters have learnt {drafter.places}", f"ask for 1 to {drafter.places} drafts"
        )
    if config.fixed_rows is None:
        config = replace(config, fixed_rows=not network_of(drafter).rows_alone)
    costs = None
    if config.after == "auto" and config.drafter != "none" and runtime is not None:
        costs = running_costs(drafter, runtime, config.drafter)
    return Placing(config, most, acceptance, costs)


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
    `settings.seed` + i; an empty prompt starts from BOS. Raises `PromptError` for a prompt that leaves no room or holds
    ids that are no tokens, `ConfigError` for settings of denoising.
    """
    settings = settings if settings is not None else GenerationConfig()
    for name in ("commit", "cached", "debug", "cache"):
        if getattr(settings, name) != getattr(GenerationConfig, name):
            raise ConfigError(f"generation.{name} is about denoising, and exact mode has none", "leave it out")
    placing = placing if placing is not None else placing_for(drafter, config)
    parent = Parent(drafter.causal_lm, tokenizer)
    prompts = [checked_prompt(parent, tokenizer, prompt) for prompt in prompts]
    limits = [length_limit(parent, len(prompt), settings.max_new_tokens) for prompt in prompts]
    writing = _Writing(drafter, tokenizer, config, settings, placing, on_event, on_completion)
    results: list[GenerationResult] = []
    for first in range(0, len(prompts), settings.batch_size):
        batch = range(first, min(first + settings.batch_size, len(prompts)))
        results += writing.batch([(i, prompts[i], limits[i]) for i in batch])
    return results


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

    drafted: int = 0
    """Drafts that the parent was asked about ..."""
    confirmed: int = 0
    """... and that it kept."""
    verified: int = 0
    """Forwards in which there were any."""
    confirmed_per_place: tuple[int, ...] = ()
    """How often the first j drafts were all kept, j from 1."""

    @classmethod
    def total(cls, parts: Iterable[GenerationStats]) -> "ExactStats":
        """Sums over texts, place by place too."""
        every = [part for part in parts if isinstance(part, cls)]
        if not every:
            return cls()
        sums = {
            part.name: sum(getattr(stats, part.name) for stats in every)
            for part in fields(cls)
            if part.name != "confirmed_per_place"
        }
        places = zip_longest(*(stats.confirmed_per_place for stats in every), fillvalue=0)
        return cls(**sums, confirmed_per_place=tuple(map(sum, places)))

    @property
    def rows_per_forward(self) -> float:
        return self.rows / max(self.denoise_forwards, 1)

    def to_record(self) -> dict[str, Any]:
        return {**super().to_record(), "rows_per_forward": self.rows_per_forward}


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
        verified=row.offered[0] if row.offered else 0,
        confirmed_per_place=tuple(row.confirmed),
        seconds=seconds,
        prefill_seconds=prefill_seconds,
    )
