"""The reward less the mean of its group, divided by the group's standard deviation."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hildanext.core.config import config
from hildanext.rl.advantages.base import Advantage, centred

ADDED = 1e-4
"""To the deviation, outside its root."""
LEAST = 1e-6
"""A smaller deviation is rounding, not a difference between answers."""


@config
class Standardised(Advantage):
    """`(r_i - mean) / (s + 1e-4)`, with s the unbiased standard deviation of the group's valid rewards; 0 where s is
    below 1e-6.

    A group's advantages are then of one size whatever the rewards' unit, also where they hardly differ.

    Paper: GRPO, arXiv:2402.03300; JustGRPO, arXiv:2601.15165.
    Differs: a group whose rewards differ by less than rounding teaches nothing.
    """

    def of(
        self, rewards: Float[Tensor, "groups answers"], valid: Bool[Tensor, "groups answers"]
    ) -> Float[Tensor, "groups answers"]:
        from_mean = centred(rewards, valid)
        count = valid.sum(-1, keepdim=True)
        deviation = (from_mean.square().sum(-1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
        return torch.where(deviation < LEAST, 0.0, from_mean / (deviation + ADDED))
