"""One graph as a picture: texts letter by letter, nodes as coloured boxes, edges as arrows, tokens as brackets."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hildanext.core.plots import INK, PALETTE, save
from hildanext.data.causal_graphs.corpus import GraphExample
from hildanext.data.causal_graphs.graph import Node, Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 84
"""Letters of a line."""
LEADING = 2.6
"""Height of a line in letters' heights: arrows and tokens need room."""
LETTER = (0.115, 0.2)
"""Width and height of a letter in inches."""
FIELD_NAMES = ("prompt", "response")

Tokens = Mapping[str, Sequence[tuple[int, int]]]
"""For each field the characters of its tokens."""


class Line(NamedTuple):
    """Characters `start` to `end` of a field, on one line of the picture."""

    field: str
    start: int
    end: int


@dataclass(frozen=True)
class Sheet:
    """Where every letter is: column x and line number y."""

    lines: tuple[Line, ...]

    @classmethod
    def of(cls, texts: Mapping[str, str]) -> "Sheet":
        lines = []
        for field, text in texts.items():
            lines += [Line(field, start, end) for start, end in wrapped(text)]
            lines.append(Line("", 0, 0))
        return cls(tuple(lines[:-1]))

    def pieces(self, field: str, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(line number, first column, column after the last) of a stretch, once for each line that it touches."""
        for number, line in enumerate(self.lines):
            low, high = max(start, line.start), min(end, line.end)
            if line.field == field and low < high:
                yield number, low - line.start, high - line.start

    def middle(self, span: Span) -> tuple[float, int]:
        """Column and line of a span's middle (of its first piece)."""
        number, low, high = next(self.pieces(*span), (0, 0, 0))
        return (low + high) / 2, number


def wrapped(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of lines of at most `COLUMNS` letters, broken at line ends and where a word begins."""
    at = 0
    for paragraph in text.split("\n"):
        end = at + len(paragraph)
        while end - at > COLUMNS:
            blank = text.rfind(" ", at, at + COLUMNS)
            stop = blank + 1 if blank > at else at + COLUMNS
            yield at, stop
            at = stop
        yield at, end
        at = end + 1


def draw(example: GraphExample, path: str | Path, tokens: Tokens | None = None, note: str = "") -> Path:
    """Write the picture of an example's graph. `tokens` draws their borders under the letters."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    texts = {"prompt": example.prompt, "response": example.response}
    sheet = Sheet.of(texts)
    nodes = example.graph.nodes if example.graph is not None else ()
    colours = {node.id: PALETTE[number % len(PALETTE)] for number, node in enumerate(nodes)}
    height = LEADING * len(sheet.lines) + 3.4
    figure = Figure(figsize=((COLUMNS + 14) * LETTER[0], height * LETTER[1]))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(-12, COLUMNS + 2)
    axes.set_ylim(-LEADING * len(sheet.lines) + 0.6, 4.0)
    axes.axis("off")
    source = example.graph.source if example.graph is not None else "no graph"
    unsure = example.graph is not None and any(edge.ambiguous for edge in example.graph.edges)
    notes = [note, "dashed: another place has the same value" if unsure else ""]
    title = "   ".join(part for part in (example.id, source, *notes) if part)
    axes.text(-11.4, 3.1, title, fontsize=10, color=INK, va="center", weight="bold")
    for node in nodes:
        _node(axes, sheet, node, colours[node.id])
    if tokens is not None:
        _tokens(axes, sheet, tokens)
    _letters(axes, sheet, texts)
    _edges(axes, sheet, example, colours)
    return save(figure, path)


def _y(number: int) -> float:
    """The baseline's middle of a line."""
    return -LEADING * number


def _letters(axes: "Axes", sheet: Sheet, texts: Mapping[str, str]) -> None:
    """Each letter in the middle of its own cell, so that boxes and letters fit whatever the font."""
    seen = set()
    for number, line in enumerate(sheet.lines):
        if line.field and line.field not in seen:
            seen.add(line.field)
            axes.text(-11.4, _y(number), line.field, fontsize=8.5, color="#5b6470", va="center")
        for column, letter in enumerate(texts[line.field][line.start : line.end] if line.field else ""):
            if not letter.isspace():
                words: dict[str, Any] = {
                    "ha": "center",
                    "va": "center",
                    "fontsize": 9.5,
                    "color": INK,
                    "family": "monospace",
                }
                axes.text(column + 0.5, _y(number), letter, zorder=4, parse_math=False, **words)


def _node(axes: "Axes", sheet: Sheet, node: Node, colour: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    for span in node.spans:
        for piece, (number, low, high) in enumerate(sheet.pieces(*span)):
            shape = f"round,pad=0.08,rounding_size={min(0.4, (high - low) / 2)}"
            corner = (low, _y(number) - 0.62)
            box = FancyBboxPatch(
                corner, high - low, 1.24, shape, facecolor=colour, alpha=0.26, edgecolor="none", zorder=2
            )
            axes.add_patch(box)
            if piece == 0:
                words: dict[str, Any] = {
                    "ha": "right",
                    "va": "bottom",
                    "fontsize": 6.5,
                    "color": colour,
                    "weight": "bold",
                }
                axes.text(low + 0.15, _y(number) + 0.5, node.id, zorder=5, **words)


def _tokens(axes: "Axes", sheet: Sheet, tokens: Tokens) -> None:
    """A bracket under each token: a line with its ends turned up."""
    for field, places in tokens.items():
        for start, end in places:
            for number, low, high in sheet.pieces(field, start, end):
                xs, y = (low + 0.1, low + 0.1, high - 0.1, high - 0.1), _y(number) - 0.78
                axes.plot(xs, (y + 0.14, y, y, y + 0.14), color="#8a93a0", linewidth=0.7, zorder=3)


def _edges(axes: "Axes", sheet: Sheet, example: GraphExample, colours: Mapping[str, str]) -> None:
    """An arrow from the place of the cause that is nearest before the effect's first place, in the cause's colour."""
    from matplotlib.patches import FancyArrowPatch

    if example.graph is None:
        return
    for edge in example.graph.edges:
        target = min(example.graph.node(edge.effect).spans, key=_order)
        places = sorted(example.graph.node(edge.cause).spans, key=_order)
        before = [span for span in places if _order(span) < _order(target)]
        start, end = sheet.middle(before[-1] if before else places[0]), sheet.middle(target)
        same = start[1] == end[1]
        arrow = FancyArrowPatch(
            (start[0], _y(start[1]) + (0.62 if same else -0.62)),
            (end[0], _y(end[1]) + 0.66),
            connectionstyle=f"arc3,rad={_bend(start, end)}",
            arrowstyle="-|>,head_length=3.2,head_width=1.6",
            linestyle=(0, (4, 2)) if edge.ambiguous else "-",
            linewidth=1.1 + 0.5 * min(edge.weight, 2.0) - 0.5,
            color=colours[edge.cause],
            alpha=0.8,
            shrinkA=0,
            shrinkB=1,
            zorder=3.5,
        )
        axes.add_patch(arrow)


def _bend(start: tuple[float, int], end: tuple[float, int]) -> float:
    """How far an arrow bows out: over the letters within a line, a little between lines."""
    if start[1] == end[1]:
        distance = max(abs(end[0] - start[0]), 1.0)
        return (-1.0 if end[0] > start[0] else 1.0) * min(0.9, 3.2 / distance)
    return 0.12 if end[0] > start[0] else -0.12


def _order(span: Span) -> tuple[int, int]:
    return FIELD_NAMES.index(span.field), span.start
