"""Blocks that earlier documents have left, for documents that begin with the same ones.

Exact, since a block's keys and values depend on the tokens up to its end alone: a prefix is found by the tokens of its
whole blocks, counted from position 0, and copied (`BlockCache.adopt`). What was used longest ago goes first.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from jaxtyping import Float
from torch import Tensor

from hildanext.kv_cache.block_cache import BlockCache


@dataclass(eq=False)
class Prefix:
    """Committed blocks of a document that lives, or of one that has ended and was kept."""

    cache: BlockCache
    last_clean_hidden: Float[Tensor, "blocks hidden"]
    """Clean hidden state before each block, as `parent` alignment needs it."""
    chain: list[bytes]
    """Hash of the document up to the end of each block."""
    bytes: int
    """0 for a document that lives: its cache is counted with it."""


class PrefixCache:
    """At most `limit_bytes` of kept prefixes; 0 keeps none, and finds only those of documents that live."""

    def __init__(self, block_size: int, limit_bytes: int) -> None:
        self.block_size, self.limit_bytes = block_size, limit_bytes
        self.bytes = 0
        self._prefixes: OrderedDict[int, Prefix] = OrderedDict()
        self._places: dict[bytes, list[int]] = {}
        """Hash of a beginning to the keys of the prefixes that hold it."""
        self._next = 0

    def __len__(self) -> int:
        return len(self._prefixes)

    def find(self, tokens: Sequence[int]) -> tuple[Prefix, int] | None:
        """The prefix that shares the most whole blocks with `tokens`, and how many tokens those are."""
        chain = self.chain(tokens)
        for blocks in range(len(chain), 0, -1):
            keys = self._places.get(chain[blocks - 1])
            if keys:
                self._prefixes.move_to_end(keys[-1])
                return self._prefixes[keys[-1]], blocks * self.block_size
        return None

    def register_live(self, cache: BlockCache, last_clean_hidden: Tensor, tokens: Sequence[int]) -> int:
        """Offer the committed beginning of a document that lives; `drop` the returned key when it ends."""
        assert cache.lends, "a pruned cache is nobody else's"
        return self._add(Prefix(cache, last_clean_hidden, self.chain(tokens[: cache.length]), 0))

    def keep(self, cache: BlockCache, last_clean_hidden: Tensor, tokens: Sequence[int]) -> None:
        """Keep what a document that has ended leaves: a copy without the room that it did not use."""
        if self.limit_bytes <= 0 or not cache.lends:
            return
        chain = self.chain(tokens[: cache.length])
        size = _bytes(cache) * cache.length // max(cache.capacity, 1)
        if not chain or size > self.limit_bytes or self._places.get(chain[-1]):
            return
        self.shrink(self.limit_bytes - size)
        layers, kv_heads, _, head_dim = cache.keys.shape
        copy = BlockCache(
            layers,
            kv_heads,
            cache.length,
            head_dim,
            block_size=cache.block_size,
            clean_mask=cache.clean_mask,
            dtype=cache.keys.dtype,
            device=cache.keys.device,
        )
        copy.adopt(cache, cache.length)
        self._add(Prefix(copy, last_clean_hidden[: len(chain) + 1].clone(), chain, size))

    def shrink(self, limit_bytes: int) -> None:
        """Drop kept prefixes, those used longest ago first, until at most so many bytes are left."""
        for key in [key for key, prefix in self._prefixes.items() if prefix.bytes]:
            if self.bytes <= max(limit_bytes, 0):
                return
            self.drop(key)

    def drop(self, key: int) -> None:
        prefix = self._prefixes.pop(key)
        self.bytes -= prefix.bytes
        for link in prefix.chain:
            self._places[link].remove(key)
            if not self._places[link]:
                del self._places[link]

    def chain(self, tokens: Sequence[int]) -> list[bytes]:
        """One hash for each whole block of `tokens`, of everything up to its end."""
        return list(_chain(tuple(tokens), self.block_size))

    def _add(self, prefix: Prefix) -> int:
        key, self._next = self._next, self._next + 1
        self._prefixes[key] = prefix
        self.bytes += prefix.bytes
        for link in prefix.chain:
            self._places.setdefault(link, []).append(key)
        return key


@lru_cache(maxsize=64)
def _chain(tokens: tuple[int, ...], size: int) -> tuple[bytes, ...]:
    """Kept for a few documents: a request that waits for the prompt of its group is asked after every forward."""
    links, before = [], b""
    for begin in range(0, len(tokens) // size * size, size):
        before = hashlib.sha256(before + array("q", tokens[begin : begin + size]).tobytes()).digest()
        links.append(before)
    return tuple(links)


def _bytes(cache: BlockCache) -> int:
    return cache.keys.nbytes + cache.values.nbytes
