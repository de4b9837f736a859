"""What a supervised loss is: a weight for each token's prediction. The objective adds them up in one head call."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from hildanext.diffusion import View
from hildanext.models.card import Card

Stream = Literal["noisy", "clean"]


@dataclass(frozen=True)
class Weights:
    """Weights of one loss over the tokens of a view, shape [batch seq]; zero where it has nothing to say.

    `stream` tells where the prediction of a token is read: the noisy reading of `diffusion.readout_index`,
    or the autoregressive reading of the clean half.
    """

    cross_entropy: Float[Tensor, "batch seq"] | None = None
    divergence: Float[Tensor, "batch seq"] | None = None
    alignment: Float[Tensor, "batch seq"] | None = None
    stream: Stream = "noisy"


class Supervision:
    """A supervised loss. Members are frozen knobs; the common case is one method."""

    needs_parent: bool = False

    def check(self, card: Card) -> None:
        """Raise `ConfigError` where this loss makes no sense for a checkpoint's conventions."""

    def weights(self, view: View, targets: Bool[Tensor, "batch seq"]) -> Weights:
        """Token weights for a view; `targets` are the tokens that may be predicted at all."""
        raise NotImplementedError
