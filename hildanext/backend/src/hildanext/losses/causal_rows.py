"""Which rows and columns of an attention map a causal pair means, in whatever way the view is fed.

The row of an effect is the one its prediction is read from (its noisy copy under `shift=none`; the position before
it under the left shift). The column of a cause is the copy of it that this row may attend to: the clean one of an
earlier block, the noisy one of the row's own block. A cause in a later block has none, and the pair is dropped.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hildanext import masks
from hildanext.corruption.input_layout import InputLayout
from hildanext.diffusion import CausalPairs, NoisedBatch, Shift
from hildanext.masks import CleanMask


@dataclass(frozen=True)
class CausalRows:
    """Rows to look at, each batch row's own, filled up to a common number; all but `index` describe fed columns."""

    index: Int[Tensor, "batch rows"]
    """Fed index of the query; 0 where there is none."""
    real: Bool[Tensor, "batch rows"]
    visible: Bool[Tensor, "batch rows fed"]
    """What the row may attend to; everything for a row that is not real, so that no softmax is empty."""
    causal: Float[Tensor, "batch rows fed"]
    """Weights of the columns of causes; each row adds up to 1."""
    others: Float[Tensor, "batch rows fed"]
    """The same for the visible columns that are neither causes nor special tokens nor the row itself."""
    row: Int[Tensor, " real"]
    """With `place` where `real` is true, in row-major order: nobody has to wait to count them."""
    place: Int[Tensor, " real"]

    def to(self, device: torch.device) -> "CausalRows":
        """The same rows on a device; the host does not wait for it."""
        parts = (self.index, self.real, self.visible, self.causal, self.others, self.row, self.place)
        return CausalRows(*(part.to(device, non_blocking=True) for part in parts))


def causal_rows(
    view: NoisedBatch,
    fed: InputLayout,
    shift: Shift,
    clean_mask: CleanMask,
    wanted: Bool[Tensor, "batch seq"],
    special: Bool[Tensor, " vocab"],
    max_rows: int,
    generator: torch.Generator | None,
) -> CausalRows | None:
    """The rows of the `wanted` effects that see a cause and something else, at most `max_rows` (drawn) a sequence.

    None where there is no such row; nothing is drawn unless there are too many.
    """
    if view.pairs is None:
        return None
    pairs = _of_wanted(view.pairs.to(view.clean.device), wanted)
    if len(pairs.row) == 0:
        return None
    seq = view.clean.shape[1]
    effects, group = torch.unique(pairs.row * seq + pairs.effect, return_inverse=True)
    row, effect = effects // seq, effects % seq
    keys = fed.rows(view)
    query = fed.prediction_index(view.position, view.block_size, shift)[row, effect]
    asking = keys.each(lambda part: part[row, query][:, None])
    sources = keys.each(lambda part: part[row])
    visible = masks.may_attend(asking, sources, view.block_size, clean_mask)[:, 0]

    copies = fed.noisy_column, fed.clean_column
    causal = torch.zeros(visible.shape, device=visible.device)
    for column in (copy[pairs.row, pairs.cause] for copy in copies):  # a row may see at most one of the two
        seen = (column >= 0) & visible[group, column.clamp_min(0)]
        causal[group[seen], column[seen]] = pairs.weight[seen].to(causal.dtype)
    others = visible & (causal == 0) & ~special[fed.tokens(view)][row]
    number = torch.arange(len(row), device=row.device)
    for column in (query, *(copy[row, effect] for copy in copies)):
        others[number[column >= 0], column[column >= 0]] = False
    usable = causal.any(-1) & others.any(-1)
    kept = _at_most(max_rows, row, usable.nonzero()[:, 0], generator)
    return _filled(len(view.clean), row[kept], query[kept], visible[kept], causal[kept], others[kept])


def _of_wanted(pairs: CausalPairs, wanted: Tensor) -> CausalPairs:
    keep = wanted[pairs.row, pairs.effect]
    return CausalPairs(pairs.row[keep], pairs.effect[keep], pairs.cause[keep], pairs.weight[keep])


def _at_most(most: int, row: Tensor, usable: Tensor, generator: torch.Generator | None) -> Tensor:
    """The usable entries, `most` drawn ones where a batch row has more, in order."""
    kept = []
    for number in row[usable].unique():
        here = usable[row[usable] == number]
        if len(here) > most:
            here = here[torch.randperm(len(here), generator=generator)[:most].sort().values.to(here.device)]
        kept.append(here)
    return torch.cat(kept) if kept else usable


def _filled(
    batch: int, row: Tensor, query: Tensor, visible: Tensor, causal: Tensor, others: Tensor
) -> CausalRows | None:
    """Flat entries (sorted by batch row) as one rectangle, each row's columns weighted to add up to 1."""
    if len(row) == 0:
        return None
    counts = torch.bincount(row, minlength=batch)
    most, fed = int(counts.max()), visible.shape[1]
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]

    def rectangle(flat: Tensor, empty: float | int | bool, *tail: int) -> Tensor:
        full = torch.full((batch, most, *tail), empty, dtype=flat.dtype, device=flat.device)
        full[row, place] = flat
        return full

    return CausalRows(
        index=rectangle(query, 0),
        real=rectangle(torch.ones_like(row, dtype=torch.bool), False),
        visible=rectangle(visible, True, fed),
        causal=rectangle(causal / causal.sum(-1, keepdim=True), 0.0, fed),
        others=rectangle(others / others.sum(-1, keepdim=True), 0.0, fed),
        row=row,
        place=place,
    )
