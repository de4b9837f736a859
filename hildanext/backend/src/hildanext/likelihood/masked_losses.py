"""One forward of a noised view: what the model says of its masked tokens."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hildanext.corruption.input_layout import InputLayout, choose_layout
from hildanext.diffusion import NoisedBatch
from hildanext.losses.linear_cross_entropy import linear_cross_entropy
from hildanext.losses.linear_log_probs import linear_log_probs
from hildanext.losses.objective import attention_for
from hildanext.models import DiffusionModel


class MaskedLosses(NamedTuple):
    """Of every token of a view; 0 and False where it is not masked."""

    nll: Float[Tensor, "batch seq"]
    """-log p(token | what the view shows)."""
    right: Bool[Tensor, "batch seq"]
    """Whether the token is the most probable one; False everywhere while gradients are formed."""


def masked_losses(model: DiffusionModel, view: NoisedBatch, chunk: int = 128) -> MaskedLosses:
    """Differentiable where gradients are on. Logits exist for `chunk` of the masked tokens at a time.

    On the model's device, which nobody waits for where the view is on the host.
    """
    hidden, fed = hidden_states(model, view)
    where = view.masked.nonzero(as_tuple=True)
    column = fed.prediction_index(view.position, view.block_size, model.card.shift)[where]
    labels, column, *where_there = (
        part.to(hidden.device, non_blocking=True) for part in (view.clean[where], column, *where)
    )
    where = (where_there[0], where_there[1])
    rows = hidden[where[0], column]
    right = torch.zeros(view.masked.shape, dtype=torch.bool, device=hidden.device)
    if torch.is_grad_enabled():
        losses = -linear_log_probs(rows, model.head, labels, model.banned, chunk)
    else:
        weight = torch.ones(len(rows), device=rows.device)
        heads = linear_cross_entropy(rows, model.head, labels, weight, model.banned, chunk=chunk)
        losses = heads.cross_entropy
        right[where] = heads.predicted == labels
    nll = torch.zeros(view.clean.shape, dtype=losses.dtype, device=losses.device)
    return MaskedLosses(nll.index_put(where, losses), right)


def hidden_states(model: DiffusionModel, view: NoisedBatch) -> tuple[Float[Tensor, "batch fed hidden"], InputLayout]:
    """The final states of a view's columns, and which columns these are."""
    fed = choose_layout(view, model.card.shift)
    sent, columns = view.to(model.device), fed.to(model.device)
    embeddings = model.embed(columns.tokens(sent))
    attention = attention_for(view, fed, model.card.clean_mask, embeddings)
    return model(embeddings, columns.rows(sent).position, attention), fed
