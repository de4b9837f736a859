"""Backbones: load them, keep their conventions, save them.

Read `card` (`hilda.json`), `bidirectional` (the diffusion model), `attention` (the rule of `masks.py`, executed),
`loading` (from a name to weights), `checkpoint` (save, merge), `start` (a conversion's start); `lora` and `quantize`.
"""

from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.card import Card, read_card

__all__ = ["HEAD_ROWS", "Card", "DiffusionModel", "read_card"]

HEAD_ROWS = 256
"""Rows of logits that exist at once. At a vocabulary of 151,936, as Qwen3 has it, they take 156 MB in fp32, those of a
whole document of 4,096 tokens 2.5 GB; and the product of the head with this many rows is still a large one."""
