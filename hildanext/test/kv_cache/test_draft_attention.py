"""Attention of an exact forward: who sees which slot, and whose numbers depend on nothing else."""

import pytest
import torch
from torch import Tensor

from hildanext.kv_cache.block_cache import STRETCH, BlockCache
from hildanext.kv_cache.draft_attention import DraftAttention, DraftSegment


def attended(dtype: torch.dtype, head_dim: int, segment: DraftSegment) -> Tensor:
    """[heads rows head_dim] of a segment of random rows; a position has the same ones wherever the segment begins."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(400, head_dim, generator=generator).to(dtype) for _ in range(2))
    queries = torch.randn(400, 3, head_dim, generator=generator).to(dtype)
    cache = BlockCache(1, 1, 320, head_dim, block_size=1, clean_mask="token_causal", dtype=dtype)
    cache.keys.zero_(), cache.values.zero_()
    cache.keys[0, 0, : segment.start], cache.values[0, 0, : segment.start] = (
        keys[: segment.start],
        values[: segment.start],
    )
    fed = [*segment.positions[0], *range(350, 350 + segment.masks)]
    query, key, value = queries[fed].transpose(0, 1)[None], keys[fed][None, None], values[fed][None, None]
    out: Tensor = DraftAttention([cache], [segment]).attend(0, query, key, value, head_dim**-0.5)[0]
    return out


@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clean_row_has_the_same_bits_wherever_its_forward_begins(dtype: torch.dtype, head_dim: int) -> None:
    """A forward of as many rows; what is behind the row reaches into the next stretch of slots, or does not."""
    for at in range(20, 260):
        wanted = attended(dtype, head_dim, DraftSegment(at, 4, (0, 1, 2), 3))[:, 0]
        for before in (1, 3):
            segment = DraftSegment(at - before, 4, (0, 1, 2), 3)
            assert torch.equal(attended(dtype, head_dim, segment)[:, before], wanted), (at, before)


@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clean_row_has_the_same_bits_whatever_is_fed_behind_it(dtype: torch.dtype, head_dim: int) -> None:
    """From one row to twenty-five, of which three heads share the keys."""
    for at in range(40, 140):
        alone = attended(dtype, head_dim, DraftSegment(at, 1, (), 0))[:, 0]
        for clean, points, places in (
            (1, (0,), 2),
            (2, (), 0),
            (3, (0, 1, 2), 2),
            (4, (3,), 3),
            (5, tuple(range(5)), 4),
        ):
            found = attended(dtype, head_dim, DraftSegment(at, clean, points, places))[:, 0]
            assert torch.equal(found, alone), (at, clean, points)


@pytest.mark.parametrize("start", [5, STRETCH - 6, STRETCH - 2, STRETCH - 1, 2 * STRETCH])
def test_every_row_attends_to_what_its_mask_shows_and_to_nothing_else(start: int) -> None:
    segment = DraftSegment(start, 4, (0, 2, 3), 3)
    out = attended(torch.float64, 16, segment)
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(400, 16, generator=generator).double() for _ in range(2))
    queries = torch.randn(400, 3, 16, generator=generator).double()
    fed = [*segment.positions[0], *range(350, 350 + segment.masks)]
    slots = [*range(start), *fed]
    sees = segment.mask(torch.device("cpu"))
    assert sees.shape == (len(fed), len(slots))
    scores = (queries[fed].transpose(0, 1) @ keys[slots].T * 0.25).masked_fill(~sees, float("-inf"))
    torch.testing.assert_close(out, scores.softmax(-1) @ values[slots], rtol=1e-12, atol=1e-12)


def test_rows_are_looked_at_once_each_and_by_no_more_slots_than_needed() -> None:
    for start in range(1, 3 * STRETCH):
        for clean, points in ((1, (0,)), (4, (0, 1, 3)), (5, ())):
            segment = DraftSegment(start, clean, points, 3)
            for with_masks in (True, False):
                looks = segment.looks(with_masks)
                assert sum(rows for _, rows in looks) == clean + segment.masks * with_masks
                each = [slots for slots, rows in looks for _ in range(rows)]
                assert all(slots - STRETCH <= start + row < slots for row, slots in enumerate(each[:clean]))
                assert each[-1] % STRETCH == 0 and each[-1] >= (segment.end if with_masks else start + clean)
