"""Mask each token with the probability of its block's noise level, as in training."""

import torch
from torch import Tensor

from hildanext.core.config import config
from hildanext.diffusion import SMALLEST_TIME
from hildanext.likelihood.base import Likelihood, Noising


@config
class TimeLikelihood(Likelihood):
    """Each token with probability t, weight 1/t. Paper: BD3-LM, arXiv:2503.09573."""

    def noising(self, scored: Tensor, blocks: Tensor, level: Tensor, generator: torch.Generator) -> Noising:
        time = SMALLEST_TIME + (1 - SMALLEST_TIME) * level[blocks]
        masked = scored & (torch.rand(scored.shape, generator=generator) < time)
        return [(masked, 1.0 / time)]
