"""Backbones: load them, keep their conventions, save them.

Read `card` (`hilda.json`), `bidirectional` (the diffusion model), `attention` (the rule of `masks.py`, executed),
`loading` (from a name to weights), `checkpoint` (save, merge), `start` (a conversion's start); `lora` and `quantize`.
"""

from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.card import Card, read_card

__all__ = ["Card", "DiffusionModel", "read_card"]
