"""Backbones: load them, keep their conventions, save them."""

from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.card import Card, read_card

__all__ = ["Card", "DiffusionModel", "read_card"]
