"""Keep the parent's own way of reading: next-token loss on the clean half."""

from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.diffusion import NoisedBatch
from hildanext.losses.base import TokenLoss, Weights
from hildanext.models.card import Card


@config
class Autoregressive(TokenLoss):
    """Cross-entropy of each token given the clean tokens before it.

    Only a token-causal clean half allows it: on a block-causal one the label would be visible (a leak).

    Paper: the auxiliary loss of I-DLM, arXiv:2604.11035 (0.2 there), and NBDiff, arXiv:2512.06776.
    """

    weight: float = Field(default=0.2, ge=0)

    def check(self, card: Card) -> None:
        if self.weight > 0 and card.clean_mask != "token_causal":
            raise ConfigError(
                "an autoregressive loss on a block-causal clean half leaks its labels",
                "use alignment 'parent', or remove the autoregressive loss",
            )

    def weights(self, view: NoisedBatch, targets: Bool[Tensor, "batch seq"]) -> Weights:
        return Weights(cross_entropy=self.weight * targets.float() * (view.position > 0), stream="clean")
