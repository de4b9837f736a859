"""diffu-GRPO (d1): GRPO on tokens, each scored by one look at a fully masked answer."""

from typing import ClassVar, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.rl.objectives.base import Figures, Objective, PolicyInputs
from hildanext.rl.objectives.ratios import over_tokens


@config
class DiffuGrpo(Objective):
    """PPO on each token of the answers, with a KL (k3) per token; a mean over the tokens of all answers.

    Long answers thus count for more than short ones. A token's term is multiplied by its weight in the estimate,
    which under `mean_field` is 1. With the likelihood `trajectory` in N segments it is d2's StepMerge.

    Paper: d1, arXiv:2504.12216; StepMerge: d2, arXiv:2509.21474.
    Differs: the mean is over the tokens of a whole step, where the code takes it over each micro-batch.
    """

    per: ClassVar[Literal["answer", "token", "group"]] = "token"
    level: ClassVar[Literal["sequence", "token"] | None] = "token"
    separable: ClassVar[bool] = True
    likelihoods: ClassVar[tuple[str, ...]] = ("mean_field", "trajectory", "left_to_right")
    advantage: ClassVar[str] = "mean"

    epsilon: float = Field(default=0.5, ge=0, lt=1, allow_inf_nan=False)
    """How far a token's ratio may go from 1."""
    beta: float = Field(default=0.04, ge=0, allow_inf_nan=False)
    """Strength of the KL to the reference; 0 has none, and needs no reference."""

    @property
    def wants_reference(self) -> bool:
        return self.beta > 0

    def loss(self, inputs: PolicyInputs) -> tuple[Float[Tensor, ""], Figures]:
        rows = over_tokens(inputs, self.epsilon, self.beta)
        return rows.pop("loss").sum(), {name: row.sum() for name, row in rows.items()}
