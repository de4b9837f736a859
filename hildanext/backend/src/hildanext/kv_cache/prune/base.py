"""What a policy of pruning is: how many of a document's keys are kept, and which are worth most.

Scores are made where keys become final (a piece of the prompt, a commit), or where a block begins, and in no other
forward. The first `SINKS` slots and the newest ones are never dropped.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config

SINKS = 4
"""First slots of a document, which are always kept."""
RECENT = 128
"""Newest slots that are always kept, at the least."""


@dataclass(frozen=True)
class Slots:
    """One layer's committed keys of one document, after the rotary embedding, in the order of their positions."""

    keys: Float[Tensor, "kv_heads slots head_dim"]
    live: Bool[Tensor, "kv_heads slots"] | None
    """False for what was dropped already; None: nothing here was."""
    attention: Float[Tensor, "kv_heads slots"] | None
    """What each received in the forward that committed it (`Prune.wants_queries`)."""


@config
class Prune:
    """A policy over a row's cache. Members are frozen knobs; what was dropped is the cache's."""

    research: ClassVar[bool] = True
    wants_queries: ClassVar[bool] = False
    """Whether `Slots.attention` is wanted. Blocks are then committed from clean rows alone."""
    guides: ClassVar[bool] = False
    """Nothing is dropped: what a block's forwards see is chosen by its first one, anew for each block."""

    ratio: float = Field(default=0.5, ge=0, lt=1, allow_inf_nan=False)
    """Share of the committed tokens whose keys and values are dropped; 0 is off."""
    compact: bool = True
    """Move what is kept together, so that memory and time are saved; false masks what is dropped: the reference."""

    def recent(self, block: int, window: int) -> int:
        """Newest slots that stay: of blocks of so many tokens, `window` of which may still change behind the last."""
        return max(RECENT, 2 * block, (window + 1) * block)

    def kept(self, length: int, recent: int) -> int:
        """How many of `length` committed tokens each head keeps."""
        return max(int(length * (1 - self.ratio)), min(length, SINKS + recent))

    def scores(self, slots: Slots) -> Float[Tensor, "kv_heads slots"]:
        """What each slot is worth: the lowest are dropped, of equal ones the oldest first."""
        raise NotImplementedError(f"{type(self).__name__} has no scores")


def received(
    query: Float[Tensor, "parts kv_heads rows head_dim"], key: Float[Tensor, "parts kv_heads slots head_dim"],
    scale: float,
) -> Float[Tensor, "parts kv_heads slots"]:  # fmt: skip
    """The attention that keys receive from rows that see all of them: its mean over the rows, heads of a group too."""
    scores = query @ key.transpose(-1, -2) * scale
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).mean(-2)
