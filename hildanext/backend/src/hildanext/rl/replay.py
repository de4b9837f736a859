"""The states that a sampler saw, one step of every block at a time."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hildanext.diffusion import block_index
from hildanext.rl.batch import RolloutBatch
from hildanext.rl.looks import Look

LEAST_ENTROPY = 1e-8
"""Added to that of every step, in nats, so that none is never drawn (AGRPO's code)."""


@dataclass(frozen=True)
class Replay:
    """A batch and its blocks' steps: looks at the states that the sampler saw."""

    batch: RolloutBatch
    block: Int[Tensor, "rows positions"]
    """Among all blocks of the batch."""
    size: int
    steps: Int[Tensor, " blocks"]
    """Up to the last one that wrote."""
    filled: Int[Tensor, "rows positions"]
    """The tokens that filled the masks, before any edit."""

    @classmethod
    def of(cls, batch: RolloutBatch, size: int) -> "Replay":
        block = block_index(batch.document, batch.position, size)
        row, when, position, *_ = batch.edits.unbind(1)
        last = torch.full((int(block.max()) + 1,), -1)
        last = last.scatter_reduce(0, block[batch.written], batch.step[batch.written], "amax")
        last = last.scatter_reduce(0, block[row, position], when, "amax")
        filled = batch.tokens.clone()
        for number, _, place, old, _ in batch.edits.flip(0).tolist():
            filled[number, place] = old
        return cls(batch, block, size, last + 1, filled)

    def chances(self, by_entropy: bool) -> Float[Tensor, "blocks steps"]:
        """Of each step of each block to be drawn."""
        batch, most = self.batch, int(self.steps.max())
        mass = torch.zeros(len(self.steps), most, dtype=torch.float64)
        if by_entropy:
            where = self.block[batch.written], batch.step[batch.written]
            mass.index_put_(where, batch.entropy[batch.written].double(), accumulate=True)
            mass += LEAST_ENTROPY
        else:
            mass += 1.0
        mass *= torch.arange(most) < self.steps[:, None]
        return mass / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)

    def look(
        self,
        first: Int[Tensor, " blocks"],
        until: Int[Tensor, " blocks"],
        weight: Float[Tensor, " blocks"] | None = None,
    ) -> Look:
        """Each block in the state before its step `first`, read what it wrote from there to before `until`."""
        batch, at = self.batch, first[self.block]
        masked = batch.written & (batch.step >= at)
        read = masked & (batch.step < until[self.block])
        shown, labels = self.filled.clone(), self.filled.clone()
        for row, when, position, _, new in batch.edits.tolist():
            now = int(at[row, position])
            if when < now:
                shown[row, position] = new
            elif when == now:
                labels[row, position], read[row, position] = new, True
        weights = read.double() if weight is None else torch.where(read, weight[self.block], 0.0)
        edited = len(batch.edits) > 0
        return Look(masked, read, weights, self.size, shown if edited else None, labels if edited else None)
