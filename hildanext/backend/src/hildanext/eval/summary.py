"""From samples to one table: each score with its interval, the difference to the parent, and what it cost."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from hildanext.core.config import plain
from hildanext.core.metrics_log import finite
from hildanext.core.run_dir import write_atomically
from hildanext.core.runtime import versions
from hildanext.eval import statistics as intervals
from hildanext.eval.generation import PARENT
from hildanext.eval.journal import Sample
from hildanext.eval.runner import Outcome, TaskRun
from hildanext.eval.statistics import Values
from hildanext.eval.tasks.base import Metric, Task, WritingTask

QUALITY = "quality.json"
COLUMNS = ("task", "metric", "", "score (95 %)", "over parent (95 %)", "p", "tokens/s", "forwards", "tok/forward")
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
    base = columns[0] if run.outcomes and run.outcomes[0].way.name == PARENT else None
    return {
        "key": run.key,
        "knobs": plain(run.task),
        "facts": run.task.facts(),
        "ways": [
            _way(run.task, outcome, items, None if items is base else base)
            for outcome, items in zip(run.outcomes, columns, strict=True)
        ],
    }


Items = dict[str, dict[int, tuple[float, float]]]
"""Metric to item to (value, weight)."""


def _items(task: Task, samples: Sequence[Sample]) -> Items:
    by_item: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_item[sample["index"]].append(sample)
    found: Items = defaultdict(dict)
    for index, own in by_item.items():
        for name, value in task.values(own).items():
            found[name][index] = value
    return found


def _way(task: Task, outcome: Outcome, items: Items, base: Items | None) -> dict[str, Any]:
    return {
        "name": outcome.way.name,
        "settings": outcome.way.settings,
        "sessions": outcome.sessions,
        "scores": {metric.name: _score(metric, items, base) | _note(task, metric, items) for metric in task.metrics},
        "details": task.details(outcome.samples),
        "cost": _cost(outcome.samples, isinstance(task, WritingTask)),
    }


def _score(metric: Metric, items: Items, base: Items | None) -> dict[str, Any]:
    own = items.get(metric.name, {})
    values = _values(own, sorted(own))
    low, high = intervals.interval(values)
    shape = math.exp if metric.exp else float
    found: dict[str, Any] = {
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
        found["over_parent"] = _difference(_values(own, both), _values(theirs, both))
    return found


def _note(task: Task, metric: Metric, items: Items) -> dict[str, str]:
    """What must be said about a column that lacks items: they were judged where it could not be had."""
    own, most = len(items.get(metric.name, {})), max(map(len, items.values()), default=0)
    if own == most:
        return {}
    return {"note": task.absent().get(metric.name, "not judged") if own == 0 else f"{own} of {most} items"}


def _difference(ours: Values, theirs: Values) -> dict[str, Any]:
    low, high = intervals.paired_interval(ours, theirs)
    found = {"value": ours.mean - theirs.mean, "low": low, "high": high, "items": len(ours.values)}
    if ours.is_proportion and theirs.is_proportion:
        found["p"] = intervals.mcnemar(ours.values.tolist(), theirs.values.tolist())
    return found


def _values(items: Mapping[int, tuple[float, float]], order: Sequence[int]) -> Values:
    return Values(np.array([items[at][0] for at in order]), np.array([items[at][1] for at in order]))


def _cost(samples: Sequence[Sample], writes: bool) -> dict[str, Any]:
    tokens = sum(sample["tokens"] for sample in samples)
    seconds = sum(sample["wall_seconds"] for sample in samples)
    forwards = sum(sample["forwards"] for sample in samples)
    found: dict[str, Any] = {
        "samples": len(samples),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
        "forwards": forwards,
    }
    if not writes:
        return found
    prefills = sum(sample["prefill_forwards"] for sample in samples)
    lengths = np.histogram([sample["tokens"] for sample in samples], bins=[*LENGTH_EDGES, 1 << 30])[0]
    unjudged = sum(any(score is None for score in sample["scores"].values()) for sample in samples)
    return found | {
        "tokens_per_forward": tokens / max(forwards - prefills, 1),
        "edits": sum(sample["edits"] for sample in samples),
        "mask_tokens": sum(sample["mask_tokens"] for sample in samples),
        "finish_reasons": dict(sorted(Counter(sample["finish_reason"] for sample in samples).items())),
        "lengths": {str(edge): int(count) for edge, count in zip(LENGTH_EDGES, lengths, strict=True)},
        "unjudged": unjudged,
    }


def mask_tokens(result: Mapping[str, Any]) -> int:
    """Ids that must never be emitted and were."""
    return sum(way["cost"].get("mask_tokens", 0) for task in result["tasks"] for way in task["ways"])


def table(result: Mapping[str, Any]) -> Table:
    """Everything in one table for a terminal; what a way was is under it (`lines`)."""
    found = Table(title="Tasks", title_justify="left")
    for number, column in enumerate(COLUMNS):
        found.add_column(column, justify="left" if number < 3 else "right", overflow="fold")
    for task in result["tasks"]:
        for cells in cells_of(task):
            found.add_row(*cells)
        found.add_section()
    return found


def cells_of(task: Mapping[str, Any]) -> list[list[str]]:
    """The table's rows of one task: metric by metric, way by way."""
    rows = []
    for number, metric in enumerate(task["ways"][0]["scores"]):
        for place, way in enumerate(task["ways"]):
            score, cost = way["scores"][metric], way["cost"]
            over = score.get("over_parent")
            costs = [""] * 3
            if number == 0:
                per = f"{cost['tokens_per_forward']:.2f}" if "tokens_per_forward" in cost else ""
                costs = [f"{cost['tokens_per_second']:.1f}", str(cost["forwards"]), per]
            rows.append(
                [
                    f"{task['key']} ({score['items']})" if place == number == 0 else "",
                    metric if place == 0 else "",
                    way["name"],
                    _with_range(score, score["percent"]),
                    "" if over is None else _with_range(over, score["percent"], sign="+"),
                    "" if over is None or "p" not in over else _p(over["p"]),
                    *costs,
                ]
            )
    return rows


def lines(result: Mapping[str, Any]) -> list[str]:
    """What each score was measured with, and how long answers were; then the notes."""
    found = []
    for task in result["tasks"]:
        for way in task["ways"]:
            facts = {**way["settings"], **_short(task["knobs"]), **task["facts"], **way["details"]}
            told = ", ".join(f"{name} {_plain(value)}" for name, value in facts.items())
            cost = f"{way['cost']['tokens']} tokens in {way['cost']['seconds']:.1f} s"
            found.append(f"{task['key']}, {way['name']}: {told}; {_sessions(way['sessions'])}; {cost}")
            if "lengths" in way["cost"]:
                found.append(f"    {_lengths(way['cost'])}")
    return [*found, *result["notes"]]


def save(result: Mapping[str, Any], folder: str | Path) -> dict[str, Path]:
    """Write `quality.json` and the pictures; returns them by name."""
    from hildanext.eval import figures as pictures

    path = Path(folder) / QUALITY
    write_atomically(path, json.dumps(finite(result), indent=2) + "\n")
    return {"json": path, **pictures.draw(result, folder)}


def _with_range(score: Mapping[str, Any], percent: bool, sign: str = "") -> str:
    """`62.1 % (59.4 to 64.7)`, and what must be said about it."""
    value, low, high = (_number(score[key], percent, sign) for key in ("value", "low", "high"))
    shown = f"{value}{' %' if percent and value else ''} ({low} to {high})" if low and high else value
    return ", ".join(part for part in (shown, score.get("note", "")) if part)


def _number(value: float | None, percent: bool, sign: str) -> str:
    if value is None or value != value:
        return ""
    if percent:
        return f"{100 * value:{sign}.1f}"
    return (
        f"{value:{sign}.3f}" if abs(value) < 100 else f"{value:{sign}.1f}" if abs(value) < 1e4 else f"{value:{sign}.3g}"
    )


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _short(config: Mapping[str, Any]) -> dict[str, Any]:
    """Knobs that change an answer: not where the data lie, and nothing that is off (no examples is told)."""
    hidden = ("data", "split", "few_shot_data", "few_shot_seed", "block_sizes", "draws", "overlong")
    off = {"repeats": 1, "temperature": 0.0}
    return {
        name: value
        for name, value in config.items()
        if name not in hidden and value is not None and value is not False and off.get(name) != value
    }


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(str(item) if name == "name" else f"{name} {item}" for name, item in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _sessions(sessions: Sequence[Mapping[str, Any]]) -> str:
    return " + ".join(
        f"{each['device_name'] or each['device']}, {each['dtype']}, {each['threads']} threads, "
        f"batch {each['batch_size']}"
        for each in sessions
    )


def _lengths(cost: Mapping[str, Any]) -> str:
    """`answers by length in tokens: 32-63 ▂12 64-127 █52; ended by eos 60, length 4; 0 mask tokens`."""
    counts = {int(edge): count for edge, count in cost["lengths"].items() if count}
    most = max(counts.values(), default=1)
    bars = []
    for edge, count in counts.items():
        end = next((other for other in LENGTH_EDGES if other > edge), None)
        name = str(edge) if end == edge + 1 else f"{edge}-{end - 1}" if end is not None else f"{edge}+"
        bars.append(f"{name} {'▁▂▃▄▅▆▇█'[(count * 8 - 1) // most if most else 0]}{count}")
    ends = ", ".join(f"{reason} {count}" for reason, count in cost["finish_reasons"].items())
    unjudged = f"; {cost['unjudged']} not judged" if cost["unjudged"] else ""
    return (
        f"answers by length in tokens: {'  '.join(bars)}; ended by {ends}; {cost['mask_tokens']} mask tokens{unjudged}"
    )
