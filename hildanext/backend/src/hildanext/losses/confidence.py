"""Be sure where already right: the confidence-aware parallel loss (CAP)."""

from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.diffusion import NoisedBatch
from hildanext.losses.base import TokenLoss, Weights, mean_over


@config
class ConfidenceAware(TokenLoss):
    """Entropy of the prediction at masked tokens whose most probable id is the truth, beside a loss that teaches it.

    Confident predictions pass tau_mask together, so that a forward of decoding writes more tokens.

    Paper: LLaDA2.0, arXiv:2512.15745, sec. 5.2, eq. 6, which gives no weight; 2 is what the documentation of its
    released code, dFactory, recommends (the flag's default there is 0).
    Differs: the sum is divided by the number of masked tokens instead of that of right ones, so that the loss of a
    model that is rarely right is small; at temperature 1 (an example in diffusers has 0.5).
    """

    weight: float = Field(default=2.0, ge=0)

    def weights(self, view: NoisedBatch, targets: Bool[Tensor, "batch seq"]) -> Weights:
        return Weights(entropy=self.weight * mean_over(view.masked, targets))
