"""Stay near the parent's representation while learning to denoise."""

import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.diffusion import NoisedBatch
from hildanext.losses.base import TokenLoss, Weights


@config
class RepresentationAlignment(TokenLoss):
    """1 - cosine between the state that predicts a masked token and the frozen parent's state before that token.

    The parent reads the clean text causally.

    Paper: REPR-ALIGN, arXiv:2605.06885 (weight 10, all layers, masked positions only).
    Differs: the last layer only, whose states are at hand without hooks.
    """

    needs_parent = True
    weight: float = Field(default=1.0, ge=0)

    def weights(self, view: NoisedBatch, targets: Bool[Tensor, "batch seq"]) -> Weights:
        weight = self.weight * view.masked.float()
        return Weights(alignment=torch.where(targets & (view.position > 0), weight, torch.zeros_like(weight)))
