"""Attention of branches behind one beginning, each branch by itself: no score between two of them is computed.

Under one mask over all columns G branches of R tokens have G x G x R x R scores with each other, all of them empty.
Here a branch is a row of its own, whose clean keys are the beginning's and its own. In fp64 it agrees to rounding with
`dense` and `blockwise` under the same rule (`masks.may_attend`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hildanext import masks
from hildanext.masks import CleanMask, TokenRows
from hildanext.models.attention.blockwise import DoubledAttention, aligned, doubled_attention
from hildanext.models.attention.dense import AttentionContext, MaskedAttention, grouped_attention

WORTH_WHILE = 2.0
"""How many times the scores the branches must have together before each gets rows of its own: those cost copies."""


@dataclass
class BranchedAttention:
    """Attention context for columns of which `TokenRows.branch` tells the branch; columns are counted over all rows."""

    beginning: Int[Tensor, "rows shared"]
    """Clean columns of each row's beginning; -1 is filling."""
    branches: Int[Tensor, "branches own"]
    """Each branch's noisy columns and then its clean ones; -1 is filling, between the two and behind them."""
    row: Int[Tensor, " branches"]
    """The row that a branch lies in."""
    noisy: int
    """How many of a branch's columns are noisy ones, filling included."""
    sees: Bool[Tensor, "rows shared shared"]
    """What the beginning sees of itself."""
    within: AttentionContext
    """Of a branch's columns, to its noisy keys, the beginning's and its clean ones."""
    scores: int
    """Computed for each head, but for those inside noisy blocks."""

    @classmethod
    def build(
        cls,
        rows: TokenRows,
        noisy: int,
        block_size: int,
        clean_mask: CleanMask,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "BranchedAttention":
        """`rows`, on the host, describe the columns, of which the first `noisy` are noisy copies in whole blocks."""
        beginning, branches, row, own_noisy = _columns(rows, noisy)
        shared, own = _at(rows, beginning), _at(rows, branches)
        behind = own.each(lambda part: part[:, own_noisy:])
        keys = TokenRows(*(torch.cat([a[row], b], 1) for a, b in zip(shared[:3], behind[:3], strict=True)))
        sees_clean = masks.may_attend(own, keys, block_size, clean_mask) | (own.document < 0)[:, :, None]
        sees = masks.may_attend(shared, shared, block_size, clean_mask) | (shared.document < 0)[:, :, None]
        within: AttentionContext = MaskedAttention(sees_clean.to(device))
        if own_noisy:
            bias = torch.zeros(sees_clean.shape, dtype=dtype).masked_fill(~sees_clean, float("-inf"))
            within = DoubledAttention(bias[:, None].to(device), block_size)
        places = beginning.to(device), branches.to(device), row.to(device)
        return cls(*places, own_noisy, sees.to(device), within, sees.numel() + sees_clean.numel())

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        batch, heads, fed, head_dim = query.shape
        out = query.new_zeros(batch * fed, heads, head_dim)
        shared_key, shared_value = (_taken(part, self.beginning) for part in (key, value))
        if self.beginning.shape[1]:
            shared_query = _taken(query, self.beginning)
            there = grouped_attention(shared_query, shared_key, shared_value, self.sees[:, None], scale)
            out = _put(out, self.beginning, there)
        own_query, own_key, own_value = (_taken(part, self.branches) for part in (query, key, value))
        keys, values = (
            torch.cat([own[:, :, : self.noisy], shared[self.row], own[:, :, self.noisy :]], 2)
            for own, shared in ((own_key, shared_key), (own_value, shared_value))
        )
        out = _put(out, self.branches, self.within.attend(layer, own_query, keys, values, scale))
        return out.view(batch, fed, heads, head_dim).transpose(1, 2)


def branched_attention(
    rows: TokenRows, noisy: int, block_size: int, clean_mask: CleanMask, dtype: torch.dtype, device: torch.device
) -> AttentionContext:
    """The context of a forward over branches: each by itself where that saves enough scores and the noisy copies lie on
    a grid of blocks, else as `doubled_attention`.

    All compute the same attention; the choice is one of speed alone, made on the host.
    """
    if aligned(rows.document[:, :noisy], rows.position[:, :noisy], block_size):
        apart = BranchedAttention.build(rows, noisy, block_size, clean_mask, dtype, device)
        batch, fed = rows.document.shape
        if WORTH_WHILE * apart.scores <= batch * fed * (fed - noisy):
            return apart
    return doubled_attention(rows, noisy, block_size, clean_mask, dtype, device)


def _columns(rows: TokenRows, noisy: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Columns of the beginnings and of the branches, each branch's row, and how many of its columns are noisy."""
    if rows.branch is None:
        raise ValueError("columns without branches")
    fed = rows.document.shape[1]
    beginning: list[Tensor] = []
    own: tuple[list[Tensor], list[Tensor]] = [], []
    row: list[int] = []
    for number, (document, branch) in enumerate(zip(rows.document, rows.branch, strict=True)):
        there = document >= 0
        beginning.append((there & (branch < 0)).nonzero()[:, 0] + number * fed)
        for one in branch[there & (branch >= 0)].unique():
            columns = (there & (branch == one)).nonzero()[:, 0]
            for part, chosen in zip(own, (columns < noisy, columns >= noisy), strict=True):
                part.append(columns[chosen] + number * fed)
            row.append(number)
    halves = [_padded(part) for part in own]
    return _padded(beginning), torch.cat(halves, 1), torch.tensor(row), halves[0].shape[1]


def _padded(columns: Sequence[Tensor]) -> Int[Tensor, "rows columns"]:
    return pad_sequence(list(columns), batch_first=True, padding_value=-1)


def _at(rows: TokenRows, columns: Int[Tensor, "some columns"]) -> TokenRows:
    """What the rule needs to know of these columns; filling is of no document."""
    at = TokenRows(*(part.flatten()[columns.clamp_min(0)] for part in rows[:3]))
    return at._replace(document=at.document.masked_fill(columns < 0, -1))


def _taken(part: Float[Tensor, "batch heads fed head_dim"], columns: Int[Tensor, "some columns"]) -> Tensor:
    return part.transpose(1, 2).flatten(0, 1)[columns.clamp_min(0)].transpose(1, 2)


def _put(out: Tensor, columns: Int[Tensor, "some columns"], states: Tensor) -> Tensor:
    """`out`, [columns heads head_dim], with states, [some heads columns head_dim], in their places."""
    there = columns >= 0
    return out.index_put((columns[there],), states.transpose(1, 2)[there].to(out.dtype))  # autocast narrows states
