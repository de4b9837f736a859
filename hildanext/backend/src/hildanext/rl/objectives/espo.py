"""ESPO: one ratio for a whole answer, from bounds on its log-probability."""

from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.rl.divergence import Divergence, divergence
from hildanext.rl.objectives.base import Figures, Objective, PolicyInputs
from hildanext.rl.objectives.ratios import counted, differences, ratios, surrogate


@config
class Espo(Objective):
    """`-min(rho A, clip(rho) A) + beta KL / L` of each answer, rho = exp((E - E_old) / L), with E the estimate of log p
    and L the answer's tokens. The KL is of whole answers and divided by L once, as it stands in `kl` of the figures.

    At rho = 1 and without a KL the gradient is that of REINFORCE on E / L.

    Paper: ESPO, arXiv:2512.03759. `clip: both_sides` and `weights: self_normalised`: StableDRL, arXiv:2603.06743.
    Differs: L counts up to and including the end of text, where the code takes the whole length of generation, filling
    included, and so makes ratios small. Of StableDRL only the abstract was read: that a ratio outside has no gradient,
    and that the sum of a group's ratios is a constant to the gradient, are our reading.
    """

    research: ClassVar[bool] = False
    level: ClassVar[Literal["sequence", "token"] | None] = "sequence"
    likelihoods: ClassVar[tuple[str, ...]] = ("block_elbo", "mean_field", "trajectory", "left_to_right")

    epsilon: float = Field(default=0.2, ge=0, lt=1, allow_inf_nan=False)
    """How far a ratio may go from 1. At 0 only updates against the advantage's direction go on."""
    beta: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Strength of the KL to the reference; 0 has none, and needs no reference."""
    kl: Divergence = "k2"
    clip: Literal["ppo", "both_sides"] = "ppo"
    weights: Literal["group", "self_normalised"] = "group"
    """`self_normalised`: a group's answers weigh rho / mean rho, by the ratios that `clip` leaves."""

    @property
    def wants_reference(self) -> bool:
        return self.beta > 0

    def loss(self, inputs: PolicyInputs) -> tuple[Float[Tensor, ""], Figures]:
        advantage, valid = counted(inputs)
        ratio = ratios(inputs.now, inputs.old, valid, "sequence")
        gain, clipped = surrogate(ratio, advantage, self.epsilon, self.clip)
        if self.weights == "self_normalised":
            gain = gain / self._mean_ratio(ratio.detach(), valid, inputs.group.to(ratio.device))
        loss, figures = -gain, {"ratio": ratio.detach()[valid].sum(), "clipped": clipped[valid].sum().to(ratio)}
        if self.wants_reference:
            assert inputs.reference is not None, "a KL is to a reference"
            apart = differences(inputs.now, inputs.reference, valid, "sequence")
            kl = divergence(self.kl, apart) / inputs.now.length.clamp_min(1)
            loss, figures["kl"] = loss + self.beta * kl, kl.detach().sum()
        return loss.sum(), figures

    def _mean_ratio(
        self, ratio: Float[Tensor, " rows"], valid: Bool[Tensor, " rows"], group: Tensor
    ) -> Float[Tensor, " rows"]:
        """Of the valid answers of each row's group; 1 in rows that are not valid."""
        held = ratio.clamp(1 - self.epsilon, 1 + self.epsilon) if self.clip == "both_sides" else ratio
        same = (group[:, None] == group) & valid
        mean = (same.to(held) @ held) / same.sum(-1).clamp_min(1)
        return torch.where(valid, mean, 1.0)
