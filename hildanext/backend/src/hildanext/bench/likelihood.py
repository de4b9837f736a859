"""How well a model predicts text: exact where that is possible, a bound with its standard error elsewhere.

At block size 1 one doubled forward gives the exact -log p of every token given the tokens before it, the one number
that compares with an autoregressive model. At a larger block size the number is an upper bound: inside a block it
averages over the orders in which the tokens could be revealed (BD3-LM, arXiv:2503.09573).

Every number is about the same tokens: maskable, and not the first of a document piece (which the parent cannot
predict; all models are given it). Documents are padded with EOS to whole blocks. A bound has the padding's loss in its
sum but not its tokens in the count, so that it stays a bound; the number without it stands beside it. An exact number
needs no padding and leaves it out.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from hildanext.ar import Parent
from hildanext.config import knobs
from hildanext.datasets import Batch
from hildanext.diffusion import View, block_index
from hildanext.feeding import choose
from hildanext.models import DiffusionModel
from hildanext.supervision.linear_cross_entropy import linear_cross_entropy
from hildanext.supervision.objective import attention_for

Estimator = Literal["count", "time", "coupled"]
FORWARDS_PER_DRAW: dict[str, int] = {"count": 1, "time": 1, "coupled": 2}
SMALLEST_TIME = 1e-3
"""The interval BD3-LM evaluates on; at t -> 0 the weight 1/t has no finite variance."""


@knobs
class LikelihoodKnobs:
    """How a bound is estimated.

    `count` masks exactly k of a block's n tokens, k uniform in 1..n, weight n/k (LLaDA, arXiv:2502.09992, evaluation);
    `time` masks each with probability t, weight 1/t; `coupled` draws k in 0..n and averages a mask and its
    complement, weights (n+1)/k and (n+1)/(n-k) (ESPO, arXiv:2512.03759), at two forwards a draw. All share one mean.
    """

    estimator: Estimator = "count"
    draws: int = Field(default=4, ge=1)
    """Draws per block, stratified over the noise level."""
    block_sizes: tuple[int, ...] = (1, 4, 32)
    seed: int = 0


@dataclass(frozen=True)
class Likelihood:
    """Sums over a text, in nats, and what they are divided by."""

    kind: Literal["exact", "bound"]
    block_size: int
    """1 for an exact number, the parent's too."""
    tokens: int
    """Real tokens that were predicted."""
    real: float
    padding: float
    """Loss of the EOS padding up to whole blocks."""
    sampling: float = 0.0
    """Standard error of `real + padding` from the random masks (not from the choice of texts)."""
    text: float = 0.0
    """Standard error from the choice of texts (rows), padding left out."""
    forwards: int = 0

    @property
    def nats(self) -> float:
        """Nats per real token: exact, or an honest upper bound, which the padding's loss belongs to."""
        return (self.real + (self.padding if self.kind == "bound" else 0.0)) / max(self.tokens, 1)

    @property
    def nats_without_padding(self) -> float:
        return self.real / max(self.tokens, 1)

    @property
    def se(self) -> float:
        """Standard error of `nats` from the random masks; 0 for an exact number."""
        return self.sampling / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats, 700.0))

    def plain(self) -> dict[str, Any]:
        """What a JSON report holds."""
        return {
            "kind": self.kind,
            "block_size": self.block_size,
            "tokens": self.tokens,
            "nats_per_token": self.nats,
            "se": self.se,
            "nats_without_padding": self.nats_without_padding,
            "perplexity": self.perplexity,
            "se_of_text": self.text,
            "forwards": self.forwards,
        }


def scored_tokens(batch: Batch) -> Bool[Tensor, "batch seq"]:
    """The tokens every likelihood is about."""
    return batch.maskable & (batch.position > 0)


def padding_tokens(batch: Batch, pad_id: int) -> Bool[Tensor, "batch seq"]:
    """EOS after the EOS that ends a document: there only to fill its last block."""
    is_pad = batch.tokens == pad_id
    after_pad = torch.zeros_like(is_pad)
    after_pad[:, 1:] = is_pad[:, :-1] & (batch.document[:, 1:] == batch.document[:, :-1])
    return is_pad & after_pad & (batch.document >= 0)


@torch.no_grad()
def masked_nll(model: DiffusionModel, view: View, chunk: int = 128) -> Float[Tensor, "batch seq"]:
    """-log p(token | what the view shows) at masked tokens, 0 elsewhere; logits exist for `chunk` of them at a time.

    On the model's device, which nobody waits for where the view is on the host.
    """
    card, device = model.card, model.device
    batch, seq = view.clean.shape
    fed = choose(view, card.shift)
    sent, columns = view.to(device), fed.to(device)
    embeddings = model.embed(columns.tokens(sent))
    attention = attention_for(view, fed, card.clean_mask, embeddings)
    hidden = model(embeddings, columns.rows(sent).position, attention)
    where = view.masked.nonzero(as_tuple=True)
    column = fed.readout(view.position, view.block_size, card.shift)[where].to(device, non_blocking=True)
    where = (where[0].to(device, non_blocking=True), where[1].to(device, non_blocking=True))
    rows = hidden[where[0], column]
    weight = torch.ones(len(rows), device=rows.device)
    losses = linear_cross_entropy(
        rows, model.head.detach(), sent.clean[where], weight, model.banned, chunk=chunk
    ).cross_entropy
    result = torch.zeros(batch, seq, dtype=losses.dtype, device=losses.device)
    result[where] = losses
    return result


def exact(model: DiffusionModel, batches: Iterable[Batch], pad_id: int, chunk: int = 128) -> Likelihood:
    """-log p of every token given those before it: block size 1, everything masked, one forward.

    With the `parent` alignment that is the model's autoregressive mode (only the clean half is fed).
    """
    return bound(model, batches, 1, pad_id, LikelihoodKnobs(draws=1), chunk)


def bound(
    model: DiffusionModel,
    batches: Iterable[Batch],
    block_size: int,
    pad_id: int,
    settings: LikelihoodKnobs,
    chunk: int = 128,
) -> Likelihood:
    """Upper bound on -log p of the tokens when blocks of `block_size` are denoised one after another.

    Exact at block size 1. Every draw is one forward (two for `coupled`) that serves all blocks at once.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    draws = 1 if block_size == 1 else settings.draws
    sums = _Sums()
    for batch in batches:
        scored, padding = scored_tokens(batch), padding_tokens(batch, pad_id)
        if not scored.any():
            continue
        blocks = block_index(batch.document, batch.position, block_size)
        pairs, nll = list(noisings(scored, blocks, draws, settings.estimator, generator)), []
        for pair in pairs:
            for masked, weight in pair:
                if masked.any():
                    nll.append(masked_nll(model, _view(batch, masked, weight, block_size, model.card.mask_id), chunk))
        sums.forwards += len(nll)
        read = iter(torch.stack(nll).to(scored.device) if nll else ())  # the one wait of a batch
        per_draw = []
        for pair in pairs:
            losses = torch.zeros(scored.shape, dtype=torch.float64, device=scored.device)
            for masked, weight in pair:
                if masked.any():
                    losses += weight * next(read).double()
            per_draw.append(losses / len(pair))
        sums.add(torch.stack(per_draw), scored, padding, blocks)
    return sums.likelihood("exact" if block_size == 1 else "bound", block_size)


def parent_likelihood(parent: Parent, batches: Iterable[Batch], pad_id: int) -> Likelihood:
    """The autoregressive parent's exact number on the very same tokens."""
    sums = _Sums()
    for batch in batches:
        scored, padding = scored_tokens(batch), padding_tokens(batch, pad_id)
        nll = parent.token_nll(batch.tokens, batch.document, batch.position).double()
        sums.add((nll * scored)[None], scored, padding, block_index(batch.document, batch.position, 1))
        sums.forwards += 1
    return sums.likelihood("exact", 1)


Noising = Sequence[tuple[Bool[Tensor, "batch seq"], Float[Tensor, "batch seq"]]]
"""Masks with the weight of their losses, to be averaged: one, or a complementary pair."""


def noisings(
    scored: Bool[Tensor, "batch seq"],
    blocks: Int[Tensor, "batch seq"],
    draws: int,
    estimator: Estimator,
    generator: torch.Generator,
) -> Iterator[Noising]:
    """`draws` unbiased ways to noise a batch, each block on its own; a block's draws share out the noise levels."""
    scored_here, blocks_here = scored.cpu(), blocks.cpu()
    count = int(blocks_here.max()) + 1
    sizes = torch.bincount(blocks_here[scored_here], minlength=count).double()
    strata = torch.rand(draws, count, generator=generator).argsort(0)
    levels = (strata + torch.rand(draws, count, generator=generator, dtype=torch.float64)) / draws
    for level in levels:
        if estimator == "time":
            time = SMALLEST_TIME + (1 - SMALLEST_TIME) * level[blocks_here]
            masked = scored_here & (torch.rand(scored.shape, generator=generator) < time)
            pair = [(masked, 1.0 / time)]
        else:
            rank = _rank_in_block(scored_here, blocks_here, generator)
            free = sizes + 1 if estimator == "coupled" else sizes
            k = (level * free).floor()
            if estimator == "count":
                k = k + 1
            pair = [_first_k(scored_here, rank, k, free, blocks_here)]
            if estimator == "coupled":
                rest = scored_here & (rank >= k[blocks_here])
                pair.append((rest, (free / (sizes - k).clamp_min(1))[blocks_here]))
        yield [(masked.to(scored.device), weight.to(scored.device)) for masked, weight in pair]


def _first_k(scored: Tensor, rank: Tensor, k: Tensor, free: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    return scored & (rank < k[blocks]), (free / k.clamp_min(1))[blocks]


def _rank_in_block(scored: Tensor, blocks: Tensor, generator: torch.Generator) -> Tensor:
    """A random order of the scored tokens of each block, counted from 0; [batch seq]."""
    key = blocks.double() + torch.rand(blocks.shape, generator=generator, dtype=torch.float64)
    order = key.flatten()[scored.flatten()].argsort()
    sorted_blocks = blocks[scored][order]
    first = torch.searchsorted(sorted_blocks, sorted_blocks)
    ranks = torch.empty_like(sorted_blocks)
    ranks[order] = torch.arange(len(order)) - first
    result = torch.zeros_like(blocks)
    result[scored] = ranks
    return result


def _view(batch: Batch, masked: Tensor, weight: Tensor, block_size: int, mask_id: int) -> View:
    return View(
        clean=batch.tokens,
        noisy=batch.tokens.masked_fill(masked, mask_id),
        document=batch.document,
        position=batch.position,
        maskable=batch.maskable,
        masked=masked,
        replaced=torch.zeros_like(masked),
        time=1.0 / weight,
        block_size=block_size,
    )


class _Sums:
    """Adds up batches."""

    def __init__(self) -> None:
        self.real = self.padding = self.variance = 0.0
        self.tokens = self.forwards = 0
        self.rows: list[tuple[float, int]] = []
        self.single: list[Tensor] = []

    def add(
        self,
        losses: Float[Tensor, "draws batch seq"],
        scored: Bool[Tensor, "batch seq"],
        padding: Bool[Tensor, "batch seq"],
        blocks: Int[Tensor, "batch seq"],
    ) -> None:
        mean = losses.mean(0)
        counted = scored & ~padding
        self.real += float(mean[counted].sum())
        self.padding += float(mean[scored & padding].sum())
        self.tokens += int(counted.sum())
        self.rows += zip((mean * counted).sum(-1).tolist(), counted.sum(-1).tolist(), strict=True)
        per_block = losses.new_zeros(len(losses), int(blocks.max()) + 1)
        per_block.index_add_(1, blocks.flatten(), losses.flatten(1))
        if len(losses) > 1:
            # Draws are stratified, hence negatively correlated: treating them as independent errs on the safe side.
            self.variance += float(per_block.var(0).sum()) / len(losses)
        else:
            self.single.append(per_block[0])

    def likelihood(self, kind: Literal["exact", "bound"], block_size: int) -> Likelihood:
        if kind == "bound" and self.single:
            # One draw a block: the spread between blocks holds the texts' own spread too, so this is too large.
            sums = torch.cat(self.single)
            self.variance += float(sums.var()) * len(sums) if len(sums) > 1 else 0.0
        sampling = math.sqrt(self.variance) if kind == "bound" else 0.0
        text = _ratio_error(self.rows)
        return Likelihood(kind, block_size, self.tokens, self.real, self.padding, sampling, text, self.forwards)


def _ratio_error(rows: Sequence[tuple[float, int]]) -> float:
    """Standard error of sum(a) / sum(n) over rows (a, n)."""
    used = [(total, count) for total, count in rows if count > 0]
    tokens = sum(count for _, count in used)
    if len(used) < 2:
        return 0.0
    mean = sum(total for total, _ in used) / tokens
    squares = sum((total - mean * count) ** 2 for total, count in used)
    return math.sqrt(squares * len(used) / (len(used) - 1)) / tokens
