"""R3L's positive amplification: what is better than its group counts for more than what is worse."""

from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.rl.advantages.base import Advantage, centred


@config
class Amplified(Advantage):
    """`r - mean`, positive ones times `alpha`, negative ones as they are; a solved answer has a number of its own.

    An answer is solved where its reward is `solved` or more. In the paper's form its advantage is `alpha`, in the
    code's 1. A group's advantages do not sum to 0.

    Paper: R3L, arXiv:2601.03715; form `code` is that of its released code, where it differs from the paper.
    Differs: a group of which all answers are solved teaches nothing unless `solved_groups` is `imitate`; theirs is
    always imitated.
    """

    research: ClassVar[bool] = True

    form: Literal["paper", "code"] = "paper"
    alpha: float = Field(default=3.0, ge=1, allow_inf_nan=False)
    """Factor of positive advantages; 1 amplifies nothing."""
    solved: float = Field(default=1.0, allow_inf_nan=False)
    """The reward from which an answer is solved."""
    solved_groups: Literal["skip", "imitate"] = "skip"
    """Whether a group of solved answers alone is made likelier, though no answer in it is better than another."""

    def of(
        self, rewards: Float[Tensor, "groups answers"], valid: Bool[Tensor, "groups answers"]
    ) -> Float[Tensor, "groups answers"]:
        from_mean = centred(rewards, valid)
        solved = valid & (rewards >= self.solved)
        amplified = torch.where(from_mean > 0, self.alpha * from_mean, from_mean)
        amplified = torch.where(solved, self.alpha if self.form == "paper" else 1.0, amplified)
        taught = valid.sum(-1, keepdim=True) > 1
        if self.solved_groups == "skip":
            taught &= (valid & ~solved).any(-1, keepdim=True)
        return torch.where(taught, amplified, 0.0)
