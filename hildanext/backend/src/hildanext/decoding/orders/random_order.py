"""A random order: every position has a key, from a stream that nothing else draws from."""

import hashlib
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from hildanext.core.config import config
from hildanext.decoding.base import Canvas
from hildanext.decoding.orders.base import Order
from hildanext.models.sampling import uniforms


@config
class RandomOrder(Order):
    """By a key for each position, of the row's seed and the block alone: the same whatever is drawn, and whoever else
    is decoded. Every order of a block is as likely as every other."""

    def rank(self, canvas: Canvas, confidence: Float[Tensor, "batch block"] | None) -> Float[Tensor, "batch block"]:
        assert canvas.rows, "a canvas without the seeds of its rows has no random order"
        size = canvas.masked.shape[1]
        keys = torch.stack([_keys(row.seed, row.start, size) for row in canvas.rows])
        return keys.to(canvas.masked.device, non_blocking=True)


@lru_cache(maxsize=4096)
def _keys(seed: int, start: int, size: int) -> Float[Tensor, " block"]:
    """Of the block at `start`. Hashed, so that the seeds of tokens (`SequenceState.uniform`) are others."""
    digest = hashlib.sha256(f"order of the block at {start}, seed {seed}".encode()).digest()
    return uniforms(int.from_bytes(digest[:8], "big") >> 1, size)
