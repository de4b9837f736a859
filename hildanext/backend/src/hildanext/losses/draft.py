"""Draft what the parent would say: groups of masks learn its next-token distribution, several tokens ahead.

The clean rows are the frozen parent: they run once, without gradients, and are the teacher, the context and the label
at the same time. Only mask rows run forward and backward.

Paper: the objective of gated LoRA multi-token prediction, arXiv:2507.11851. Differs: KL to the parent in place of
cross-entropy to data by default, masks of a group see each other both ways.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from hildanext.core.config import config
from hildanext.corruption.anchors import DraftGroups, draw_groups
from hildanext.diffusion import NoisedBatch
from hildanext.losses.linear_cross_entropy import linear_cross_entropy
from hildanext.losses.objective import TIME_BUCKETS, Outcome
from hildanext.masks import clean_only
from hildanext.models.attention.kept import GroupAttention, KeepingAttention
from hildanext.models.drafter import Drafter


@config
class DraftLossConfig:
    """What masks learn from: the parent's distribution (`kl`), the data's token (`ce`), or half of each (`both`)."""

    kind: Literal["kl", "ce", "both"] = "kl"
    decay: float = Field(default=0.8, gt=0, le=1)
    """Mask i of a group weighs decay to the power of i: without the masks before it, it is never used."""
    groups: int = Field(default=24, ge=1)
    """Anchors in a row of the batch."""


class DraftStep(nn.Module):
    """A drafter and its loss as one module, as the training loop calls it (`losses.SupervisedStep` is the other)."""

    def __init__(self, model: Drafter, config: DraftLossConfig, chunk: int = 256) -> None:
        super().__init__()
        self.model, self.config, self.chunk = model, config, chunk
        rows = model.head.shape[0]
        self.banned: Tensor
        self.register_buffer("banned", torch.zeros(rows, dtype=torch.bool, device=model.device), persistent=False)

    def forward(
        self,
        view: NoisedBatch,
        mask_noise: float = 0.0,
        generator: torch.Generator | None = None,
        teacher_hidden: Tensor | None = None,
        wants_draft: bool = False,
        progress: float = 0.0,
    ) -> Outcome:
        """The loss of groups drawn by `generator` in the clean rows of a view, whose noise is not looked at."""
        places = self.model.places
        groups = draw_groups(view.document, view.maskable, self.config.groups, places, generator)
        hidden, clean = self.read(view, groups)
        learnt = groups.learnt.flatten().to(hidden.device, non_blocking=True)
        place = torch.arange(places, device=hidden.device).expand(groups.learnt.shape).flatten()
        weight = torch.where(learnt, self.config.decay**place, 0.0)
        # The loop divides by the tokens that a view may predict: this makes the loss a mean over them.
        weight = weight * (view.maskable.sum() / weight.sum().clamp_min(1e-9))
        share = {"kl": (0.0, 1.0), "ce": (1.0, 0.0), "both": (0.5, 0.5)}[self.config.kind]
        labels = self.labels(view, groups).to(hidden.device, non_blocking=True)
        losses = linear_cross_entropy(
            hidden, self.model.head, labels, share[0] * weight, self.banned,
            share[1] * weight, clean, self.model.head, self.chunk,
        )  # fmt: skip
        value = share[0] * losses.cross_entropy + share[1] * losses.divergence
        return Outcome(
            losses.total, self._by_place(value, learnt, place, view), *_hits(losses.predicted == labels, learnt, place)
        )

    def read(
        self, view: NoisedBatch, groups: DraftGroups
    ) -> tuple[Float[Tensor, "rows hidden"], Float[Tensor, "rows hidden"]]:
        """Final states of all mask rows, and the parent's behind the same text.

        A sampler head is told the text's own token before each: where the drafts before one are right, that is what it
        is told in decoding, and where one is wrong those behind it are never used.
        """
        model, sent, groups = self.model, view.to(self.model.device), groups.to(self.model.device)
        batch, seq = sent.clean.shape
        rows = torch.arange(batch, device=sent.clean.device)[:, None]
        kept = KeepingAttention(clean_only(sent.document, sent.position, 1, "token_causal"))
        with torch.no_grad():
            final, entering = model.clean(sent.clean, sent.position, kept)
        anchors = groups.anchors.repeat_interleave(groups.places, 1)
        place = torch.arange(groups.places, device=anchors.device).repeat(groups.anchors.shape[1])
        positions = sent.position[rows, anchors] + 1 + place
        attention = GroupAttention.of(kept, groups.anchors, groups.places)
        hidden = model.noisy(entering[rows, anchors], place, positions, attention)
        columns = groups.columns(seq).flatten(1)
        told = model.told(hidden, sent.clean[rows, columns])
        return told.flatten(0, 1), final[rows, columns].flatten(0, 1)

    def labels(self, view: NoisedBatch, groups: DraftGroups) -> Tensor:
        """The token that each mask row is to say, [rows]."""
        rows = torch.arange(len(view.clean))[:, None]
        columns = (groups.columns(view.clean.shape[1]).flatten(1) + 1).clamp_max(view.clean.shape[1] - 1)
        return view.clean[rows, columns].flatten()

    def _by_place(self, value: Tensor, learnt: Tensor, place: Tensor, view: NoisedBatch) -> dict[str, Tensor]:
        """The mean loss of each place, times what the loop divides by."""
        places, wide = self.model.places, value.dtype
        sums = torch.zeros(places, dtype=wide, device=value.device).scatter_add(
            0, place, torch.where(learnt, value, 0.0)
        )
        counts = torch.zeros(places, dtype=wide, device=value.device).scatter_add(0, place, learnt.to(wide))
        means = sums / counts.clamp_min(1.0) * view.maskable.sum()
        return {f"place_{number + 1}": mean for number, mean in enumerate(means)}


def _hits(right: Bool[Tensor, " rows"], learnt: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Right ones and all by place, as the loop's buckets have room for."""
    bucket = torch.where(learnt, place.clamp_max(TIME_BUCKETS - 1), TIME_BUCKETS)
    zeros = torch.zeros(TIME_BUCKETS + 1, dtype=torch.long, device=right.device)
    correct = zeros.scatter_add(0, bucket, right.long())
    return correct[:-1], zeros.scatter_add(0, bucket, torch.ones_like(bucket))[:-1]
