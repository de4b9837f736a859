"""What every stage measures while it trains: the bound on held-out rows."""

from collections.abc import Sequence
from typing import Any

import torch

from hildanext.datasets import Batch, PackedDataset
from hildanext.diffusion import block_index, block_times, mask_tokens, targets
from hildanext.models.card import Card
from hildanext.supervision import SupervisedStep
from hildanext.supervision.mask_to_token import MaskToToken
from hildanext.training import make_generator


def first_batches(dataset: PackedDataset, rows: int, batch_size: int, device: torch.device) -> list[Batch]:
    """The data set's first `rows` rows (all, where it has fewer), always in the same batches."""
    rows = min(rows, len(dataset))
    starts = range(0, rows, batch_size)
    return [dataset.batch(range(start, min(start + batch_size, rows))).to(device) for start in starts]


class Validation:
    """The bound at the checkpoint's block size on fixed batches, under fixed noise.

    Padding to the block boundary (`pad_id` after `pad_id`) is predicted and summed but not counted, so the figure
    is an upper bound in nats per real token.
    """

    def __init__(self, batches: Sequence[Batch], pad_id: int, card: Card) -> None:
        self.batches, self.pad, self.card = list(batches), pad_id, card

    def __call__(self, step: SupervisedStep, number: int) -> dict[str, Any]:
        """The bound of `step`'s model; `number` is the optimiser step, which changes nothing."""
        scorer = SupervisedStep(step.model, {"m2t": MaskToToken()}, chunk=step.chunk).eval()
        block_size = self.card.block_size
        total, count, per_batch = 0.0, 0, []
        for index, batch in enumerate(self.batches):
            generator = make_generator(0, 2, index)
            blocks = block_index(batch.document, batch.position, block_size)
            time = block_times(blocks, (1e-3, 1.0) if block_size > 1 else (1.0 - 1e-9, 1.0), generator)
            view = mask_tokens(
                batch.tokens,
                batch.document,
                batch.position,
                batch.maskable,
                time,
                block_size,
                self.card.mask_id,
                generator,
            )
            nats = float(scorer(view).total)
            may = targets(batch.maskable, batch.position, self.card.shift)
            padding = torch.zeros_like(may)
            padding[:, 1:] = (batch.tokens[:, 1:] == self.pad) & (batch.tokens[:, :-1] == self.pad)
            real = int((may & ~(padding & (batch.position > 0))).sum())
            total, count = total + nats, count + real
            per_batch.append(nats / max(real, 1))
        spread = torch.tensor(per_batch).std(unbiased=True) if len(per_batch) > 1 else torch.tensor(float("nan"))
        return {"block_size": block_size, "bound": total / count, "bound_se": float(spread) / len(per_batch) ** 0.5}
