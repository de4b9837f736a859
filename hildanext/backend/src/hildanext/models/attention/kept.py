"""Attention of drafts while they are learnt: clean rows run once and are kept, groups of mask rows attend to them."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hildanext.models.attention.dense import folded_mask, grouped_attention

TOGETHER = 64
"""Mask rows that attend at a time: fewer see fewer keys in vain, more are fewer calls."""


@dataclass
class KeepingAttention:
    """Attend where a boolean mask says so, and keep the keys and values of layers from `first` on,
    [batch kv_heads seq head_dim]."""

    mask: Bool[Tensor, "batch query key"]
    first: int = 0
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    added: Tensor | None = None
    """The mask as all layers of a forward add it."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if layer >= self.first:
            self.keys[layer], self.values[layer] = key, value
        if self.added is None:
            self.added = folded_mask(self.mask, query.shape[1] // key.shape[1], query.dtype)
        return grouped_attention(query, key, value, self.added, scale)


@dataclass
class GroupAttention:
    """Mask rows, group by group, attend to kept clean rows up to their anchor and to their own group, both ways.

    Groups lie in the order of their anchors and attend a few at a time, each few with the clean rows up to their last
    anchor: the keys that a mask row sees are at most those, and a call reads no others.
    """

    kept: KeepingAttention
    anchors: Int[Tensor, "batch groups"]
    places: int
    ends: tuple[int, ...]
    """Behind the last anchor of each few groups."""
    added: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, kept: KeepingAttention, anchors: Int[Tensor, "batch groups"], places: int) -> "GroupAttention":
        """`anchors` in ascending order, best on the host: the device is then not waited for."""
        ends = tuple(int(part.max()) + 1 for part in anchors.split(max(TOGETHER // places, 1), 1))
        return cls(kept, anchors.to(kept.mask.device, non_blocking=True), places, ends)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if not self.added:
            group = query.shape[1] // key.shape[1]
            self.added = [folded_mask(mask, group, query.dtype) for mask in self._masks()]
        size = max(TOGETHER // self.places, 1) * self.places
        out, at = [], 0
        for end, mask in zip(self.ends, self.added, strict=True):
            own = slice(at, at + size)
            keys = torch.cat([self.kept.keys[layer][:, :, :end], key[:, :, own]], 2)
            values = torch.cat([self.kept.values[layer][:, :, :end], value[:, :, own]], 2)
            out.append(grouped_attention(query[:, :, own], keys, values, mask, scale))
            at += size
        return torch.cat(out, 2)

    def _masks(self) -> Iterator[Bool[Tensor, "batch query key"]]:
        """For each few groups: the clean rows that the anchor sees, then the own group of all their mask rows."""
        batch, few = len(self.anchors), max(TOGETHER // self.places, 1)
        rows = torch.arange(batch, device=self.anchors.device)[:, None]
        for end, anchors in zip(self.ends, self.anchors.split(few, 1), strict=True):
            clean = self.kept.mask[rows, anchors][..., :end].repeat_interleave(self.places, 1)
            number = torch.arange(anchors.shape[1], device=anchors.device).repeat_interleave(self.places)
            own = (number[:, None] == number[None]).expand(batch, -1, -1)
            yield torch.cat([clean, own], -1)
