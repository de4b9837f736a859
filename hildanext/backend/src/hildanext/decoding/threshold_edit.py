"""LLaDA2.1's joint threshold: fill what the model is sure of, rewrite what it has become surer about."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.decoding.base import Canvas, Decoder, Denoiser, Edit, Sampling, fill_above
from hildanext.models.sampling import candidates


@config
class ThresholdEdit(Decoder):
    """Fill masked positions the model is sure of; rewrite written ones it disagrees with.

    With v the candidate and p its probability, position i is written when it is masked and p_i > tau_mask,
    or when it holds another token of ours and p_i > tau_edit (both strict; editing goes on while masks remain).
    A block is final when it has no mask and a forward changes nothing, or after `max_post` forwards without masks.

    Paper: LLaDA2.1, arXiv:2602.08676.
    Differs: a row where nothing passes commits its most confident mask, ties to the lowest position (as the
    released checkpoint's own loop does); the mask and unused rows cannot be candidates; multi-block editing,
    whose algorithm is not published, is ours (`window`); at a temperature, one draw per position lasts for the
    whole block.
    """

    tau_mask: float = Field(title="Fill a mask above", default=0.7, ge=0, le=1, allow_inf_nan=False)
    """Probability above which a mask is filled; 1 fills one position per forward."""
    tau_edit: float | None = Field(title="Edit a word above", default=0.5, ge=0, le=1, allow_inf_nan=False)
    """Probability above which a written token is replaced; off (None) edits nothing, 0 on any disagreement."""
    max_post: int = Field(title="Forwards once filled", default=16, ge=0, json_schema_extra={"request_maximum": 1024})
    """Forwards a block may have after its last mask was filled."""
    tau_cautious: float | None = Field(title="Where unsure, above", default=None, ge=0, le=1, allow_inf_nan=False)
    """Where the masks' mean confidence m is low, fill above tau_cautious + m (tau_mask - tau_cautious); off is None."""
    kv_safe: bool = Field(title="End only when settled", default=False)
    """End a block only with a forward that changed nothing: at most one forward more, never another token."""
    window: int = Field(title="Blocks still edited", default=0, ge=0, json_schema_extra={"request_maximum": 1024})
    """Finished blocks that are offered for editing again after each block; their text is held back until then."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False, json_schema_extra={"request_maximum": 100})
    """0 is greedy."""
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    """Draw from the likeliest tokens that hold this probability together; None is all of them."""
    top_k: int | None = Field(default=None, ge=1, le=2147483648)
    """Draw from this many of the likeliest tokens; None is all of them."""

    def __post_init__(self) -> None:
        if self.window > 0 and self.tau_edit is None:
            raise ConfigError("window edits finished blocks but tau_edit is off", "give tau_edit, or window 0")

    @property
    def sampling(self) -> Sampling:
        return self.temperature, self.top_p, self.top_k

    def needs(self, canvas: Canvas) -> Bool[Tensor, "batch block"]:
        return canvas.masked if self.tau_edit is None else canvas.masked | canvas.editable

    def edit(self, logits: Float[Tensor, "rows vocab"], where: Bool[Tensor, "batch block"], canvas: Canvas) -> Edit:
        uniform = canvas.uniform[canvas.places(where)] if self.temperature > 0.0 else None
        picks, sure = candidates(logits, uniform, self.temperature, self.top_p, self.top_k)
        tokens = canvas.tokens.masked_scatter(where, picks)
        confidence = torch.zeros(where.shape, dtype=sure.dtype, device=sure.device).masked_scatter(where, sure)
        had_masks = canvas.masked.any(-1)
        fill = fill_above(confidence, canvas.masked, self._fill_threshold(confidence, canvas))
        write = fill | self._rewrites(tokens, confidence, canvas)
        checks = canvas.checks + ~had_masks
        filled = ~(canvas.masked & ~fill).any(-1)
        final = ~had_masks & ~write.any(-1)
        if not self.kv_safe:
            final |= filled & (checks >= self.max_post)
        return Edit(write, tokens, confidence, final)

    def _fill_threshold(self, confidence: Tensor, canvas: Canvas) -> Tensor | float:
        if self.tau_cautious is None:
            return self.tau_mask
        masks = canvas.masked.sum(-1, keepdim=True).clamp_min(1)
        mean = (confidence * canvas.masked).sum(-1, keepdim=True) / masks
        return self.tau_cautious + mean * (self.tau_mask - self.tau_cautious)

    def _rewrites(self, tokens: Tensor, confidence: Tensor, canvas: Canvas) -> Bool[Tensor, "batch block"]:
        if self.tau_edit is None:
            return torch.zeros_like(canvas.masked)
        write = canvas.editable & (tokens != canvas.tokens) & (confidence > self.tau_edit)
        if self.kv_safe:  # the budget is spent: this forward only confirms
            spent = ~canvas.masked.any(-1) & (canvas.checks >= self.max_post)
            write &= ~spent[:, None]
        return write

    def after_block(self, denoiser: Denoiser, rows: Sequence[int]) -> None:
        if self.window > 0:
            denoiser.revise(self.window, self.edit, rows)
