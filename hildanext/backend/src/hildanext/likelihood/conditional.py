"""-log p of a continuation given its context, the one question behind multiple choice and perplexity.

Under the parent, and under a diffusion model at block size 1, the answer is exact. At a larger block size it is an
upper bound: inside a block it averages over the orders in which the tokens may be revealed, estimated with random
masks (k of a block's n tokens, k uniform in 1..n, weight n/k; LLaDA, arXiv:2502.09992, evaluation). A block with a
single scored token has one order only, so it is exact again.

Only the continuation is summed; the context is visible. What lies behind the continuation in its last block stays
masked, as when the model writes: the orders that reveal it afterwards still bound the same -log p.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hildanext.ar import Parent
from hildanext.core.errors import PromptError
from hildanext.core.runtime import send
from hildanext.diffusion import NoisedBatch
from hildanext.inference import context_length
from hildanext.likelihood.base import number
from hildanext.likelihood.masked_losses import hidden_states
from hildanext.losses.linear_cross_entropy import linear_cross_entropy
from hildanext.models import HEAD_ROWS, DiffusionModel

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """Tokens that are given (at least one, the first of the document) and tokens that are scored."""

    context: Ids
    continuation: Ids
    seed: int = 0
    """Pairs with one seed and contexts of one length share their random masks: options of one question."""

    def __post_init__(self) -> None:
        if not self.context:
            raise PromptError("a continuation has no context", "begin the document with the tokenizer's BOS or EOS")


@dataclass(frozen=True)
class Scored:
    """-log p of a continuation."""

    nats: float
    """Summed over its tokens."""
    variance: float
    """Of `nats`, from the random masks; 0 for an exact number."""
    tokens: int
    kind: Literal["exact", "bound"]
    forwards: int
    """Rows of forwards that this took (one shared by several pairs counts for each)."""

    @property
    def se(self) -> float:
        return math.sqrt(self.variance)


@dataclass
class _Unit:
    """One row of a forward: a context with a noised continuation, read for one pair, or for several one-token pairs."""

    context: Ids
    continuation: Ids
    offsets: list[int]
    """Scored positions, counted in the continuation."""
    weights: list[float]
    draw: int
    pairs: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.context) + len(self.continuation)


def score_diffusion(
    model: DiffusionModel,
    pairs: Sequence[Pair],
    block_size: int | None = None,
    draws: int = 16,
    batch_size: int = 8,
    chunk: int = 128,
) -> list[Scored]:
    """Score every pair; `block_size` None is the checkpoint's own. A forward has `batch_size` rows.

    Raises `PromptError` for a pair longer than the context.
    """
    size = block_size if block_size is not None else model.card.block_size
    limit = context_length(model)
    for pair in pairs:
        _check(pair, limit)
    plans = [_plan(pair, size, draws) for pair in pairs]
    units = _units(pairs, plans)
    sums = [torch.zeros(len(plan.masks), plan.blocks, dtype=torch.float64) for plan in plans]
    order = sorted(units, key=lambda unit: unit.length)
    for start in range(0, len(order), batch_size):
        for owner, draw, block, loss in _losses(model, order[start : start + batch_size], pairs, size, chunk):
            sums[owner][draw, block] += loss
    return [_scored(pair, plan, total) for pair, plan, total in zip(pairs, plans, sums, strict=True)]


@torch.no_grad()
def score_parent(parent: Parent, pairs: Sequence[Pair], batch_size: int = 8, chunk: int = HEAD_ROWS) -> list[Scored]:
    """The autoregressive parent's exact numbers on the same pairs. Raises `PromptError` as above."""
    limit = int(parent.causal_lm.config.max_position_embeddings)
    for pair in pairs:
        _check(pair, limit)
    units: dict[tuple[Ids, Ids], list[int]] = defaultdict(list)
    for index, pair in enumerate(pairs):  # one-token options of one question are read from one forward
        units[pair.context, pair.continuation[:-1]].append(index)
    order = sorted(units, key=lambda unit: len(unit[0]) + len(unit[1]))
    nats = [0.0] * len(pairs)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        tokens, document, position = _rows([(*context, *before) for context, before in batch], 1)
        hidden = parent.hidden(*(part.to(parent.device, non_blocking=True) for part in (tokens, document, position)))
        reads = [
            (row, len(context) - 1 + offset, token, index)
            for row, (context, before) in enumerate(batch)
            for index in units[context, before]
            for offset, token in enumerate(pairs[index].continuation)
        ]
        for first in range(0, len(reads), chunk):
            part = send(reads[first : first + chunk], hidden.device)
            logits = parent.logits(hidden[part[:, 0], part[:, 1]])
            losses = cross_entropy(logits, part[:, 2], reduction="none")
            for (_, _, _, owner), loss in zip(reads[first : first + chunk], losses.tolist(), strict=True):
                nats[owner] += loss
    return [
        Scored(number(total, "autoregressive parent"), 0.0, len(pair.continuation), "exact", 1)
        for total, pair in zip(nats, pairs, strict=True)
    ]


@dataclass(frozen=True)
class _Plan:
    """How a pair is scored: for each draw the masked positions of the continuation and the weights of their losses."""

    masks: list[tuple[list[int], list[float]]]
    blocks: int
    """Blocks that hold a scored token."""
    exact: bool
    """No block holds two scored tokens, so that there is nothing to draw."""


def _plan(pair: Pair, size: int, draws: int) -> _Plan:
    """Random masks, block by block, so that a longer continuation begins with the masks of a shorter one."""
    first, end = len(pair.context), len(pair.context) + len(pair.continuation)
    blocks = [range(max(start, first), min(start + size, end)) for start in range(first // size * size, end, size)]
    blocks = [block for block in blocks if block]
    exact = all(len(block) == 1 for block in blocks)
    draws = 1 if exact else draws
    generator = torch.Generator().manual_seed(pair.seed)
    masks: list[tuple[list[int], list[float]]] = [([], []) for _ in range(draws)]
    for block in blocks:
        n = len(block)
        strata = torch.rand(draws, generator=generator).argsort()
        level = (strata + torch.rand(draws, generator=generator, dtype=torch.float64)) / draws
        ranks = torch.rand(draws, size, generator=generator)[:, :n].argsort(-1).argsort(-1).tolist()
        for (offsets, weights), rank, k in zip(masks, ranks, ((level * n).long() + 1).tolist(), strict=True):
            offsets += [block[i] - first for i in range(n) if rank[i] < k]
            weights += [n / k] * k
    return _Plan(masks, len(blocks), exact)


def _units(pairs: Sequence[Pair], plans: Sequence[_Plan]) -> list[_Unit]:
    units: list[_Unit] = []
    shared: dict[Ids, _Unit] = {}
    for index, (pair, plan) in enumerate(zip(pairs, plans, strict=True)):
        if len(pair.continuation) == 1:
            unit = shared.get(pair.context)
            if unit is None:
                unit = shared[pair.context] = _Unit(pair.context, pair.continuation, [0], [1.0], 0)
                units.append(unit)
            unit.pairs.append(index)
        elif pair.continuation:
            units += [
                _Unit(pair.context, pair.continuation, offsets, weights, draw, [index])
                for draw, (offsets, weights) in enumerate(plan.masks)
            ]
    return units


@torch.no_grad()
def _losses(
    model: DiffusionModel, units: Sequence[_Unit], pairs: Sequence[Pair], size: int, chunk: int
) -> Iterator[tuple[int, int, int, float]]:
    """(pair, draw, block, weighted loss) of every scored token of one forward."""
    view = _view(units, size, model.card.mask_id)
    hidden, fed = hidden_states(model, view)
    readout = fed.prediction_index(view.position, size, model.card.shift)
    rows, columns, labels, marks = [], [], [], []
    for row, unit in enumerate(units):
        first = len(unit.context)
        for index in unit.pairs:
            for offset, weight in zip(unit.offsets, unit.weights, strict=True):
                rows.append(row)
                columns.append(int(readout[row, first + offset]))
                labels.append(pairs[index].continuation[offset])
                marks.append((index, unit.draw, (first + offset) // size - first // size, weight))
    losses = linear_cross_entropy(
        hidden[send(rows, hidden.device), send(columns, hidden.device)],
        model.head.detach(),
        send(labels, hidden.device, torch.long),
        torch.ones(len(rows), device=hidden.device),
        model.banned,
        chunk=chunk,
    ).cross_entropy.double()
    for (index, draw, block, weight), loss in zip(marks, losses.tolist(), strict=True):
        yield index, draw, block, weight * loss


def _view(units: Sequence[_Unit], size: int, mask_id: int) -> NoisedBatch:
    tokens, document, position = _rows([(*unit.context, *unit.continuation) for unit in units], size)
    noisy, masked = tokens.clone(), torch.zeros_like(tokens, dtype=torch.bool)
    for row, unit in enumerate(units):
        noisy[row, unit.length :] = mask_id
        scored = torch.tensor(unit.offsets, dtype=torch.long) + len(unit.context)
        noisy[row, scored] = mask_id
        masked[row, scored] = True
    return NoisedBatch(
        clean=tokens,
        noisy=noisy,
        document=document,
        position=position,
        maskable=masked,
        masked=masked,
        replaced=torch.zeros_like(masked),
        time=torch.ones(tokens.shape),
        block_size=size,
    )


def _rows(rows: Sequence[Sequence[int]], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, document and position of rows that end with their last block; beyond it is padding."""
    ends = [-(-len(row) // size) * size for row in rows]
    tokens = torch.zeros(len(rows), max(ends), dtype=torch.long)
    document, position = torch.full_like(tokens, -1), torch.zeros_like(tokens)
    for index, (row, end) in enumerate(zip(rows, ends, strict=True)):
        tokens[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        document[index, :end] = 0
        position[index, :end] = torch.arange(end)
    return tokens, document, position


def _scored(pair: Pair, plan: _Plan, total: Tensor) -> Scored:
    """`total` has shape [draws blocks]. Draws are stratified; treating them as independent errs on the safe side."""
    draws = len(plan.masks)
    variance = float(total.var(0).sum()) / draws if draws > 1 else 0.0
    nats = number(float(total.mean(0).sum()), "diffusion model")
    return Scored(nats, variance, len(pair.continuation), "exact" if plan.exact else "bound", draws)


def _check(pair: Pair, limit: int) -> None:
    length = len(pair.context) + len(pair.continuation)
    if length > limit:
        raise PromptError(
            f"context and continuation have {length} tokens, the model's context is {limit}",
            "shorten the context (fewer examples), or cut the text",
        )
