"""log p of each token given those before it, from the hidden states before it: exact, the autoregressive way."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hildanext.ar import Parent
from hildanext.core.runtime import send
from hildanext.losses.linear_cross_entropy import linear_cross_entropy


class NextToken(NamedTuple):
    """What a model says of a token's place, in nats."""

    logprob: float
    best: int
    """The most probable id."""
    best_logprob: float


@torch.no_grad()
def score_tokens(parent: Parent, hidden: Float[Tensor, "rows hidden"], tokens: Sequence[int]) -> list[NextToken]:
    """Of each token, given the state of the position before it. Banned ids get no probability."""
    banned = parent.banned
    rows = linear_cross_entropy(
        hidden,
        parent.head,
        send(list(tokens), hidden.device, torch.long),
        torch.ones(len(tokens), device=hidden.device),
        banned if banned is not None else torch.zeros(len(parent.head), dtype=torch.bool, device=hidden.device),
    )
    nats, best, most = rows.cross_entropy.tolist(), rows.predicted.tolist(), rows.confidence.log().tolist()
    return [
        NextToken(-nats[i], best[i], -nats[i] if best[i] == token else most[i])  # the same number, but for rounding
        for i, token in enumerate(tokens)
    ]
