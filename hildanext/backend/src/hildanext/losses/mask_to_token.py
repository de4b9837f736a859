"""Fill the masks: the M2T loss."""

from typing import Literal

import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.diffusion import NoisedBatch, elbo_weight
from hildanext.losses.base import TokenLoss, Weights, mean_over


@config
class MaskToToken(TokenLoss):
    """Cross-entropy at masked tokens.

    `elbo` weighs 1/t, so that the sum over a document bounds its -log p. `masked_mean` is the plain mean over a
    view's masked tokens (LLaDA2's released SFT code), which has less variance and is not a likelihood; a view without
    any adds nothing. `uniform` is their sum over the tokens that could have been masked: `masked_mean` times the share
    that was. The three are never compared with each other.

    Paper: BD3-LM, arXiv:2503.09573; LLaDA2.0, arXiv:2512.15745, eq. 1-5.
    Differs: the sign of the printed weight is mended (it is positive); over a window, means are weighed by their views'
    counts of maskable tokens.
    """

    weight: float = Field(default=1.0, ge=0)
    weighting: Literal["elbo", "uniform", "masked_mean"] = "elbo"

    def weights(self, view: NoisedBatch, targets: Bool[Tensor, "batch seq"]) -> Weights:
        if self.weighting == "masked_mean":
            weight = mean_over(view.masked, targets)
        else:
            weight = elbo_weight(view) if self.weighting == "elbo" else view.masked.float()
        return Weights(cross_entropy=torch.where(targets, self.weight * weight, torch.zeros_like(weight)))
