"""The tasks' table as pictures: scores with their intervals, and how long the answers were."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hildanext.core import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(result: Mapping[str, Any], folder: str | Path) -> dict[str, Path]:
    """Write the pictures there is something for; returns them by name."""
    folder = Path(folder)
    files: dict[str, Path] = {}
    scores = _bars(result, percent=True)
    if scores:
        files["tasks"] = plots.save(
            _scores_figure(scores, "% of items", "Tasks, with 95 % intervals"), folder / "tasks.png"
        )
    losses = _bars(result, percent=False)
    if losses:
        title = "Perplexity, with 95 % intervals (lower is better; a bound is not an exact number)"
        files["perplexity"] = plots.save(_scores_figure(losses, "perplexity", title), folder / "perplexity.png")
    writing = [task for task in result["tasks"] if any("lengths" in method["cost"] for method in task["ways"])]
    if writing:
        files["lengths"] = plots.save(_lengths_figure(writing), folder / "lengths.png")
    return files


Bar = tuple[str, str, float, float, float]
"""Group, method, value, low, high."""


def _bars(result: Mapping[str, Any], percent: bool) -> list[Bar]:
    """The percentages of every metric; of the others the first metric of each task."""
    bars: list[Bar] = []
    for task in result["tasks"]:
        for number, metric in enumerate(task["ways"][0]["scores"]):
            for method in task["ways"]:
                score = method["scores"][metric]
                if score["percent"] != percent or (not percent and number > 0) or score["value"] != score["value"]:
                    continue
                scale = 100 if percent else 1
                name = f"{task['key']}\n{metric}" if percent else task["key"]
                bars.append((name, method["name"], *(scale * score[key] for key in ("value", "low", "high"))))
    return bars


def _scores_figure(bars: Sequence[Bar], label: str, title: str) -> "Figure":
    groups = list(dict.fromkeys(bar[0] for bar in bars))
    methods = list(dict.fromkeys(bar[1] for bar in bars))
    figure, axes = plots.new_figure(height=1.3 + 0.3 * (len(bars) + len(groups)))
    widest = max(bar[4] for bar in bars) or 1.0
    place, ticks = 0.0, []
    for group in groups:
        own = [bar for bar in bars if bar[0] == group]
        ticks.append(place + (len(own) - 1) / 2)
        for _, method, value, low, high in own:
            colour = plots.PALETTE[methods.index(method) % len(plots.PALETTE)]
            reach = [[max(value - low, 0.0)], [max(high - value, 0.0)]]
            shown = axes.barh(
                place, value, height=0.8, color=colour, xerr=reach, error_kw={"ecolor": plots.INK, "capsize": 2}
            )
            if method not in axes.get_legend_handles_labels()[1]:
                shown.set_label(method)
            axes.plot(value, place, "o", color=colour, markersize=4, zorder=4)
            text = f"{value:.1f}" if value < 1000 else f"{value:,.0f}"
            axes.text(high + 0.012 * widest, place, text, va="center", fontsize=8.5, color=plots.INK)
            place += 1
        place += 1
    axes.set_yticks(ticks, groups)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * widest)
    axes.grid(axis="y", visible=False)
    _finish(figure, axes, label, title)
    return figure


def _lengths_figure(tasks: Sequence[Mapping[str, Any]]) -> "Figure":
    """Share of a method's answers in each range of lengths."""
    figure, axes = plots.new_figure(height=3.4)
    used = [
        int(edge) for task in tasks for method in task["ways"] for edge, n in method["cost"]["lengths"].items() if n
    ]
    edges = [int(edge) for edge in tasks[0]["ways"][0]["cost"]["lengths"]]
    edges = [edge for edge in edges if min(used) <= edge <= max(used)]
    rows = [
        (f"{task['key']}, {method['name']}", method["cost"]["lengths"]) for task in tasks for method in task["ways"]
    ]
    width = 0.84 / len(rows)
    for number, (name, lengths) in enumerate(rows):
        total = max(sum(lengths.values()), 1)
        heights = [100 * lengths[str(edge)] / total for edge in edges]
        places = [index + (number - (len(rows) - 1) / 2) * width for index in range(len(edges))]
        axes.bar(places, heights, width, color=plots.PALETTE[number % len(plots.PALETTE)], label=name)
    axes.set_xticks(range(len(edges)), [f"{edge}+" for edge in edges])
    axes.set_ylabel("% of answers")
    axes.grid(axis="x", visible=False)
    _finish(figure, axes, "tokens of the answer (up to the next mark)", "Length of answers")
    return figure


def _finish(figure: "Figure", axes: "Axes", label: str, title: str) -> None:
    axes.set_xlabel(label)
    axes.set_title(title, loc="left", fontsize=11, color=plots.INK)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(handles), 3), fontsize=8.5, frameon=False)
