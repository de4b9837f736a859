"""Plans as pictures: stacked bars against the memory that is there, and predicted beside measured."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hildanext.core.plots import INK, PALETTE, new_figure
from hildanext.memory_plan.machine import MIB
from hildanext.memory_plan.step import PARTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.8}
ALL_PARTS = (*PARTS, "cache")
COLOURS = dict(zip(ALL_PARTS, (*PALETTE, "#b8a13a", "#5d8a7a", "#9a8fb8"), strict=True))


def comparison_figure(lines: Sequence[Mapping[str, Any]]) -> "Figure":
    """What was predicted, by part, and under it what was measured."""
    figure, axes = new_figure(10.0, 1.4 + 0.62 * len(lines))
    for place, line in enumerate(lines):
        _stack(axes, place - 0.18, line["parts"], 0.34)
        measured = line["measured"] / MIB
        axes.barh(place + 0.2, measured, height=0.26, color=INK, label="measured" if place == 0 else None)
        axes.text(
            measured,
            place + 0.2,
            f"  {measured:,.0f} MiB, ratio {line['ratio']:.3f}",
            va="center",
            fontsize=8,
            bbox=PLAIN,
        )
    axes.set_yticks(range(len(lines)), [line["name"] for line in lines])
    axes.invert_yaxis()
    axes.set_xlabel("MiB")
    axes.set_xlim(0, 1.25 * max(max(line["measured"], line["predicted"]) for line in lines) / MIB)
    _legend(figure, axes)
    return figure


def plan_figure(bars: Mapping[str, Mapping[str, int]], memory: int, budget: int) -> "Figure":
    """A stacked bar for each stage, with lines where the memory ends and where the room that is used does."""
    figure, axes = new_figure(10.0, 1.6 + 0.62 * len(bars))
    for place, parts in enumerate(bars.values()):
        _stack(axes, float(place), parts, 0.6)
        total = sum(parts.values()) / MIB
        axes.text(total, place, f"  {total:,.0f} MiB", va="center", fontsize=9, color=INK, bbox=PLAIN)
    axes.axvline(memory / MIB, color=INK, linewidth=1.4)
    axes.axvline(budget / MIB, color=INK, linewidth=1.0, linestyle=":")
    axes.set_yticks(range(len(bars)), list(bars), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel(f"MiB   (dotted: room that is planned with; line: {memory / 2**30:.1f} GiB)")
    axes.set_xlim(0, 1.16 * max(memory, *(sum(parts.values()) for parts in bars.values())) / MIB)
    _legend(figure, axes)
    return figure


def _stack(axes: Any, place: float, parts: Mapping[str, int], height: float) -> None:
    left = 0.0
    shown = set(axes.get_legend_handles_labels()[1])
    for name in ALL_PARTS:
        width = parts.get(name, 0) / MIB
        if width > 0:
            label = None if name in shown else name
            axes.barh(place, width, left=left, height=height, color=COLOURS[name], label=label)
            left += width


def _legend(figure: Any, axes: Any) -> None:
    axes.grid(axis="y", visible=False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
