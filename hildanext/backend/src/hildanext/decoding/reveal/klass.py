"""Masks that are sure, and whose distribution has stopped moving."""

from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.decoding.base import Canvas
from hildanext.decoding.reveal.base import Facts, Fill, Memory, Reveal


@config
class Klass(Reveal):
    """Masks above `tau_mask` whose last `history` steps each moved their distribution by less than `epsilon`.

    A step's move is KL(now || before), in nats; a mask's first step in a block moves it infinitely far.

    Paper: KLASS, arXiv:2511.05664. The authors' scripts have tau_mask / epsilon 0.6 / 0.015 (LLaDA, GSM8K),
    0.6 / 0.01 (MATH), 0.9 / 0.01 (HumanEval), 0.7 / 0.01 (MBPP), 0.9 / 0.001 (Dream); history 2 in all of them.
    Differs: theirs starts at probabilities of zero and a constant inside the logarithm, a first move that is huge and
    not infinite; distributions are kept for masks alone.
    """

    wants_log_probs: ClassVar[bool] = True

    epsilon: float = Field(default=0.01, gt=0, allow_inf_nan=True)
    """Nats."""
    history: int = Field(default=2, ge=1, le=64)
    """Steps."""

    def reveal(self, facts: Facts, canvas: Canvas, memory: Memory) -> tuple[Fill, Memory]:
        assert facts.log_probs is not None
        moved = self._moved(facts.log_probs, canvas, memory)
        still = (moved < self.epsilon) | (moved.new_tensor(self.epsilon).isinf())
        fill = canvas.masked & (facts.confidence > facts.tau) & still.all(-1)
        return fill, self._memory(facts.log_probs, canvas, moved)

    def _moved(
        self, now: Float[Tensor, "masks vocab"], canvas: Canvas, memory: Memory
    ) -> Float[Tensor, "batch block history"]:
        """The last moves of each position, the newest last; infinite before its first."""
        size = canvas.masked.shape[1]
        moved = now.new_full((*canvas.masked.shape, self.history), torch.inf)
        if not memory or all(row is None for row in memory):
            return moved
        begin = 0
        for row, (count, kept) in enumerate(zip(canvas.masked.sum(-1).tolist(), memory, strict=True)):
            part, begin = now[begin : begin + count], begin + count
            if kept is None or count == 0:
                continue
            before, places, moves = kept
            slot = torch.full((size,), -1, device=now.device).scatter(0, places, torch.arange(len(places)).to(places))
            mine = canvas.masked[row].nonzero()[:, 0]
            known = slot[mine] >= 0
            ratio = part[known] - before[slot[mine[known]]]
            kl = (part[known].exp() * ratio.nan_to_num(0.0)).sum(-1)
            moved[row, mine[known]] = torch.cat([moves[mine[known], 1:], kl[:, None]], -1)
        return moved

    def _memory(self, now: Float[Tensor, "masks vocab"], canvas: Canvas, moved: Tensor) -> Memory:
        parts = now.split(canvas.masked.sum(-1).tolist())
        return tuple(
            (part, masked.nonzero()[:, 0], moves)
            for part, masked, moves in zip(parts, canvas.masked, moved, strict=True)
        )
