"""Attention of an exact forward: clean rows of several documents, then groups of mask rows that leave no keys behind.

A document's clean rows are written at their positions; its mask rows are written into the slots behind them, as scratch
that the next forward overwrites. So keys lie in one piece, and one mask says who sees what:

    clean row at n + c   slots up to n + c
    mask of group j      slots up to n + j, and its own group, both ways

Attention looks at whole stretches of slots (`block_cache.STRETCH`), whose hidden end is finite, and a clean row at no
more of them than it needs: so its numbers do not depend on how many rows are fed behind it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from hildanext.kv_cache.block_cache import STRETCH, BlockCache, whole_stretches

FEW = 4
"""Query rows come in multiples of so many: PyTorch's kernel for CPUs takes 32 at a time, and adds in another order for
one to three that are left over."""


@lru_cache
def attention_alone(dtype: torch.dtype) -> bool:
    """Whether query rows came out with the same bits in every company that was tried on this CPU."""
    generator = torch.Generator().manual_seed(0)
    for slots in (STRETCH, 3 * STRETCH, 8 * STRETCH):
        query, key, value = (torch.randn(1, 2, rows, 64, generator=generator).to(dtype) for rows in (96, slots, slots))
        together = scaled_dot_product_attention(query, key, value)
        for rows in range(FEW, 96, FEW):
            if not torch.equal(scaled_dot_product_attention(query[:, :, :rows], key, value), together[:, :, :rows]):
                return False
    return True


@dataclass(frozen=True)
class DraftSegment:
    """What a forward feeds of one document."""

    start: int
    """Position of the first clean row: the newest certain token, whose keys are not cached yet."""
    clean: int
    """That token and the drafts behind it."""
    points: tuple[int, ...]
    """Behind which clean rows, counted from 0, a group of masks stands."""
    places: int
    """Masks of a group."""

    @property
    def masks(self) -> int:
        return len(self.points) * self.places

    @property
    def end(self) -> int:
        """Slots that are written, scratch included."""
        return self.start + self.clean + self.masks

    def looks(self, with_masks: bool) -> list[tuple[int, int]]:
        """(slots, rows): so many rows, from the first on, look at so many slots; masks at all that are written.

        A piece of a prompt, which is the same whatever is drafted behind it, is looked at as a whole.
        """
        rows = range(1, self.clean + 1) if self.clean <= STRETCH else [self.clean] * self.clean
        slots = [whole_stretches(self.start + row) for row in rows]
        slots += [whole_stretches(self.end)] * (self.masks if with_masks else 0)
        return [(seen, len(list(alike))) for seen, alike in groupby(slots)]

    @property
    def anchors(self) -> list[int]:
        """For each mask row, the clean row that it stands behind."""
        return [point for point in self.points for _ in range(self.places)]

    @property
    def positions(self) -> tuple[list[int], list[int]]:
        """Of the clean rows, and of the mask rows."""
        clean = list(range(self.start, self.start + self.clean))
        return clean, [self.start + point + 1 + place for point in self.points for place in range(self.places)]

    def mask(self, device: torch.device, slots: int | None = None) -> Bool[Tensor, "row slot"]:
        """Who sees which slot, of `slots` or those that are written; True = sees."""
        clean, rows, before = self.clean, self.clean + self.masks, self.start
        sees = torch.zeros(rows, self.end if slots is None else slots, dtype=torch.bool)
        sees[:, :before] = True
        sees[:clean, before : before + clean] = torch.ones(clean, clean, dtype=torch.bool).tril()
        for number, point in enumerate(self.points):
            own = slice(clean + number * self.places, clean + (number + 1) * self.places)
            sees[own, before : before + point + 1] = True
            sees[own, before + own.start : before + own.stop] = True
        return sees.to(device, non_blocking=True)


class DraftAttention:
    """One forward of clean rows of every document, one behind another, and then of their mask rows.

    Layers before the masks enter see clean rows alone; how many rows come tells which kind of layer it is.
    """

    def __init__(self, caches: Sequence[BlockCache], segments: Sequence[DraftSegment]) -> None:
        for cache, segment in zip(caches, segments, strict=True):
            assert whole_stretches(segment.end) <= cache.capacity, "the cache is too small for this forward"
        self.caches, self.segments = list(caches), list(segments)
        device = caches[0].keys.device
        self._clean = [segment.clean for segment in segments]
        self._masks = [segment.masks for segment in segments]
        self.clean_rows = sum(self._clean)
        self._sees = [segment.mask(device, whole_stretches(segment.end)) for segment in segments]
        self._folded: dict[tuple[int, bool, int], Tensor] = {}

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "one heads rows head_dim"],
        key: Float[Tensor, "one kv_heads rows head_dim"],
        value: Float[Tensor, "one kv_heads rows head_dim"],
        scale: float,
    ) -> Float[Tensor, "one heads rows head_dim"]:
        with_masks = query.shape[2] > self.clean_rows
        outputs: list[Tensor] = []
        queries, keys, values = (self.by_document(part[0], with_masks) for part in (query, key, value))
        for number, (cache, segment) in enumerate(zip(self.caches, self.segments, strict=True)):
            end = segment.end if with_masks else segment.start + segment.clean
            cache.keys[layer, :, segment.start : end] = keys[number]
            cache.values[layer, :, segment.start : end] = values[number]
            heads, rows, head_dim = queries[number].shape
            kv_heads = key.shape[1]
            folded = heads // kv_heads * rows
            query_rows = queries[number].reshape(1, kv_heads, folded, head_dim)
            query_rows = pad(query_rows, (0, 0, 0, -folded % FEW))
            parts, first = [], 0
            for seen, count in segment.looks(with_masks):
                mixed = scaled_dot_product_attention(
                    query_rows,
                    cache.keys[layer, None, :, :seen],
                    cache.values[layer, None, :, :seen],
                    attn_mask=self._mask(number, with_masks, seen, heads // kv_heads, query.dtype),
                    scale=scale,
                )[:, :, :folded].reshape(heads, rows, head_dim)
                parts.append(mixed[:, first : first + count])
                first += count
            outputs.append(parts[0] if len(parts) == 1 else torch.cat(parts, 1))
        return self.by_kind(outputs, with_masks)[None]

    def by_document(self, rows: Shaped[Tensor, "heads rows head_dim"], with_masks: bool) -> list[Tensor]:
        """The rows of each document: clean ones, then masks."""
        if len(self.segments) == 1:
            return [rows]
        clean = rows[:, : self.clean_rows].split(self._clean, 1)
        if not with_masks:
            return list(clean)
        masks = rows[:, self.clean_rows :].split(self._masks, 1)
        return [torch.cat(pair, 1) for pair in zip(clean, masks, strict=True)]

    def by_kind(self, outputs: list[Tensor], with_masks: bool) -> Float[Tensor, "heads rows head_dim"]:
        """All clean rows, then all masks, again."""
        if len(outputs) == 1:
            return outputs[0]
        clean = [out[:, :count] for out, count in zip(outputs, self._clean, strict=True)]
        masks = [out[:, count:] for out, count in zip(outputs, self._clean, strict=True)] if with_masks else []
        return torch.cat([*clean, *masks], 1)

    def _mask(self, number: int, with_masks: bool, seen: int, group: int, dtype: torch.dtype) -> Tensor:
        """Additive, repeated for the heads that share keys; made at the first layer of its kind."""
        if (number, with_masks, seen) not in self._folded:
            rows = self._sees[number][: None if with_masks else self._clean[number], :seen]
            zero = torch.zeros(rows.shape, dtype=dtype, device=rows.device)
            folded = zero.masked_fill_(~rows, float("-inf")).repeat(group, 1)
            self._folded[number, with_masks, seen] = pad(folded, (0, 0, 0, -len(folded) % FEW))
        return self._folded[number, with_masks, seen]
