"""SPG: good answers by a lower bound on their likelihood, bad ones by an upper one."""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.rl.looks import Scores
from hildanext.rl.objectives.base import Figures, Objective, PolicyInputs
from hildanext.rl.objectives.ratios import counted


@config
class Spg(Objective):
    """`-A B` of each answer: B is the ELBO where A >= 0, else `omega` EUBO + (1 - `omega`) ELBO. No ratio, clip or KL.

    `EUBO = (1 / beta) sum over tokens of log E[w 1(masked) p^beta]`, a Renyi upper bound whose expectation is taken
    over the looks at one answer, with the ELBO's own weights w; with one look it says no more than that look does. A
    token that no look reads has no term, and those that have one stand for it. It bounds the law of a model that says
    the same in every order; log p of another one's sampler may lie above it.

    Paper: SPG ("Sandwiched Policy Gradient"), arXiv:2510.09541.
    Differs: w is the estimate's own. In the code it is length / masked tokens, the mean over a draw's masks, which is
    the same for masks over a whole answer. The sum is divided by tokens, which is the code's mean over answers by
    their length, but over the whole step.
    """

    per: ClassVar[Literal["answer", "token", "group"]] = "token"
    likelihoods: ClassVar[tuple[str, ...]] = ("block_elbo",)
    advantage: ClassVar[str] = "mean"

    omega: float = Field(default=0.5, ge=0, le=1, allow_inf_nan=False)
    """Share of the upper bound in the mixture; 0 is the ELBO for all answers."""
    beta: float = Field(default=1.5, ge=1, allow_inf_nan=False)
    """Order of the upper bound; no KL's strength."""

    def loss(self, inputs: PolicyInputs) -> tuple[Float[Tensor, ""], Figures]:
        advantage, valid = counted(inputs)
        now = replace(inputs.now, raw=torch.where(valid[:, None], inputs.now.raw, 0.0))
        bound = now.sequence
        if self.omega > 0:
            mixture = self.omega * upper_bound(now, self.beta) + (1 - self.omega) * bound
            bound = torch.where(advantage < 0, mixture, bound)
        return -(advantage * bound).sum(), {}


def upper_bound(scores: Scores, beta: float) -> Float[Tensor, " rows"]:
    """The EUBO of each row, in nats. Weights are positive where they are not 0."""
    read = scores.read
    covered = read.any(0)
    powers = torch.where(read, scores.weight, 1.0).log() + beta * scores.raw
    # a token that no look reads is summed over zeros: the sum over nothing has no gradient that is a number
    powers = torch.where(read, powers, torch.where(covered, -torch.inf, 0.0))
    tokens = torch.where(covered, powers.logsumexp(0), 0.0).sum(-1) / beta
    return tokens * scores.length / covered.sum(-1).clamp_min(1)
