"""RAFT: fine-tuning on one's own successes, the baseline without a policy gradient."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from hildanext.core.config import config
from hildanext.rl.objectives.base import Figures, Objective, PolicyInputs
from hildanext.rl.objectives.ratios import counted


@config
class Raft(Objective):
    """`-E / L` of each answer that is better than its group, with E the estimate of log p and L the answer's tokens.
    Nothing is made less likely, and how much better an answer is makes no difference.

    Paper: RAFT, arXiv:2304.06767.
    Differs: successes are the answers with a positive advantage, not each prompt's best one, so that a group that
    agrees teaches nothing here either. The sum is divided by all answers that count, the failures among them, as that
    of any other objective: where few succeed, steps are small.
    """

    separable: ClassVar[bool] = True
    likelihoods: ClassVar[tuple[str, ...]] = ("block_elbo", "mean_field", "trajectory", "left_to_right")
    advantage: ClassVar[str] = "mean"

    def loss(self, inputs: PolicyInputs) -> tuple[Float[Tensor, ""], Figures]:
        advantage, _ = counted(inputs)
        mean = inputs.now.sequence / inputs.now.length.clamp_min(1)
        return -torch.where(advantage > 0, mean, 0.0).sum(), {}
