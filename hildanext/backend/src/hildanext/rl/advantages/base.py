"""What an advantage is: how much better an answer is than its group, from rewards alone."""

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hildanext.core.config import config


@config
class Advantage:
    """Members are frozen knobs. A group of equal rewards has no advantage at all: exactly 0."""

    research: ClassVar[bool] = False

    def of(
        self, rewards: Float[Tensor, "groups answers"], valid: Bool[Tensor, "groups answers"]
    ) -> Float[Tensor, "groups answers"]:
        """Each answer's advantage; 0 where it is not valid, and in groups with less than two valid answers. `rewards`
        are anything where not valid."""
        raise NotImplementedError(f"{type(self).__name__} gives no advantage")


def centred(
    rewards: Float[Tensor, "groups answers"], valid: Bool[Tensor, "groups answers"]
) -> Float[Tensor, "groups answers"]:
    """Rewards less the mean of their group's valid ones; exactly 0 in a group of equal ones, and where not valid."""
    counted = torch.where(valid, rewards.double(), 0.0)
    count = valid.sum(-1, keepdim=True).clamp_min(1)
    highest = torch.where(valid, rewards.double(), -torch.inf).amax(-1, keepdim=True)
    lowest = torch.where(valid, rewards.double(), torch.inf).amin(-1, keepdim=True)
    apart = valid & (highest > lowest)  # a mean of equal numbers may round to another one
    return torch.where(apart, counted - counted.sum(-1, keepdim=True) / count, 0.0)
