"""As many masks as may be filled at once for a bounded dependence between them."""

from typing import ClassVar

import torch
from pydantic import Field

from hildanext.core.config import config
from hildanext.decoding.base import Canvas
from hildanext.decoding.reveal.base import Facts, Fill, Memory, Reveal


@config
class EntropyBound(Reveal):
    """The k masks of lowest entropy, for the largest k whose entropies but the highest add up to gamma or less.

    That sum bounds the mutual information of what is filled. One is always filled. `tau_mask` is not read.

    Paper: EB-Sampler, arXiv:2505.24857; gamma 0.1 is DiffusionGemma's.
    """

    wants_entropy: ClassVar[bool] = True

    gamma: float = Field(default=0.1, ge=0, allow_inf_nan=True)
    """Nats. 0 fills one mask a forward and those of no entropy."""

    def reveal(self, facts: Facts, canvas: Canvas, memory: Memory) -> tuple[Fill, Memory]:
        assert facts.entropy is not None
        ranked, order = facts.entropy.masked_fill(~canvas.masked, torch.inf).sort(dim=-1, stable=True)
        # Of the first k the k-th is the highest, so that what counts are the k - 1 before it.
        before = torch.cat([torch.zeros_like(ranked[:, :1]), ranked[:, :-1].cumsum(-1)], -1)
        fits = before <= self.gamma
        return torch.zeros_like(canvas.masked).scatter_(-1, order, fits) & canvas.masked, ()
