"""Orders in which the masks of a block are filled. To add one: write the file, add its row, add its case; the knob
`order` of `decoding.ordered` names it."""

from hildanext.decoding.orders.base import Order
from hildanext.decoding.orders.confidence import ConfidenceOrder
from hildanext.decoding.orders.left_to_right import LeftToRight
from hildanext.decoding.orders.random_order import RandomOrder

ORDERS: dict[str, type[Order]] = {
    "random": RandomOrder,
    "left_to_right": LeftToRight,
    "confidence": ConfidenceOrder,
}

__all__ = ["ORDERS", "Order"]
