"""Rows of tokens as training takes them, whatever they are made of."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents.

    `document`: index inside the row, -1 for padding. `position`: index inside the document piece, from 0; 0 for
    padding. `maskable`: what corruption may hide: everything but padding and the BOS that opens a document; of a
    conversation, only its answers. `always_masked`: tokens that a noised copy always shows as masks and that are not
    learnt (the next question in the block that an answer ends in: inference writes that block without it).
    """

    tokens: Int[Tensor, "batch seq"]
    document: Int[Tensor, "batch seq"]
    position: Int[Tensor, "batch seq"]
    maskable: Bool[Tensor, "batch seq"]
    always_masked: Bool[Tensor, "batch seq"] | None = None

    def to(self, device: torch.device | str) -> "Batch":
        there = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: part.to(device) for name, part in there.items() if part is not None})


def padding_tokens(
    tokens: Int[Tensor, "batch seq"], document: Int[Tensor, "batch seq"], pad_id: int | None
) -> Bool[Tensor, "batch seq"]:
    """What only fills a document's last block: the `pad_id` at its end, but for the first, its own end of text.

    A piece is a stretch of one number in `document`. Its first token is never padding: documents are cut at whole
    blocks, so that a piece may open with the end of the one that was cut. What looks the same counts as padding: the
    EOS of an empty document behind a BOS of the same id, and a cut right behind two ends inside a text.
    """
    if pad_id is None:
        return torch.zeros_like(document, dtype=torch.bool)
    opens = torch.ones_like(document, dtype=torch.bool)
    opens[:, 1:] = document[:, 1:] != document[:, :-1]
    piece = opens.flatten().cumsum(0).view_as(document) - 1
    column = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    text = torch.where(tokens != pad_id, column, torch.where(opens, column - 1, -1))  # a pad id inside a text is text
    last = torch.full((tokens.numel(),), -1, device=tokens.device)
    last = last.scatter_reduce(0, piece.flatten(), text.flatten(), "amax")
    return (document >= 0) & (column > last[piece] + 1)


@runtime_checkable
class RowDataset(Protocol):
    """A data set of rows, whatever they are made of."""

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The given rows, stacked."""
        ...
