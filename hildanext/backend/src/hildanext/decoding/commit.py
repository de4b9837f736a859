"""Where keys and values of a finished block are committed to its row's cache, and when.

A block is committed from clean rows alone: those of the next forward ("fused"), of a forward of their own
("separate"), or with no work at all ("auto", fused otherwise) where the last forward of the block changed nothing: its
input was the final tokens, and under the block-causal rule noisy rows of them have the keys and values of clean ones.
One edit in that forward and they are those of other tokens; token-causally a clean row sees less than a noisy one did.
A cache may want clean rows in any case (`BlockCache.needs_clean`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from hildanext.decoding.feed_plan import Feed, pending_blocks
from hildanext.decoding.sequence import SequenceState
from hildanext.masks import CleanMask

Commit = Literal["auto", "fused", "separate"]


@dataclass(frozen=True)
class CommitPolicy:
    """When a block is committed; `DecodeState` asks at three points of a step."""

    mode: Commit
    block: int
    clean_mask: CleanMask

    def ahead(self, rows: Sequence[SequenceState]) -> list[Feed]:
        """What a forward of its own commits before the active blocks are fed; most often nothing."""
        return pending_blocks([row for row in rows if row.cache is not None]) if self.mode == "separate" else []

    def fed(self, feeds: Sequence[Feed], hidden: Float[Tensor, "fed hidden"]) -> None:
        """Commit the clean tokens of a forward, and keep the hidden state behind each of their blocks."""
        begin = 0
        for row, segment in feeds:
            if segment.clean > 0:
                block = segment.start // self.block + 1
                lasts = hidden[begin + self.block - 1 : begin + segment.clean : self.block]
                row.last_clean_hidden[block : block + len(lasts)] = lasts
                if row.cache is not None:
                    row.cache.commit(segment.start + segment.clean, row.tokens)
            begin += segment.num_tokens

    def finished(self, row: SequenceState, unchanged: bool) -> None:
        """The block before `start` is final; `unchanged` where its last forward was fed what it holds now."""
        free = unchanged and self.mode == "auto" and self.clean_mask == "block_causal"
        if free and row.cache is not None and not row.cache.needs_clean:
            row.cache.commit(row.start, row.tokens)
