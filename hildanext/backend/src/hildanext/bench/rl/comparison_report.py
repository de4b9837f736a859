"""What `comparison` found, for people: a table, the same as Markdown, and curves."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from hildanext.bench.rl.sheets import Sheet, cell, document
from hildanext.core import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES = {"rollouts": "rollouts", "columns": "columns fed in updates", "seconds": "seconds of steps"}


def tables(result: Mapping[str, Any]) -> list[Table]:
    return [sheet.table() for sheet in _sheets(result)]


def markdown(result: Mapping[str, Any]) -> str:
    return document(_sheets(result), result["machine"], f"Start: `{result['start']}`.")


def draw(result: Mapping[str, Any], path: str | Path) -> Path:
    """Held-out greedy accuracy over rollouts, columns and seconds: thin lines are seeds, thick ones their mean."""
    rows = [row for row in result["rows"] if row["seeds"]]
    figure, grid = plots.new_grid(1, len(AXES), 13.0, 4.6)
    for axes, (name, label) in zip(grid[0], AXES.items(), strict=True):
        for number, row in enumerate(rows):
            _curves(axes, row, name, plots.PALETTE[number % len(plots.PALETTE)], number >= len(plots.PALETTE))
        axes.set_xlabel(label, fontsize=9)
        axes.xaxis.set_major_formatter(lambda value, _: _short(value))
        axes.set_ylim(0, 1)
    grid[0][0].set_ylabel("held out, greedy accuracy", fontsize=9)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), fontsize=8.5, frameon=False)
    figure.suptitle(_title(result), x=0.02, ha="left", fontsize=11, color=plots.INK)
    return plots.save(figure, path)


def _curves(axes: "Axes", row: Mapping[str, Any], name: str, colour: str, again: bool) -> None:
    style = "--" if row["control"] else "-." if again else "-"
    curves = row["curves"]
    for curve in curves if len(curves) > 1 else ():
        axes.plot([p[name] for p in curve], [p["accuracy"] for p in curve], style, color=colour, lw=0.6, alpha=0.4)
    common = min(len(curve) for curve in curves)
    over = np.mean([[point[name] for point in curve[:common]] for curve in curves], 0)
    accuracy = np.mean([[point["accuracy"] for point in curve[:common]] for curve in curves], 0)
    axes.plot(over, accuracy, style, color=colour, lw=1.9, label=row["name"])


def _sheets(result: Mapping[str, Any]) -> list[Sheet]:
    samples = result["budget"]["samples"]
    columns = ["method", "rate", "greedy: start", "end, by seed", "end", "gain [95 %]"]
    columns += ["sampled: end, gain [95 %]", f"pass@{samples}: end, gain [95 %]", "equal groups"] if samples else []
    rows = [_cells(row, samples) for row in result["rows"]]
    if result["start_row"] is not None:
        rows.append(_start_cells(result["start_row"], samples))
    sheets = [
        Sheet(_title(result), columns, rows, _caption(result)),
        Sheet(
            "What it did to the policy, and what it cost",
            [
                "method",
                "entropy",
                "tok/forward",
                "length",
                "mended",
                "kept",
                "reward",
                "s of steps",
                "rollout s",
                "columns",
                "peak MB",
            ],
            [_cost_cells(row) for row in result["rows"] if row["seeds"]],
            "start > end, means over seeds; entropy (nats a token) and reward are of rollouts, first and last tenth of "
            "the rounds; columns are those of updates (reference and old policy not counted); peak: the largest; "
            "mended, kept: of held-out right answers in which a tenth of the tokens is wrong, the share of wrong ones "
            "that one forward would mend, and of right ones that it would leave alone",
        ),
    ]
    if result["grid"]:
        rates = list(next(iter(result["grid"].values())))
        seeds = ", ".join(map(str, result["settings"]["grid_seeds"]))
        tried = [[name, *(cell(found[rate]) for rate in rates)] for name, found in result["grid"].items()]
        caption = f"seeds {seeds}, not reported above; the best is taken, chosen on the held-out problems"
        sheets.append(Sheet("Greedy accuracy by learning rate", ["method", *rates], tried, caption))
    return sheets


def _title(result: Mapping[str, Any]) -> str:
    budget = result["budget"]
    size = f"{budget['rounds']} x {budget['problems_per_round']} x {budget['group']} answers"
    return f"Alignment, {size}, {budget['held_out']} held-out problems, {len(result['settings']['seeds'])} seeds"


def _caption(result: Mapping[str, Any]) -> str:
    lines = [f"intervals: {result['pooled']}"]
    lines += [
        f"{row['name']}, seed {seed}, did not end: {why}"
        for row in result["rows"]
        for seed, why in row["failed"].items()
    ]
    lines += [f"{row['name']} starts from {row['own_start']}" for row in result["rows"] if row["own_start"] is not None]
    return "; ".join(lines + [f"not measured: {what}" for what in result["not_there"]])


def _cells(row: Mapping[str, Any], samples: int) -> list[str]:
    name = f"{row['name']} (control)" if row["control"] else row["name"]
    if not row["seeds"]:
        return [name, f"{row['learning_rate']:g}", *["-"] * (7 if samples else 4)]
    gain = row["greedy"]
    cells = [name, f"{row['learning_rate']:g}", cell(gain["start"])]
    cells += [" ".join(cell(end) for end in gain["ends"]), cell(gain["end"]), _interval(gain)]
    if samples:
        cells += [f"{cell(row[part]['end'])}, {_interval(row[part])}" for part in ("sampled", "pass_at_k")]
        cells.append(_change(row["zero_variance"]))
    return cells


def _start_cells(start: Mapping[str, Any], samples: int) -> list[str]:
    cells = ["no update (control)", "-", cell(start["greedy"]), "-", cell(start["greedy"]), "-"]
    return cells + ([cell(start[part]) for part in ("sampled", "pass_at_k", "zero_variance")] if samples else [])


def _cost_cells(row: Mapping[str, Any]) -> list[str]:
    peak = row["peak_bytes"]
    return [
        row["name"],
        _change(row["entropy"], ".3f"),
        _change(row["tokens_per_forward"]),
        _change(row["length"], ".1f"),
        *(_change(row[part]) if part in row else "-" for part in ("corrected", "kept")),
        _change(row["reward"]),
        f"{row['seconds']:.0f}",
        f"{row['seconds_by_part']['rollout']:.0f}",
        _short(row["columns"]),
        cell(None if peak is None else peak / 2**20, ".0f"),
    ]


def _interval(gain: Mapping[str, Any]) -> str:
    return f"{gain['gain']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]"


def _change(both: Mapping[str, Any], shape: str = ".2f") -> str:
    return f"{cell(both['start'], shape)} > {cell(both['end'], shape)}"


def _short(value: float | int) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
