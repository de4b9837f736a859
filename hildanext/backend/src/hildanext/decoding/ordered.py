"""A fixed number of masks a step, in an order that is chosen: what is written is never touched again."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.decoding.base import Canvas, Decoder, Edit, Sampling
from hildanext.decoding.orders import ORDERS
from hildanext.models.sampling import candidates


@config
class Ordered(Decoder):
    """Fill `per_step` masks of a block in every forward, in random order, from left to right, or the surest first.

    In the first two orders the log-probability of what was drawn is that of the action, so that a policy gradient
    over a trajectory is exact. Not so by confidence: trajectories then say `biased`.

    Paper: the random order of AGRPO, arXiv:2510.04019; from left to right JustGRPO, arXiv:2601.15165; by confidence
    LLaDA, arXiv:2502.09992.
    Differs: the order is one of each block; one draw per position lasts for the whole block, as in every decoder here.
    """

    order: Literal["random", "left_to_right", "confidence"] = "random"
    """Which masks are filled first."""
    per_step: int = Field(title="Masks per forward", default=1, ge=1, json_schema_extra={"request_maximum": 1024})
    """Masks of a block that a forward fills."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False, json_schema_extra={"request_maximum": 100})
    """0 is greedy."""
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    """Draw from the likeliest tokens that hold this probability together; None is all of them."""
    top_k: int | None = Field(default=None, ge=1, le=2147483648)
    """Draw from this many of the likeliest tokens; None is all of them."""

    @property
    def sampling(self) -> Sampling:
        return self.temperature, self.top_p, self.top_k

    @property
    def biased(self) -> bool:
        return ORDERS[self.order].biased

    def needs(self, canvas: Canvas) -> Bool[Tensor, "batch block"]:
        return canvas.masked if self.biased else self._next(canvas, None)

    def edit(self, logits: Float[Tensor, "rows vocab"], where: Bool[Tensor, "batch block"], canvas: Canvas) -> Edit:
        uniform = canvas.uniform[canvas.places(where)] if self.temperature > 0.0 else None
        picks, sure = candidates(logits, uniform, self.temperature, self.top_p, self.top_k)
        tokens = canvas.tokens.masked_scatter(where, picks)
        confidence = torch.zeros(where.shape, dtype=sure.dtype, device=sure.device).masked_scatter(where, sure)
        fill = self._next(canvas, confidence if self.biased else None)
        return Edit(fill, tokens, confidence, ~canvas.left(fill, tokens).any(-1))

    def _next(self, canvas: Canvas, confidence: Tensor | None) -> Bool[Tensor, "batch block"]:
        """The masks that come first."""
        rank = ORDERS[self.order]().rank(canvas, confidence).masked_fill(~canvas.masked, float("inf"))
        first = rank.argsort(dim=-1, stable=True)[:, : self.per_step]
        return torch.zeros_like(canvas.masked).scatter_(-1, first, True) & canvas.masked
