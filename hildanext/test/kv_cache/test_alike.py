"""Rows that feed alike: to the bit what each is alone, and written where its document keeps it."""

import pytest
import torch

from hildanext.kv_cache import BlockCache, CachedAttention, Segment
from hildanext.kv_cache import alike as alike_module
from hildanext.kv_cache.alike import alike

SEGMENTS = [Segment(8, 4, 4), Segment(4, 0, 4), Segment(8, 4, 4), Segment(0, 8, 0), Segment(4, 0, 4), Segment(8, 4, 4)]


def caches(dtype, clean_mask):
    made = []
    for seed in range(len(SEGMENTS)):
        cache = BlockCache(2, 2, 20, 8, block_size=4, clean_mask=clean_mask, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        for part in (cache.keys, cache.values):
            part.copy_(torch.randn(part.shape, generator=generator, dtype=torch.float64))
        made.append(cache)
    return made


@pytest.mark.parametrize("clean_mask", ["block_causal", "token_causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_row_in_company_has_the_bits_of_the_row_alone(dtype, clean_mask):
    widths = [segment.num_tokens for segment in SEGMENTS]
    generator = torch.Generator().manual_seed(9)
    shapes = ((1, 6, sum(widths), 8), (1, 2, sum(widths), 8), (1, 2, sum(widths), 8))
    together, alone = caches(dtype, clean_mask), caches(dtype, clean_mask)
    context = CachedAttention(together, SEGMENTS)
    rows = [CachedAttention([cache], [segment]) for cache, segment in zip(alone, SEGMENTS, strict=True)]
    for layer in range(2):
        fed = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
        whole = context.attend(layer, *fed, 0.3)
        own = zip(*(part.split(widths, 2) for part in fed), strict=True)
        single = [row.attend(layer, *parts, 0.3) for row, parts in zip(rows, own, strict=True)]
        assert torch.equal(whole, torch.cat(single, 2))
    for cache, other in zip(together, alone, strict=True):
        assert torch.equal(cache.keys, other.keys) and torch.equal(cache.values, other.values)


def test_only_equal_segments_are_gathered_and_only_small_ones(monkeypatch):
    assert alike(SEGMENTS, 2, 128) == [[0, 2, 5], [1, 4], [3]]
    monkeypatch.setattr(alike_module, "ROW_BYTES", 8 * 128)
    assert alike(SEGMENTS, 2, 128) == [[0], [1, 4], [2], [3], [5]]
    monkeypatch.setattr(alike_module, "FORWARD_BYTES", 0)
    assert alike(SEGMENTS, 2, 128) == [[0], [1], [2], [3], [4], [5]]
