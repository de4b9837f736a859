"""A block's first forward, all masks, says where its other forwards look."""

from typing import ClassVar

from pydantic import Field

from hildanext.core.config import config
from hildanext.kv_cache.prune.base import Prune


@config
class MaskGuided(Prune):
    """Each head keeps in sight the slots that received the most attention in the block's first forward.

    Nothing is dropped, and the next block chooses anew: time is saved, memory is not. Clean rows see everything, so
    that what is committed is exact; for that every block is committed by clean rows.

    Paper: MAGE, arXiv:2602.14209.
    Differs: a reconstruction from the abstract: the mean over the block's rows and a group's heads, one choice a layer
    and head. A block that begins inside the prompt has its tokens in that first forward.
    """

    guides: ClassVar[bool] = True

    newest: int = Field(default=128, ge=0)
    """Newest slots that are always seen: two blocks at the least. Fewer than 128 lose nothing: they come back."""

    def recent(self, block: int, window: int) -> int:
        return max(self.newest, 2 * block)
