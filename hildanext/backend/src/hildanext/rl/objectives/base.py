"""What an objective is: a loss of the policy's log-probabilities, given those of the policy that wrote the answers."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from hildanext.core.config import config
from hildanext.rl.desk import Desk
from hildanext.rl.looks import Scores
from hildanext.rl.material import Material

Figures = dict[str, Float[Tensor, ""]]
"""Sums over a micro-batch, detached; divided by the step's normaliser they are means."""


@dataclass(frozen=True)
class PolicyInputs:
    """A micro-batch of whole groups, as an objective sees it."""

    now: Scores
    """Of the policy that learns; carries the gradient."""
    old: Scores
    """Of the policy that wrote the answers, under the same looks; before a round's first update `now`, detached."""
    reference: Scores | None
    """Of the policy that the KL holds on to; None without one."""
    advantage: Float[Tensor, " rows"]
    valid: Bool[Tensor, " rows"]
    """Rows that count: judged ones, of groups that teach something."""
    group: Int[Tensor, " rows"]


@config
class Objective:
    """A loss to be minimised, as a sum over a micro-batch; the loop divides it by `count` over the whole step."""

    research: ClassVar[bool] = True
    """Built under the profile FULL alone."""
    per: ClassVar[Literal["answer", "token", "group"]] = "answer"
    """What the sum is divided by."""
    level: ClassVar[Literal["sequence", "token"] | None] = None
    """What its ratios are of (`ratios.ratios` gives them all); None where it has none and does not read `old`."""
    separable: ClassVar[bool] = False
    """Whether the loss is a sum over looks, so that each may have a forward and a backward pass of its own."""
    likelihoods: ClassVar[tuple[str, ...]] = ()
    """Names of the estimates that it may be given, the usual one first."""
    advantage: ClassVar[str] = "leave_one_out"
    """Name of the usual advantage."""

    def more(self, material: Material, desk: Desk) -> Material:
        """What is learnt of a chunk's judged answers: the same, or more; `Desk` keeps what is made."""
        return material

    @property
    def wants_reference(self) -> bool:
        """Whether it reads `PolicyInputs.reference`."""
        return False

    def loss(self, inputs: PolicyInputs) -> tuple[Float[Tensor, ""], Figures]:
        """The sum over the valid rows, and figures to be shown: `ratio`, `clipped`, `kl`, as far as it has them."""
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def count(self, valid: Bool[Tensor, " rows"], group: Int[Tensor, " rows"], read: Int[Tensor, " rows"]) -> int:
        """What a micro-batch adds to the normaliser: answers, groups, or tokens (`read`: those of each estimate)."""
        if self.per == "group":
            return len(set(group[valid].tolist()))
        return int(read[valid].sum()) if self.per == "token" else int(valid.sum())
