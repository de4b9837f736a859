"""Mask everything, at block size 1."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.likelihood.base import Likelihood, Noising


@config
class ExactLikelihood(Likelihood):
    """Each token given those before it, in one doubled forward: exact, as a block of one token has one order.

    Under the `parent` alignment it is the model's autoregressive mode, and only the clean half is fed.
    """

    kind: ClassVar[Literal["exact", "bound"]] = "exact"
    draws: int = Field(default=1, ge=1, le=1)
    block_size: int | None = Field(default=1, ge=1, le=1)

    def noising(self, scored: Tensor, blocks: Tensor, level: Tensor, generator: torch.Generator) -> Noising:
        return [(scored, torch.ones(scored.shape, dtype=torch.float64))]
