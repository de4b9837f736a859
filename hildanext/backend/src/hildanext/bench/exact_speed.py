"""The same answers by every way to write them, in turns: speed beside the parent, and how much of its text it is.

Rates are those behind the first token, as medians over answers; each answer's rate is also divided by the parent's on
the same prompt in the same turn. A way in 16-bit types is compared with the plain parent, whose forwards have one row,
and with the parent in forwards of its own shape, with whose numbers it computes.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from pydantic import Field

from hildanext.bench import llama_cpp
from hildanext.bench.exact_memory import peak_bytes
from hildanext.bench.exact_prompts import kinds_of_prompts
from hildanext.bench.exact_ways import RUNTIMES, Answer, Opened, Way, WaySettings, own_ways
from hildanext.core.config import Seed, config, plain
from hildanext.core.errors import ConfigError
from hildanext.core.progress import Repeats
from hildanext.core.runtime import RuntimeConfig
from hildanext.decoding.exact import costs
from hildanext.decoding.exact.network import Network
from hildanext.eval.generation import generative_nats
from hildanext.kv_cache.draft_attention import DraftSegment
from hildanext.models.loading.names import models_folder

FIRST_BY_PREFILL = ("transformers", "llama.cpp")
"""Whose first token is read from the prompt's own forward."""


@config
class ExactSpeedConfig:
    """What is asked, and of whom."""

    prompts: int = Field(default=4, ge=1)
    """Of each kind, at most."""
    prompts_file: str | None = None
    """Files of prompts behind commas, one for each kind; None is the three kinds that are built in."""
    new_tokens: int = Field(default=64, ge=2)
    repeats: int = Field(default=1, ge=1)
    seed: Seed = 0
    """Of the run; everything here is greedy."""
    drafts: int | None = Field(default=None, ge=1)
    after: Literal["auto", "all", "last"] = "auto"
    diffusion: str | None = None
    """A diffusion checkpoint whose two modes are measured, too, in every runtime."""
    weights: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Of runtimes other than torch: the weights that each is measured with."""
    llama: tuple[str, ...] = ("Q8_0", "Q4_1")
    """Of llama.cpp, where peers are measured: the quantisations."""
    memory: bool = True
    """Measure each way's peak memory, in a process of its own."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weights) - set(RUNTIMES))
        if unknown:
            raise ConfigError(f"no runtime {unknown[0]!r} to measure", f"choices: {', '.join(RUNTIMES)}")
        known = ("Q8_0", "Q4_0", "Q4_1", "F32")
        odd = [name for name in self.llama if name not in known]
        if odd:
            raise ConfigError(f"no quantisation {odd[0]!r}", f"choices: {', '.join(known)}")


@dataclass
class Written:
    """What a way wrote, prompt by prompt, kinds one after another."""

    way: Way
    answers: list[Answer] = field(default_factory=list)

    def rates(self) -> list[float]:
        """Tokens per second behind the first, of each answer; NaN where there are none."""
        counts = ((one.tokens, one.first_tokens, one.seconds - one.first_seconds) for one in self.answers)
        return [(len(tokens) - first) / took if len(tokens) > first else math.nan for tokens, first, took in counts]


def measure(
    model: str,
    parent: str | None,
    runtime: RuntimeConfig,
    settings: ExactSpeedConfig,
    peers: bool = False,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Every way on every prompt, in turns that each begin with another way. `model` is a folder of draft adapters.

    Raises what loading raises, `DataError` for a file of prompts that cannot be read.
    """
    folder = models_folder().parent / "gguf"
    shared = WaySettings(model, parent, settings.diffusion, runtime, settings.drafts, settings.after, folder)
    opened = Opened(shared)
    kinds = kinds_of_prompts(settings.prompts_file, settings.prompts, opened.loaded.tokenizer)
    ways = own_ways(opened, settings.weights) + (_llama_ways(settings, say) if peers else [])
    prompts = [prompt for every in kinds.values() for prompt in every]
    written = _write(opened, ways, prompts, settings, say)
    names = [kind for kind, every in kinds.items() for _ in every] * settings.repeats
    rows = [_record(one, written, names, prompts * settings.repeats, opened) for one in written]
    if settings.memory:
        alike = {(way.who, way.network): way for way in ways}  # exact decoding takes the same with any drafter
        peaks = {key: peak_bytes(shared, way, prompts[0], settings.new_tokens) for key, way in alike.items()}
        for row, way in zip(rows, ways, strict=True):
            row["peak_bytes"] = peaks[way.who, way.network]
    return {
        "bench": "peers" if peers else "exact",
        "parent": opened.parent_name,
        "settings": plain(settings),
        "prompts": {kind: len(every) for kind, every in kinds.items()},
        "draft_card": plain(opened.loaded.card),
        "machine": opened.loaded.machine(),
        "ways": rows,
        "forward_ms": _forward_times(opened, ways),
        "distance": _distances(opened, ways, prompts, written[1].answers),
        "blocks_from_fp32": {
            f"{runtime}, {weights}": opened.blocks(runtime, weights).facts["from_fp32"]
            for runtime, weights in dict.fromkeys(way.network for way in ways if way.who == "blocks")
            if "from_fp32" in opened.blocks(runtime, weights).facts
        },
    }


def _llama_ways(settings: ExactSpeedConfig, say: Callable[[str], None] | None) -> list[Way]:
    if not llama_cpp.is_installed():
        if say is not None:
            say("llama.cpp is not measured: its package is not here (pip install xllamacpp)")
        return []
    return [
        Way(f"llama.cpp{' + ngram' * (drafter == 'ngram')}", "llama.cpp", weights, "llama.cpp", drafter)
        for weights in settings.llama
        for drafter in ("none", "ngram")
    ]


def _write(
    opened: Opened,
    ways: Sequence[Way],
    prompts: Sequence[Sequence[int]],
    settings: ExactSpeedConfig,
    say: Callable[[str], None] | None,
) -> list[Written]:
    writers = [opened.writer(way) for way in ways]
    for write in writers:
        write(prompts[0], 4)  # the first forward of a shape pays for allocations
    written = [Written(way) for way in ways]
    turns = Repeats(settings.repeats * len(prompts), say)
    for turn in range(settings.repeats * len(prompts)):
        prompt = prompts[turn % len(prompts)]
        for at in range(len(ways)):
            number = (turn + at) % len(ways)
            written[number].answers.append(writers[number](prompt, settings.new_tokens))
        turns.done(turn + 1)
    return written


def _record(
    one: Written, written: Sequence[Written], kinds: Sequence[str], prompts: Sequence[Sequence[int]], opened: Opened
) -> dict[str, Any]:
    """The numbers of one way, and of each kind of prompt."""
    way = one.way
    parent = _named("parent", way.network, written) or _named("parent", written[0].way.network, written)
    assert parent is not None
    alike = _named(way.alike, way.network, written) if way.alike is not None else None

    def numbers(chosen: Sequence[int]) -> dict[str, Any]:
        answers, rates = [one.answers[at] for at in chosen], one.rates()
        forwards = sum(answer.forwards for answer in answers)
        ratios = [rates[at] / beside for at in chosen if (beside := parent.rates()[at]) > 0 and rates[at] > 0]
        kept = sum(len(answer.tokens) - (way.who in FIRST_BY_PREFILL) for answer in answers)
        return {
            "tokens": sum(len(answer.tokens) for answer in answers),
            "seconds": sum(answer.seconds for answer in answers),
            "tokens_per_second": _median([rates[at] for at in chosen]),
            "over_parent": _median(ratios),
            "forwards": forwards,
            "tokens_per_forward": kept / forwards if forwards else None,
            "rows_per_forward": sum(answer.rows for answer in answers) / forwards if forwards else None,
            "first_token_ms": 1000.0 * statistics.median(answer.first_seconds for answer in answers),
            "like_parent": _agreement(one, written[1], chosen),
            "like_own_rows": None if alike is None or alike is written[1] else _agreement(one, alike, chosen),
        }

    every = range(len(one.answers))
    texts = [one.answers[at].tokens for at in every]
    return {
        **{part.name: getattr(way, part.name) for part in fields(way)},
        **numbers(every),
        "nats": generative_nats(opened.parent, [prompts[at] for at in every], texts),
        "kinds": {kind: numbers([at for at in every if kinds[at] == kind]) for kind in dict.fromkeys(kinds)},
    }


def _named(name: str | None, network: tuple[str, str], written: Sequence[Written]) -> Written | None:
    found = (one for one in written if one.way.name == name and one.way.network == network)
    return next(found, None)


def _agreement(one: Written, other: Written, chosen: Sequence[int]) -> dict[str, Any]:
    """The share of answers that are the other's token for token, and where the others first differ (median place)."""
    pairs = [(one.answers[at].tokens, other.answers[at].tokens) for at in chosen]
    places = [
        next((at for at, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
        for mine, theirs in pairs
        if mine != theirs
    ]
    return {
        "answers": len(pairs),
        "equal": (len(pairs) - len(places)) / len(pairs),
        "first_difference": float(statistics.median(places)) if places else None,
    }


def _median(values: Sequence[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else None


def _forward_times(opened: Opened, ways: Sequence[Way]) -> dict[str, dict[int, float]]:
    """Milliseconds of a forward by its rows, of each network."""
    times = {}
    for runtime, weights in dict.fromkeys(way.network for way in ways if way.who == "exact"):
        opened.take_over(runtime)
        measured = costs.measure(opened.network(runtime, weights))
        times[f"{runtime} {weights}"] = {rows: 1000.0 * took for rows, took in measured.items()}
    return times


@torch.inference_mode()
def _distances(
    opened: Opened, ways: Sequence[Way], prompts: Sequence[Sequence[int]], answers: Sequence[Answer]
) -> dict[str, dict[str, float]]:
    """How far each network's parent is from the one in fp32, behind every token of the parent's own answers."""
    runtime = RuntimeConfig(device=str(opened.runtime.device), dtype="fp32", threads=opened.runtime.threads)
    shared = WaySettings(opened.settings.model, opened.settings.parent, None, runtime)
    wide = Opened(shared).network("torch", "float32")
    texts = [[*prompt, *answer.tokens] for prompt, answer in zip(prompts, answers, strict=False)]
    sums: dict[str, list[float]] = {}
    for prompt, text in zip(prompts, texts, strict=True):
        target = torch.tensor(text[len(prompt) :])
        reference = _behind(wide, text, len(prompt)).log_softmax(-1)
        for network in dict.fromkeys(way.network for way in ways if way.who == "exact"):
            law = _behind(opened.network(*network), text, len(prompt)).log_softmax(-1)
            kl = (reference.exp() * (reference - law)).sum()
            nll = (reference - law).gather(1, target[:, None]).sum()
            same = (law.argmax(-1) == reference.argmax(-1)).sum()
            total = sums.setdefault(" ".join(network), [0.0] * 4)
            for at, value in enumerate((float(nll), float(kl), float(same), float(len(target)))):
                total[at] += value
    return {
        name: {"nats": nll / count, "kl": kl / count, "argmax": same / count}
        for name, (nll, kl, same, count) in sums.items()
    }


def _behind(network: Network, text: Sequence[int], first: int) -> torch.Tensor:
    """Logits of the tokens from number `first` on, in fp64 on the CPU."""
    cache = network.new_cache(len(text))
    hidden = network.forward(text[:-1], [cache], [DraftSegment(0, len(text) - 1, (), 0)])
    logits: torch.Tensor = network.logits(hidden[first - 1 :])
    return logits.double().cpu()
