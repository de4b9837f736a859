"""What one forward holds: of each document a segment, first its clean tokens, then its noisy ones; one behind another.

Positions are absolute in the document. Segments have any lengths; nothing is padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hildanext.core.runtime import send
from hildanext.masks import CleanMask, TokenRows, may_attend


@dataclass(frozen=True)
class Segment:
    """A document's part of a forward: it feeds positions `start .. start + clean + noisy`."""

    start: int
    """Tokens before the segment: all in the cache already. Where finished blocks are revised the cache holds those too,
    and the forward writes over their slots (`DecodeState` puts them back)."""
    clean: int
    """Final tokens that enter the cache with this forward."""
    noisy: int
    """Tokens of the active block that follow them (of several blocks, where finished ones are revised)."""

    @property
    def num_tokens(self) -> int:
        return self.clean + self.noisy

    @property
    def end(self) -> int:
        """Slots of the cache that the segment may look at."""
        return self.start + self.num_tokens


def positions_of(segments: Sequence[Segment], device: torch.device) -> Int[Tensor, "one fed"]:
    """Position of each fed token."""
    return send([place for segment in segments for place in range(segment.start, segment.end)], device)[None]


def rows_of(segments: Sequence[Segment], device: torch.device) -> TokenRows:
    """The fed tokens as the rule of `hildanext.masks` sees them, each segment a document.

    The noisy segment counts as one block behind every clean one, which it is in plain decoding, and which a revision
    of several blocks makes of it.
    """
    owners = [number for number, segment in enumerate(segments) for _ in range(segment.num_tokens)]
    document = send(owners, device)[None]
    position = positions_of(segments, device)
    first = send([segment.start + segment.clean for segment in segments], device)[document]
    noisy = position >= first
    return TokenRows(document, position.masked_fill(noisy, torch.iinfo(torch.int32).max), noisy)


def sees(segment: Segment, block_size: int, clean_mask: CleanMask, device: torch.device) -> Bool[Tensor, "fed slot"]:
    """Which slots of its document, up to the segment's end, each fed token sees."""
    document = rows_of([Segment(0, segment.start + segment.clean, segment.noisy)], device)
    fed = document.each(lambda part: part[:, segment.start :])
    return may_attend(fed, document, block_size, clean_mask)[0]
