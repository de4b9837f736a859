"""As many masks as are sure enough for their number."""

import torch
from pydantic import Field

from hildanext.core.config import config
from hildanext.decoding.base import Canvas
from hildanext.decoding.reveal.base import Facts, Fill, Memory, Reveal


@config
class Factor(Reveal):
    """The n surest masks, for the largest n whose n-th confidence is at least 1 - f / (n + 1). `tau_mask` is not read.

    Where n masks have marginals of at least 1 - e each and (n + 1) e <= 1, the product's likeliest tokens are the joint
    distribution's: f = 1 is that bound.

    Paper: Fast-dLLM, arXiv:2505.22618, the factor rule.
    Differs: that the first is always filled is the decoder's fallback; of equal confidences the lower position comes
    first.
    """

    f: float = Field(default=1.0, ge=0, allow_inf_nan=True)
    """Larger fills more at once; 0 fills one mask a forward, and those that are certain."""

    def reveal(self, facts: Facts, canvas: Canvas, memory: Memory) -> tuple[Fill, Memory]:
        sure = facts.confidence.masked_fill(~canvas.masked, -1.0)
        ranked, order = sure.sort(dim=-1, descending=True, stable=True)
        bound = 1.0 - self.f / torch.arange(2, ranked.shape[-1] + 2, device=ranked.device, dtype=ranked.dtype)
        # Confidences fall and bounds rise with n: where the n-th passes, those before it do.
        fits = (ranked >= bound) & (ranked >= 0)
        return torch.zeros_like(canvas.masked).scatter_(-1, order, fits) & canvas.masked, ()
