"""Learning rate over the run, by the share of tokens done."""

import math
from typing import Literal

from pydantic import Field

from hildanext.core.config import config


@config
class LearningRate:
    """Linear warm-up, constant, then a final decay to `floor` (arXiv:2404.06395 calls this shape WSD as well).

    All shares are of the run's total tokens. The block-size ladder is independent of it.
    """

    peak: float = Field(default=4e-4, gt=0)
    warmup: float = Field(default=0.05, ge=0, le=1)
    decay: float = Field(default=0.3, ge=0, le=1)
    shape: Literal["cosine", "linear"] = "cosine"
    floor: float = Field(default=0.05, ge=0, le=1)
    """Share of the peak that is left at the end."""

    def at(self, progress: float) -> float:
        """Learning rate when `progress` (0 to 1) of the run is done."""
        progress = min(max(progress, 0.0), 1.0)
        if progress < self.warmup:
            return self.peak * max(progress / self.warmup, 1e-2)
        start = 1.0 - self.decay
        if progress <= start or self.decay == 0:
            return self.peak
        done = (progress - start) / self.decay
        shape = 0.5 * (1 + math.cos(math.pi * done)) if self.shape == "cosine" else 1 - done
        return self.peak * (self.floor + (1 - self.floor) * shape)
