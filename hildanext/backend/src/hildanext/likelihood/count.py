"""Mask a number of a block's tokens."""

import torch
from torch import Tensor

from hildanext.core.config import config
from hildanext.likelihood.base import Likelihood, Noising, rank_in_block, scored_per_block


@config
class CountLikelihood(Likelihood):
    """Exactly k of a block's n tokens, k uniform in 1..n, weight n/k. Paper: LLaDA, arXiv:2502.09992, evaluation."""

    def noising(self, scored: Tensor, blocks: Tensor, level: Tensor, generator: torch.Generator) -> Noising:
        rank, sizes = rank_in_block(scored, blocks, generator), scored_per_block(scored, blocks)
        k = (level * sizes).floor() + 1
        return [(scored & (rank < k[blocks]), (sizes / k.clamp_min(1))[blocks])]
