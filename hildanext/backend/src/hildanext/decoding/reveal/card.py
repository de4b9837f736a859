"""A confidence gate that fills from the left where nothing passes."""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from hildanext.core.config import config
from hildanext.decoding.base import Canvas, most_confident
from hildanext.decoding.reveal.base import Facts, Fill, Memory, Reveal


@config
class Card(Reveal):
    """Masks above `tau_mask`, at most `most` of them; where none is, one by `order`.

    Paper: CARD, arXiv:2601.22031.
    Differs: CARD is a way to train a strictly causal diffusion model, and this is its gate alone, adapted to blocks
    that see themselves in both directions. `run` with the left order is nearest to the paper.
    """

    research: ClassVar[bool] = True

    order: Literal["left", "confident"] = "left"
    """Which mask is filled where none passes."""
    run: bool = False
    """Only masks without a gap from the first one on."""
    most: int | None = Field(default=None, ge=1)
    """Masks that a forward fills, the surest ones of those that pass (of a run the first ones); None: all."""

    def reveal(self, facts: Facts, canvas: Canvas, memory: Memory) -> tuple[Fill, Memory]:
        masked = canvas.masked
        passes = masked & (facts.confidence > facts.tau)
        if self.run:  # what is no mask is no gap
            passes &= (passes | ~masked).int().cumprod(-1).bool()
        if self.most is not None:
            rank = facts.confidence.masked_fill(~passes, -1.0)
            order = passes.int() if self.run else rank
            first = order.argsort(dim=-1, descending=True, stable=True)[:, : self.most]
            passes &= torch.zeros_like(passes).scatter_(-1, first, True)
        left = masked & (masked.int().cumsum(-1) == 1)
        one = left if self.order == "left" else most_confident(facts.confidence, masked)
        return passes | (one & ~passes.any(-1, keepdim=True)), ()
