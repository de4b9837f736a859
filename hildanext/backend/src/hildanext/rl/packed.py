"""Answers of a group behind their one prompt: the prompt's whole blocks are fed once for all of them.

For a prompt of P and G answers of R tokens a forward has P + G x 2R columns instead of G x (P + 2R). A packed row is a
group: noisy copies of its answers' blocks, clean copies of the prompt's whole blocks, clean copies of the answers'
blocks. Answers are branches of the prompt (`masks.may_attend`), their positions go on from its end, and what each sees
is what it sees alone: the numbers are those of the unpacked forward but for rounding.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hildanext.core.errors import ConfigError
from hildanext.diffusion import NoisedBatch, Shift
from hildanext.losses.objective import attention_over
from hildanext.masks import TokenRows
from hildanext.models.bidirectional import DiffusionModel


@dataclass(frozen=True)
class PackedColumns:
    """The columns of a packed forward, and where each token of the unpacked rows has its copies."""

    token: Int[Tensor, "groups fed"]
    """Of which token a column is a copy: row times positions plus position; -1 is filling. Noisy copies come first."""
    branch: Int[Tensor, "groups fed"]
    """The row that a column belongs to; -1 for the prompt that is shared, and for filling."""
    noisy: int
    """How many are noisy copies."""
    place: Int[Tensor, " rows"]
    """The packed row that holds a row."""
    noisy_column: Int[Tensor, "rows positions"]
    """Column of each token's noisy copy; -1 where it has none."""
    clean_column: Int[Tensor, "rows positions"]
    """Column of each token's clean copy, which rows of a group share in the prompt; -1 where it has none."""

    def prediction_index(
        self, position: Int[Tensor, "rows positions"], block_size: int, shift: Shift
    ) -> Int[Tensor, "rows positions"]:
        """Column of the hidden state that predicts each token, as `InputLayout.prediction_index`."""
        if shift == "none":
            return self.noisy_column
        noisy, clean = self.noisy_column.roll(1, 1), self.clean_column.roll(1, 1)
        return torch.where(position % block_size == 0, clean, noisy)


def pack(view: NoisedBatch, prompt: Int[Tensor, " rows"], group: Int[Tensor, " rows"], shift: Shift) -> PackedColumns:
    """The columns that the predictions of `view.maskable` depend on; one packed row for each run of equal `group`.

    Rows begin at position 0 and hold one document. Raises `ConfigError` where rows of a group have other prompts.
    """
    size, (rows, width) = view.block_size, view.clean.shape
    _, place = torch.unique_consecutive(group, return_inverse=True)
    shared = prompt // size * size
    _check_prompts(view.clean, shared, place)
    block = torch.arange(width) // size
    answering = torch.zeros(rows, width // size + 1, dtype=torch.bool)
    at = view.maskable.nonzero(as_tuple=True)
    answering[at[0], block[at[1]]] = True
    last = torch.where(answering, torch.arange(answering.shape[1]), -1).amax(1)
    alone = shift == "left" and size == 1  # every prediction is read from a clean copy
    number = torch.arange(rows * width).view(rows, width)
    noisy: list[list[Tensor]] = [[] for _ in range(int(place[-1]) + 1)]
    clean: list[list[Tensor]] = [[] for _ in noisy]
    for row in range(rows):
        begin, end, group_row = int(shared[row]), int(last[row]) * size, int(place[row])
        if not clean[group_row]:
            clean[group_row].append(number[row, :begin])
        clean[group_row].append(number[row, begin:end])
        noisy[group_row].append(number[row, :0] if alone else number[row, answering[row, block]])
    halves = [pad_sequence([torch.cat(part) for part in half], True, -1) for half in (noisy, clean)]
    token = torch.cat(halves, 1)
    owner, column = token // width, torch.arange(token.shape[1]).expand_as(token)
    prompts = (token >= 0) & (token % width < shared[owner])
    noisy_first = halves[0].shape[1]
    prompts[:, :noisy_first] = False
    copies = [torch.full((rows * width,), -1) for _ in halves]
    for copy, part in zip(copies, (slice(noisy_first), slice(noisy_first, None)), strict=True):
        fed = token[:, part] >= 0
        copy[token[:, part][fed]] = column[:, part][fed]
    first = torch.searchsorted(place, place)
    clean_column = copies[1].view(rows, width)
    clean_column = torch.where(torch.arange(width) < shared[:, None], clean_column[first], clean_column)
    branch = torch.where((token < 0) | prompts, -1, owner)
    return PackedColumns(token, branch, noisy_first, place, copies[0].view(rows, width), clean_column)


def packed_states(
    model: DiffusionModel, view: NoisedBatch, prompt: Int[Tensor, " rows"], group: Int[Tensor, " rows"]
) -> tuple[Float[Tensor, "groups fed hidden"], PackedColumns]:
    """The final states of the packed columns. Raises as `pack`."""
    columns = pack(view, prompt, group, model.card.shift)
    is_noisy = (torch.arange(columns.token.shape[1]) < columns.noisy).expand_as(columns.token)
    token, filling = columns.token.clamp_min(0), columns.token < 0
    shown = torch.where(is_noisy, view.noisy.flatten()[token], view.clean.flatten()[token])
    position = view.position.flatten()[token].masked_fill(filling, 0)
    document = torch.zeros_like(token).masked_fill(filling, -1)
    rows = TokenRows(document, position, is_noisy, columns.branch)
    embeddings = model.embed(shown.to(model.device, non_blocking=True))
    attention = attention_over(rows, columns.noisy, view.block_size, model.card.clean_mask, embeddings)
    return model(embeddings, position.to(model.device, non_blocking=True), attention), columns


def _check_prompts(
    tokens: Int[Tensor, "rows positions"], shared: Int[Tensor, " rows"], place: Int[Tensor, " rows"]
) -> None:
    first = torch.searchsorted(place, place)
    inside = torch.arange(tokens.shape[1]) < shared[:, None]
    other = (shared != shared[first]) | ((tokens != tokens[first]) & inside).any(-1)
    if other.any():
        row = int(other.nonzero()[0])
        raise ConfigError(
            f"answer {row} has another prompt than answer {int(first[row])} of its group",
            "give each problem a group of its own, or score unpacked",
        )
