"""Methods of alignment under one budget, from one start, on the same held-out problems: `hildanext bench rl`.

Every (method, seed) is a run folder of the stage `rl`; every number here is read from its files.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from hildanext.bench.rl.config import Contender, RlComparisonConfig, with_rate
from hildanext.bench.rl.intervals import POOLED, crossed_bootstrap
from hildanext.bench.rl.readings import Reading, greedy, read, sampled
from hildanext.bench.rl.runs import Run, execute
from hildanext.core.config import plain
from hildanext.core.errors import ConfigError, DataError
from hildanext.core.statistics import Values, paired_interval
from hildanext.models.card import read_card
from hildanext.models.loading.names import locate_diffusion
from hildanext.rl_stage2 import check

Say = Callable[[str], None]


def measure(
    start: str, settings: RlComparisonConfig, folder: Path, profile: str, say: Say | None = None
) -> dict[str, Any]:
    """Bring every run to its end, choosing learning rates first where there is a grid, and read them all.

    A run that fails is named in the result, and the others go on. Raises `ConfigError` for what the stage `rl` refuses,
    for a folder that holds finished runs of other sections, and for a parent that is none; `DataError` where not one
    run came to its end.
    """
    if settings.controls.parent is not None:
        _check_parent(settings.controls.parent)
    grid = _grid(start, settings, folder, profile, say)
    rates = {name: rate for name, tried in grid.items() if (rate := _best(tried)) is not None}
    runs = {
        one.name: [
            Run(one.name, seed, folder / "runs" / f"{one.name}-seed-{seed}", _section(one, start, seed, rates))
            for seed in settings.seeds
        ]
        for one in settings.contenders()
    }
    failed = execute(
        [run for every in runs.values() for run in every], profile, settings.jobs, settings.threads_each, say
    )
    rows, machine = [], None
    for one in settings.contenders():
        readings = [read(run.folder, run.seed) for run in runs[one.name] if str(run.folder) not in failed]
        why = {str(run.seed): failed[str(run.folder)] for run in runs[one.name] if str(run.folder) in failed}
        machine = readings[0].machine if readings and machine is None else machine
        rows.append(_row(one, runs[one.name][0].section, readings, why))
    _check_same_problems(rows)
    if machine is None:
        raise DataError("not one run came to its end", next(iter(failed.values())))
    built, _ = check({**runs[rows[0]["name"]][0].section})
    return {
        "bench": "rl",
        "start": start,
        "profile": profile,
        "settings": plain(settings),
        "budget": {
            "rollouts": built.rounds * built.problems_per_round * built.group,
            "rounds": built.rounds,
            "problems_per_round": built.problems_per_round,
            "group": built.group,
            "held_out": built.measure.problems,
            "samples": built.measure.samples,
        },
        "pooled": POOLED,
        "machine": {**machine, "threads": settings.threads_each},
        "grid": grid,
        "start_row": _start_row(rows) if settings.controls.no_update else None,
        "rows": rows,
        "not_there": []
        if settings.controls.parent is not None
        else ["the autoregressive parent under GRPO: name a checkpoint of it as controls.parent"],
    }


def _check_parent(name: str) -> None:
    card = read_card(locate_diffusion(name))
    if card.alignment != "parent" or card.block_size != 1:
        raise ConfigError(
            f"controls.parent {name!r} is of alignment {card.alignment!r} with blocks of {card.block_size}",
            "give a checkpoint of alignment 'parent' with blocks of 1, which writes as its parent does",
        )


def _section(
    one: Contender, start: str, seed: int, rates: Mapping[str, float], settings: RlComparisonConfig | None = None
) -> dict[str, Any]:
    """The whole section of a run; of the grid where `settings` are given, which may change more than the rate."""
    section = dict(one.section)
    if one.rate_of in rates:
        rate = rates[one.rate_of]
        section = settings.grid_section(section, rate) if settings is not None else with_rate(section, rate)
    return {**section, "model": one.start if one.start is not None else start, "seed": seed}


def _grid(
    start: str, settings: RlComparisonConfig, folder: Path, profile: str, say: Say | None
) -> dict[str, dict[str, float | None]]:
    """Held-out greedy accuracy at the end of each rate, the mean over the grid's seeds; None where a run failed."""
    choosing = [one for one in settings.contenders() if one.rate_of == one.name]
    runs = {
        (one.name, rate): [
            Run(
                f"{one.name}, rate {rate:g}",
                seed,
                folder / "grid" / f"{one.name}-rate-{rate:g}-seed-{seed}",
                _section(one, start, seed, {one.name: rate}, settings),
            )
            for seed in settings.grid_seeds
        ]
        for one in choosing
        for rate in settings.grid
    }
    every = [run for some in runs.values() for run in some]
    failed = execute(every, profile, settings.jobs, settings.threads_each, say) if every else {}
    grid: dict[str, dict[str, float | None]] = {}
    for (name, rate), some in runs.items():
        whole = all(str(run.folder) not in failed for run in some)
        ends = [read(run.folder, run.seed).after["accuracy"] for run in some] if whole else []
        grid.setdefault(name, {})[f"{rate:g}"] = statistics.mean(ends) if ends else None
    return grid


def _best(tried: Mapping[str, float | None]) -> float | None:
    """The rate of the highest accuracy, of equal ones the smallest; None where every rate failed."""
    known = [(-accuracy, float(rate)) for rate, accuracy in tried.items() if accuracy is not None]
    return min(known)[1] if known else None


def _row(
    one: Contender, section: Mapping[str, Any], readings: Sequence[Reading], failed: Mapping[str, str]
) -> dict[str, Any]:
    """What the table says of a method."""
    built, _ = check(section)
    row: dict[str, Any] = {
        "name": one.name,
        "control": one.control,
        "own_start": one.start,
        "learning_rate": built.train.learning_rate.peak,
        "failed": dict(failed),
        "seeds": [reading.seed for reading in readings],
    }
    if not readings:
        return row
    samples, firsts = built.measure.samples, [reading.before for reading in readings]
    lasts = [reading.after for reading in readings]
    row |= {"greedy": _gain([greedy(line) for line in firsts], [greedy(line) for line in lasts])}
    if samples:
        before, after = ([sampled(line, samples) for line in lines] for lines in (firsts, lasts))
        row["sampled"] = _gain(before, after)
        row["pass_at_k"] = _gain(*([(part > 0).astype(float) for part in parts] for parts in (before, after)))
        row["zero_variance"] = _both(
            [line["zero_variance"] for line in firsts], [line["zero_variance"] for line in lasts]
        )
    row |= {
        **_editing(firsts, lasts),
        "tokens_per_forward": _both(*([line["tokens_per_forward"] for line in lines] for lines in (firsts, lasts))),
        "length": _both(*([line["length"] for line in lines] for lines in (firsts, lasts))),
        "entropy": _both([r.entropy[0] for r in readings], [r.entropy[1] for r in readings]),
        "reward": _both([r.reward[0] for r in readings], [r.reward[1] for r in readings]),
        "seconds": statistics.mean(reading.seconds for reading in readings),
        "seconds_by_part": {
            part: statistics.mean(reading.seconds_by_part[part] for reading in readings)
            for part in readings[0].seconds_by_part
        },
        "columns": statistics.mean(reading.columns for reading in readings),
        "rollouts": statistics.mean(reading.rollouts for reading in readings),
        "peak_bytes": max((r.peak_bytes for r in readings if r.peak_bytes is not None), default=None),
        "problems": [dict(reading.problems) for reading in readings],
        "curves": [reading.curve for reading in readings],
    }
    return row


def _gain(
    before: Sequence[Float[np.ndarray, " problems"]], after: Sequence[Float[np.ndarray, " problems"]]
) -> dict[str, Any]:
    """Start and end of every seed, each seed's own interval over problems, and that of all of them."""
    first, last = np.stack(before).astype(float), np.stack(after).astype(float)
    ones = np.ones(first.shape[1])
    alone = [paired_interval(Values(b, ones), Values(a, ones)) for a, b in zip(first, last, strict=True)]
    low, high = crossed_bootstrap(last - first)
    return {
        **_both(first.mean(1).tolist(), last.mean(1).tolist()),
        "gain": float((last - first).mean()),
        "low": low,
        "high": high,
        "intervals": [list(interval) for interval in alone],
    }


def _editing(firsts: Sequence[Mapping[str, Any]], lasts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is left of editing, where it was measured: of problems with right answers alone."""
    lines = [*firsts, *lasts]
    names = [name for name in ("corrected", "kept") if all(line.get(name) is not None for line in lines)]
    return {name: _both([line[name] for line in firsts], [line[name] for line in lasts]) for name in names}


def _both(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    return {
        "starts": [float(value) for value in before],
        "ends": [float(value) for value in after],
        "start": float(np.mean(before)) if len(before) else math.nan,
        "end": float(np.mean(after)) if len(after) else math.nan,
    }


def _start_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The control without an update: step 0 of the first method from the common start."""
    row = next((row for row in rows if row["seeds"] and row["own_start"] is None), None)
    if row is None:
        return None
    names = ("greedy", "sampled", "pass_at_k", "zero_variance", "tokens_per_forward", "length", "corrected", "kept")
    return {"of": row["name"], **{name: row[name]["starts"][0] for name in names if name in row}}


def _check_same_problems(rows: Sequence[Mapping[str, Any]]) -> None:
    known: dict[str, str] = {}
    for row in rows:
        for problems in row.get("problems", ()):
            known.setdefault(problems["fingerprint"], row["name"])
    if len(known) > 1:
        one, other, *_ = known.values()
        raise ConfigError(
            f"{one} and {other} are not asked the same problems", "give problems in shared alone, with a seed"
        )
