"""Fill the masks: the M2T loss."""

from typing import Literal

import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from hildanext.config import knobs
from hildanext.diffusion import View, elbo_weight
from hildanext.supervision.base import Supervision, Weights


@knobs
class MaskToToken(Supervision):
    """Cross-entropy at masked tokens.

    `elbo` weighs 1/t, so that the sum over a document bounds its -log p; `uniform` weighs every masked
    token alike (LLaDA2's released SFT code), which has less variance and is not a likelihood.

    Paper: BD3-LM, arXiv:2503.09573; LLaDA2.0, arXiv:2512.15745, eq. 1-5.
    Differs: the sign of the printed weight is mended (it is positive); the normaliser is the window's count.
    """

    weight: float = Field(default=1.0, ge=0)
    weighting: Literal["elbo", "uniform"] = "elbo"

    def weights(self, view: View, targets: Bool[Tensor, "batch seq"]) -> Weights:
        weight = elbo_weight(view) if self.weighting == "elbo" else view.masked.float()
        return Weights(cross_entropy=torch.where(targets, self.weight * weight, torch.zeros_like(weight)))
