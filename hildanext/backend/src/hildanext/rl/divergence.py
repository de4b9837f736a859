"""How far the policy is from a reference, from what both say of a sample: k1, k2 and k3."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

Divergence = Literal["k1", "k2", "k3"]
"""`k1`: d. `k2`: d^2 / 2. `k3`: exp(-d) - 1 + d."""


def divergence(kind: Divergence, difference: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """An estimate of KL(policy || reference) in nats, for samples of the policy; differentiable, 0 where d is 0.

    `difference` is d = log p of the policy less log p of the reference, of tokens or of whole answers. k1 is unbiased
    and of either sign; its gradient, which is that of log p, is 0 in the mean, so that it holds on to nothing. k2 is
    biased, but its gradient, d times that of log p, is the KL's in the mean. k3 is unbiased and never negative; its
    gradient has the factor 1 - exp(-d), which grows without bound where the policy has become much less likely.

    Source: J. Schulman, "Approximating KL divergence" (2020). ESPO, arXiv:2512.03759, compares them for whole answers:
    k1 collapses, k3 stagnates between spikes of the gradient, k2 is what it uses. Where d is a difference of bounds on
    log p, all three are about the bounds.
    """
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    return (-difference).expm1() + difference
