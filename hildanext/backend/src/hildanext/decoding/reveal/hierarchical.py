"""In every run of masks its surest one, so that what is filled at once lies apart."""

import torch
from pydantic import Field

from hildanext.core.config import config
from hildanext.decoding.base import Canvas
from hildanext.decoding.reveal.base import Facts, Fill, Memory, Reveal


@config
class Hierarchical(Reveal):
    """Masks above `tau_mask`, and of each run of masks the surest where it is above `low`.

    Where no mask at all is above `low` the fallback fills one.

    Paper: dInfer, arXiv:2510.08666, hierarchical decoding.
    """

    low: float = Field(default=0.4, ge=0, le=1, allow_inf_nan=False)
    """Probability above which a run's surest mask is filled."""

    def reveal(self, facts: Facts, canvas: Canvas, memory: Memory) -> tuple[Fill, Memory]:
        masked, sure = canvas.masked, facts.confidence
        begins = masked & ~torch.cat([torch.zeros_like(masked[:, :1]), masked[:, :-1]], -1)
        run = begins.cumsum(-1) * masked  # 0 is no run
        runs = torch.full((len(masked), masked.shape[1] + 1), -1.0, dtype=sure.dtype, device=sure.device)
        best = runs.scatter_reduce(-1, run, sure, "amax").gather(-1, run)
        first = masked & (sure == best)
        # Of equal ones the lowest: no other of its run stands before it.
        counted = first.int().cumsum(-1)
        before = (counted - first.int()).masked_fill(~begins, 0).cummax(-1).values
        first &= counted - before == 1
        return masked & ((sure > facts.tau) | (first & (sure > self.low))), ()
