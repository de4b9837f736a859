"""Where the model is surest first: the order of LLaDA's low-confidence remasking."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from hildanext.core.config import config
from hildanext.decoding.base import Canvas
from hildanext.decoding.orders.base import Order


@config
class ConfidenceOrder(Order):
    """By the candidates' probabilities, the highest first.

    Paper: LLaDA, arXiv:2502.09992.
    Differs: a position's candidate is drawn with one number for the whole block, not anew in every step. Fresh draws
    would keep the likelier candidates and draw the others again: of two independent positions (0.6, 0.4) and
    (0.55, 0.45) the first would be its likelier token with 0.84.
    """

    biased: ClassVar[bool] = True

    def rank(self, canvas: Canvas, confidence: Float[Tensor, "batch block"] | None) -> Float[Tensor, "batch block"]:
        assert confidence is not None, "an order by confidence is asked after the forward"
        return -confidence
