"""Learn from the frozen parent: match its next-token distribution where a token is masked."""

import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.diffusion import NoisedBatch, elbo_weight
from hildanext.losses.base import TokenLoss, Weights


@config
class ParentDistillation(TokenLoss):
    """KL(parent || student) at masked tokens; the parent reads the clean text before them.

    Paper: OPDLM, arXiv:2606.06712 (forward KL, full vocabulary at 0.6B and 1.7B).
    Differs: off-policy, on the training text. The document's first token, which the parent cannot predict, has none.
    """

    needs_parent = True
    weight: float = Field(default=0.5, ge=0)
    elbo: bool = True
    """Weigh by 1/t like the elbo, or every masked token alike."""

    def weights(self, view: NoisedBatch, targets: Bool[Tensor, "batch seq"]) -> Weights:
        weight = elbo_weight(view) if self.elbo else view.masked.float()
        return Weights(
            divergence=torch.where(targets & (view.position > 0), self.weight * weight, torch.zeros_like(weight))
        )
