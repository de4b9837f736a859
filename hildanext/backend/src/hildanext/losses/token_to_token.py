"""Mend wrong tokens and leave right ones alone: the T2T loss."""

from typing import Literal

from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.diffusion import NoisedBatch
from hildanext.losses.base import TokenLoss, Weights, mean_over


@config
class TokenToToken(TokenLoss):
    """Cross-entropy at replaced tokens, and (with `keep`) at a share of the visible right ones.

    `sum` adds them up over the tokens that could have been replaced, so that few errors weigh little; `mean` is the
    mean over the replaced tokens plus `keep` times the mean over the kept ones, however many there are.

    Paper: LLaDA2.1, arXiv:2602.08676, sec. 3.1.
    Differs: the paper gives no weights; keeping right tokens is ours, because with tau_edit = 0 every
    disagreement is an edit. Each kept token carries the loss with the chance `keep_share`, to spare head rows, and
    weighs so much more that the expectation is the same.
    """

    weight: float = Field(default=1.0, ge=0)
    keep: float = Field(default=0.2, ge=0)
    keep_share: float = Field(default=0.25, gt=0, le=1)
    weighting: Literal["sum", "mean"] = "sum"

    def weights(self, view: NoisedBatch, targets: Bool[Tensor, "batch seq"]) -> Weights:
        mean = self.weighting == "mean"
        weight = self.weight * (mean_over(view.replaced, targets) if mean else view.replaced.float())
        if self.keep > 0:
            assert view.chance is not None, "a view for training is made by mask_tokens, which draws the chances"
            chosen = view.kept & (view.chance < self.keep_share)
            weight = weight + self.keep * (mean_over(chosen, targets) if mean else chosen.float() / self.keep_share)
        return Weights(cross_entropy=weight * targets)
