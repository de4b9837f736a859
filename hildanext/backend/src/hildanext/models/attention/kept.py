"""Attention of drafts while they are learnt: clean rows run once and are kept, groups of mask rows attend to them."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hildanext.models.attention.dense import grouped_attention


@dataclass
class KeepingAttention:
    """Attend where a boolean mask says so, and keep every layer's keys and values, [batch kv_heads seq head_dim]."""

    mask: Bool[Tensor, "batch query key"]
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.keys[layer], self.values[layer] = key, value
        return grouped_attention(query, key, value, self.mask[:, None], scale)


@dataclass
class GroupAttention:
    """Mask rows, group by group, attend to kept clean rows up to their anchor and to their own group, both ways."""

    kept: KeepingAttention
    mask: Bool[Tensor, "batch query key"]
    """Keys: the clean rows, then the mask rows."""

    @classmethod
    def of(cls, kept: KeepingAttention, anchors: Int[Tensor, "batch groups"], places: int) -> "GroupAttention":
        batch, groups = anchors.shape
        rows = torch.arange(batch, device=anchors.device)[:, None]
        clean = kept.mask[rows, anchors].repeat_interleave(places, 1)  # a group sees what its anchor sees
        group = torch.arange(groups, device=anchors.device).repeat_interleave(places)
        own = (group[:, None] == group[None]).expand(batch, -1, -1)
        return cls(kept, torch.cat([clean, own], -1))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        keys = torch.cat([self.kept.keys[layer], key], 2)
        values = torch.cat([self.kept.values[layer], value], 2)
        return grouped_attention(query, keys, values, self.mask[:, None], scale)
