"""A denoising as a moving picture: an animated SVG of masks, drafts and edits, from a trace that `generate` wrote.

hildanext generate --prompt "Once upon a time" --max-new-tokens 37 --trace hildanext/docs/pictures/denoising.json
python hildanext/scripts/draw_denoising.py                       docs/pictures/denoising.json to denoising.svg
python hildanext/scripts/draw_denoising.py trace.json picture.svg

A line of the picture is a block, a frame is a forward. Nothing in it is a script: CSS moves it, so that it runs where
an SVG is an image; it has a background of its own, follows light and dark, and stands still at its end for readers who
asked for less motion.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"

SECONDS, SECONDS_OF_AN_EDIT, SECONDS_AT_THE_END = 0.28, 1.1, 4.0
CHARACTER, PADDING, GAP, CELL, LINE, LEFT, TOP = 9.1, 5, 4, 26, 38, 92, 62
"""Pixels: a monospaced character at 15 px, around a text, between cells, a cell's height, a line's, the margins."""

STYLE = """
text { font: 15px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #1f2328 }
.page { fill: #ffffff; stroke: #d0d7de }
.dim, .prompt { fill: #59636e } .dim { font-size: 13px }
.mask { fill: #a8c7fa } .draft { fill: #9be9a8 } .edit { fill: #ffc928 } .kept { fill: none }
.on-draft, .on-edit { font-weight: bold }
.on-cut { text-decoration: line-through; fill: #8b949e }
.end { text-anchor: end } .middle { text-anchor: middle }
.frame { opacity: 0 } .frame.last { opacity: 1 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .page { fill: #0d1117; stroke: #30363d } .dim, .prompt { fill: #9198a1 }
  .mask { fill: #2b5797 } .draft { fill: #1f7a37 } .edit { fill: #f2b600 }
  .on-edit { fill: #1f2328 } .on-cut { fill: #6e7681 }
}
@media (prefers-reduced-motion: reduce) { .frame { animation: none !important } }
"""


@dataclass
class Cell:
    """One position: what it shows from which frame on. A text of None is nothing, a mask has no text."""

    states: list[tuple[int, str, str]] = field(default_factory=list)

    def show(self, frame: int, kind: str, text: str = "") -> None:
        if not self.states or self.states[-1][1:] != (kind, text):
            self.states.append((frame, kind, text))

    def settle(self, frame: int) -> None:
        """What was written a frame ago is no news any more."""
        if self.states and self.states[-1][1] in ("draft", "edit"):
            self.show(frame, "kept", self.states[-1][2])

    @property
    def width(self) -> float:
        return max(len(text) for _, _, text in self.states) * CHARACTER + 2 * PADDING


@dataclass
class Film:
    """The cells of every block, how long each frame lasts, and what is said below it."""

    blocks: dict[int, dict[int, Cell]]
    seconds: list[float]
    counts: list[str]
    captions: list[str]


def visible(text: str) -> str:
    return text.strip(" ").replace("\n", "⏎") or "␣"


def film(row: Mapping[str, Any]) -> Film:
    """The frames of one row of a trace: one for every block as it opens, one for every forward, one at the end."""
    made = Film({}, [], [], [])
    forwards = 0
    for step in row["steps"]:
        cells = made.blocks.setdefault(step["block_start"], {})
        if not cells:
            frame = _frame(made, SECONDS, f"forward {forwards}", "")
            for position in step["masks"]:
                cells.setdefault(position, Cell()).show(frame, "mask")
        forwards += 1
        changes = [f"{visible(edit['old_text'])} → {visible(edit['new_text'])}" for edit in step["edits"]]
        caption = f"edit: {', '.join(changes)}" if changes else ""
        frame = _frame(made, SECONDS_OF_AN_EDIT if changes else SECONDS, f"forward {forwards}", caption)
        for cell in (cell for block in made.blocks.values() for cell in block.values()):
            cell.settle(frame)
        for draft in step["drafts"]:
            cells[draft["position"]].show(frame, "draft", visible(draft["text"]))
        for edit in step["edits"]:
            block = next(block for block in made.blocks.values() if edit["position"] in block)
            block[edit["position"]].show(frame, "edit", visible(edit["new_text"]))
    stats = row["stats"]
    said = f"{stats['tokens']} tokens, {stats['forwards']} forwards, {stats['edits']} edits"
    frame = _frame(made, SECONDS_AT_THE_END, f"forward {forwards}", said)
    positions = sorted(position for block in made.blocks.values() for position in block)
    for block in made.blocks.values():
        for position, cell in block.items():
            cell.settle(frame)
            if position >= positions[0] + stats["tokens"]:  # behind the length that was asked for
                cell.show(frame, "cut", cell.states[-1][2])
    return made


def _frame(made: Film, seconds: float, count: str, caption: str) -> int:
    made.seconds.append(seconds)
    made.counts.append(count)
    made.captions.append(caption)
    return len(made.seconds) - 1


class Timeline:
    """Spans of frames as CSS animations, each written once."""

    def __init__(self, seconds: list[float]) -> None:
        self.total = sum(seconds)
        self.starts = [sum(seconds[:frame]) / self.total * 100 for frame in range(len(seconds))]
        self.frames = len(seconds)
        self.names: dict[tuple[int, int], str] = {}

    def span(self, first: int, end: int) -> str:
        """The class of what is seen from frame `first` until `end`."""
        name = self.names.setdefault((first, end), f"f{len(self.names)}")
        return f"frame {name}{' last' if end == self.frames else ''}"

    def style(self) -> str:
        rules = [f".frame {{ animation: {self.total:.2f}s step-end infinite }}"]
        for (first, end), name in self.names.items():
            hide = f"{self.starts[end]:.3f}% {{ opacity: 0 }}" if end < self.frames else ""
            start = "" if first == 0 else "0% { opacity: 0 } "
            rules.append(f"@keyframes {name} {{ {start}{self.starts[first]:.3f}% {{ opacity: 1 }} {hide} }}")
            rules.append(f".{name} {{ animation-name: {name} }}")
        return "\n".join(rules)


def draw(trace: Mapping[str, Any]) -> str:
    """The SVG of a trace's first row."""
    row = trace["rows"][0]
    made = film(row)
    time = Timeline(made.seconds)
    body: list[str] = []
    right = 0.0
    for line, (start, cells) in enumerate(sorted(made.blocks.items())):
        top = TOP + line * LINE
        body.append(f'<text class="dim" x="16" y="{top + 18}">block {start // trace["block_size"]}</text>')
        left = float(LEFT)
        if line == 0:
            left += len(row["prompt"]) * CHARACTER + 2 * PADDING + GAP
            body.append(f'<text class="prompt" x="{LEFT + PADDING}" y="{top + 18}">{escape(row["prompt"])}</text>')
        for _, cell in sorted(cells.items()):
            body += _draw_cell(cell, left, top, time)
            left += cell.width + GAP
        right = max(right, left)
    width, bottom = round(max(right + 12, 560)), TOP + len(made.blocks) * LINE
    for kind, words in (("dim end", made.counts), ("dim", made.captions)):
        x, y = width - 16 if "end" in kind else LEFT + PADDING, bottom + 16
        body += [f'<text class="{kind} {span}" x="{x}" y="{y}">{escape(said)}</text>'
                 for said, span in _spans(words, time) if said]  # fmt: skip
    shown = f'<rect class="page" x="0.5" y="0.5" width="{width - 1}" height="{bottom + 31}" rx="8"/>'
    size = f'width="{width}" height="{bottom + 32}" viewBox="0 0 {width} {bottom + 32}"'
    title = escape(f"{row['prompt']}{row['text']}, denoised block by block")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{title}">'
    style = f"<style>{STYLE}{time.style()}</style>"
    return "\n".join([head, style, shown, *_legend(), *body, "</svg>"]) + "\n"


def _draw_cell(cell: Cell, left: float, top: int, time: Timeline) -> list[str]:
    ends = [frame for frame, _, _ in cell.states[1:]] + [time.frames]
    drawn = []
    for (frame, kind, text), end in zip(cell.states, ends, strict=True):
        box = f'x="{left:.1f}" y="{top}" width="{cell.width:.1f}" height="{CELL}" rx="4"'
        middle = f'x="{left + cell.width / 2:.1f}" y="{top + 18}"'
        filled = f'<rect class="{kind}" {box}/>' if kind in ("mask", "draft", "edit") else ""
        word = f'<text class="middle on-{kind}" {middle}>{escape(text)}</text>' if text else ""
        drawn.append(f'<g class="{time.span(frame, end)}">{filled}{word}</g>')
    return drawn


def _spans(words: list[str], time: Timeline) -> list[tuple[str, str]]:
    """Each text with the class of the frames in which it stands."""
    starts = [at for at, said in enumerate(words) if at == 0 or said != words[at - 1]]
    return [(words[at], time.span(at, end)) for at, end in zip(starts, [*starts[1:], time.frames], strict=True)]


def _legend() -> list[str]:
    drawn, left = [], float(LEFT)
    for kind, meaning in (("mask", "mask"), ("draft", "draft: just filled"), ("edit", "edit: rewritten")):
        drawn.append(f'<rect class="{kind}" x="{left + PADDING:.0f}" y="22" width="18" height="15" rx="3"/>')
        drawn.append(f'<text class="dim" x="{left + PADDING + 24:.0f}" y="34">{meaning}</text>')
        left += len(meaning) * 8 + 48
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", nargs="?", type=Path, default=PICTURES / "denoising.json")
    parser.add_argument("picture", nargs="?", type=Path)
    options = parser.parse_args()
    picture = options.picture or options.trace.with_suffix(".svg")
    picture.write_text(draw(json.loads(options.trace.read_text(encoding="utf-8"))), encoding="utf-8")
    print(f"{picture}: {picture.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
