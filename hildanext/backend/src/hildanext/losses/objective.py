"""All supervised losses of a view in one backbone forward and one head call per stream (clean: `ar` alone)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hildanext.core.errors import NumericsError
from hildanext.corruption.input_layout import InputLayout, LayoutChoice, choose_layout
from hildanext.diffusion import NoisedBatch, targets
from hildanext.losses.base import AttentionLoss, ForwardContext, TokenLoss, Weights
from hildanext.losses.linear_cross_entropy import RowLosses, linear_cross_entropy
from hildanext.losses.residual_inputs import ResidualInputs
from hildanext.losses.step import Outcome, TrainingStep
from hildanext.masks import CleanMask, TokenRows
from hildanext.models.attention.blockwise import doubled_attention
from hildanext.models.attention.branched import branched_attention
from hildanext.models.attention.dense import AttentionContext
from hildanext.models.bidirectional import DiffusionModel

TIME_BUCKETS = 4


@dataclass(frozen=True)
class _Stream:
    """The rows of one reading: which hidden state, which label, what weight."""

    index: Int[Tensor, " rows"]
    where: tuple[Tensor, ...]
    cross_entropy: Float[Tensor, " rows"]
    divergence: Float[Tensor, " rows"] | None
    alignment: Float[Tensor, " rows"] | None
    entropy: Float[Tensor, " rows"] | None

    def to(self, device: torch.device) -> "_Stream":
        """The same rows on a device; the host does not wait for it."""

        def there(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.to(device, non_blocking=True)

        where = tuple(part.to(device, non_blocking=True) for part in self.where)
        index, cross_entropy = (part.to(device, non_blocking=True) for part in (self.index, self.cross_entropy))
        return _Stream(index, where, cross_entropy, there(self.divergence), there(self.alignment), there(self.entropy))


class SupervisedStep(TrainingStep):
    """A diffusion model and its supervised losses.

    `teacher_hidden` of `forward` are the frozen parent's hidden states of the clean batch, [batch seq hidden].
    `special` lists ids that are no text ([vocab]); None takes those that may never be emitted.
    With `residual` masks are fed with what a frozen reference thinks of them; `progress` of `forward` says how much.
    `layout` says which copies of a view's tokens are fed (see `input_layout.choose_layout`); it changes no number.
    A view on the host is best: which columns and rows there are is then known without asking the device.
    """

    model: DiffusionModel
    by = "t"
    buckets = tuple(f"{at / TIME_BUCKETS:.2f}-{(at + 1) / TIME_BUCKETS:.2f}" for at in range(TIME_BUCKETS))

    def __init__(
        self,
        model: DiffusionModel,
        losses: Mapping[str, TokenLoss],
        teacher_head: Tensor | None = None,
        chunk: int = 128,
        special: Tensor | None = None,
        layout: LayoutChoice = "auto",
        residual: ResidualInputs | None = None,
    ) -> None:
        super().__init__()
        for loss in losses.values():
            loss.check(model.card)
            loss.check_model(model)
        self.model = model
        self.losses = dict(losses)
        self.chunk, self.layout, self.residual = chunk, layout, residual
        self.teacher_head: Tensor | None
        self.register_buffer("teacher_head", teacher_head, persistent=False)
        self.special = model.banned if special is None else special

    def forward(
        self,
        view: NoisedBatch,
        mask_noise: float = 0.0,
        generator: torch.Generator | None = None,
        teacher_hidden: Tensor | None = None,
        wants_draft: bool = False,
        progress: float = 0.0,
    ) -> Outcome:
        """Losses of a view; with `wants_draft` also the view's tokens after one decoding step (for `next_turn`)."""
        card = self.model.card
        may_predict = targets(view.maskable, view.position, card.shift)
        weights = {name: loss.weights(view, may_predict) for name, loss in self.losses.items()}
        fed = choose_layout(view, card.shift, _read_clean(weights.values()), self.layout)
        sent, columns = view.to(self.model.device), fed.to(self.model.device)
        embeddings = self.model.embed(columns.tokens(sent), mask_noise, generator, columns.token, fed.seq)
        embeddings, attention = self._attended(view, fed, embeddings, progress)
        attention, attention_losses = self._wrap_attention(view, fed, may_predict, attention, progress, generator)
        with self.model.dropout_from(generator):
            hidden = self.model(embeddings, columns.rows(sent).position, attention)
        total = hidden.new_zeros((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        sums: dict[str, Tensor] = {}
        counts, draft = _no_counts(hidden.device), None
        noisy_index = fed.prediction_index(view.position, view.block_size, card.shift)
        for stream, index in (("noisy", noisy_index), ("clean", fed.clean_prediction_index(view.position))):
            members = {name: weight for name, weight in weights.items() if weight.stream == stream and weight.is_active}
            drafting = wants_draft and stream == "noisy"
            rows = _rows(members, index, hidden.shape[1], may_predict if drafting else None)
            if rows is None:
                continue
            chosen = {name: _chosen(weight, rows.where, hidden.device) for name, weight in members.items()}
            buckets, rows = _buckets(view, rows.where).to(hidden.device, non_blocking=True), rows.to(hidden.device)
            row, place = rows.where
            labels = sent.clean[row, place]
            teacher = None if teacher_hidden is None else teacher_hidden[row, (place - 1).clamp_min(0)]
            states = hidden.flatten(0, 1)[rows.index]
            losses = linear_cross_entropy(
                states,
                self.model.head,
                labels,
                rows.cross_entropy,
                self.model.banned,
                rows.divergence,
                teacher,
                self.teacher_head,
                self.chunk,
                rows.entropy,
            )
            apart = _cosine_distance(states, teacher) if rows.alignment is not None and teacher is not None else None
            total = total + losses.total
            if apart is not None and rows.alignment is not None:
                total = total + (rows.alignment * apart).sum()
            sums |= {name: _weighted(parts, losses, apart) for name, parts in chosen.items()}
            if stream == "noisy":
                counts = _accuracy(buckets, losses.predicted == labels)
            if drafting:
                draft = _draft(sent, rows.where, losses.predicted, losses.confidence, generator)
        # Every parameter must take part in every backward, or data-parallel training waits for ever.
        total = total + 0.0 * hidden.sum()
        return Outcome(total, sums, *counts, draft, *self._aux_losses(attention_losses, total))

    def countable(self, view: NoisedBatch) -> Tensor:
        return targets(view.maskable, view.position, self.model.card.shift).sum()

    def _attended(
        self, view: NoisedBatch, fed: InputLayout, embeddings: Tensor, progress: float
    ) -> tuple[Tensor, AttentionContext]:
        """The embeddings as they are fed, and who sees whom."""
        attention = attention_for(view, fed, self.model.card.clean_mask, embeddings)
        if self.residual is not None:
            embeddings = self.residual.mixed(self.model, view, fed, embeddings, attention, progress)
        return embeddings, attention

    def _wrap_attention(
        self,
        view: NoisedBatch,
        fed: InputLayout,
        may_predict: Tensor,
        attention: AttentionContext,
        progress: float,
        generator: torch.Generator | None,
    ) -> tuple[AttentionContext, dict[str, AttentionLoss]]:
        """The attention inside every loss that wraps it, and these losses by name."""
        attention_losses: dict[str, AttentionLoss] = {}
        for name, loss in self.losses.items():
            if loss.wraps_attention:  # it looks where the view lies; moved once
                self.special = self.special.to(view.clean.device)
            context = ForwardContext(view, fed, may_predict, self.model, attention, self.special, progress, generator)
            attention_loss = loss.auxiliary(context)
            if attention_loss is not None:
                attention_losses[name] = attention = attention_loss
        return attention, attention_losses

    def _aux_losses(
        self, attention_losses: Mapping[str, AttentionLoss], total: Tensor
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Their sum (None without any), and each detached, absent ones as 0."""
        losses = {name: loss.loss().to(total.dtype) for name, loss in attention_losses.items()}
        averages = {name: total.new_zeros(()) for name, loss in self.losses.items() if loss.wraps_attention}
        averages |= {name: loss.detach() for name, loss in losses.items()}
        return _sum(losses.values()), averages


def attention_for(view: NoisedBatch, fed: InputLayout, clean_mask: CleanMask, embeddings: Tensor) -> AttentionContext:
    """The attention context of a training forward; `embeddings` tells the compute dtype and the device."""
    return attention_over(fed.rows(view), fed.noisy.shape[1], view.block_size, clean_mask, embeddings)


def attention_over(
    rows: TokenRows, noisy: int, block_size: int, clean_mask: CleanMask, embeddings: Tensor
) -> AttentionContext:
    """The same for any columns, of which the first `noisy` are noisy copies."""
    device = embeddings.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else embeddings.dtype
    if rows.branch is not None:
        return branched_attention(rows, noisy, block_size, clean_mask, dtype, embeddings.device)
    return doubled_attention(rows, noisy, block_size, clean_mask, dtype, embeddings.device)


def _read_clean(weights: Iterable[Weights]) -> bool:
    """Whether any loss has a say about the clean half's reading; one of weight zero has none."""
    parts = (part for weight in weights if weight.stream == "clean" for part in weight.parts)
    return any(part is not None and bool(part.any()) for part in parts)


def _rows(members: Mapping[str, Weights], readout: Tensor, fed: int, also: Tensor | None) -> _Stream | None:
    """Gather every token with a weight, and those that `also` names."""
    parts = zip(*(weight.parts for weight in members.values()), strict=True)
    cross_entropy, divergence, alignment, entropy = (_sum(same) for same in parts) if members else (None,) * 4
    present = [part != 0 for part in (cross_entropy, divergence, alignment, entropy) if part is not None]
    wanted = _sum((*present, also))
    if wanted is None:
        return None
    where = wanted.bool().nonzero(as_tuple=True)
    if len(where[0]) == 0:
        return None
    column = readout[where]
    if int(column.min()) < 0:
        raise NumericsError("a loss reads a token that was not fed", "give the step the layout 'double'")
    return _Stream(
        index=where[0] * fed + column,
        where=where,
        cross_entropy=torch.zeros_like(column, dtype=torch.float) if cross_entropy is None else cross_entropy[where],
        divergence=None if divergence is None else divergence[where],
        alignment=None if alignment is None else alignment[where],
        entropy=None if entropy is None else entropy[where],
    )


def _cosine_distance(states: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of each pair of states, in at least fp32."""
    wide = torch.float64 if states.dtype == torch.float64 else torch.float32
    return 1.0 - cosine_similarity(states.to(wide), teacher.to(wide), dim=-1)


def _draft(
    view: NoisedBatch,
    where: tuple[Tensor, ...],
    predicted: Tensor,
    confidence: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """One decoding step with a drawn tau_mask and tau_edit = 0: the next turn's noisy tokens.

    Paper: LLaDA2.1, arXiv:2602.08676, names the multi-turn forward; the thresholds are ours.
    """
    tau_mask = 0.3 + 0.6 * float(torch.rand((), generator=generator))
    tokens = view.noisy.clone()
    write = ~view.masked[where] | (confidence > tau_mask)
    tokens[where] = torch.where(write, predicted, tokens[where])
    return tokens


def _sum(parts: Iterable[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return sum(present[1:], present[0]) if present else None


def _chosen(weight: Weights, where: tuple[Tensor, ...], device: torch.device) -> list[Tensor | None]:
    """A loss's weights of the chosen tokens, on the device that computes."""
    return [None if part is None else part[where].to(device, non_blocking=True) for part in weight.parts]


def _weighted(parts: Sequence[Tensor | None], losses: RowLosses, apart: Tensor | None) -> Tensor:
    values = losses.cross_entropy, losses.divergence, None if apart is None else apart.detach(), losses.entropy
    total = losses.cross_entropy.new_zeros(())
    for part, value in zip(parts, values, strict=True):
        if part is not None and value is not None:
            total = total + (part * value).sum()
    return total


def _no_counts(device: torch.device) -> tuple[Tensor, Tensor]:
    zeros = torch.zeros(TIME_BUCKETS, dtype=torch.long, device=device)
    return zeros, zeros.clone()


def _buckets(view: NoisedBatch, where: tuple[Tensor, ...]) -> Int[Tensor, " rows"]:
    """The bucket by noise level of each chosen token; one more for those that are not masked."""
    bucket = (view.time[where] * TIME_BUCKETS).long().clamp(0, TIME_BUCKETS - 1)
    return bucket.masked_fill(~view.masked[where], TIME_BUCKETS)


def _accuracy(buckets: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    zeros = torch.zeros(TIME_BUCKETS + 1, dtype=torch.long, device=correct.device)  # bincount would read its input back
    right = zeros.scatter_add(0, buckets, correct.long())
    return right[:-1], zeros.scatter_add(0, buckets, torch.ones_like(buckets))[:-1]
