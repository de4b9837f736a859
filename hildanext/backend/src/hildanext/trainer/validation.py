"""What every stage measures while it trains: the bound on held-out rows."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hildanext.core.errors import DataError
from hildanext.core.runtime import make_generator
from hildanext.data.batch import Batch, RowDataset, padding_tokens
from hildanext.data.packing.rows import row_order
from hildanext.diffusion import (
    SMALLEST_TIME,
    NoisedBatch,
    block_index,
    block_times,
    mask_always,
    mask_tokens,
    replace_tokens,
    targets,
)
from hildanext.likelihood.held_out import NoisedText, text_likelihood
from hildanext.losses import SupervisedStep
from hildanext.losses.mask_to_token import MaskToToken
from hildanext.models.card import Card


def first_batches(dataset: RowDataset, rows: int, batch_size: int) -> list[Batch]:
    """The data set's first `rows` rows (all, where it has fewer), always in the same batches."""
    rows = min(rows, len(dataset))
    starts = range(0, rows, batch_size)
    return [dataset.batch(range(start, min(start + batch_size, rows))) for start in starts]


def drawn_batches(dataset: RowDataset, rows: int, batch_size: int) -> list[Batch]:
    """`rows` rows drawn from all over the data set (all, where it has fewer), always the same in the same batches."""
    drawn = row_order(len(dataset), 0, 0)[:rows]
    return [dataset.batch(drawn[at : at + batch_size]) for at in range(0, len(drawn), batch_size)]


class Validation:
    """The bound at the checkpoint's block size on fixed batches, under fixed noise.

    Scored is what the checkpoint can predict (`diffusion.targets`): under `block` alignment the first token of a piece
    too, which `likelihood.held_out` leaves to no model. Padding to the block boundary is predicted and summed but not
    counted, so the figure is an upper bound in nats per real token. Raises `DataError` where there is none.
    """

    def __init__(self, batches: Sequence[Batch], pad_id: int, card: Card) -> None:
        self.batches, self.card, self.pad_id = list(batches), card, pad_id
        predictable = [targets(batch.maskable, batch.position, card.shift) for batch in self.batches]
        padding = [padding_tokens(batch.tokens, batch.document, pad_id) for batch in self.batches]
        if not any(bool((may & ~filling).any()) for may, filling in zip(predictable, padding, strict=True)):
            rows = sum(len(batch.tokens) for batch in self.batches)
            raise DataError(
                f"the validation data holds no token to predict in {rows} rows",
                "give it longer documents (the first token of one is given, not predicted), or raise valid_rows",
            )

    @torch.no_grad()
    def __call__(self, step: SupervisedStep, number: int) -> dict[str, Any]:
        """The bound of `step`'s model; `number` is the optimiser step, which changes nothing."""
        model, block_size = step.model.eval(), self.card.block_size
        parts = [
            text_likelihood(model, [self._noised(index)], block_size, self.pad_id, chunk=step.chunk)
            for index in range(len(self.batches))
        ]
        per_batch = torch.tensor([part.nats_per_token for part in parts])
        error = float(per_batch.std(unbiased=True)) / len(parts) ** 0.5 if len(parts) > 1 else None
        return {
            "block_size": block_size,
            "bound": sum(part.real_nll + part.padding_nll for part in parts) / sum(part.tokens for part in parts),
            "bound_se": error,  # none of a single batch
            "masked_accuracy": sum(part.right for part in parts) / max(sum(part.masked for part in parts), 1),
        }

    def _noised(self, index: int) -> NoisedText:
        """One draw, whose levels are shared out among the blocks of the batch."""
        batch, card, generator = self.batches[index], self.card, make_generator(0, 2, index)
        scored = targets(batch.maskable, batch.position, card.shift)
        blocks = block_index(batch.document, batch.position, card.block_size)
        time = block_times(blocks, (SMALLEST_TIME, 1.0) if card.block_size > 1 else (1.0 - 1e-9, 1.0), generator)
        view = mask_tokens(
            batch.tokens, batch.document, batch.position, scored, time, card.block_size, card.mask_id, generator
        )
        return NoisedText(batch, scored, [[(view.masked, 1.0 / time)]])


class EditCheck:
    """What one forward with tau_edit = 0 would do to fixed batches in which a share `rate` of tokens is wrong.

    `corrected`: wrong tokens that it would mend. `kept`: right ones that it would leave alone. There are no masks, as
    in a decoder's last passes over a block.
    """

    def __init__(self, batches: Sequence[Batch], card: Card, real: Int[Tensor, " real"], rate: float = 0.1) -> None:
        self.views = [self._wrong(batch, card, real, rate, index) for index, batch in enumerate(batches)]

    def _wrong(self, batch: Batch, card: Card, real: Tensor, rate: float, index: int) -> NoisedBatch:
        generator = make_generator(0, 4, index)
        may = targets(batch.maskable, batch.position, card.shift)
        nothing = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
        view = mask_tokens(
            batch.tokens, batch.document, batch.position, may, nothing, card.block_size, card.mask_id, generator
        )
        if batch.always_masked is not None:
            view = mask_always(view, batch.always_masked, card.mask_id)
        return replace_tokens(view, rate, real, generator)

    @torch.no_grad()
    def __call__(self, step: SupervisedStep, number: int) -> dict[str, Any]:
        """Both shares; None where nothing was wrong."""
        scorer = SupervisedStep(step.model, {"m2t": MaskToToken()}, chunk=step.chunk).eval()
        counts = torch.zeros(4, dtype=torch.long)
        for view in self.views:
            draft = scorer(view, generator=make_generator(0, 5), wants_draft=True).draft
            if draft is not None:
                right = draft.to(view.clean.device) == view.clean
                groups = (right & view.replaced, view.replaced, right & view.kept, view.kept)
                counts += torch.stack([group.sum() for group in groups])
        corrected, wrong, kept, rest = counts.tolist()
        return {
            "corrected": corrected / wrong if wrong else None,
            "kept": kept / rest if rest else None,
        }
