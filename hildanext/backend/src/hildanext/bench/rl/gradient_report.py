"""What `gradient` and `drawn_gradients` found, for people: tables, the same as Markdown, and a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from hildanext.bench.rl.gradient import error_after
from hildanext.bench.rl.sheets import Sheet, cell, document
from hildanext.core import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BUDGETS = [10.0 ** (exponent / 4) for exponent in range(6, 29)]
"""Columns over which the error is drawn."""
SHOWN = 10_000.0
"""Columns after which the table says the error."""


def tables(result: Mapping[str, Any]) -> list[Table]:
    return [sheet.table() for sheet in _sheets(result)]


def markdown(result: Mapping[str, Any]) -> str:
    return document(_sheets(result), result["machine"])


def draw(result: Mapping[str, Any], path: str | Path) -> Path:
    """Error over columns on the small policy; the cosine of one draw on the real model, where there is one."""
    drawn = result["drawn"]
    figure, grid = plots.new_grid(1, 1 if drawn is None else 2, 7.5 if drawn is None else 13.0, 4.8)
    axes = grid[0][0]
    for number, (name, row) in enumerate(_known(result["small"]["estimates"]).items()):
        style = "-" if number < len(plots.PALETTE) else "--"
        colour = plots.PALETTE[number % len(plots.PALETTE)]
        axes.loglog(BUDGETS, [error_after(row, columns) for columns in BUDGETS], style, color=colour, label=name)
    axes.set_xlabel("columns fed", fontsize=9)
    axes.set_ylabel("error of the gradient over its norm, best scale", fontsize=9)
    axes.set_title("Small policy: noise falls with columns, bias stays", loc="left", fontsize=10, color=plots.INK)
    axes.legend(fontsize=7.5, frameon=False)
    if drawn is not None:
        _bars(grid[0][1], drawn["estimates"])
        grid[0][1].set_title(_drawn_title(result), loc="left", fontsize=10, color=plots.INK)
    return plots.save(figure, path)


def _bars(axes: "Axes", estimates: Mapping[str, Any]) -> None:
    rows = list(reversed(_known(estimates).items()))
    for number, (_, row) in enumerate(rows):
        axes.barh(number, row["cosine"], color=plots.PALETTE[0], height=0.6)
        axes.plot(row["cosines"], [number] * len(row["cosines"]), "|", color=plots.INK, ms=7)
        axes.text(1.02, number, f"{row['columns']:.0f} columns", va="center", fontsize=7.5, color=plots.INK)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlim(0, 1.3)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.set_xlabel("cosine of one draw to the mean of many others", fontsize=9)


def _known(estimates: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row for name, row in estimates.items() if "refused" not in row}


def _sheets(result: Mapping[str, Any]) -> list[Sheet]:
    small, settings = result["small"], result["settings"]
    policy = settings["small"]
    sizes = f"{policy['vocab']} tokens, block {policy['block_size']}, {policy['per_step']} a step"
    sheets = [
        Sheet(
            f"Gradient of E[r] over {small['trajectories']} trajectories: {sizes}, {policy['alignment']} alignment",
            ["estimate", "cosine", "bias", "+-", "bias as is", "variance", "columns", f"error, {SHOWN:,.0f} columns"],
            [_small_cells(name, row) for name, row in small["estimates"].items()],
            "bias and variance over the exact norm (squared), at the scale that fits best; columns of one answer; "
            f"+-: standard error of the mean over {policy['repeats']} draws, taken off the bias",
        )
    ]
    if result["drawn"] is not None:
        sheets.append(
            Sheet(
                _drawn_title(result),
                ["estimate", "draws", "cosine of one", "noise / signal", "columns", "cosine to trajectory"],
                [_drawn_cells(name, row) for name, row in result["drawn"]["estimates"].items()],
                f"advantages of +1 and -1, dealt; mean over {settings['singles']} draws; noise / signal: squared "
                "distance over the squared norm of the mean",
            )
        )
    return sheets


def _drawn_title(result: Mapping[str, Any]) -> str:
    drawn = result["drawn"]
    size = f"{drawn['answers']} answers, {drawn['tokens']} tokens, {drawn['tokens_per_forward']:.2f} a forward"
    return f"{result['model']}, block {drawn['card_block']}, {drawn['alignment']}: {size}"


def _small_cells(name: str, row: Mapping[str, Any]) -> list[str]:
    if "refused" in row:
        return [f"{name}: {row['refused']}", *["-"] * 7]
    cells = [cell(row[part], ".3f") for part in ("cosine", "bias", "bias_error", "bias_as_is")]
    cells += [cell(row["variance"], ".1f"), cell(row["columns"], ".1f")]
    return [name, *cells, cell(error_after(row, SHOWN), ".3f")]


def _drawn_cells(name: str, row: Mapping[str, Any]) -> list[str]:
    if "refused" in row:
        return [f"{name}: {row['refused']}", *["-"] * 5]
    cells = [str(row["draws"]), cell(row["cosine"], ".3f"), cell(row["noise"]), cell(row["columns"], ".1f")]
    return [name, *cells, cell(row.get("cosine_to_trajectory"), ".3f")]
