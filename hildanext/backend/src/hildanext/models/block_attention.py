"""Attention of the doubled training input, computed block by block instead of under a dense mask.

The rule of `masks.doubled` is sparse: a noisy token sees its own block of the noisy half and a prefix of the
clean half. So the noisy half needs [L, L + block] scores and the clean half [L, L], not [2L, 2L]. On a CPU this
is about three times as fast as the library's fused kernel under a dense mask; in fp64 both agree to rounding.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hildanext import masks
from hildanext.masks import CleanMask
from hildanext.models.attention import AttentionContext, MaskedAttention


def aligned(document: Int[Tensor, "batch seq"], position: Int[Tensor, "batch seq"], block_size: int) -> bool:
    """Whether every block of the row grid lies inside one block of one document (or is padding throughout)."""
    batch, seq = document.shape
    if seq % block_size:
        return False
    chunks = document.view(batch, -1, block_size)
    if not bool((chunks == chunks[..., :1]).all()):
        return False
    index = torch.arange(seq, device=position.device) % block_size
    return bool(((position % block_size == index) | (document < 0)).all())


@dataclass
class DoubledAttention:
    """Attention context for `[x_t ; x_0]` whose blocks lie on the row grid (see `aligned`)."""

    bias: Float[Tensor, "batch 1 twice_seq seq"]
    """What noisy and clean queries see of the clean half: 0 or -inf."""
    block_size: int

    @classmethod
    def build(
        cls,
        document: Int[Tensor, "batch seq"],
        position: Int[Tensor, "batch seq"],
        block_size: int,
        clean_mask: CleanMask,
        dtype: torch.dtype,
    ) -> "DoubledAttention":
        seq = document.shape[1]
        mask: Bool[Tensor, "batch twice_seq twice_seq"] = masks.doubled(document, position, block_size, clean_mask)
        sees_clean = mask[:, :, seq:]
        bias = torch.zeros(sees_clean.shape, dtype=dtype, device=mask.device).masked_fill(~sees_clean, float("-inf"))
        return cls(bias[:, None], block_size)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        batch, heads, fed, head_dim = query.shape
        kv_heads, seq, block = key.shape[1], fed // 2, self.block_size
        group, blocks = heads // kv_heads, fed // 2 // block
        folded = (query * scale).view(batch, kv_heads, group, fed, head_dim)
        clean_key, clean_value = key[:, :, seq:], value[:, :, seq:]
        flat = folded.reshape(batch, kv_heads, group * fed, head_dim)
        clean_scores = (flat @ clean_key.transpose(-1, -2)).view(batch, kv_heads, group, fed, seq)
        clean_scores = clean_scores + self.bias.view(batch, 1, 1, fed, seq)

        def by_block(x: Tensor, last: int) -> Tensor:
            """[batch kv_heads group seq last] -> [batch*kv_heads*blocks, group*block, last]"""
            x = x.reshape(batch, kv_heads, group, blocks, block, last).transpose(2, 3)
            return x.reshape(batch * kv_heads * blocks, group * block, last)

        def by_row(x: Tensor, last: int) -> Tensor:
            x = x.view(batch, kv_heads, blocks, group, block, last).transpose(2, 3)
            return x.reshape(batch, kv_heads, group, seq, last)

        noisy_key = key[:, :, :seq].reshape(-1, block, head_dim)
        noisy_value = value[:, :, :seq].reshape(-1, block, head_dim)
        own_scores = by_row(by_block(folded[:, :, :, :seq], head_dim) @ noisy_key.transpose(-1, -2), block)
        noisy_p = torch.cat([clean_scores[..., :seq, :], own_scores], -1).softmax(-1)
        clean_p = clean_scores[..., seq:, :].softmax(-1)
        del clean_scores, own_scores  # the largest tensors of a layer; nothing below reads them
        p = torch.cat([noisy_p[..., :seq], clean_p], -2).view(batch, kv_heads, group * fed, seq)
        out = (p @ clean_value).view(batch, kv_heads, group, fed, head_dim)
        own = by_row(by_block(noisy_p[..., seq:], block) @ noisy_value, head_dim)
        out = torch.cat([out[..., :seq, :] + own, out[..., seq:, :]], -2)
        return out.reshape(batch, heads, fed, head_dim)


def doubled_attention(
    document: Int[Tensor, "batch seq"],
    position: Int[Tensor, "batch seq"],
    block_size: int,
    clean_mask: CleanMask,
    dtype: torch.dtype,
) -> AttentionContext:
    """The context of a doubled forward: by blocks where they lie on the row grid, else under the dense mask.

    Both compute the same attention; the choice is one of speed alone.
    """
    if aligned(document, position, block_size):
        return DoubledAttention.build(document, position, block_size, clean_mask, dtype)
    return MaskedAttention(masks.doubled(document, position, block_size, clean_mask))
