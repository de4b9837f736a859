"""What the training loop trains, a model and its losses as one module, and what it is told of a forward."""

from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Outcome:
    """Sums over one view; `total` carries the gradient and is not yet divided by the window's normaliser."""

    total: Float[Tensor, ""]
    losses: dict[str, Tensor]
    """Weighted sum of each loss, detached."""
    correct: Int[Tensor, " buckets"]
    """Right argmax at masked tokens, by the step's `buckets`."""
    masked: Int[Tensor, " buckets"]
    draft: Int[Tensor, "batch seq"] | None = None
    auxiliary: Float[Tensor, ""] | None = None
    """Losses on the forward itself, each averaged over its own rows: to be divided by the number of forwards alone."""
    averages: dict[str, Tensor] = field(default_factory=dict)
    """Each loss in `auxiliary`, detached; one that had nothing to look at is 0."""


class TrainingStep(nn.Module):
    """A model and its losses as one module, so that data-parallel wrappers see a single forward.

    `SupervisedStep` learns from noised rows, `DraftStep` from groups of masks behind clean ones. Both are called with a
    view (and what the loop offers beside it) and return an `Outcome`.
    """

    model: Any
    """Has `device` and `recompute_layers()`."""
    by: Literal["t", "place"]
    """What right predictions are counted by: the noise level of their block, or their place in a group."""
    buckets: tuple[str, ...]
    """Names of those counts, as a line of metrics has them; empty where predictions are not right or wrong."""
    guarded: bool = True
    """Whether a loss far above its usual one is a sign of harm. That of a policy, near 0 by nature, is none."""

    def countable(self, view: Any) -> Float[Tensor, ""] | Int[Tensor, ""]:
        """What the losses of a view are divided by, summed over the accumulation window."""
        raise NotImplementedError

    def extremes(self) -> dict[str, float]:
        """The largest of each number that the step has kept since this was last asked; for its line of metrics."""
        return {}
