"""How log p of an answer is asked for: looks at it with some tokens hidden, and what the model says there."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hildanext.diffusion import NoisedBatch
from hildanext.likelihood.masked_losses import hidden_states
from hildanext.losses.linear_log_probs import linear_log_probs
from hildanext.models.bidirectional import DiffusionModel
from hildanext.rl.batch import RolloutBatch
from hildanext.rl.packed import PackedColumns, packed_states


@dataclass(frozen=True)
class Look:
    """One look at every row of a batch. Data: drawn once and kept, so that every policy sees the same noise."""

    masked: Bool[Tensor, "rows positions"]
    """Shown as masks. What stands behind the text in its terminal block is masked too unless the look shows it."""
    read: Bool[Tensor, "rows positions"]
    """The masked tokens whose log-probability counts, and visible ones that this step edits."""
    weight: Float[Tensor, "rows positions"]
    """Of each log-probability in the estimate; 0 where nothing is read."""
    block_size: int
    shown: Int[Tensor, "rows positions"] | None = None
    """What visible tokens of the noisy copy are, where that is not the final text (edits come later)."""
    labels: Int[Tensor, "rows positions"] | None = None
    """The tokens that are read, where these are not the text's."""

    def rows(self, chosen: Sequence[int], width: int) -> "Look":
        """The same look at some of the rows, cut to `width` positions."""
        index = torch.tensor(list(chosen), dtype=torch.long)
        parts: dict[str, Any] = {
            part.name: getattr(self, part.name)[index, :width].contiguous()
            for part in fields(self)
            if isinstance(getattr(self, part.name), Tensor)
        }
        return replace(self, **parts)


@dataclass(frozen=True)
class Scores:
    """What looks say of each row's tokens."""

    raw: Float[Tensor, "looks rows positions"]
    """log p of what was read, in nats; 0 where nothing was. Carries the gradient."""
    weight: Float[Tensor, "looks rows positions"]
    length: Int[Tensor, " rows"]
    """Tokens that the estimate is about."""
    columns: int = 0
    """Columns of the forwards, over all looks and rows."""

    @property
    def read(self) -> Bool[Tensor, "looks rows positions"]:
        return self.weight != 0

    @property
    def sequence(self) -> Float[Tensor, " rows"]:
        """The estimate of each row's log p."""
        return (self.raw * self.weight).sum((0, 2))

    def detach(self) -> "Scores":
        return replace(self, raw=self.raw.detach())


def score(
    model: DiffusionModel,
    batch: RolloutBatch,
    looks: Sequence[Look],
    temperature: float = 1.0,
    chunk: int = 128,
    packed: bool = False,
    actions: bool = False,
) -> Scores:
    """The model's log-probabilities under each look, differentiable; one forward a look, none where nothing is read.

    `temperature` divides the logits: 1 for the model itself, the sampler's for the law of its actions. With `packed`
    the prompt of a group is fed once (`rl.packed`), which changes no number but for rounding. `actions` says that the
    estimate is of all that the sampler wrote, what stands behind the end of text among it, and not of the text; by the
    law that the sampler's filters leave, as many tokens as they left of each (`RolloutBatch.kept`).
    """
    raw, columns = [], 0
    for look in looks:
        full = torch.zeros(batch.tokens.shape, dtype=_log_dtype(model), device=model.device)
        where = look.read.nonzero(as_tuple=True)
        if len(where[0]):
            there, fed = states_at(model, batch, look, where, packed)
            labels = (batch.tokens if look.labels is None else look.labels)[where]
            kept = batch.kept[where].to(there.device) if actions and batch.kept is not None else None
            labels = labels.to(there.device)
            logp = linear_log_probs(there, model.head, labels, model.banned, chunk, temperature, kept)
            full = full.index_put(tuple(part.to(logp.device) for part in where), logp)
            columns += fed
        raw.append(full)
    stacked = torch.stack(raw)
    weight = torch.stack([look.weight for look in looks]).to(stacked)
    about = batch.written if actions else batch.scored
    return Scores(stacked, weight, about.sum(-1).to(stacked.device), columns)


def states_at(
    model: DiffusionModel, batch: RolloutBatch, look: Look, where: tuple[Tensor, ...], packed: bool
) -> tuple[Float[Tensor, "read hidden"], int]:
    """The states that predict the tokens at `where` (row and position), and how many columns were fed."""
    view = noised_view(batch, look, model.card.mask_id)
    hidden, fed = packed_states(model, view, batch.prompt, batch.group) if packed else hidden_states(model, view)
    row = fed.place[where[0]] if isinstance(fed, PackedColumns) else where[0]
    column = fed.prediction_index(view.position, view.block_size, model.card.shift)[where]
    return hidden[row.to(hidden.device), column.to(hidden.device)], fed.token.numel()


def _log_dtype(model: DiffusionModel) -> torch.dtype:
    return torch.float64 if model.dtype == torch.float64 else torch.float32


def noised_view(batch: RolloutBatch, look: Look, mask_id: int) -> NoisedBatch:
    """The batch as a look shows it."""
    shown = batch.tokens if look.shown is None else look.shown
    return NoisedBatch(
        clean=batch.tokens,
        noisy=shown.masked_fill(look.masked, mask_id),
        document=batch.document,
        position=batch.position,
        maskable=look.read,
        masked=look.masked,
        replaced=torch.zeros_like(look.masked),
        time=torch.ones(batch.tokens.shape),
        block_size=look.block_size,
    )
