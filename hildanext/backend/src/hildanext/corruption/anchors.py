"""Where drafts are learnt: groups of mask rows behind anchors that may stand anywhere in a document."""

from dataclasses import dataclass, fields, replace

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

    shown: Int[Tensor, "batch groups places"] | None = None
    """The token that a row shows in place of a mask, -1 for a mask; None where all rows are masks."""

    @property
    def places(self) -> int:
        return self.learnt.shape[2]

    @property
    def noised(self) -> Bool[Tensor, "batch groups"]:
        """Groups in which a row shows a token."""
        if self.shown is None:
            return torch.zeros_like(self.anchors, dtype=torch.bool)
        return (self.shown >= 0).any(-1)

    def columns(self, seq: int) -> Int[Tensor, "batch groups places"]:
        """The clean row of `seq` that reads what each mask reads: the parent's state behind the same text."""
        reach = torch.arange(1, self.places + 1, device=self.anchors.device)
        return (self.anchors[:, :, None] + reach).clamp_max(seq - 1)  # behind the row's end nothing is learnt

    def to(self, device: torch.device | str) -> "DraftGroups":
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        there = {name: part.to(device, non_blocking=True) for name, part in parts.items() if part is not None}
        return DraftGroups(**there)


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


def show_tokens(
    groups: DraftGroups,
    tokens: Int[Tensor, "batch seq"],
    share: float,
    wrong: float,
    vocabulary: int,
    generator: torch.Generator | None,
) -> DraftGroups:
    """Groups of which about `share` are partly filled, as an editor finds them: M2T and T2T in the words of LLaDA2.1.

    A level is drawn for each of these groups, and each of its rows shows the token of its own position with that
    chance, of which the share `wrong` is a random one below `vocabulary`. What is learnt there is what stands behind a
    mask or a wrong token: a row is learnt unless the next row shows the token that it is to say. Left as they are: rows
    whose own token is not the document's to learn.
    """
    if share == 0.0:
        return groups
    shape = groups.learnt.shape
    partly = torch.rand(shape[:2], generator=generator) < share
    level = torch.rand(shape[:2], generator=generator)
    shows = (torch.rand(shape, generator=generator) < level[..., None]) & partly[..., None] & groups.learnt
    is_wrong = torch.rand(shape, generator=generator) < wrong
    random = torch.randint(vocabulary, shape, generator=generator)
    rows = torch.arange(shape[0])[:, None, None]
    own = tokens[rows, groups.columns(tokens.shape[1])]
    shown = torch.where(shows, torch.where(is_wrong, random, own), -1)
    settled = torch.zeros_like(shows)
    settled[..., :-1] = (shown == own)[..., 1:]
    return replace(groups, learnt=groups.learnt & ~settled, shown=shown)
