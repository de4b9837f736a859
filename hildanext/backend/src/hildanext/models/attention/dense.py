"""The attention seam: one function in Transformers' attention interface, one context per forward.

Queries, keys and values arrive after the rotary embedding. What is done with them is the context's
business: a given boolean mask (`MaskedAttention`), or the block cache (`hildanext.kv_cache`). A forward that
brings no context raises, so that attention can never silently turn causal.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hildanext.core.errors import NumericsError

SEAM = "hilda"


@runtime_checkable
class AttentionContext(Protocol):
    """What one forward knows about attention; `attend` is called once per layer, in layer order."""

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "batch heads query head_dim"],
        key: Float[Tensor, "batch kv_heads query head_dim"],
        value: Float[Tensor, "batch kv_heads query head_dim"],
        scale: float,
    ) -> Float[Tensor, "batch heads query head_dim"]: ...


def grouped_attention(
    query: Float[Tensor, "batch heads query head_dim"],
    key: Float[Tensor, "batch kv_heads key head_dim"],
    value: Float[Tensor, "batch kv_heads key head_dim"],
    mask: Bool[Tensor, "#batch 1 query key"] | Float[Tensor, "#batch 1 folded key"] | None,
    scale: float,
) -> Float[Tensor, "batch heads query head_dim"]:
    """Grouped-query attention without copying keys: a group's heads become extra query rows.

    `mask` None means that every query sees every key; one of numbers comes from `folded_mask`.
    """
    batch, heads, seq, head_dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    folded = query.reshape(batch, kv_heads, group * seq, head_dim)
    if mask is not None and group > 1 and mask.dtype == torch.bool:
        mask = mask.repeat(1, 1, group, 1)
    out = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, seq, head_dim)


def folded_mask(
    mask: Bool[Tensor, "#batch query key"], group: int, dtype: torch.dtype
) -> Float[Tensor, "#batch 1 folded key"]:
    """What `grouped_attention` adds to the scores, made once for all layers: 0 where the mask allows, else -inf."""
    allowed = mask[:, None].repeat(1, 1, group, 1)
    return torch.zeros(allowed.shape, dtype=dtype, device=mask.device).masked_fill_(~allowed, float("-inf"))


@dataclass
class MaskedAttention:
    """Attend where a boolean mask says so; nothing is cached."""

    mask: Bool[Tensor, "batch query key"]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return grouped_attention(query, key, value, self.mask[:, None], scale)


def _seam(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    hilda: AttentionContext | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if hilda is None:
        raise NumericsError(
            "this model's attention was called without a context",
            "call it through hildanext.models.DiffusionModel, or reload the parent with attention 'sdpa'",
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    out = hilda.attend(layer, query, key, value, scale)
    return out.transpose(1, 2).contiguous(), None


def install_seam() -> str:
    """Register the seam (idempotent) and return its name for `attn_implementation`."""
    if SEAM not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS[SEAM] = _seam
    return SEAM


def no_mask(device: torch.device) -> Float[Tensor, "1 1 1 1"]:
    """A 4-D stand-in: Transformers takes a 4-D mask as final and builds no causal one of its own."""
    return torch.ones(1, 1, 1, 1, device=device)  # made there: to copy one over, the host would wait
