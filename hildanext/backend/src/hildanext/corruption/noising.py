"""A batch to the noised views that a micro-batch trains on. Every stage that denoises text shares it."""

from dataclasses import replace

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.data.batch import Batch
from hildanext.diffusion import (
    CausalPairs,
    NoisedBatch,
    block_index,
    block_times,
    complement,
    effect_rates,
    mask_always,
    mask_tokens,
    replace_tokens,
    targets,
)
from hildanext.models.card import Card


@config
class NoiseConfig:
    """How a batch is noised. A stage's own knobs may extend these."""

    t_range: tuple[float, float] = (0.05, 1.0)
    """Bounds the weight 1/t at 20."""
    complementary: bool = False
    replace_rate: float = Field(default=0.1, ge=0, le=1)
    """Share of visible tokens replaced by random ones, drawn per micro-batch from [0, this]."""
    effect_boost: float = Field(default=1.0, ge=1)
    """How many times as often the effects of a causal graph are replaced as other tokens."""

    def __post_init__(self) -> None:
        low, high = self.t_range
        if not 0.0 < low < high <= 1.0:
            raise ConfigError(f"t_range {low}, {high}", "give 0 < low < high <= 1")


def noised(
    batch: Batch,
    block_size: int,
    noise: NoiseConfig,
    card: Card,
    real: Int[Tensor, " real"],
    generator: torch.Generator,
    pairs: CausalPairs | None = None,
) -> list[NoisedBatch]:
    """One view, or a complementary pair. At block size 1 every token is masked: there is nothing else to see.

    Tokens that the card's alignment cannot predict (`diffusion.targets`) stay as they are, as at inference.
    `real` lists the ids that a replaced token may become (see `diffusion.replace_tokens`). `pairs` are the batch's
    causes and effects, where it has any.
    """
    blocks = block_index(batch.document, batch.position, block_size)
    alone = block_size == 1
    time = torch.ones(blocks.shape) if alone else block_times(blocks, noise.t_range, generator)
    view = mask_tokens(
        batch.tokens,
        batch.document,
        batch.position,
        targets(batch.maskable, batch.position, card.shift),
        time.to(blocks.device),
        block_size,
        card.mask_id,
        generator,
    )
    if pairs is not None:
        view = replace(view, pairs=pairs.to(blocks.device))
    views = [view, complement(view, card.mask_id)] if noise.complementary and not alone else [view]
    if batch.always_masked is not None:  # inference writes the block that an answer ends in without the next question
        views = [mask_always(v, batch.always_masked, card.mask_id) for v in views]
    if alone:
        return views
    if noise.replace_rate > 0:
        rates = noise.replace_rate * torch.rand(len(views), generator=generator)
        drawn = zip(views, rates.tolist(), strict=True)
        views = [replace_tokens(v, effect_rates(v, rate, noise.effect_boost), real, generator) for v, rate in drawn]
    return views
