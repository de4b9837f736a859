"""Tokens that stayed the likeliest for some steps are trusted sooner."""

from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.decoding.base import Canvas
from hildanext.decoding.reveal.base import Facts, Fill, Memory, Reveal, of_rows, remembered


@config
class Credit(Reveal):
    """Masks above `tau_mask` once each mask's logits are raised by alpha log(1 + credit).

    A step multiplies all credits of a mask by beta and gives the likeliest token its probability to the power gamma.
    What is shown as a token's probability is the model's own.

    Paper: CreditDecoding, arXiv:2510.06133; the knobs' defaults are dInfer's.
    Differs: a position keeps the credits of its `entries` richest tokens, as indices and values; a token beyond them
    takes the poorest one's place.
    """

    shifts: ClassVar[bool] = True

    alpha: float = Field(default=0.7, ge=0, allow_inf_nan=False)
    """0 is the threshold's rule."""
    beta: float = Field(default=0.8, ge=0, le=1, allow_inf_nan=False)
    """What is left of a credit after a step."""
    gamma: float = Field(default=0.2, ge=0, allow_inf_nan=False)
    """Below 1 an unsure token earns nearly as much as a sure one."""
    entries: int = Field(default=4, ge=1, le=64)
    """Tokens of a position that have credit."""

    def shift(
        self, logits: Float[Tensor, "masks vocab"], canvas: Canvas, memory: Memory
    ) -> tuple[Float[Tensor, "masks vocab"], Memory]:
        masked = canvas.masked
        nobody = torch.full((masked.shape[1], self.entries), -1, device=logits.device)
        fresh = (nobody, torch.zeros(nobody.shape, dtype=logits.dtype, device=logits.device))
        ids, credit = remembered(memory, len(masked), fresh)
        best, top = logits.max(-1)
        earned = (best - logits.logsumexp(-1)).exp() ** self.gamma
        mine, held = ids[masked], credit[masked] * self.beta
        same = mine == top[:, None]
        # Its own entry, or the poorest; of equal ones the first.
        place = torch.where(same.any(-1), same.int().argmax(-1), held.argmin(-1))[:, None]
        kept = torch.where(same.any(-1, keepdim=True), held.gather(-1, place), 0.0)
        held = held.scatter(-1, place, kept + earned[:, None])
        mine = mine.scatter(-1, place, top[:, None])
        raised = self.alpha * held.log1p()
        # A position that is no mask has no credit: what it was given counts for the mask that it was.
        ids = nobody.expand(len(masked), -1, -1).clone().masked_scatter(masked[..., None], mine)
        credit = torch.zeros_like(credit).masked_scatter(masked[..., None], held)
        return logits.scatter_add(-1, mine.clamp_min(0), raised.masked_fill(mine < 0, 0.0)), of_rows(ids, credit)

    def reveal(self, facts: Facts, canvas: Canvas, memory: Memory) -> tuple[Fill, Memory]:
        return canvas.masked & (facts.confidence > facts.tau), memory
