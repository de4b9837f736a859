"""wd1: likelihoods weighted by how good an answer is in its group, without any ratio."""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.rl.objectives.base import Figures, Objective, PolicyInputs
from hildanext.rl.objectives.ratios import counted


@config
class Wd1(Objective):
    """`-A log p` summed over the answers of a group: with the advantage `weighted`, `(-w+ + w-) log p`.

    log p is not divided by the answer's length. Nothing bounds the loss from below, for nothing is clipped: small
    rates, and small gradient norms. It reads neither the old policy nor a reference.

    Paper: wd1, arXiv:2507.08838, equations 8 and 9.
    Differs: a sum over the group, as in the code, where the paper has 1/G before it; the mean over groups is the
    loop's. The paper's experiments leave out the reference too; the knob `beta` of its code belongs to what it was
    made from.
    """

    per: ClassVar[Literal["answer", "token", "group"]] = "group"
    separable: ClassVar[bool] = True
    likelihoods: ClassVar[tuple[str, ...]] = ("mean_field", "block_elbo", "trajectory", "left_to_right")
    advantage: ClassVar[str] = "weighted"

    beta: float = 0.0
    """Strength of a KL. There is none: 0 alone is taken."""

    def __post_init__(self) -> None:
        if self.beta != 0:
            raise ConfigError(
                f"wd1 with beta {self.beta:g}: it has no KL, since its weights hold on to the old policy (psi)",
                "leave beta out, or lower psi of the advantage 'weighted'",
            )

    def loss(self, inputs: PolicyInputs) -> tuple[Float[Tensor, ""], Figures]:
        advantage, valid = counted(inputs)
        return -(advantage * torch.where(valid, inputs.now.sequence, 0.0)).sum(), {}
