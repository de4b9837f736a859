"""What decoding did, step by step: as JSON to keep, and live in a terminal to watch."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from hildanext.decoding.sequence import Step

TRACE_FORMAT = 1
STYLES = {"prompt": "dim", "kept": "", "draft": "bold green", "edit": "bold black on yellow", "mask": "dim blue"}
MASK = "░"


def step_record(step: Step, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Any]:
    """A step in JSON types; token texts beside the ids where there is a tokenizer."""
    drafts = [{"position": at, "token": new, "probability": round(p, 6)} for at, new, p in step.drafts]
    edits = [{"position": at, "old": old, "new": new, "probability": round(p, 6)} for at, old, new, p in step.edits]
    if tokenizer is not None:
        for cell in drafts:
            cell["text"] = tokenizer.decode([cell["token"]])
        for cell in edits:
            cell["old_text"], cell["new_text"] = tokenizer.decode([cell["old"]]), tokenizer.decode([cell["new"]])
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


def trace_record(steps: Sequence[Step], tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Any]:
    """A whole trace; `final` marks the step that committed its block."""
    return {"format": TRACE_FORMAT, "steps": [step_record(step, tokenizer) for step in steps]}


class TerminalView:
    """One row's document as it is being denoised: masks, this step's drafts and edits in colour.

    On a terminal the picture is redrawn in place; elsewhere every step is one line.
    """

    def __init__(
        self, prompt: Sequence[int], tokenizer: PreTrainedTokenizerBase, console: Console | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.console = console if console is not None else Console()
        self.prompt = len(prompt)
        self.cells: dict[int, tuple[str, str]] = {
            at: (tokenizer.decode([token]), "prompt") for at, token in enumerate(prompt)
        }
        self.forwards = 0
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None

    def __enter__(self) -> "TerminalView":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, step: Step) -> None:
        """Draw the canvas after a step."""
        self.forwards += 1
        self.cells = {at: (text, "kept" if how in ("draft", "edit") else how) for at, (text, how) in self.cells.items()}
        self.cells |= {at: (MASK, "mask") for at in step.masks}
        self.cells |= {at: (self.tokenizer.decode([new]), "draft") for at, new, _ in step.drafts}
        self.cells |= {at: (self.tokenizer.decode([new]), "edit") for at, _, new, _ in step.edits}
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
        for at in self._visible():
            text, how = self.cells[at]
            picture.append(text, style=STYLES[how])
        return picture

    def _visible(self) -> list[int]:
        """The last positions, as many as the screen surely holds (a line break may cost a whole line)."""
        cells_left = self.console.width * max(self.console.height - 4, 1)
        shown: list[int] = []
        for at in sorted(self.cells, reverse=True):
            text = self.cells[at][0]
            cells_left -= len(text) + self.console.width * text.count("\n")
            if cells_left < 0:
                break
            shown.append(at)
        return shown[::-1]

    def line(self, step: Step) -> Text:
        """One step as one line: counts, then the active block with masks, drafts and edits marked."""
        head = f"{self.forwards:4d} {step.kind} block at {step.start}: {len(step.masks)} masks, "
        line = Text(f"{head}+{len(step.drafts)} drafts, {len(step.edits)} edits{', final' if step.final else ''} | ")
        for at in sorted(at for at in self.cells if at >= step.start):
            text, how = self.cells[at]
            line.append(text.replace("\n", "⏎"), style=STYLES[how])
        return line
