"""Which views a micro-batch trains on: rows by number, noise (where there is any) by number."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from hildanext.core.runtime import make_generator
from hildanext.corruption.noising import NoiseConfig, noised
from hildanext.corruption.schedules import BlockPhase
from hildanext.data.batch import Batch, RowDataset
from hildanext.data.packing.rows import RowOrder
from hildanext.diffusion import CausalPairs, NoisedBatch
from hildanext.models.card import Card

PairsOf = Callable[[Sequence[int]], CausalPairs | None]


class NoisedBatches:
    """Micro-batch index and phase -> noised views; a pure function of both, so that any process can begin anywhere.

    Views are made on the host, where their generator draws; whoever computes with one sends it to the device. So no
    size that depends on the noise is asked of the device.

    `real` lists the ids that a replaced token may become; `pairs` gives the causes and effects of rows, where the data
    has any.
    """

    def __init__(
        self,
        dataset: RowDataset,
        batch_size: int,
        noise: NoiseConfig,
        card: Card,
        real: Int[Tensor, " real"],
        seed: int,
        pairs: PairsOf | None = None,
    ) -> None:
        self.dataset, self.order, self.noise = dataset, RowOrder(len(dataset), batch_size, seed), noise
        self.card, self.real, self.seed, self.pairs = card, real, seed, pairs

    def __call__(self, index: int, block_phase: BlockPhase) -> list[NoisedBatch]:
        rows = self.order.batch(index)
        batch = self.dataset.batch(rows)
        pairs = self.pairs(rows) if self.pairs is not None else None
        generator = make_generator(self.seed, 1, index)
        return noised(batch, block_phase.block_size, self.noise, self.card, self.real, generator, pairs)


def clean_view(batch: Batch, block_size: int) -> NoisedBatch:
    """Rows without noise, for a step that draws its masks itself (`losses.draft`)."""
    nothing = torch.zeros_like(batch.maskable)
    level = torch.ones(batch.tokens.shape)
    parts = (batch.tokens, batch.tokens, batch.document, batch.position, batch.maskable, nothing, nothing, level)
    return NoisedBatch(*parts, block_size)


class CleanBatches:
    """Micro-batch index and phase -> one view without noise, in blocks of the phase's size."""

    def __init__(self, dataset: RowDataset, batch_size: int, seed: int) -> None:
        self.dataset, self.order = dataset, RowOrder(len(dataset), batch_size, seed)

    def __call__(self, index: int, block_phase: BlockPhase) -> list[NoisedBatch]:
        return [clean_view(self.dataset.batch(self.order.batch(index)), block_phase.block_size)]
