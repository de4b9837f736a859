"""Which noised views a micro-batch trains on: rows by number, noise by number."""

from collections.abc import Callable, Sequence

from jaxtyping import Int
from torch import Tensor

from hildanext.datasets import Rows
from hildanext.diffusion import CausalPairs, View
from hildanext.models.card import Card
from hildanext.noising import NoiseKnobs, noised
from hildanext.packing.rows import RowOrder
from hildanext.schedules import Rung
from hildanext.training import make_generator

PairsOf = Callable[[Sequence[int]], CausalPairs | None]


class Views:
    """Micro-batch index and rung -> noised views; a pure function of both, so that any process can begin anywhere.

    Views are made on the host, where their generator draws; whoever computes with one sends it to the device. So no
    size that depends on the noise is asked of the device.

    `real` lists the ids that a replaced token may become; `pairs` gives the causes and effects of rows, where the data
    has any.
    """

    def __init__(
        self,
        dataset: Rows,
        batch_size: int,
        noise: NoiseKnobs,
        card: Card,
        real: Int[Tensor, " real"],
        seed: int,
        pairs: PairsOf | None = None,
    ) -> None:
        self.dataset, self.order, self.noise = dataset, RowOrder(len(dataset), batch_size, seed), noise
        self.card, self.real, self.seed, self.pairs = card, real, seed, pairs

    def __call__(self, index: int, rung: Rung) -> list[View]:
        rows = self.order.batch(index)
        batch = self.dataset.batch(rows)
        pairs = self.pairs(rows) if self.pairs is not None else None
        generator = make_generator(self.seed, 1, index)
        return noised(batch, rung.block_size, self.noise, self.card, self.real, generator, pairs)
