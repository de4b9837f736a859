"""Decoders that nobody has written a line for, but their own."""

from typing import ClassVar

import torch
from pydantic import Field

from hildanext.core.config import config
from hildanext.decoding import Canvas, Decoder, Edit
from hildanext.models.sampling import candidates

ASKED = {"name": "toy", "alpha": 0.3}


@config
class Toy(Decoder):
    """Fill whatever is surer than alpha, and else everything."""

    alpha: float = Field(default=0.5, ge=0, le=1)
    """How sure."""
    beta: int | None = None
    """Not used; off is None."""
    eager: bool = False

    def edit(self, logits, where, canvas: Canvas) -> Edit:
        picks, sure = candidates(logits, canvas.uniform[where])
        tokens = canvas.tokens.masked_scatter(where, picks)
        confidence = torch.zeros(where.shape, dtype=sure.dtype).masked_scatter(where, sure)
        fill = canvas.masked & (confidence > self.alpha)
        fill = torch.where(fill.any(-1, keepdim=True), fill, canvas.masked)
        return Edit(fill, tokens, confidence, ~(canvas.masked & ~fill).any(-1))


@config
class Daring(Toy):
    """A research method."""

    research: ClassVar[bool] = True
