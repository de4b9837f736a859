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
    conversation, only its answers. `hidden`: tokens that a noised copy always shows as masks and that are not learnt
    (the next question in the block that an answer ends in: inference writes that block without it).
    """

    tokens: Int[Tensor, "batch seq"]
    document: Int[Tensor, "batch seq"]
    position: Int[Tensor, "batch seq"]
    maskable: Bool[Tensor, "batch seq"]
    hidden: Bool[Tensor, "batch seq"] | None = None

    def to(self, device: torch.device | str) -> "Batch":
        there = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: part.to(device) for name, part in there.items() if part is not None})


@runtime_checkable
class RowDataset(Protocol):
    """A data set of rows, whatever they are made of."""

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The given rows, stacked."""
        ...
