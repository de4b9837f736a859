"""Where drafts are learnt: groups of mask rows behind anchors that may stand anywhere in a document."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class DraftGroups:
    """Groups of mask rows in a batch of clean rows. Mask i of a group has the position anchor + 1 + i and is to say the
    token in column anchor + 2 + i; the column between is what the parent says in the same forward."""

    anchors: Int[Tensor, "batch groups"]
    """Columns of the clean rows."""
    learnt: Bool[Tensor, "batch groups places"]
    """Whether a mask's token lies in the anchor's document and may be learnt; false from the first that may not on."""

    @property
    def places(self) -> int:
        return self.learnt.shape[2]

    def columns(self, seq: int) -> Int[Tensor, "batch groups places"]:
        """The clean row of `seq` that reads what each mask reads: the parent's state behind the same text."""
        reach = torch.arange(1, self.places + 1, device=self.anchors.device)
        return (self.anchors[:, :, None] + reach).clamp_max(seq - 1)  # behind the row's end nothing is learnt

    def to(self, device: torch.device | str) -> "DraftGroups":
        return DraftGroups(*(part.to(device, non_blocking=True) for part in (self.anchors, self.learnt)))


def draw_groups(
    document: Int[Tensor, "batch seq"],
    learnable: Bool[Tensor, "batch seq"],
    groups: int,
    places: int,
    generator: torch.Generator | None,
) -> DraftGroups:
    """`groups` anchors of each row, without repetition, among all whose first mask has something to learn; where a row
    has fewer, the rest learns nothing. All anchors in order where `generator` is None and `groups` is the row's length.
    """
    batch, seq = document.shape
    inside = torch.zeros(batch, seq, places, dtype=torch.bool)
    for place in range(min(places, max(seq - 2, 0))):
        reach = place + 2
        here = (document[:, :-reach] == document[:, reach:]) & (document[:, reach:] >= 0) & learnable[:, reach:]
        inside[:, : seq - reach, place] = here if place == 0 else here & inside[:, : seq - reach, place - 1]
    possible = inside[:, :, 0]
    chance = torch.rand(batch, seq, generator=generator) if generator is not None else torch.ones(batch, seq)
    order = chance.masked_fill(~possible, -1.0).sort(dim=-1, descending=True, stable=True).indices[:, :groups]
    anchors = order.sort(-1).values
    learnt = inside[torch.arange(batch)[:, None], anchors]
    return DraftGroups(anchors, learnt)
