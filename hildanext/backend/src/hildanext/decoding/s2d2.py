"""Self-speculation: what a block's denoising drafts, the same weights at block size 1 confirm."""

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.decoding.base import Canvas, CausalLogits, Decoder, Edit, fill_above
from hildanext.models.sampling import candidates


@config
class S2D2(Decoder):
    """Fill a block's first run of masks with what the model writes at block size 1, as far as its draft was right.

    The first forward drafts every mask of the block. A second one reads the first run of masks at block size 1, each
    position from what stands left of it: drafts stay up to the first that this mode would not write, which becomes
    what it does write; the rest stays masked. Where every run is verified (the defaults) the text is that mode's own,
    token for token, at any temperature: under `parent` alignment the text of the converted weights as an
    autoregressive model. Under `block` alignment finished blocks keep the keys of their own block size. A run that is
    not verified is filled above `tau_mask`, and the text is no longer that mode's.

    Paper: S2D2, arXiv:2603.25702.
    Differs: a draft and the mode's token are drawn with the same uniform number and a draft stays where they agree,
    so that the text is a function of the seed alone; the paper accepts with min(1, q / p) and draws the rest from the
    residual, which has the same law and accepts more at a temperature. Acceptance is estimated by the draft's
    probability; no hysteresis, no bandit; nothing is edited.
    """

    research: ClassVar[bool] = True

    tau_mask: float = Field(title="Fill a mask above", default=0.85, ge=0, le=1, allow_inf_nan=False)
    """Probability above which a mask is filled where a run is not verified."""
    min_span: int = Field(title="Verify runs from", default=1, ge=1, le=2147483648)
    """Masks that a run has at least where it is verified."""
    cost: float | None = Field(title="Price of verifying", default=None, ge=0, allow_inf_nan=False)
    """Verify where the drafts expected to stay are at least this many for each mask above the threshold; off: always.
    """
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False, json_schema_extra={"request_maximum": 100})
    """0 is greedy."""
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    """Draw from the likeliest tokens that hold this probability together; None is all of them."""
    top_k: int | None = Field(default=None, ge=1, le=2147483648)
    """Draw from this many of the likeliest tokens; None is all of them."""

    def needs(self, canvas: Canvas) -> Bool[Tensor, "batch block"]:
        return canvas.masked

    def edit(self, logits: Float[Tensor, "rows vocab"], where: Bool[Tensor, "batch block"], canvas: Canvas) -> Edit:
        """A draft for every mask, and which of them are filled where they are not verified."""
        uniform = canvas.uniform[canvas.places(where)] if self.temperature > 0.0 else None
        picks, sure = candidates(logits, uniform, self.temperature, self.top_p, self.top_k)
        tokens = canvas.tokens.masked_scatter(where, picks)
        confidence = torch.zeros(where.shape, dtype=sure.dtype, device=sure.device).masked_scatter(where, sure)
        fill = fill_above(confidence, canvas.masked, self.tau_mask)
        return Edit(fill, tokens, confidence, ~canvas.left(fill, tokens).any(-1))

    def verify(self, edit: Edit, canvas: Canvas, causal_logits: CausalLogits) -> Edit:
        span = first_run(canvas.masked)
        verified = self._pays(edit, canvas, span)
        span &= verified[:, None]
        drafted = torch.where(span, edit.tokens, canvas.tokens)
        uniform = canvas.uniform[span] if self.temperature > 0.0 else None
        logits = causal_logits(drafted, span)
        picks, sure = candidates(logits, uniform, self.temperature, self.top_p, self.top_k)
        tokens = drafted.masked_scatter(span, picks)
        confidence = edit.confidence.masked_scatter(span, sure)
        # All before a position were right: it reads what it would have read in that mode.
        right = torch.where(span, tokens == drafted, True).cumprod(-1).bool()
        reached = torch.cat([torch.ones_like(right[:, :1]), right[:, :-1]], -1)
        write = torch.where(verified[:, None], span & reached, edit.write)
        tokens = torch.where(verified[:, None], tokens, edit.tokens)
        confidence = torch.where(verified[:, None], confidence, edit.confidence)
        return Edit(write, tokens, confidence, ~canvas.left(write, tokens).any(-1))

    def _pays(self, edit: Edit, canvas: Canvas, span: Bool[Tensor, "batch block"]) -> Bool[Tensor, " batch"]:
        """Rows whose run is verified."""
        verified = span.sum(-1) >= self.min_span
        if self.cost is None:
            return verified
        stays = torch.where(span, edit.confidence, 1.0).cumprod(-1)
        expected = (stays * span).sum(-1)
        filled = (canvas.masked & (edit.confidence > self.tau_mask)).sum(-1)
        return verified & (expected >= self.cost * filled)


def first_run(masked: Bool[Tensor, "batch block"]) -> Bool[Tensor, "batch block"]:
    """The masks of each row from its first on, up to the first position that is none."""
    begun = masked.int().cummax(-1).values.bool()
    ended = (begun & ~masked).int().cummax(-1).values.bool()
    return begun & ~ended
