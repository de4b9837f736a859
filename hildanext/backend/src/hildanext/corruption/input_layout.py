"""What a training forward is given of a view, and where the prediction of each token is read.

Every layout is a choice of columns: noisy copies of some tokens, then clean copies of some, all with the positions of
their tokens. What a prediction depends on is the same in all of them, so that a layout changes the time a forward
takes and no number (but for rounding).

`double` is [x_t ; x_0] (BD3-LM, arXiv:2503.09573). `response` leaves out what no prediction depends on: noisy copies
of blocks without a maskable token, and clean copies that neither a maskable block nor a loss reads. For a prompt of P
and an answer of R tokens that is P + 2R columns (the layout of OPDLM, arXiv:2606.06712) less the answer's last block.
`single` drops the clean half when a block spans the row; `clean` drops the noisy half at block size 1 under the left
shift, where every prediction reads the clean half.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hildanext import masks
from hildanext.diffusion import NoisedBatch, Shift, block_index

Layout = Literal["double", "response", "single", "clean"]
LayoutChoice = Literal["auto", "double", "response"]

WORTH_WHILE = 0.9
"""Share of the doubled columns at which `auto` begins to leave some out."""


@dataclass(frozen=True)
class InputLayout:
    """The columns of a forward, as indices of the view's tokens; the noisy copies come first.

    Rows that need fewer columns than others are filled up with copies of further tokens, which nothing reads.
    """

    noisy: Int[Tensor, "batch noisy"]
    clean: Int[Tensor, "batch clean"]
    seq: int
    """Length of the view's rows."""

    def to(self, device: torch.device | str) -> "InputLayout":
        """The same columns on a device; the host does not wait for it."""
        noisy, clean = (part.to(device, non_blocking=True) for part in (self.noisy, self.clean))
        return InputLayout(noisy, clean, self.seq)

    @cached_property
    def token(self) -> Int[Tensor, "batch fed"]:
        """The token that each column is a copy of."""
        return torch.cat([self.noisy, self.clean], -1)

    @cached_property
    def is_noisy(self) -> Bool[Tensor, "batch fed"]:
        kinds = torch.ones_like(self.noisy, dtype=torch.bool), torch.zeros_like(self.clean, dtype=torch.bool)
        return torch.cat(kinds, -1)

    @cached_property
    def noisy_column(self) -> Int[Tensor, "batch seq"]:
        """Column of each token's noisy copy; -1 where it has none."""
        return self._column_of(self.noisy, 0)

    @cached_property
    def clean_column(self) -> Int[Tensor, "batch seq"]:
        """Column of each token's clean copy; -1 where it has none."""
        return self._column_of(self.clean, self.noisy.shape[1])

    def _column_of(self, token: Tensor, first: int) -> Tensor:
        columns = torch.arange(first, first + token.shape[1], device=token.device).expand_as(token)
        return torch.full((len(token), self.seq), -1, device=token.device).scatter(1, token, columns)

    def tokens(self, view: NoisedBatch) -> Int[Tensor, "batch fed"]:
        return torch.cat([view.noisy.gather(1, self.noisy), view.clean.gather(1, self.clean)], -1)

    def rows(self, view: NoisedBatch) -> masks.TokenRows:
        """Document, position and kind of each column: what the mask rule, and the model, need to know."""
        return masks.TokenRows(view.document.gather(1, self.token), view.position.gather(1, self.token), self.is_noisy)

    def prediction_index(
        self, position: Int[Tensor, "batch seq"], block_size: int, shift: Shift
    ) -> Int[Tensor, "batch seq"]:
        """Column of the hidden state that predicts each token; -1 where it is not fed.

        Under the left shift the first token of a block is read from the clean half, because at inference
        the block before it is finished; the first token of a document has no predecessor (column 0, never a target).
        """
        if shift == "none":
            return self.noisy_column
        before = self._before(position)
        if not self.clean.shape[1]:
            return self.noisy_column.gather(1, before)
        clean = self.clean_column.gather(1, before)
        if not self.noisy.shape[1]:
            return clean
        return torch.where(position % block_size == 0, clean, self.noisy_column.gather(1, before))

    def clean_prediction_index(self, position: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
        """Column of the clean hidden state at the token before (the autoregressive reading of the clean half)."""
        return self.clean_column.gather(1, self._before(position))

    def _before(self, position: Tensor) -> Tensor:
        return (torch.arange(self.seq, device=position.device) - 1).clamp_min(0).expand_as(position)


def layout_of(block_size: int, seq: int, shift: Shift, reads_clean: bool = False) -> Layout:
    """The layout that leaves out whole halves, where one is never read.

    `reads_clean` says that a loss reads the clean half, which is then there: in a single copy its place would be
    taken by noisy tokens that see their own labels.
    """
    if shift == "left" and block_size == 1:
        return "clean"
    return "single" if block_size >= seq and not reads_clean else "double"


def build_layout(view: NoisedBatch, layout: Layout, reads_clean: bool = False) -> InputLayout:
    """The columns of a layout. With `reads_clean`, `response` keeps every clean copy."""
    seq = view.clean.shape[1]
    every = torch.arange(seq, device=view.clean.device).expand_as(view.clean)
    if layout == "response":
        answering, seen = _needed(view)
        least = min(view.block_size, seq)  # so that neither half is ever empty
        return InputLayout(_chosen(answering, least), every if reads_clean else _chosen(seen, least), seq)
    return InputLayout(every[:, :0] if layout == "clean" else every, every[:, :0] if layout == "single" else every, seq)


def choose_layout(
    view: NoisedBatch, shift: Shift, reads_clean: bool = False, choice: LayoutChoice = "auto"
) -> InputLayout:
    """The columns that a forward is to be given. A `choice` other than `auto` is about views that must be doubled."""
    layout = layout_of(view.block_size, view.clean.shape[1], shift, reads_clean)
    if layout != "double" or choice == "double":
        return build_layout(view, layout)
    response = build_layout(view, "response", reads_clean)
    few = response.token.shape[1] <= WORTH_WHILE * 2 * response.seq
    return response if few or choice == "response" else build_layout(view, layout)


def _needed(view: NoisedBatch) -> tuple[Bool[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """Tokens of blocks that hold a maskable token, and tokens that a later such block of their document sees."""
    block = block_index(view.document, view.position, view.block_size)
    document = block_index(view.document, view.position, view.clean.shape[1])  # one block each
    holds = torch.zeros(int(block.max()) + 1, dtype=torch.bool, device=block.device)
    holds[block[view.maskable]] = True
    answering = holds[block]
    last = torch.full((int(document.max()) + 1,), -1, device=block.device)
    last = last.scatter_reduce(0, document[answering], block[answering], "amax")
    return answering, block < last[document]


def _chosen(needed: Bool[Tensor, "batch seq"], least: int) -> Int[Tensor, "batch chosen"]:
    """Each row's needed tokens in order, filled up to the longest row's count (and `least`) with the row's others."""
    count = max(int(needed.sum(-1).max()), least)
    return (~needed).to(torch.uint8).argsort(dim=-1, stable=True)[:, :count].sort(-1).values
