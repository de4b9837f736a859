"""Mask each token with the probability of its block's noise level, as in training."""

import torch
from torch import Tensor

from hildanext.core.config import config
from hildanext.likelihood.base import Likelihood, Noising

SMALLEST_TIME = 1e-3
"""The interval BD3-LM evaluates on; at t -> 0 the weight 1/t has no finite variance."""


@config
class TimeLikelihood(Likelihood):
    """Each token with probability t, weight 1/t. Paper: BD3-LM, arXiv:2503.09573."""

    def noising(self, scored: Tensor, blocks: Tensor, level: Tensor, generator: torch.Generator) -> Noising:
        time = SMALLEST_TIME + (1 - SMALLEST_TIME) * level[blocks]
        masked = scored & (torch.rand(scored.shape, generator=generator) < time)
        return [(masked, 1.0 / time)]
