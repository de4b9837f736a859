"""Mask a number of a block's tokens, and then the others."""

import torch
from torch import Tensor

from hildanext.core.config import config
from hildanext.likelihood.base import Likelihood, Noising, rank_in_block, scored_per_block


@config
class CoupledLikelihood(Likelihood):
    """k of a block's n tokens, k uniform in 0..n, averaged with the complement; weights (n+1)/k and (n+1)/(n-k).

    Paper: ESPO, arXiv:2512.03759. Every token is scored in every draw, at two forwards.
    """

    def noising(self, scored: Tensor, blocks: Tensor, level: Tensor, generator: torch.Generator) -> Noising:
        rank, sizes = rank_in_block(scored, blocks, generator), scored_per_block(scored, blocks)
        k = (level * (sizes + 1)).floor()
        first = scored & (rank < k[blocks])
        weights = ((sizes + 1) / part.clamp_min(1) for part in (k, sizes - k))
        return [(masked, weight[blocks]) for masked, weight in zip((first, scored & ~first), weights, strict=True)]
