"""From samples to numbers: each score with its interval, the difference to the parent, and what it cost."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hildanext.core.config import plain
from hildanext.core.metrics_log import to_json
from hildanext.core.run_dir import write_atomically
from hildanext.core.runtime import versions
from hildanext.core.statistics import Values, interval, mcnemar, paired_interval
from hildanext.eval import figures
from hildanext.eval.generation import PARENT
from hildanext.eval.journal import Sample
from hildanext.eval.runner import Outcome, TaskRun
from hildanext.eval.tasks.base import Metric, Task, WritingTask

QUALITY = "quality.json"
NOTES = (
    "Every model was given the same strings. Intervals are over items: Wilson's for right or wrong, else the "
    "bootstrap. 'over parent' is the paired difference (Agresti and Min's interval for right or wrong, else the "
    "bootstrap; p: McNemar, exact). A difference whose interval holds 0 is noise.",
    "exact and bound are different numbers: a bound's slack is part of its difference to the parent.",
    "Forwards are summed over the items (a forward counts once for each row in it); tokens per forward leaves prefills "
    "out. Tokens per second are those of all batches, prefill included.",
)
LENGTH_EDGES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def summarise(runs: Sequence[TaskRun]) -> dict[str, Any]:
    """All numbers, as JSON types."""
    return {
        "versions": versions(),
        "notes": list(NOTES),
        "tasks": [_task(run) for run in runs],
    }


def _task(run: TaskRun) -> dict[str, Any]:
    columns = [_items(run.task, outcome.samples) for outcome in run.outcomes]
    base = columns[0] if run.outcomes and run.outcomes[0].model.name == PARENT else None
    return {
        "key": run.key,
        "knobs": plain(run.task),
        "facts": {**run.task.facts(), **({"rows left out": run.task.left_out()} if run.task.left_out() else {})},
        "ways": [
            _method(run.task, outcome, items, None if items is base else base)
            for outcome, items in zip(run.outcomes, columns, strict=True)
        ],
    }


Items = dict[str, dict[int, tuple[float, float]]]
"""Metric to item to (value, weight)."""


def _items(task: Task, samples: Sequence[Sample]) -> Items:
    by_item: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_item[sample["index"]].append(sample)
    values: Items = defaultdict(dict)
    for index, own in by_item.items():
        for name, value in task.values(own).items():
            values[name][index] = value
    return values


def _method(task: Task, outcome: Outcome, items: Items, base: Items | None) -> dict[str, Any]:
    return {
        "name": outcome.model.name,
        "settings": outcome.model.settings,
        "sessions": outcome.sessions,
        "scores": {metric.name: _score(metric, items, base) | _note(task, metric, items) for metric in task.metrics},
        "details": task.details(outcome.samples),
        "cost": _cost(outcome.samples, isinstance(task, WritingTask)),
    }


def _score(metric: Metric, items: Items, base: Items | None) -> dict[str, Any]:
    own = items.get(metric.name, {})
    values = _values(own, sorted(own))
    low, high = interval(values)
    shape = math.exp if metric.exp else float
    score: dict[str, Any] = {
        "value": shape(values.mean),
        "low": shape(low),
        "high": shape(high),
        "items": len(own),
        "percent": metric.percent,
        "better": metric.better,
    }
    theirs = (base or {}).get(metric.name, {})
    both = sorted(own.keys() & theirs.keys())
    if both and not metric.exp:
        score["over_parent"] = _difference(_values(own, both), _values(theirs, both))
    return score


def _note(task: Task, metric: Metric, items: Items) -> dict[str, str]:
    """What must be said about a column that lacks items: they were judged where it could not be had."""
    own, most = len(items.get(metric.name, {})), max(map(len, items.values()), default=0)
    if own == most:
        return {}
    return {"note": task.absent().get(metric.name, "not judged") if own == 0 else f"{own} of {most} items"}


def _difference(ours: Values, theirs: Values) -> dict[str, Any]:
    low, high = paired_interval(ours, theirs)
    difference = {"value": ours.mean - theirs.mean, "low": low, "high": high, "items": len(ours.values)}
    if ours.is_proportion and theirs.is_proportion:
        difference["p"] = mcnemar(ours.values.tolist(), theirs.values.tolist())
    return difference


def _values(items: Mapping[int, tuple[float, float]], order: Sequence[int]) -> Values:
    return Values(np.array([items[at][0] for at in order]), np.array([items[at][1] for at in order]))


def _cost(samples: Sequence[Sample], writes: bool) -> dict[str, Any]:
    tokens = sum(sample["tokens"] for sample in samples)
    seconds = sum(sample["wall_seconds"] for sample in samples)
    forwards = sum(sample["forwards"] for sample in samples)
    cost: dict[str, Any] = {
        "samples": len(samples),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
        "forwards": forwards,
    }
    if not writes:
        return cost
    prefills = sum(sample["prefill_forwards"] for sample in samples)
    lengths = np.histogram([sample["tokens"] for sample in samples], bins=[*LENGTH_EDGES, 1 << 30])[0]
    unjudged = sum(any(score is None for score in sample["scores"].values()) for sample in samples)
    return cost | {
        "tokens_per_forward": tokens / max(forwards - prefills, 1),
        "edits": sum(sample["edits"] for sample in samples),
        "mask_tokens": sum(sample["mask_tokens"] for sample in samples),
        "finish_reasons": dict(sorted(Counter(sample["finish_reason"] for sample in samples).items())),
        "lengths": {str(edge): int(count) for edge, count in zip(LENGTH_EDGES, lengths, strict=True)},
        "unjudged": unjudged,
    }


def mask_tokens(result: Mapping[str, Any]) -> int:
    """Ids that must never be emitted and were."""
    return sum(method["cost"].get("mask_tokens", 0) for task in result["tasks"] for method in task["ways"])


def save(result: Mapping[str, Any], folder: str | Path) -> dict[str, Path]:
    """Write `quality.json` and the pictures; returns them by name."""
    path = Path(folder) / QUALITY
    write_atomically(path, to_json(result, indent=2) + "\n")
    return {"json": path, **figures.draw(result, folder)}
