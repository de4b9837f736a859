"""The picture of a load: how long requests waited for their first block and for all of it, over how many there were."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hildanext.core import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = {"p50": "-", "p90": "--", "p99": ":"}
ROWS = {"first_block_seconds": "to the first block, s", "latency_seconds": "to the whole answer, s"}
LOOPS = {"closed": ("clients", "requests open at a time"), "open": ("rate", "arrivals per second")}
COLOURS = {"model": plots.PALETTE[0], "parent": plots.PALETTE[1]}


def draw(result: Mapping[str, Any], path: str | Path) -> Path | None:
    """Write the picture of `serve_load.measure`'s result; None where not one request was answered."""
    loads: Sequence[Mapping[str, Any]] = result["loads"]
    loops = [loop for loop in LOOPS if any(load["loop"] == loop and _answered(load) for load in loads)]
    return plots.save(_figure(result, loops), path) if loops else None


def _answered(load: Mapping[str, Any]) -> bool:
    return any(result["answered"] for result in load["results"].values())


def _figure(result: Mapping[str, Any], loops: Sequence[str]) -> "Figure":
    figure, grid = plots.new_grid(len(ROWS) + 1, len(loops), width=4.5 * len(loops) + 1.0, height=7.5)
    for column, loop in enumerate(loops):
        loads = [load for load in result["loads"] if load["loop"] == loop]
        knob, label = LOOPS[loop]
        for row, (field, words) in enumerate(ROWS.items()):
            _percentiles(grid[row][column], loads, knob, field)
            grid[row][column].set_ylabel(words, fontsize=9)
        _throughput(grid[-1][column], loads, knob)
        for axes in grid:
            axes[column].set_xticks(sorted({float(load["settings"][knob]) for load in loads}))
            axes[column].xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes[column].set_ylim(bottom=0)
        grid[-1][column].set_xlabel(label, fontsize=9)
        grid[0][column].set_title(f"{loop} loop", loc="left", fontsize=10, color=plots.INK)
    handles, labels = grid[0][0].get_legend_handles_labels()
    columns = max(len(labels) // len(LINES), 1)  # one for each model
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False)
    settings = result["loads"][0]["settings"]
    size = f"{settings['requests']} requests of up to {settings['max_new_tokens']} tokens each"
    figure.suptitle(f"Waiting under load, {size}", x=0.02, ha="left", fontsize=11, color=plots.INK)
    return figure


def _percentiles(axes: "Axes", loads: Sequence[Mapping[str, Any]], knob: str, field: str) -> None:
    for role, colour in COLOURS.items():
        for share, style in LINES.items():
            points = [
                (float(load["settings"][knob]), float(result[field][share]))
                for load in loads
                if (result := load["results"].get(role)) is not None and result[field] is not None
            ]
            if points:
                x, y = zip(*sorted(points), strict=True)
                label = f"{_name(loads, role)}, {share}"
                axes.plot(x, y, color=colour, linestyle=style, marker="o", markersize=4, label=label)


def _throughput(axes: "Axes", loads: Sequence[Mapping[str, Any]], knob: str) -> None:
    for role, colour in COLOURS.items():
        points = [
            (float(load["settings"][knob]), float(result["tokens_per_second"]))
            for load in loads
            if (result := load["results"].get(role)) is not None
        ]
        if points:
            x, y = zip(*sorted(points), strict=True)
            axes.plot(x, y, color=colour, marker="o", markersize=4)
    axes.set_ylabel("tokens per second", fontsize=9)


def _name(loads: Sequence[Mapping[str, Any]], role: str) -> str:
    name = next(load["results"][role]["name"] for load in loads if role in load["results"])
    return f"{name} (AR parent)" if role == "parent" else str(name)
