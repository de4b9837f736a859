"""From left to right: the order of an autoregressive model, inside a block."""

import torch
from jaxtyping import Float
from torch import Tensor

from hildanext.core.config import config
from hildanext.decoding.base import Canvas
from hildanext.decoding.orders.base import Order


@config
class LeftToRight(Order):
    """By position."""

    def rank(self, canvas: Canvas, confidence: Float[Tensor, "batch block"] | None) -> Float[Tensor, "batch block"]:
        places = torch.arange(canvas.masked.shape[1], dtype=torch.float64, device=canvas.masked.device)
        return places.expand(canvas.masked.shape)
