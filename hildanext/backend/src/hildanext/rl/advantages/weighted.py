"""wd1's weights of likelihoods: a group's better answers by one softmax, its worse ones by another."""

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.rl.advantages.base import Advantage, centred


@config
class Weighted(Advantage):
    """`w+ - w-`: w+ is the softmax of `psi (r - mean)` over the group's valid answers, and w- that of its negative.

    Each sums to 1 over the group, so that the advantages sum to 0 at an equal share. The rewards' unit is a hidden
    temperature: twice the reward is twice `psi`.

    Paper: wd1, arXiv:2507.08838, equations 8 and 9: the loss has the coefficients -w+ + w-.
    Differs: normalised over the group, where the paper's sum runs over all groups and its code's over the micro-batch.
    """

    research: ClassVar[bool] = True

    psi: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """1 / (lambda + beta), the strengths of the KL to the old policy and to a reference, in 1 / unit of reward."""
    positive: float = Field(default=0.5, ge=0, le=1, allow_inf_nan=False)
    """Share p of w+: the advantage is 2 (p w+ - (1 - p) w-). 0.5 is the paper's; 1 makes no answer less likely."""

    def of(
        self, rewards: Float[Tensor, "groups answers"], valid: Bool[Tensor, "groups answers"]
    ) -> Float[Tensor, "groups answers"]:
        from_mean = centred(rewards, valid)
        better = (self.psi * from_mean).masked_fill(~valid, -torch.inf).softmax(-1)
        worse = (-self.psi * from_mean).masked_fill(~valid, -torch.inf).softmax(-1)
        teaches = valid & (from_mean != 0).any(-1, keepdim=True)
        return torch.where(teaches, 2 * (self.positive * better - (1 - self.positive) * worse), 0.0)
