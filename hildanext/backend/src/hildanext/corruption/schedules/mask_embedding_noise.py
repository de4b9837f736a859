"""Noise on the mask token's embedding, early in the run.

Paper: LLaDA2.0, arXiv:2512.15745, sec. 7.1 (a mask embedding the parent never trained makes high mask rates explode).
Differs: deviation and duration are not published; ours decays linearly over a share of the run.
"""

from pydantic import Field

from hildanext.core.config import config


@config
class MaskNoise:
    """`deviation` is in units of the embedding rows' own standard deviation; it reaches 0 at `until` of the run."""

    deviation: float = Field(default=0.0, ge=0)
    until: float = Field(default=0.1, gt=0, le=1)

    def at(self, progress: float) -> float:
        return self.deviation * max(0.0, 1.0 - progress / self.until)


def open_ratio(step: int, steps: int = 10_000) -> float:
    """DiffuLLaMA's attention anneal: share of future positions opened at `step`.

    Paper: DiffuLLaMA, arXiv:2410.17891.
    State: the formula alone; no mask uses it.
    """
    return min(1.0, (step + 1) / steps)
