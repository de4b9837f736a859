"""What a supervised loss is: a weight for each token's prediction, or a loss on the forward's attention (`auxiliary`).

The objective adds the weights up, for one call of the head per stream.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hildanext.corruption.input_layout import InputLayout
from hildanext.diffusion import NoisedBatch
from hildanext.models.attention.dense import AttentionContext
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.card import Card

Stream = Literal["noisy", "clean"]


@dataclass(frozen=True)
class Weights:
    """Weights of one loss over the tokens of a view, shape [batch seq]; zero where it has nothing to say.

    `stream` tells where the prediction of a token is read: the noisy reading of `InputLayout.prediction_index`,
    or the autoregressive reading of the clean half.
    """

    cross_entropy: Float[Tensor, "batch seq"] | None = None
    divergence: Float[Tensor, "batch seq"] | None = None
    alignment: Float[Tensor, "batch seq"] | None = None
    entropy: Float[Tensor, "batch seq"] | None = None
    """Of the entropy of a prediction, where the prediction is right."""
    stream: Stream = "noisy"

    @property
    def parts(self) -> tuple[Float[Tensor, "batch seq"] | None, ...]:
        return self.cross_entropy, self.divergence, self.alignment, self.entropy

    @property
    def is_active(self) -> bool:
        """Whether the loss has any part in the predictions' losses."""
        return any(part is not None for part in self.parts)


@dataclass(frozen=True)
class ForwardContext:
    """What a loss on the forward itself may see before it happens."""

    view: NoisedBatch
    fed: InputLayout
    """The columns of the forward."""
    targets: Bool[Tensor, "batch seq"]
    """The tokens that may be predicted at all."""
    model: DiffusionModel
    attention: AttentionContext
    """What the forward would use; a loss may wrap it."""
    special: Bool[Tensor, " vocab"]
    """Ids that are no text: the mask, padding, unused rows, markers."""
    progress: float
    """How much of the training is done, in [0, 1)."""
    generator: torch.Generator | None


class AttentionLoss(AttentionContext, Protocol):
    """An attention context that notes what runs through it, and has a loss on that afterwards."""

    def loss(self) -> Float[Tensor, ""]:
        """Averaged over the rows it looked at, its own weight included."""


class TokenLoss:
    """A supervised loss. Members are frozen knobs; the common case is one method."""

    research: ClassVar[bool] = False
    """A research method: built under the profile FULL alone."""
    needs_parent: bool = False
    needs_graphs: bool = False
    """Whether it has nothing to say about data without causal graphs."""
    wraps_attention: bool = False
    """Whether it has a loss on the forward itself (`auxiliary`)."""

    def check(self, card: Card) -> None:
        """Raise `ConfigError` where this loss makes no sense for a checkpoint's conventions."""

    def check_model(self, model: DiffusionModel) -> None:
        """Raise `ConfigError` where this loss asks for what the backbone does not have."""

    def auxiliary(self, context: ForwardContext) -> AttentionLoss | None:
        """A loss on the coming forward, or None where it has nothing to look at: nothing is drawn or computed then."""
        return None

    def weights(self, view: NoisedBatch, targets: Bool[Tensor, "batch seq"]) -> Weights:
        """Token weights for a view; `targets` are the tokens that may be predicted at all."""
        raise NotImplementedError


def mean_over(chosen: Bool[Tensor, "batch seq"], targets: Bool[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
    """Weights that make a sum over all targets, divided by their number, the mean over the chosen ones (0 for none)."""
    chosen = chosen & targets
    return chosen.float() * (targets.sum() / chosen.sum().clamp_min(1))
