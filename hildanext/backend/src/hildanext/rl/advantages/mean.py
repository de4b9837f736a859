"""The reward less the mean of its group."""

from jaxtyping import Bool, Float
from torch import Tensor

from hildanext.core.config import config
from hildanext.rl.advantages.base import Advantage, centred


@config
class Mean(Advantage):
    """`r_i` less the mean of the valid rewards of the group, in the rewards' unit.

    The mean holds the answer itself, so that the expected gradient is (G-1)/G of the true one; `leave_one_out` is the
    same without that factor.

    Paper: diffu-GRPO (d1), arXiv:2504.12216; AGRPO, arXiv:2510.04019. Both leave out GRPO's division by the deviation.
    """

    def of(
        self, rewards: Float[Tensor, "groups answers"], valid: Bool[Tensor, "groups answers"]
    ) -> Float[Tensor, "groups answers"]:
        return centred(rewards, valid)
