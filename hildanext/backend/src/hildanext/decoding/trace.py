"""What decoding did, step by step: as JSON to keep, and live in a terminal to watch."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from hildanext.core.console import wide_console
from hildanext.decoding.sequence import Step
from hildanext.detokenization import TokenCells, cell_bytes, pieces_of

TRACE_FORMAT = 1
STYLES = {
    "prompt": "dim", "kept": "", "draft": "bold green", "edit": "bold black on yellow", "mask": "dim blue",
    "gone": "strike red",
}  # fmt: skip
MASK = "░"


def step_record(step: Step, texts: TokenCells | None = None) -> dict[str, Any]:
    """A step in JSON types; beside the ids what their texts are, where there are any (`TokenCells.cell`)."""
    drafts: list[dict[str, Any]]
    edits: list[dict[str, Any]]
    # Of exact mode they are the parent's own, which are told to all the digits that they have.
    sure = (lambda p: float(f"{p:.9g}")) if step.kind == "exact" else (lambda p: round(p, 6))
    drafts = [{"position": at, "token": new, "probability": sure(p)} for at, new, p in step.drafts]
    edits = [{"position": at, "old": old, "new": new, "probability": sure(p)} for at, old, new, p in step.edits]
    if texts is not None:
        for cell in drafts:
            cell |= texts.cell(cell["position"], cell["token"])
        for cell in edits:
            for which in ("old", "new"):
                cell |= texts.cell(cell["position"], cell[which], f"{which}_")
    return {
        "row": step.row,
        "forward": step.forward,
        "kind": step.kind,
        "block_start": step.start,
        "masks": step.masks,
        "drafts": drafts,
        "edits": edits,
        "final": step.final,
    }


def trace_record(steps: Sequence[Step], texts: TokenCells | None = None) -> dict[str, Any]:
    """A whole trace; `final` marks the step that committed its block."""
    return {"format": TRACE_FORMAT, "steps": [step_record(step, texts) for step in steps]}


class TerminalView:
    """One row's document as it is being denoised: masks, this step's drafts and edits in colour.

    `prompt` are its cells (`TokenCells.prompt`). On a terminal the picture is redrawn in place; elsewhere every step is
    one line.
    """

    def __init__(self, prompt: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
        self.console = console if console is not None else wide_console()
        self.cells: dict[float, tuple[bytes, str]] = {cell["position"]: (cell_bytes(cell), "prompt") for cell in prompt}
        self.forwards = 0
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None

    def __enter__(self) -> "TerminalView":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, step: Mapping[str, Any]) -> None:
        """Draw the canvas after a step, told by its record."""
        self.forwards += 1
        self.cells = {
            at: (raw, "kept" if how in ("draft", "edit") else how)
            for at, (raw, how) in self.cells.items()
            if how != "gone"
        }
        self.cells |= {at: (MASK.encode(), "mask") for at in step["masks"]}
        self.cells |= {cell["position"]: (cell_bytes(cell), "draft") for cell in step["drafts"]}
        self.cells |= {cell["position"]: (cell_bytes(cell, "new_"), "edit") for cell in step["edits"]}
        if step["kind"] == "exact":  # the draft was never part of the text: it stands before what is, for this step
            self.cells |= {cell["position"] - 0.5: (cell_bytes(cell, "old_"), "gone") for cell in step["edits"]}
        if self._live is not None:
            self._live.update(self.render(), refresh=True)
        else:
            self.console.print(self.line(step))

    def render(self) -> RenderableType:
        """The document so far, a legend above it."""
        picture = Text(f"forward {self.forwards}  ", style="dim")
        for name in ("mask", "draft", "edit"):
            picture.append(f" {name} ", style=STYLES[name])
        picture.append("\n")
        for text, how in self._visible():
            picture.append(text, style=STYLES[how])
        return picture

    def _texts(self, start: float = -1) -> list[tuple[str, str]]:
        """Text and look of each position from `start` on, in order."""
        cells = [self.cells[at] for at in sorted(at for at in self.cells if at >= start)]
        return list(zip(pieces_of(raw for raw, _ in cells), (how for _, how in cells), strict=True))

    def _visible(self) -> list[tuple[str, str]]:
        """The last of them, as many as the screen surely holds (a line break may cost a whole line)."""
        cells_left = self.console.width * max(self.console.height - 4, 1)
        shown: list[tuple[str, str]] = []
        for text, how in reversed(self._texts()):
            cells_left -= len(text) + self.console.width * text.count("\n")
            if cells_left < 0:
                break
            shown.append((text, how))
        return shown[::-1]

    def line(self, step: Mapping[str, Any]) -> Text:
        """One step as one line: counts, then the active block with masks, drafts and edits marked."""
        start, final = step["block_start"], ", final" if step["final"] else ""
        head = f"{self.forwards:4d} {step['kind']} block at {start}: {len(step['masks'])} masks, "
        line = Text(f"{head}+{len(step['drafts'])} drafts, {len(step['edits'])} edits{final} | ")
        for text, how in self._texts(start - 0.5):  # with a draft that gave way to the first token
            shown = text.replace("\n", "⏎")
            line.append(f"[{shown} →]" if how == "gone" else shown, style=STYLES[how])
        return line
