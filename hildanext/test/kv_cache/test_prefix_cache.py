"""Which prefixes are found, how many are kept, and that a copy holds what was committed."""

import torch

from hildanext.kv_cache.block_cache import BlockCache
from hildanext.kv_cache.prefix_cache import PrefixCache

BLOCK = 4
BYTES_PER_BLOCK = 2 * 1 * 1 * BLOCK * 2 * 8
"""Keys and values of one layer and head of two fp64 numbers."""


def cache_of(blocks: int, value: float = 1.0, capacity: int = 32) -> BlockCache:
    cache = BlockCache(1, 1, capacity, 2, block_size=BLOCK, clean_mask="block_causal", dtype=torch.float64)
    cache.keys[:], cache.values[:] = value, -value
    cache.commit(blocks * BLOCK)
    return cache


def boundaries(blocks: int) -> torch.Tensor:
    return torch.zeros(blocks + 1, 3)


def kept(store: PrefixCache, first: int, blocks: int = 2) -> list[int]:
    """Keep a document of `blocks` blocks that begins with token `first`; its tokens."""
    tokens = [first, *range(1, blocks * BLOCK)]
    store.keep(cache_of(blocks, float(first)), boundaries(blocks), tokens)
    return tokens


def test_the_longest_common_beginning_is_found():
    store = PrefixCache(BLOCK, 10_000)
    tokens = kept(store, 50, 3)
    for shared, found in ((12, 12), (11, 8), (8, 8), (5, 4)):
        prefix, length = store.find([*tokens[:shared], 99, 98, 97, 96])
        assert length == found and prefix.cache.length == 12
    assert store.find([50, 1, 2]) is None and store.find([51, *tokens[1:]]) is None


def test_a_block_behind_another_beginning_is_not_the_same():
    """Its keys depend on everything before it."""
    store = PrefixCache(BLOCK, 10_000)
    kept(store, 50, 2)
    assert store.find([60, 1, 2, 3, 4, 5, 6, 7]) is None
    assert store.find([4, 5, 6, 7]) is None


def test_a_copy_holds_keys_and_values_without_the_room_behind_them():
    store = PrefixCache(BLOCK, 10_000)
    tokens = kept(store, 5)
    prefix, _ = store.find(tokens)
    assert prefix.cache.capacity == 2 * BLOCK and store.bytes == prefix.bytes == 2 * BYTES_PER_BLOCK
    assert bool((prefix.cache.keys == 5).all()) and bool((prefix.cache.values == -5).all())


def test_what_was_used_longest_ago_goes_first():
    store = PrefixCache(BLOCK, 4 * BYTES_PER_BLOCK)
    first, second = kept(store, 50), kept(store, 60)
    assert store.find(first) is not None
    third = kept(store, 70)
    assert store.find(second) is None and store.find(first) is not None and store.find(third) is not None
    assert len(store) == 2 and store.bytes == 4 * BYTES_PER_BLOCK


def test_the_store_never_holds_more_than_its_limit():
    store = PrefixCache(BLOCK, 4 * BYTES_PER_BLOCK)
    for first in range(50, 60):
        kept(store, first, 1 + first % 3)
        assert store.bytes <= store.limit_bytes
    kept(store, 70, 5)
    assert store.find([70, *range(1, 20)]) is None, "larger than the whole store"


def test_a_document_that_lives_is_lent_and_taken_back():
    store = PrefixCache(BLOCK, 0)
    tokens = list(range(8))
    key = store.register_live(cache_of(2), boundaries(2), tokens)
    assert store.find(tokens) is not None and store.bytes == 0
    store.shrink(0)
    assert store.find(tokens) is not None, "what lives is not dropped"
    store.drop(key)
    assert store.find(tokens) is None and len(store) == 0


def test_slots_are_put_back_as_they_were():
    cache = cache_of(2)
    before = cache.snapshot(4, 8)
    cache.keys[:, :, 4:8] = 9
    cache.values[:, :, 4:8] = 9
    cache.restore(4, before)
    assert bool((cache.keys == 1).all()) and bool((cache.values == -1).all())
