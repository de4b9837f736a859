"""What one cached forward holds: for each row of the batch a run of clean tokens, then a run of noisy ones.

Positions are absolute in the document, one document per row; a row shorter than the widest is padded at its end.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hildanext.masks import CleanMask, Rows, may_attend


@dataclass(frozen=True)
class Segment:
    """The tokens of one forward: row r feeds positions `start[r] .. start[r] + clean[r] + noisy`."""

    start: tuple[int, ...]
    """Tokens of each row that are in the cache already."""
    clean: tuple[int, ...]
    """Final tokens of each row that enter the cache with this forward."""
    noisy: int
    """Tokens of the active block that follow them, the same number in every row."""
    block_size: int
    clean_mask: CleanMask

    @cached_property
    def width(self) -> int:
        return max(self.clean) + self.noisy

    @cached_property
    def extent(self) -> int:
        """Slots of the cache that some row may look at."""
        return max(start + clean for start, clean in zip(self.start, self.clean, strict=True)) + self.noisy

    @cached_property
    def uniform(self) -> bool:
        """True where every row feeds the same positions."""
        return len(set(self.start)) == 1 and len(set(self.clean)) == 1

    @cached_property
    def sees_all(self) -> bool:
        """True where every query may attend to every slot below `extent`, so that no mask is needed."""
        one_clean_block = self.noisy == 0 and self.clean_mask == "block_causal" and self.clean[0] <= self.block_size
        return self.uniform and (self.clean[0] == 0 or one_clean_block)

    def positions(self, device: torch.device) -> tuple[Int[Tensor, "batch width"], Bool[Tensor, "batch width"]]:
        """Position of each fed token and whether it is padding (whose position reads 0)."""
        offset = torch.arange(self.width, device=device)[None, :]
        if self.uniform:
            return offset + self.start[0], torch.zeros_like(offset, dtype=torch.bool)
        start, clean = torch.tensor([self.start, self.clean], device=device)[:, :, None]
        padding = offset >= clean + self.noisy
        return (start + offset).masked_fill(padding, 0), padding

    def may_attend(
        self, positions: Int[Tensor, "batch width"], padding: Bool[Tensor, "batch width"]
    ) -> Bool[Tensor, "batch width extent"]:
        """The rule of `hildanext.masks` for these queries over the slots of the cache.

        Padding sees slot 0 alone, so that no softmax row is empty. The noisy run counts as one block,
        which it is in plain decoding, and which a revision of several blocks makes of it.
        """
        slot = torch.arange(self.extent, device=positions.device)[None, :]
        start, clean = torch.tensor([self.start, self.clean], device=positions.device)[:, :, None]
        if self.uniform:
            start, clean = start[:1], clean[:1]
        first = start + clean
        queries = Rows(torch.where(padding, -1, 0), positions, positions >= first)
        keys = Rows(torch.where(slot < first + self.noisy, 0, -1), slot.expand(len(first), -1), slot >= first)
        allowed = may_attend(_one_block(queries), _one_block(keys), self.block_size, self.clean_mask)
        return allowed | (padding[:, :, None] & (slot == 0)[:, None, :])


def _one_block(rows: Rows) -> Rows:
    """The same rows with all noisy tokens moved into one block behind every clean one."""
    return rows._replace(position=rows.position.masked_fill(rows.noisy, torch.iinfo(torch.int32).max))
