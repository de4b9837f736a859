"""Attention of an exact forward: clean rows of several documents, then groups of mask rows that leave no keys behind.

A document's clean rows are written at their positions; its mask rows are written into the slots behind them, as scratch
that the next forward overwrites. So keys lie in one piece, and one mask says who sees what:

    clean row at n + c   slots up to n + c
    mask of group j      slots up to n + j, and its own group, both ways

Attention looks at whole stretches of slots (`block_cache.STRETCH`), whose hidden end is finite, so that a row's numbers
do not depend on how many rows are fed behind it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hildanext.kv_cache.block_cache import BlockCache, whole_stretches


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
        self._sees = [
            None if segment.clean == 1 and not segment.masks else segment.mask(device, whole_stretches(segment.end))
            for segment in segments
        ]
        self._folded: dict[tuple[int, bool], Tensor] = {}

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
        queries, keys, values = (self._by_document(part[0], with_masks) for part in (query, key, value))
        for number, (cache, segment) in enumerate(zip(self.caches, self.segments, strict=True)):
            end = segment.end if with_masks else segment.start + segment.clean
            cache.keys[layer, :, segment.start : end] = keys[number]
            cache.values[layer, :, segment.start : end] = values[number]
            seen = end if self._sees[number] is None else whole_stretches(end)
            seen_keys, seen_values = cache.keys[layer, None, :, :seen], cache.values[layer, None, :, :seen]
            heads, rows, head_dim = queries[number].shape
            kv_heads = key.shape[1]
            mixed = scaled_dot_product_attention(
                queries[number].reshape(1, kv_heads, heads // kv_heads * rows, head_dim),
                seen_keys,
                seen_values,
                attn_mask=self._mask(number, with_masks, heads // kv_heads, query.dtype),
                scale=scale,
            )
            outputs.append(mixed.reshape(heads, rows, head_dim))
        return self._by_kind(outputs, with_masks)[None]

    def _by_document(self, rows: Float[Tensor, "heads rows head_dim"], with_masks: bool) -> list[Tensor]:
        """The rows of each document: clean ones, then masks."""
        if len(self.segments) == 1:
            return [rows]
        clean = rows[:, : self.clean_rows].split(self._clean, 1)
        if not with_masks:
            return list(clean)
        masks = rows[:, self.clean_rows :].split(self._masks, 1)
        return [torch.cat(pair, 1) for pair in zip(clean, masks, strict=True)]

    def _by_kind(self, outputs: list[Tensor], with_masks: bool) -> Float[Tensor, "heads rows head_dim"]:
        """All clean rows, then all masks, again."""
        if len(outputs) == 1:
            return outputs[0]
        clean = [out[:, :count] for out, count in zip(outputs, self._clean, strict=True)]
        masks = [out[:, count:] for out, count in zip(outputs, self._clean, strict=True)] if with_masks else []
        return torch.cat([*clean, *masks], 1)

    def _mask(self, number: int, with_masks: bool, group: int, dtype: torch.dtype) -> Tensor | None:
        """Additive, repeated for the heads that share keys; made at the first layer of its kind."""
        sees = self._sees[number]
        if sees is None:
            return None
        if (number, with_masks) not in self._folded:
            if not with_masks:
                clean = self._clean[number]
                sees = sees[:clean, : whole_stretches(self.segments[number].start + clean)]
            zero = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
            self._folded[number, with_masks] = zero.masked_fill_(~sees, float("-inf")).repeat(group, 1)
        return self._folded[number, with_masks]
