"""How a model writes: speed, forwards and quality of several methods of decoding, side by side in one process.

Quality is the perplexity of the samples under the autoregressive parent, which repetitive text flatters; so the
shares of distinct n-grams and of repetition always stand beside it. Methods take turns prompt by prompt, so
that a busy machine slows all of them alike.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from hildanext.ar import Parent
from hildanext.core.config import Seed, config
from hildanext.data.generation_result import GenerationResult, GenerationStats
from hildanext.datasets import PackedDataset
from hildanext.decoding import DIFFUSION_MODES, MODE_MEANS, MODES, make_decoder
from hildanext.inference import GenerationConfig, eos_ids, generate
from hildanext.kv_cache.prune import make_prune
from hildanext.likelihood.base import number
from hildanext.models import DiffusionModel

ONE_PER_STEP: dict[str, Any] = {"name": "threshold_edit", "tau_mask": 1.0, "tau_edit": None, "max_post": 0}
PARENT = "AR parent"
TOTALS = (
    "tokens", "seconds", "tokens_per_second", "forwards", "prefill_forwards", "tokens_per_forward", "rows",
    "rows_per_token", "edits",
)  # fmt: skip
"""What a report holds of a method's summed cost."""


@config
class GenerationBenchConfig:
    """What is generated, and how."""

    prompts: int = Field(default=8, ge=1)
    prompt_tokens: int = Field(default=8, ge=1)
    """Beginning of a held-out document, BOS included."""
    new_tokens: int = Field(default=96, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    seed: Seed = 0
    decoders: dict[str, dict[str, Any]] = Field(
        default_factory=lambda: {
            **{name: dict(MODES[name]) for name in DIFFUSION_MODES},
            "one per step": dict(ONE_PER_STEP),
        }
    )
    """Name to decoder section."""
    cache: dict[str, Any] | str | None = None
    """What the diffusion model keeps of its keys and values (FULL), as `GenerationConfig.cache`."""

    def __post_init__(self) -> None:
        make_prune(self.cache)
        for section in self.decoders.values():
            make_decoder(section)


@dataclass
class MethodResults:
    """What one method of decoding wrote, prompt by prompt, and what it cost."""

    name: str
    section: dict[str, Any]
    """Of its decoder."""
    results: list[GenerationResult] = field(default_factory=list)
    seconds: float = 0.0
    """Over all prompts, one at a time."""
    nats_per_token: float = math.nan
    """Under the parent, per token written."""

    @property
    def completions(self) -> list[list[int]]:
        return [result.tokens for result in self.results]

    def total(self) -> GenerationStats:
        """Sums over the prompts."""
        return replace(GenerationStats.total(result.stats for result in self.results), seconds=self.seconds)

    def to_record(self) -> dict[str, Any]:
        """What a JSON report holds."""
        totals = self.total().to_record()
        return {
            "name": self.name,
            "decoder": self.section,
            **{name: totals[name] for name in TOTALS},
            "generative_nats": self.nats_per_token,
            "generative_perplexity": math.exp(min(self.nats_per_token, 700.0)),
            **{f"distinct_{n}": distinct(self.completions, n) for n in (1, 2, 3)},
            "repetition": repetition(self.completions),
            "samples": [result.text for result in self.results[:3]],
        }


def distinct(completions: Sequence[Sequence[int]], n: int) -> float:
    """Share of different n-grams among all n-grams, pooled over the completions; 0 where there is none."""
    grams = [tuple(ids[i : i + n]) for ids in completions for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(completions: Sequence[Sequence[int]], n: int = 4) -> float:
    """Share of n-grams that occurred before in the same completion."""
    repeated = total = 0
    for ids in completions:
        grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        repeated += len(grams) - len(set(grams))
        total += len(grams)
    return repeated / total if total else 0.0


def generative_nats(parent: Parent, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> float:
    """Mean -log p of the completions' tokens under the parent, each given its prompt; NaN where nothing was written."""
    total, count = 0.0, 0
    for prompt, completion in zip(prompts, completions, strict=True):
        if not completion:
            continue
        tokens = torch.tensor([[*prompt, *completion]])
        position = torch.arange(tokens.shape[1])[None]
        nll = parent.token_nll(tokens, torch.zeros_like(tokens), position)
        total += number(float(nll[0, len(prompt) :].sum()), "autoregressive parent")
        count += len(completion)
    return total / count if count else math.nan


def held_out_prompts(dataset: PackedDataset, count: int, length: int) -> list[list[int]]:
    """The first `length` tokens of documents that begin in the data (a row's first piece may be the rest of one)."""
    prompts: list[list[int]] = []
    for index in range(len(dataset)):
        row = dataset.row(index)
        starts = (row["position"] == 0) & (row["document"] >= 0)
        if dataset.bos_id is not None:
            starts &= row["tokens"] == dataset.bos_id
        for start in starts.nonzero()[0].tolist():
            same = row["document"][start : start + length] == row["document"][start]
            if int(same.sum()) == length:
                prompts.append(row["tokens"][start : start + length].tolist())
            if len(prompts) == count:
                return prompts
    return prompts


def compare(
    model: DiffusionModel,
    tokenizer: PreTrainedTokenizerBase | None,
    parent: Parent | None,
    prompts: Sequence[Sequence[int]],
    settings: GenerationBenchConfig,
    progress: Callable[[int], None] | None = None,
) -> list[MethodResults]:
    """Every decoder and the parent's own generation on the same prompts, taking turns.

    Without a parent there is no generative perplexity and no parent row.
    """
    methods = [MethodResults(name, _tempered(section, settings)) for name, section in settings.decoders.items()]
    baseline = MethodResults(PARENT, {"name": "autoregressive", "temperature": settings.temperature})
    _warm_up(model, tokenizer, parent, prompts[0])
    for index, prompt in enumerate(prompts):
        for method in methods:
            _complete(method, model, tokenizer, prompt, settings, index)
        if parent is not None:
            _continue(baseline, model, tokenizer, parent, prompt, settings, index)
        if progress is not None:
            progress(index + 1)
    if parent is None:
        return methods
    for method in (*methods, baseline):
        method.nats_per_token = generative_nats(parent, prompts, method.completions)
    return [*methods, baseline]


def _tempered(section: dict[str, Any], settings: GenerationBenchConfig) -> dict[str, Any]:
    return {**section, "temperature": settings.temperature} if settings.temperature > 0 else dict(section)


def _warm_up(
    model: DiffusionModel, tokenizer: PreTrainedTokenizerBase | None, parent: Parent | None, prompt: Sequence[int]
) -> None:
    """The first call of a shape pays for allocations; nobody's numbers should."""
    generate(model, tokenizer, [prompt], make_decoder(dict(ONE_PER_STEP)), GenerationConfig(max_new_tokens=4))
    if parent is not None:
        parent.generate(prompt, 4, stop_ids=[])


def _complete(
    method: MethodResults,
    model: DiffusionModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Sequence[int],
    settings: GenerationBenchConfig,
    index: int,
) -> None:
    config = GenerationConfig(max_new_tokens=settings.new_tokens, seed=settings.seed + index, cache=settings.cache)
    begun = time.perf_counter()
    method.results += generate(model, tokenizer, [prompt], make_decoder(dict(method.section)), config)
    method.seconds += time.perf_counter() - begun


def _continue(
    method: MethodResults,
    model: DiffusionModel,
    tokenizer: PreTrainedTokenizerBase | None,
    parent: Parent,
    prompt: Sequence[int],
    settings: GenerationBenchConfig,
    index: int,
) -> None:
    stops = sorted(eos_ids(model, tokenizer))
    begun = time.perf_counter()
    result = parent.generate(
        prompt, settings.new_tokens, settings.temperature, seed=settings.seed + index, stop_ids=stops
    )
    method.seconds += time.perf_counter() - begun
    method.results.append(result)


def label(name: str) -> str:
    """A method's name for people: the mode with what it is measured as."""
    return f"{name} ({MODE_MEANS[name]})" if name in MODE_MEANS else name
