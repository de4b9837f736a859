"""Draft what the parent would say: groups of masks learn its next-token distribution, several tokens ahead.

The clean rows are the frozen parent: they run once, without gradients, and are the teacher, the context and the label
at the same time. Only mask rows run forward and backward. Where drafts may say a part of the vocabulary, both
distributions are those over that part, and rows whose own token lies outside it teach nothing.

Paper: the objective of gated LoRA multi-token prediction, arXiv:2507.11851. Differs: KL to the parent in place of
cross-entropy to data by default, masks of a group see each other both ways.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.corruption.anchors import DraftGroups, draw_groups, show_tokens
from hildanext.diffusion import NoisedBatch
from hildanext.losses.kept_clean_rows import KeptCleanRows
from hildanext.losses.linear_cross_entropy import linear_cross_entropy
from hildanext.losses.step import Outcome, TrainingStep
from hildanext.models.attention.kept import GroupAttention
from hildanext.models.drafter import Drafter


@config
class DraftLossConfig:
    """What masks learn from: the parent's distribution (`kl`), the data's token (`ce`), or half of each (`both`)."""

    kind: Literal["kl", "ce", "both"] = "kl"
    decay: float = Field(default=0.8, gt=0, le=1)
    """Mask i of a group weighs decay to the power of i: without the masks before it, it is never used."""
    groups: int = Field(default=64, ge=1)
    """Anchors in a row of the batch. More of them share a row's clean half, and say less that is new."""
    kept_mib: int = Field(default=0, ge=0)
    """Host memory for what the parent made of rows: where the data is read again, it need not compute them again."""


@config
class DraftNoise:
    """Groups that are partly filled, so that the adapters also learn to fill and to edit."""

    share: float = Field(default=0.0, ge=0, le=1)
    """Of all groups. None by default: exact decoding asks for whole groups of masks alone."""
    wrong: float = Field(default=0.3, ge=0, le=1)
    """Of the tokens shown in them: random ones."""


class DraftStep(TrainingStep):
    """A drafter and its loss as one module, as the training loop calls it."""

    model: Drafter
    by = "place"

    def __init__(
        self, model: Drafter, config: DraftLossConfig, chunk: int = 256, noise: DraftNoise | None = None
    ) -> None:
        super().__init__()
        self.model, self.config, self.chunk = model, config, chunk
        self.noise = noise if noise is not None else DraftNoise()
        places = tuple(str(place + 1) for place in range(model.places))
        self.buckets = (*places, "noised") if self.noise.share else places
        rows = len(model.draft_head)
        self.banned: Tensor
        self.register_buffer("banned", torch.zeros(rows, dtype=torch.bool, device=model.device), persistent=False)
        self.kept = KeptCleanRows(config.kept_mib)

    def countable(self, view: NoisedBatch) -> Tensor:
        return view.maskable.sum()

    def draw(self, view: NoisedBatch, generator: torch.Generator | None) -> DraftGroups:
        """The groups of a view on the host, drawn by `generator`."""
        groups = draw_groups(view.document, view.maskable, self.config.groups, self.model.places, generator)
        vocabulary = self.model.head.shape[0]
        return show_tokens(groups, view.clean, self.noise.share, self.noise.wrong, vocabulary, generator)

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
        groups = self.draw(view, generator)
        hidden, clean = self.read(view, groups)
        # Rows that learn nothing are left out here, on the host, where their number is known without waiting.
        number = self._numbers(self.labels(view, groups))
        rows = (groups.learnt.flatten() & (number >= 0)).nonzero()[:, 0]
        bucket, place = self._buckets(groups)[rows], self._places(groups)[rows]
        weight = self.config.decay**place
        # The loop divides by the tokens that a view may predict: this makes the loss a mean over them.
        scale = view.maskable.sum()
        weight = weight * (scale / weight.sum().clamp_min(1e-9))
        share = {"kl": (0.0, 1.0), "ce": (1.0, 0.0), "both": (0.5, 0.5)}[self.config.kind]
        there = hidden.device
        rows, bucket, weight, labels, scale = (
            part.to(there, non_blocking=True) for part in (rows, bucket, weight, number[rows], scale)
        )
        head = self.model.draft_head
        losses = linear_cross_entropy(
            hidden[rows], head, labels, share[0] * weight, self.banned,
            share[1] * weight, clean[rows], head, self.chunk,
        )  # fmt: skip
        value = share[0] * losses.cross_entropy + share[1] * losses.divergence
        counts = self._summed(torch.ones_like(value), bucket)
        means = self._summed(value, bucket) / counts.clamp_min(1.0) * scale
        names = [f"place_{name}" if name.isdigit() else name for name in self.buckets]
        right = self._summed((losses.predicted == labels).to(value.dtype), bucket)
        return Outcome(losses.total, dict(zip(names, means, strict=True)), right.long(), counts.long())

    def read(
        self, view: NoisedBatch, groups: DraftGroups
    ) -> tuple[Float[Tensor, "rows hidden"], Float[Tensor, "rows hidden"]]:
        """Final states of all mask rows, and the parent's behind the same text.

        A sampler head is told the text's own token before each: where the drafts before one are right, that is what it
        is told in decoding, and where one is wrong those behind it are never used.
        """
        model, sent, drawn, groups = self.model, view.to(self.model.device), groups, groups.to(self.model.device)
        batch, seq = sent.clean.shape
        rows = torch.arange(batch, device=sent.clean.device)[:, None]
        final, entering, kept = self.kept(model, view, sent)
        anchors = groups.anchors.repeat_interleave(groups.places, 1)
        place = torch.arange(groups.places, device=anchors.device).repeat(groups.anchors.shape[1])
        positions = sent.position[rows, anchors] + 1 + place
        attention = GroupAttention.of(kept, drawn.anchors, drawn.places)
        hidden = model.noisy(self._entering(entering[rows, anchors], groups), place, positions, attention)
        columns = groups.columns(seq).flatten(1)
        told = model.told(hidden, sent.clean[rows, columns])
        return told.flatten(0, 1), final[rows, columns].flatten(0, 1)

    def labels(self, view: NoisedBatch, groups: DraftGroups) -> Int[Tensor, " rows"]:
        """The token that each mask row is to say."""
        rows = torch.arange(len(view.clean))[:, None]
        columns = (groups.columns(view.clean.shape[1]).flatten(1) + 1).clamp_max(view.clean.shape[1] - 1)
        return view.clean[rows, columns].flatten()

    def _numbers(self, tokens: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
        """Their rows in the drafts' head; -1 for a token that drafts may not say."""
        chosen = self.model.draft_tokens
        if chosen is None:
            return tokens
        numbers = torch.full((len(self.model.head),), -1)
        numbers[chosen.cpu()] = torch.arange(len(chosen))
        return numbers[tokens]

    def _entering(self, anchors: Tensor, groups: DraftGroups) -> Tensor:
        """A mask starts from its anchor's state, a row that shows a token from that token's embedding."""
        if groups.shown is None:
            return anchors
        shown = groups.shown.flatten(1)
        tokens: Tensor = self.model.causal_lm.get_input_embeddings()(shown.clamp_min(0))
        return torch.where((shown >= 0)[..., None], tokens, anchors)

    def _places(self, groups: DraftGroups) -> Int[Tensor, " rows"]:
        return torch.arange(groups.places).expand(groups.learnt.shape).flatten()

    def _buckets(self, groups: DraftGroups) -> Int[Tensor, " rows"]:
        """The place of each row of a whole group, one bucket for all rows of partly filled ones."""
        noised = groups.noised[..., None].expand(groups.learnt.shape).flatten()
        return torch.where(noised, groups.places, self._places(groups))

    def _summed(self, values: Float[Tensor, " rows"], bucket: Int[Tensor, " rows"]) -> Float[Tensor, " buckets"]:
        zeros = torch.zeros(len(self.buckets), dtype=values.dtype, device=values.device)
        return zeros.scatter_add(0, bucket, values)


def confirmed(
    drafts: Int[Tensor, "groups places"], said: Int[Tensor, "groups places"]
) -> Bool[Tensor, "groups places"]:
    """Whether the parent says each draft and all before it in its group."""
    return (drafts == said).int().cumprod(-1).bool()
