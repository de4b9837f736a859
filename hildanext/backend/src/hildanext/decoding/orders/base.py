"""What an order is: a rank for each position of a block."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from hildanext.decoding.base import Canvas


class Order:
    """Which masks come first. Members are frozen and know nothing but what they are given."""

    biased: ClassVar[bool] = False
    """Whether the rank depends on what is drawn. Log p of the tokens is then not the log-probability of the action,
    which is also the choice of positions."""

    def rank(self, canvas: Canvas, confidence: Float[Tensor, "batch block"] | None) -> Float[Tensor, "batch block"]:
        """The lowest is filled first, ties from the left. `confidence`: the candidates' probabilities; a `biased` order
        gets them, others must do without, since they are asked before the forward."""
        raise NotImplementedError(f"{type(self).__name__} has no rank")
