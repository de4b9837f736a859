"""The reward less the mean of the others."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hildanext.core.config import config
from hildanext.rl.advantages.base import Advantage, centred


@config
class LeaveOneOut(Advantage):
    """`r_i` less the mean of the other valid rewards of the group: G/(G-1) times the centred reward.

    Paper: RLOO, arXiv:2402.14740; the advantage of ESPO's code, arXiv:2512.03759. Its baseline does not hold the sample
    itself, so that the expected gradient is the true one.
    """

    def of(
        self, rewards: Float[Tensor, "groups answers"], valid: Bool[Tensor, "groups answers"]
    ) -> Float[Tensor, "groups answers"]:
        count = valid.sum(-1, keepdim=True)
        return torch.where(count > 1, centred(rewards, valid) * count / (count - 1).clamp_min(1), 0.0)
