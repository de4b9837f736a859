"""What drafts are worth, on held-out rows: how many of a group the parent would keep."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hildanext.core.errors import DataError
from hildanext.core.runtime import make_generator
from hildanext.corruption.anchors import DraftGroups, draw_groups
from hildanext.corruption.noised_batches import clean_view
from hildanext.data.batch import Batch
from hildanext.diffusion import NoisedBatch
from hildanext.losses.draft import DraftStep, confirmed


class DraftValidation:
    """Tokens per forward, greedy, on fixed batches behind fixed anchors.

    Counted are groups whose masks all stand for tokens of the same document that may be learnt, up to `groups` of a
    row. Draft j is right where the parent's most probable token behind the same true text is the same; `s_j`, entry
    j - 1 of `acceptance`, is the share of groups in which the first j are. On the parent's own greedy answers that is
    what exact decoding keeps; on other text it is an estimate, since the parent would go on differently there. With
    drafts behind every acceptance point a forward gives 1 + s_1 + ... + s_K tokens.

    Raises `DataError` where no group fits.
    """

    def __init__(self, batches: Sequence[Batch], places: int, groups: int) -> None:
        self.views = [clean_view(batch, places) for batch in batches]
        self.groups = [self._groups(view, number, groups) for number, view in enumerate(self.views)]
        if not any(bool(drawn.learnt[..., -1].any()) for drawn in self.groups):
            raise DataError(
                f"the validation data has no room for a group of {places} drafts",
                "give it longer documents, raise valid_rows, or lower drafts.places",
            )

    def _groups(self, view: NoisedBatch, number: int, groups: int) -> DraftGroups:
        return draw_groups(view.document, view.maskable, groups, view.block_size, make_generator(0, 2, number))

    @torch.no_grad()
    def __call__(self, step: DraftStep, number: int) -> dict[str, Any]:
        """`number` is the optimiser step, which changes nothing."""
        kept, losses, count = torch.zeros(step.model.places, dtype=torch.float64), [], 0
        for view, groups in zip(self.views, self.groups, strict=True):
            whole = groups.learnt.all(-1).flatten().nonzero()[:, 0].to(step.model.device)
            hidden, clean = (part.unflatten(0, (-1, groups.places))[whole] for part in step.read(view, groups))
            drafts, said, apart = _compared(step, hidden.flatten(0, 1), clean.flatten(0, 1))
            kept += confirmed(*(part.view(-1, groups.places) for part in (drafts, said))).sum(0).cpu()
            losses.append(apart.view(-1, groups.places).sum(0).cpu())
            count += len(whole)
        acceptance = (kept / count).tolist()
        by_place = (torch.stack(losses).sum(0) / count).tolist()
        return {
            "tokens_per_forward": 1.0 + sum(acceptance),
            "acceptance": acceptance,
            "divergence": sum(by_place) / len(by_place),
            "divergence_by_place": by_place,
            "groups": count,
        }


def _compared(
    step: DraftStep, hidden: Float[Tensor, "rows hidden"], clean: Float[Tensor, "rows hidden"]
) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """What the drafter, of what it may say, and the parent find most probable; KL(parent || drafter) in nats."""
    drafts, said, apart = [], [], []
    for at in range(0, len(hidden), step.chunk):
        student, teacher = (step.model.logits(part[at : at + step.chunk]) for part in (hidden, clean))
        drafts.append(step.model.most_probable(student))
        said.append(teacher.argmax(-1))
        law = teacher.log_softmax(-1)
        apart.append((law.exp() * (law - student.log_softmax(-1))).sum(-1))
    return torch.cat(drafts), torch.cat(said), torch.cat(apart)
