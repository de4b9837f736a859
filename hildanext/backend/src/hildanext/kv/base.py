"""What one forward holds: for each document a run of clean tokens, then a run of noisy ones, one run behind another.

Positions are absolute in the document. Runs have any lengths; nothing is padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from hildanext.masks import Rows
from hildanext.runtime import send


@dataclass(frozen=True)
class Run:
    """A document's part of a forward: it feeds positions `start .. start + clean + noisy`."""

    start: int
    """Tokens of the document that are in its cache already."""
    clean: int
    """Final tokens that enter the cache with this forward."""
    noisy: int
    """Tokens of the active block that follow them (of several blocks, where finished ones are revised)."""

    @property
    def width(self) -> int:
        return self.clean + self.noisy

    @property
    def extent(self) -> int:
        """Slots of the cache that the run may look at."""
        return self.start + self.width


def positions_of(runs: Sequence[Run], device: torch.device) -> Int[Tensor, "one fed"]:
    """Position of each fed token."""
    return torch.cat([torch.arange(run.start, run.extent, device=device) for run in runs])[None]


def rows_of(runs: Sequence[Run], device: torch.device) -> Rows:
    """The fed tokens as the rule of `hildanext.masks` sees them, each run a document.

    The noisy run counts as one block behind every clean one, which it is in plain decoding, and which a revision
    of several blocks makes of it.
    """
    document = send([number for number, run in enumerate(runs) for _ in range(run.width)], device)[None]
    position = positions_of(runs, device)
    first = send([run.start + run.clean for run in runs], device)[document]
    noisy = position >= first
    return Rows(document, position.masked_fill(noisy, torch.iinfo(torch.int32).max), noisy)
