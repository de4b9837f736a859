"""What every stage measures while it trains: the bound on held-out rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hildanext.datasets import Batch, Rows
from hildanext.diffusion import View, block_index, block_times, hide_tokens, mask_tokens, replace_tokens, targets
from hildanext.errors import DataError
from hildanext.log import MetricLog, read_metrics
from hildanext.models.card import Card
from hildanext.packing.rows import row_order
from hildanext.supervision import SupervisedStep
from hildanext.supervision.mask_to_token import MaskToToken
from hildanext.training import Stage, make_generator


def first_batches(dataset: Rows, rows: int, batch_size: int) -> list[Batch]:
    """The data set's first `rows` rows (all, where it has fewer), always in the same batches."""
    rows = min(rows, len(dataset))
    starts = range(0, rows, batch_size)
    return [dataset.batch(range(start, min(start + batch_size, rows))) for start in starts]


def drawn_batches(dataset: Rows, rows: int, batch_size: int) -> list[Batch]:
    """`rows` rows drawn from all over the data set (all, where it has fewer), always the same in the same batches."""
    drawn = row_order(len(dataset), 0, 0)[:rows]
    return [dataset.batch(drawn[at : at + batch_size]) for at in range(0, len(drawn), batch_size)]


def measure_start(metrics: Path, stage: Stage, step: SupervisedStep) -> None:
    """Validate what is about to be trained, once in a run, so that it can say what it learned: the line of step 0."""
    if stage.validate is None or any(line["kind"] == "eval" for line in read_metrics(metrics)):
        return
    found = stage.validate(step.eval(), 0)
    with MetricLog(metrics) as log:
        log.write(kind="eval", step=0, tokens=0, **found)


class Validation:
    """The bound at the checkpoint's block size on fixed batches, under fixed noise.

    Padding to the block boundary (`pad_id` after `pad_id`) is predicted and summed but not counted, so the figure
    is an upper bound in nats per real token. Raises `DataError` where there is none.
    """

    def __init__(self, batches: Sequence[Batch], pad_id: int, card: Card) -> None:
        self.batches, self.card = list(batches), card
        self.predictable = [targets(batch.maskable, batch.position, card.shift) for batch in self.batches]
        self.counts = [
            int((may & ~_padding(batch, pad_id)).sum())
            for may, batch in zip(self.predictable, self.batches, strict=True)
        ]
        if not sum(self.counts):
            rows = sum(len(batch.tokens) for batch in self.batches)
            raise DataError(
                f"the validation data holds no token to predict in {rows} rows",
                "give it longer documents (the first token of one is given, not predicted), or raise valid_rows",
            )

    @torch.no_grad()
    def __call__(self, step: SupervisedStep, number: int) -> dict[str, Any]:
        """The bound of `step`'s model; `number` is the optimiser step, which changes nothing."""
        scorer = SupervisedStep(step.model, {"m2t": MaskToToken()}, chunk=step.chunk).eval()
        block_size = self.card.block_size
        nats: list[float] = []
        right = masked = 0
        for index, (batch, may) in enumerate(zip(self.batches, self.predictable, strict=True)):
            generator = make_generator(0, 2, index)
            blocks = block_index(batch.document, batch.position, block_size)
            time = block_times(blocks, (1e-3, 1.0) if block_size > 1 else (1.0 - 1e-9, 1.0), generator)
            view = mask_tokens(
                batch.tokens, batch.document, batch.position, may, time, block_size, self.card.mask_id, generator
            )
            if batch.hidden is not None:
                view = hide_tokens(view, batch.hidden, self.card.mask_id)
            outcome = scorer(view)
            sums = torch.stack([outcome.total, outcome.correct.sum(), outcome.masked.sum()]).tolist()  # one wait
            nats.append(sums[0])
            right, masked = right + int(sums[1]), masked + int(sums[2])
        per_batch = torch.tensor([total / max(count, 1) for total, count in zip(nats, self.counts, strict=True)])
        spread = float(per_batch.std(unbiased=True)) if len(nats) > 1 else float("nan")
        return {
            "block_size": block_size,
            "bound": sum(nats) / sum(self.counts),
            "bound_se": spread / len(nats) ** 0.5,
            "masked_accuracy": right / max(masked, 1),
        }


class EditCheck:
    """What one forward with tau_edit = 0 would do to fixed batches in which a share `rate` of tokens is wrong.

    `corrected`: wrong tokens that it would mend. `kept`: right ones that it would leave alone. There are no masks, as
    in a decoder's last passes over a block.
    """

    def __init__(self, batches: Sequence[Batch], card: Card, real: Int[Tensor, " real"], rate: float = 0.1) -> None:
        self.views = [self._wrong(batch, card, real, rate, index) for index, batch in enumerate(batches)]

    def _wrong(self, batch: Batch, card: Card, real: Tensor, rate: float, index: int) -> View:
        generator = make_generator(0, 4, index)
        may = targets(batch.maskable, batch.position, card.shift)
        nothing = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
        view = mask_tokens(
            batch.tokens, batch.document, batch.position, may, nothing, card.block_size, card.mask_id, generator
        )
        if batch.hidden is not None:
            view = hide_tokens(view, batch.hidden, card.mask_id)
        return replace_tokens(view, rate, real, generator)

    @torch.no_grad()
    def __call__(self, step: SupervisedStep, number: int) -> dict[str, Any]:
        """Both shares; NaN where nothing was wrong."""
        scorer = SupervisedStep(step.model, {"m2t": MaskToToken()}, chunk=step.chunk).eval()
        counts = torch.zeros(4, dtype=torch.long)
        for view in self.views:
            draft = scorer(view, generator=make_generator(0, 5), wants_draft=True).draft
            if draft is not None:
                right = draft.to(view.clean.device) == view.clean
                found = (right & view.replaced, view.replaced, right & view.kept, view.kept)
                counts += torch.stack([one.sum() for one in found])
        corrected, wrong, kept, rest = counts.tolist()
        return {
            "corrected": corrected / wrong if wrong else float("nan"),
            "kept": kept / rest if rest else float("nan"),
        }


def _padding(batch: Batch, pad_id: int) -> Bool[Tensor, "batch seq"]:
    """Ends of text after the end of text, there only to fill the document's last block."""
    padding = torch.zeros_like(batch.maskable)
    padding[:, 1:] = (batch.tokens[:, 1:] == pad_id) & (batch.tokens[:, :-1] == pad_id)
    return padding & (batch.position > 0)
