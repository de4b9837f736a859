"""The ordered decoder without its last steps: what is left of a block then is written at once."""

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.decoding.base import Canvas, Edit
from hildanext.decoding.ordered import Ordered
from hildanext.models.sampling import candidates


@config
class Pruned(Ordered):
    """`ordered`, until a block's planned share of steps is over, or until it is sure of all that is left.

    With `sure` None the plan decides: of the T steps that the block's masks would take, ceil((1 - early) T) are made,
    and one more writes the rest. Else a step writes the rest where the likeliest token of every mask has `sure` or
    more, in the model's own distribution: what was drawn does not decide it, so that log p of what is written at once
    stays that of the action.

    Paper: the temporal pruning of STP, arXiv:2602.08905.
    Differs: a reconstruction from the abstract, whose code and full text could not be had; steps are those of a block.
    """

    research: ClassVar[bool] = True

    early: float = Field(default=0.25, ge=0, lt=1, allow_inf_nan=False)
    """Share of the planned steps that the last one makes up for; not read where `sure` is given."""
    sure: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    """Confidence of every mask from which the rest is written at once."""

    def __post_init__(self) -> None:
        if self.sure is None and self.early == 0:
            raise ConfigError("pruned with early 0 leaves no step out", "take the decoder ordered, or give sure")

    def needs(self, canvas: Canvas) -> Bool[Tensor, "batch block"]:
        if self.sure is not None:
            return canvas.masked
        return torch.where(self._over(canvas)[:, None], canvas.masked, super().needs(canvas))

    def edit(self, logits: Float[Tensor, "rows vocab"], where: Bool[Tensor, "batch block"], canvas: Canvas) -> Edit:
        edit = super().edit(logits, where, canvas)
        if self.sure is None:
            over = self._over(canvas)
        else:
            _, best = candidates(logits, None)
            confidence = torch.ones(where.shape, dtype=best.dtype, device=best.device).masked_scatter(where, best)
            over = (confidence >= self.sure).where(canvas.masked, torch.tensor(True, device=best.device)).all(-1)
        write = torch.where(over[:, None], canvas.masked, edit.write)
        return Edit(write, edit.tokens, edit.confidence, ~canvas.left(write, edit.tokens).any(-1))

    def _over(self, canvas: Canvas) -> Bool[Tensor, " batch"]:
        """Whether a block has had the steps that it is to have one by one."""
        own = (canvas.masked | canvas.editable).sum(-1)
        planned = -(-own // self.per_step)
        done = (own - canvas.masked.sum(-1)) // self.per_step
        return done >= ((1 - self.early) * planned - 1e-9).ceil()
