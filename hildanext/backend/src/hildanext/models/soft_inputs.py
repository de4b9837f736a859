"""What is fed in place of a mask's embedding: a mixture of it and of the tokens that a distribution had there.

Entropies are in nats, in the logits' dtype (fp32 or fp64).

Paper: Residual Context Diffusion, arXiv:2601.22954v2, sec. 3.1.
Differs: log V counts the tokens that can be emitted, so that a uniform distribution has weight 1; a mixture may be that
of the likeliest tokens alone, whose probabilities are then renormalised.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag


class SoftInputs(NamedTuple):
    """For each fed token, or each position of the active blocks."""

    weight: Float[Tensor, "batch seq"]
    """0 where the embedding stays as it is."""
    states: Float[Tensor, "batch seq hidden"]

    def mixed(self, embeddings: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq hidden"]:
        """(1 - weight) of each embedding and weight of its state; the embedding itself, bit for bit, at weight 0."""
        weight = self.weight[..., None].to(embeddings.dtype)
        soft = (1.0 - weight) * embeddings + weight * self.states.to(embeddings.dtype)
        return torch.where(weight > 0, soft, embeddings)


class InputTable(NamedTuple):
    """Of a model."""

    rows: Float[Tensor, "vocab hidden"]
    banned: Bool[Tensor, " vocab"]
    """Ids that may never be emitted, which are part of no mixture."""


class Likely(NamedTuple):
    """The tokens that a mixture is of, and their shares, which add up to 1."""

    ids: Int[Tensor, "rows kept"] | None
    """None: all ids, in order."""
    probability: Float[Tensor, "rows kept"]


def normalized_entropy(logits: Float[Tensor, "rows vocab"], t_res: float = 1.0) -> Float[Tensor, " rows"]:
    """Entropy of softmax(logits / t_res) over that of a uniform distribution: 0 to 1. Banned ids have logits of -inf,
    the same ids in all rows."""
    below = (logits - logits.amax(-1, keepdim=True)).clamp_min_(torch.finfo(logits.dtype).min)
    if t_res != 1.0:
        below = below.div_(t_res).clamp_min_(torch.finfo(logits.dtype).min)
    share = below.exp()
    total = share.sum(-1)
    entropy = total.log() - share.mul_(below).sum(-1) / total
    possible = (logits[:1] > -math.inf).sum(-1).clamp_min(2)
    return (entropy / possible.to(logits.dtype).log()).clamp(0.0, 1.0)


def likely(logits: Float[Tensor, "rows vocab"], top: int) -> Likely:
    """At temperature 1 the `top` likeliest tokens of each row, renormalised; 0 is all of them."""
    if top == 0:
        return Likely(None, logits.softmax(-1))
    best = logits.topk(min(top, logits.shape[-1]), -1)
    return Likely(best.indices, best.values.softmax(-1))


def mixture(table: Float[Tensor, "vocab hidden"], tokens: Likely) -> Float[Tensor, "rows hidden"]:
    """The mean embedding of each row's tokens."""
    shares = tokens.probability.to(table.dtype)
    if tokens.ids is None:
        return shares @ table
    return embedding_bag(tokens.ids, table, mode="sum", per_sample_weights=shares)
