"""JustGRPO: plain GRPO, from left to right, where each token's likelihood is exact."""

from typing import ClassVar, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.rl.objectives.base import Figures, Objective, PolicyInputs
from hildanext.rl.objectives.ratios import over_tokens


@config
class JustGrpo(Objective):
    """PPO on each token given those before it; a mean over the answer's own tokens, then over answers. No KL.

    Paper: JustGRPO ("The Flexibility Trap"), arXiv:2601.15165.
    Differs: an answer's sum is divided by its own length, its end of text included, where the code divides by the
    length of generation, filling included; its ratio is to the policy itself and so never clipped, ours is to the one
    that wrote the answers, which is the same in a round's first update.
    """

    level: ClassVar[Literal["sequence", "token"] | None] = "token"
    separable: ClassVar[bool] = True
    likelihoods: ClassVar[tuple[str, ...]] = ("left_to_right", "trajectory")
    advantage: ClassVar[str] = "standardised"

    epsilon: float = Field(default=0.2, ge=0, lt=1, allow_inf_nan=False)
    """How far a token's ratio may go from 1."""

    def loss(self, inputs: PolicyInputs) -> tuple[Float[Tensor, ""], Figures]:
        rows = over_tokens(inputs, self.epsilon)
        means = {name: (row / inputs.now.length.clamp_min(1)).sum() for name, row in rows.items()}
        return means.pop("loss"), means
