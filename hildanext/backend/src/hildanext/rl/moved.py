"""Answers that were written under another prompt than the one they are learnt under: what was said of them there.

The same tokens are masked and read, counted from the answer's beginning. Blocks are counted from the document's, so
that under a prompt of another length they are other blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hildanext.rl.batch import RolloutBatch
from hildanext.rl.looks import Look


@dataclass(frozen=True)
class Moved:
    """The rows that have another prompt, behind it."""

    rows: list[int]
    """Which ones of the batch."""
    batch: RolloutBatch
    """Each row a group of its own."""
    looks: list[Look]
    spans: list[tuple[int, int, int]]
    """Of each row: where its answer began, where it begins now, and how many positions it has."""

    def back(
        self, raw: Float[Tensor, "looks moved there"], into: Float[Tensor, "looks rows positions"]
    ) -> Float[Tensor, "looks rows positions"]:
        """What was said of the moved rows in place of what `into` holds of them."""
        whole = into.clone()
        for number, (row, (old, new, count)) in enumerate(zip(self.rows, self.spans, strict=True)):
            whole[:, row] = 0
            whole[:, row, old : old + count] = raw[:, number, new : new + count].to(whole)
        return whole


def moved(batch: RolloutBatch, looks: Sequence[Look], prompts: Sequence[tuple[int, ...] | None]) -> Moved:
    """The rows of which `prompts` has another prompt. Looks must show the text as it is and read its own tokens."""
    assert all(look.shown is None and look.labels is None for look in looks), "a look that replays steps was moved"
    rows = [row for row, prompt in enumerate(prompts) if prompt is not None]
    ends = (batch.document >= 0).sum(-1)
    spans, size = [], looks[0].block_size
    for row in rows:
        first = int(batch.prompt[row])
        spans.append((first, len(prompts[row] or ()), int(ends[row]) - first))
    lengths = [-(-(new + count) // size) * size for _, new, count in spans]
    shape = len(rows), max(lengths)
    tokens, document = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    scored, after = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    position, kept = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for number, (row, (old, new, count), length) in enumerate(zip(rows, spans, lengths, strict=True)):
        tokens[number, :new] = torch.tensor(prompts[row])
        document[number, :length], position[number, :length] = 0, torch.arange(length)
        here, there = slice(new, new + count), slice(old, old + count)
        tokens[number, here], scored[number, here] = batch.tokens[row, there], batch.scored[row, there]
        after[number, here] = batch.after[row, there]
        if batch.kept is not None:
            kept[number, here] = batch.kept[row, there]
        after[number, new + count : length] = True
    whole = RolloutBatch(
        tokens=tokens,
        document=document,
        position=position,
        prompt=torch.tensor([new for _, new, _ in spans]),
        scored=scored,
        after=after,
        step=torch.full(shape, -1),
        logp=torch.zeros(shape, dtype=torch.float64),
        entropy=torch.zeros(shape, dtype=torch.float64),
        group=torch.arange(len(rows)),
        edits=torch.zeros(0, 5, dtype=torch.long),
        kept=None if batch.kept is None else kept,
    )
    return Moved(rows, whole, [_look(look, whole, rows, spans) for look in looks], spans)


def _look(look: Look, whole: RolloutBatch, rows: Sequence[int], spans: Sequence[tuple[int, int, int]]) -> Look:
    masked, read = whole.after.clone(), torch.zeros_like(whole.after)
    weight = torch.zeros(whole.after.shape, dtype=look.weight.dtype)
    for number, (row, (old, new, count)) in enumerate(zip(rows, spans, strict=True)):
        here, there = slice(new, new + count), slice(old, old + count)
        masked[number, here], read[number, here] = look.masked[row, there], look.read[row, there]
        weight[number, here] = look.weight[row, there]
    return Look(masked, read, weight, look.block_size)
