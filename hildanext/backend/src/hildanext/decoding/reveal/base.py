"""What a rule of filling is: facts of one forward in, the masks to fill out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hildanext.decoding.base import Canvas

Fill = Bool[Tensor, "batch block"]
Memory = tuple[Any, ...]
"""Of each row a value or None, as `Canvas.memory`; empty where nothing is remembered."""


@dataclass(frozen=True)
class Facts:
    """Of one forward. What a rule does not ask for is None."""

    confidence: Float[Tensor, "batch block"]
    """Probability of each candidate; 0 where no logits were asked for."""
    tau: Float[Tensor, "batch 1"] | float
    """The decoder's `tau_mask`, lowered to where it is cautious."""
    entropy: Float[Tensor, "batch block"] | None
    """Of the model's own distribution, in nats; infinite where no logits were asked for."""
    log_probs: Float[Tensor, "masks vocab"] | None
    """Of the masks alone, row-major."""


class Reveal:
    """Which masks are filled. Members are frozen knobs; what changes is in `memory`."""

    research: ClassVar[bool] = False
    """A research method: built under the profile FULL alone."""
    wants_entropy: ClassVar[bool] = False
    wants_log_probs: ClassVar[bool] = False
    shifts: ClassVar[bool] = False
    """Whether `shift` changes logits. No one law then describes what is drawn."""

    def shift(
        self, logits: Float[Tensor, "masks vocab"], canvas: Canvas, memory: Memory
    ) -> tuple[Float[Tensor, "masks vocab"], Memory]:
        """The masks' logits (row-major) as candidates are chosen from them."""
        return logits, memory

    def reveal(self, facts: Facts, canvas: Canvas, memory: Memory) -> tuple[Fill, Memory]:
        """The masks to fill, none where the fallback is to, and what is remembered of each row."""
        raise NotImplementedError(f"{type(self).__name__} has no reveal")


def entropies(log_probs: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """In nats; what has no probability adds nothing."""
    return -(log_probs.exp() * log_probs.clamp_min(torch.finfo(log_probs.dtype).min)).sum(-1)


def remembered(memory: Memory, batch: int, fresh: Sequence[Tensor]) -> list[Tensor]:
    """The parts of all rows' memories, stacked; a row without one has the `fresh` parts."""
    rows = [row if row is not None else fresh for row in (memory if memory else [None] * batch)]
    return [torch.stack([row[part] for row in rows]) for part in range(len(fresh))]


def of_rows(*parts: Tensor) -> Memory:
    """Parts that begin with the batch, apart by row."""
    return tuple(zip(*(part.unbind() for part in parts), strict=True))
