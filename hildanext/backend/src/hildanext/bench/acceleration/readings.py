"""The numbers of a way from what it wrote, with 95 % intervals over prompts, and over seeds where there are several."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hildanext.bench.acceleration.cells import Answer, Written
from hildanext.bench.acceleration.ways import COUNTS
from hildanext.core.statistics import Values, crossed_interval
from hildanext.eval.generation import distinct, repetition

KINDS = ("prefill_forwards", "denoise_forwards", "commit_forwards", "revise_forwards")


def record(one: Written, base: Written | None, parent: Written, part: int) -> dict[str, Any]:
    """One row: every ratio as {"value", "low", "high"}; nats and tokens per forward also as the difference from `base`
    on the same prompts ("over"). Counts are sums over what was written, `samples` the first three texts' tokens."""
    texts = [[list(answer["tokens"]) for answer in answers] for answers in one.answers.values()]
    every = [answer for answers in one.answers.values() for answer in answers]
    seconds = sum(answer["seconds"] for answer in every)
    tokens = sum(len(answer["tokens"]) for answer in every)
    known = all(answer["rows"] is not None for answer in every)
    return {
        "name": one.way.name,
        "decoder": dict(one.way.section) if one.way.section is not None else None,
        "runtime": one.way.runtime,
        "dtype": one.way.dtype,
        "seeds": len(one.answers),
        "tokens": tokens,
        **{name: sum(answer[name] for answer in every) for name in COUNTS},
        "tokens_per_forward": _ratio(one, base, _tokens, _forwards),
        "rows_per_token": _ratio(one, base, lambda answer: float(answer["rows"]), _tokens) if known else None,
        "nats": _ratio(one, base, lambda answer: float(answer["nats"]), _tokens),
        **{f"distinct_{n}": statistics.mean(distinct(own, n) for own in texts) for n in (1, 2, 3)},
        "repetition": statistics.mean(repetition(own) for own in texts),
        "seconds": seconds,
        "tokens_per_second": statistics.median(rates) if (rates := _rates(one, part)) else None,
        "over_parent": _over(one, parent, part),
        "sessions": len(one.sessions),
        "samples": texts[0][:3],
    }


def _tokens(answer: Answer) -> float:
    return float(len(answer["tokens"]))


def _forwards(answer: Answer) -> float:
    """All but the prefill, as `GenerationStats.tokens_per_forward` has it."""
    return float(max(sum(answer[kind] for kind in KINDS[1:]), 1))


Reading = Callable[[Answer], float]


def values(one: Written, value: Reading, weight: Reading) -> Values:
    """Tables of [seeds prompts]."""
    rows = list(one.answers.values())
    return Values(
        np.array([[value(answer) for answer in row] for row in rows]),
        np.array([[weight(answer) for answer in row] for row in rows]),
    )


def _ratio(one: Written, base: Written | None, value: Reading, weight: Reading) -> dict[str, Any]:
    ours = values(one, value, weight)
    shown: dict[str, Any] = {"value": ours.mean, **crossed_interval(ours)._asdict()}
    if base is not None and base is not one:
        theirs = values(base, value, weight)
        shown["over"] = {"value": ours.mean - theirs.mean, **crossed_interval(ours, theirs)._asdict()}
    return shown


def _over(one: Written, parent: Written, part: int) -> float | None:
    """Tokens per second over the parent's: the median over turns, each beside the parent's in the same turn."""
    beside = Written(parent.way, {seed: parent.answers.get(seed, []) for seed in one.answers})
    pairs = zip(_rates(one, part), _rates(beside, part), strict=False)
    ratios = [mine / theirs for mine, theirs in pairs if mine and theirs]
    return statistics.median(ratios) if ratios else None


def _rates(one: Written, part: int) -> list[float]:
    """Tokens per second of each turn."""
    rows = one.answers.values()
    return [_rate(answers[first : first + part]) for answers in rows for first in range(0, len(answers), part)]


def _rate(answers: Sequence[Answer]) -> float:
    took = sum(answer["seconds"] for answer in answers)
    return sum(len(answer["tokens"]) for answer in answers) / took if took > 0 else 0.0
