"""The document as it is being denoised, put together from the engine's steps."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from hildanext.decoding.trace import MASK
from hildanext.detokenization import cell_bytes, cut_pieces, pieces_of

State = Literal["mask", "draft", "edited", "committed"]

NEVER = -9999.0
"""Log probability where the probability rounds to nothing, as OpenAI has it."""


@dataclass
class Glyph:
    """A position behind the prompt. `probability` is the model's when the token was last written."""

    state: State = "mask"
    token: int | None = None
    text: str = MASK
    probability: float | None = None
    raw: bytes = MASK.encode()
    """The token's own bytes; `text` shows half a character as one that is not."""

    @property
    def logprob(self) -> float:
        return math.log(self.probability) if self.probability else NEVER


class Canvas:
    """Takes step records (`decoding.trace.step_record`) in order. The text does not show the tokens in `hidden`."""

    def __init__(self, prompt: int, block_size: int | None, hidden: Collection[int] = frozenset()) -> None:
        self.prompt, self.block_size, self.hidden = prompt, block_size, hidden
        self.glyphs: dict[int, Glyph] = {}
        self.edits = 0
        self._open: set[int] = set()
        """Positions of the block that is not final yet."""

    def apply(self, record: Mapping[str, Any]) -> None:
        """The next forward. A `revise` one edits blocks that are final already, and ends none, whatever it says."""
        for at, glyph in self.glyphs.items():
            if glyph.state == "edited":
                glyph.state = "draft" if at in self._open else "committed"
            elif glyph.state == "draft" and at not in self._open:  # in exact mode what is written is final
                glyph.state = "committed"
        for at in record["masks"]:
            self.glyphs[at] = Glyph()
            self._open.add(at)
        for cell in record["drafts"]:
            self.glyphs[cell["position"]] = Glyph(
                "draft", cell["token"], cell["text"], cell["probability"], cell_bytes(cell)
            )
        for cell in record["edits"]:
            self.glyphs[cell["position"]] = Glyph(
                "edited", cell["new"], cell["new_text"], cell["probability"], cell_bytes(cell, "new_")
            )
            self.edits += 1
        if record["final"] and record["kind"] == "denoise":
            for at in self._open:
                if self.glyphs[at].state == "draft":
                    self.glyphs[at].state = "committed"
            self._open.clear()

    def text(self) -> str:
        """Everything behind the prompt, masks as a sign, the end of text as nothing; half a character shows as one
        that is not."""
        shown = (glyph.raw for _, glyph in sorted(self.glyphs.items()) if glyph.token not in self.hidden)
        return b"".join(shown).decode("utf-8", "replace")

    def picture(self, record: Mapping[str, Any], committed: int) -> dict[str, Any]:
        """A frame for clients that draw it; `committed` counts the characters that are final."""
        start = record["block_start"]
        places = sorted(self.glyphs)
        texts = dict(zip(places, pieces_of(self.glyphs[at].raw for at in places), strict=True))
        block = start // self.block_size if self.block_size else 0
        return {
            "type": "frame",
            "block": block,
            "forward": record["forward"],
            "kind": record["kind"],
            "n_masked": sum(glyph.state == "mask" for glyph in self.glyphs.values()),
            "n_edited": len(record["edits"]),
            "final": record["final"],
            "text": self.text(),
            "committed_chars": committed,
            "tokens": [
                {"pos": at, "id": glyph.token, "text": texts[at], "state": glyph.state, "p": glyph.probability}
                for at, glyph in sorted(self.glyphs.items())
                if at >= start
            ],
        }

    def kept(self, count: int, text: str) -> list[Glyph]:
        """The first `count` positions behind the prompt, the tokens of an answer that says `text`.

        Their texts join to it: a token of a character's beginning has none, nor has what ended the text.
        """
        glyphs = [self.glyphs.get(at, Glyph()) for at in range(self.prompt, self.prompt + count)]
        raws = [b"" if glyph.token in self.hidden else glyph.raw for glyph in glyphs]
        cut = cut_pieces(raws, text)
        return [replace(glyph, text=shown, raw=raw) for glyph, (shown, raw) in zip(glyphs, cut, strict=True)]
