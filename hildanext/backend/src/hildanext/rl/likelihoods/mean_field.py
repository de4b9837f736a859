"""log p of every token as if no other of its block were known."""

from typing import ClassVar

import torch

from hildanext.core.config import config
from hildanext.models.card import Card
from hildanext.rl.batch import RolloutBatch
from hildanext.rl.likelihoods.base import PolicyLikelihood
from hildanext.rl.looks import Look


@config
class MeanField(PolicyLikelihood):
    """One look: the whole answer masked, in every block, given the clean blocks before it. Neither exact nor a bound.

    Paper: d1 (diffu-GRPO), arXiv:2504.12216, and wd1, arXiv:2507.08838.
    Differs: earlier blocks are known, as they are to a block's first step; there all blocks are masked at once. Their
    masks over 0.15 of the prompt are left out: a prompt's blocks are fed as clean copies, which hold no masks. So the
    estimate has no noise.
    """

    caveat: ClassVar[str | None] = (
        "mean_field is neither log p nor a bound on it: no token of a block knows another, so a ratio of it may be far "
        "from that of the policies; block_elbo is a bound, trajectory exact"
    )

    def draw(self, batch: RolloutBatch, card: Card, generator: torch.Generator) -> list[Look]:
        return [Look(batch.open, batch.scored, batch.scored.double(), card.block_size)]
