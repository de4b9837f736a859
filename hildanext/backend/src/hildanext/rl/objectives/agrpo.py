"""AGRPO: the policy gradient of the sampler itself, from some of its steps."""

from typing import ClassVar, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.rl.objectives.base import Figures, Objective, PolicyInputs
from hildanext.rl.objectives.ratios import over_tokens


@config
class Agrpo(Objective):
    """PPO on each token that a step wrote, given the state in which the step wrote it, summed over an answer's steps.

    A token's term is multiplied by its weight in the estimate: with every step read it is 1, with steps drawn the
    inverse of how often they are, so that the gradient is that of J and not of J over the number of steps. That is
    the gradient of the sampler's decisions, and of its law only where the order does not depend on the policy.

    Figures are averages over an answer's tokens; where steps are drawn, estimates of them.

    Paper: AGRPO, arXiv:2510.04019; the KL times the ratio: arXiv:2512.02556.
    Differs: a sum over steps where the paper takes the mean, divided by answers, where the code divides by draws and
    the group's size, which is the number of answers only where a device holds one group; default advantage as there.
    """

    level: ClassVar[Literal["sequence", "token"] | None] = "token"
    separable: ClassVar[bool] = True
    likelihoods: ClassVar[tuple[str, ...]] = ("trajectory", "left_to_right")
    advantage: ClassVar[str] = "mean"

    epsilon: float = Field(default=0.2, ge=0, lt=1, allow_inf_nan=False)
    """How far a token's ratio may go from 1."""
    beta: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Strength of the KL (k3, per token, times the ratio) to the reference; 0 has none, and needs no reference."""

    @property
    def wants_reference(self) -> bool:
        return self.beta > 0

    def loss(self, inputs: PolicyInputs) -> tuple[Float[Tensor, ""], Figures]:
        rows = over_tokens(inputs, self.epsilon, self.beta, corrected=True)
        loss = rows.pop("loss").sum()
        return loss, {name: (row / inputs.now.length.clamp_min(1)).sum() for name, row in rows.items()}
