"""Which drafts stay: greedily those that the parent would write, or by speculative sampling, which keeps its law.

Paper: speculative sampling, arXiv:2302.01318 and arXiv:2211.17192. Differs: a draft may be a choice without a law of
its own (greedy or looked up), which then counts as one of probability one.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Verdict(NamedTuple):
    """Of each document."""

    accepted: Int[Tensor, " documents"]
    """How many of its drafts stay, from the first on."""
    token: Int[Tensor, " documents"]
    """What the parent writes behind them: the edit of the first draft that does not stay, or one more token."""


def verify_greedy(
    best: Int[Tensor, "documents rows"],
    drafts: Int[Tensor, "documents drafts"],
    given: Bool[Tensor, "documents drafts"],
) -> Verdict:
    """`best`: the parent's argmax behind each clean row; row j judges draft j. `given`: which drafts there are."""
    right = (best[:, : drafts.shape[1]] == drafts) & given
    accepted = right.int().cumprod(-1).sum(-1)
    return Verdict(accepted, best.gather(1, accepted[:, None])[:, 0])


def verify_sampled(
    law: Float[Tensor, "documents rows vocab"],
    drafts: Int[Tensor, "documents drafts"],
    given: Bool[Tensor, "documents drafts"],
    draft_law: Float[Tensor, "documents drafts vocab"] | None,
    accept: Float[Tensor, "documents drafts"],
    draw: Float[Tensor, "documents rows"],
) -> Verdict:
    """`law`: the parent's, after temperature and filters; `draft_law`: what each draft was drawn from (None: a choice).

    `accept` and `draw` are uniform numbers of each place. Draft j stays with the chance min(1, p(d) / q(d)); behind the
    last that stays a token is drawn from (p - q)+, renormalised, or from p where every draft stayed.
    """
    documents, count = drafts.shape
    p = law[:, :count].gather(2, drafts[..., None])[..., 0]
    q = torch.ones_like(p) if draft_law is None else draft_law.gather(2, drafts[..., None])[..., 0]
    stays = (accept * q < p) & given
    accepted = stays.int().cumprod(-1).sum(-1)
    row = torch.arange(documents, device=drafts.device)
    rest = law[row, accepted]
    if count:
        at = accepted.clamp_max(count - 1)
        refused = (accepted < count) & given[row, at]
        if draft_law is None:
            minus = torch.zeros_like(rest).scatter_(1, drafts[row, at][:, None], float("inf"))
        else:
            minus = draft_law[row, at]
        rest = torch.where(refused[:, None], (rest - minus).clamp_min(0.0), rest)
    return Verdict(accepted, _drawn(rest, draw[row, accepted]))


def _drawn(weights: Float[Tensor, "rows vocab"], uniform: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """An id for each row, in proportion to its weights; ids in the vocabulary's order, as in `models.sampling`."""
    cumulative = weights.double().cumsum(-1)
    height = uniform[:, None].to(cumulative) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, height, right=True).clamp_max(cumulative.shape[-1] - 1)
    possible = weights.gather(-1, chosen) > 0  # rounding may land behind the last that is
    return torch.where(possible, chosen, weights.argmax(-1, keepdim=True))[:, 0]
