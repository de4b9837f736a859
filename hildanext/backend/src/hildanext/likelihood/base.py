"""What a likelihood of a text is: masks drawn in such a way that weighted losses at them estimate -log p."""

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.core.errors import LogitsNotFinite
from hildanext.data.batch import Batch
from hildanext.diffusion import NoisedBatch, block_index
from hildanext.likelihood.masked_losses import masked_losses
from hildanext.models import DiffusionModel

Model = Literal["diffusion model", "autoregressive parent"]

Noising = Sequence[tuple[Bool[Tensor, "batch seq"], Float[Tensor, "batch seq"]]]
"""Masks with the weight of their losses, to be averaged: one, or a complementary pair."""


@config
class Likelihood:
    """An estimator of log p of each row of a batch. Members say how one draw is noised; all share one mean."""

    kind: ClassVar[Literal["exact", "bound"]] = "bound"

    draws: int = Field(default=4, ge=1)
    """Per block, stratified over the noise level."""
    block_size: int | None = Field(default=None, ge=1)
    """Of the order in which blocks are denoised; None is the checkpoint's own."""

    def score(
        self, model: DiffusionModel, batch: Batch, generator: torch.Generator, chunk: int = 128
    ) -> Float[Tensor, " batch"]:
        """log p of each row's scored tokens, or its estimate from below; differentiable.

        The noise depends on the generator and the batch alone: one of the same seed gives another policy the same.
        """
        return self.score_under(model, batch, self.draw(model, batch, generator), chunk)

    def draw(self, model: DiffusionModel, batch: Batch, generator: torch.Generator) -> list[Noising]:
        """The noise of `score`, to be kept where several models are to see the same."""
        blocks = block_index(batch.document, batch.position, self.size(model))
        return list(self.noisings(scored_tokens(batch), blocks, generator))

    def score_under(
        self, model: DiffusionModel, batch: Batch, noise: Sequence[Noising], chunk: int = 128
    ) -> Float[Tensor, " batch"]:
        """`score` under noise that was drawn before."""
        draws = (weighted_losses(model, batch, noising, self.size(model), chunk) for noising in noise)
        return -torch.stack([draw.nll.sum(-1) for draw in draws]).mean(0)

    def size(self, model: DiffusionModel) -> int:
        return model.card.block_size if self.block_size is None else self.block_size

    def noisings(
        self, scored: Bool[Tensor, "batch seq"], blocks: Int[Tensor, "batch seq"], generator: torch.Generator
    ) -> Iterator[Noising]:
        """`draws` unbiased noisings of a batch, each block on its own; a block's draws share out the noise levels."""
        # Drawn on the CPU, so that a seed gives the same noise on every device.
        scored_here, blocks_here = scored.cpu(), blocks.cpu()
        count = int(blocks_here.max()) + 1
        strata = torch.rand(self.draws, count, generator=generator).argsort(0)
        levels = (strata + torch.rand(self.draws, count, generator=generator, dtype=torch.float64)) / self.draws
        for level in levels:
            noising = self.noising(scored_here, blocks_here, level, generator)
            yield [(masked.to(scored.device), weight.to(scored.device)) for masked, weight in noising]

    def noising(
        self,
        scored: Bool[Tensor, "batch seq"],
        blocks: Int[Tensor, "batch seq"],
        level: Float[Tensor, " blocks"],
        generator: torch.Generator,
    ) -> Noising:
        """One draw; `level` is uniform in [0, 1) for each block."""
        raise NotImplementedError


def scored_tokens(batch: Batch) -> Bool[Tensor, "batch seq"]:
    """The tokens that every likelihood is about: maskable, and not the first of a piece, under any alignment.

    A run's validation asks `diffusion.targets` instead, which leaves out the first under `parent` alignment alone.
    """
    return batch.maskable & (batch.position > 0)


def number(nats: float, who: Model) -> float:
    """The same, which may be infinite (a token that may never be written). Raises `LogitsNotFinite` where it is NaN."""
    if math.isnan(nats):
        raise LogitsNotFinite(who)
    return nats


class DrawLosses(NamedTuple):
    """What one draw says of a batch."""

    nll: Float[Tensor, "batch seq"]
    """Each token's loss times its weight, averaged over the noising's masks; 0 where nothing is masked."""
    right: Int[Tensor, ""]
    """Masked tokens that are the most probable ones (counted where gradients are off)."""
    masked: Int[Tensor, ""]
    forwards: int


def weighted_losses(
    model: DiffusionModel, batch: Batch, noising: Noising, block_size: int, chunk: int = 128
) -> DrawLosses:
    """Every bound is made of these: the forwards of a draw, and their losses times the weights.

    `nll` and `right` lie where the model is, `masked` where the batch is.
    """
    nll = torch.zeros(batch.tokens.shape, dtype=torch.float64, device=model.device)
    right, forwards = nll.new_zeros((), dtype=torch.long), 0
    total = torch.zeros((), dtype=torch.long, device=batch.tokens.device)
    for masked, weight in noising:
        if masked.any():
            losses = masked_losses(model, noised_view(batch, masked, weight, block_size, model.card.mask_id), chunk)
            nll = nll + weight.to(nll.device, non_blocking=True) * losses.nll.double()
            right, total, forwards = right + losses.right.sum(), total + masked.sum(), forwards + 1
    return DrawLosses(nll / len(noising), right, total, forwards)


def noised_view(batch: Batch, masked: Tensor, weight: Tensor, block_size: int, mask_id: int) -> NoisedBatch:
    """The batch with `masked`, and what it always hides, shown as masks."""
    shown_as_mask = masked if batch.always_masked is None else masked | batch.always_masked
    return NoisedBatch(
        clean=batch.tokens,
        noisy=batch.tokens.masked_fill(shown_as_mask, mask_id),
        document=batch.document,
        position=batch.position,
        maskable=batch.maskable,
        masked=masked,
        replaced=torch.zeros_like(masked),
        time=1.0 / weight,
        block_size=block_size,
    )


def scored_per_block(scored: Tensor, blocks: Tensor) -> Float[Tensor, " blocks"]:
    return torch.bincount(blocks[scored], minlength=int(blocks.max()) + 1).double()


def rank_in_block(scored: Tensor, blocks: Tensor, generator: torch.Generator) -> Int[Tensor, "batch seq"]:
    """A random order of the scored tokens of each block, counted from 0."""
    key = blocks.double() + torch.rand(blocks.shape, generator=generator, dtype=torch.float64)
    order = key.flatten()[scored.flatten()].argsort()
    sorted_blocks = blocks[scored][order]
    first = torch.searchsorted(sorted_blocks, sorted_blocks)
    ranks = torch.empty_like(sorted_blocks)
    ranks[order] = torch.arange(len(order)) - first
    result = torch.zeros_like(blocks)
    result[scored] = ranks
    return result
