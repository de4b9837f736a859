"""Which noised views a micro-batch trains on: rows by number, noise by number."""

from collections.abc import Callable, Sequence

from jaxtyping import Int
from torch import Tensor

from hildanext.core.runtime import make_generator
from hildanext.corruption.noising import NoiseConfig, noised
from hildanext.corruption.schedules import BlockPhase
from hildanext.data.batch import RowDataset
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
