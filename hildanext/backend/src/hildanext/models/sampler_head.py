"""A head that tells a mask row which token stands before the one it is to say.

Masks of a group are computed together, before anything behind their anchor is decided. The sampler head mends that at
the price of a small product: once the token before is known (the parent's own, or the draft before), it shifts the
row's final state by what follows from it.

Paper: the sampler head of gated LoRA multi-token prediction, arXiv:2507.11851. Differs: it shifts the final state, so
that the parent's own output matrix reads it, and starts as zero.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from hildanext.models.kept_copies import KeptCopies


class SamplerHead(nn.Module):
    """hidden + up(silu(down [hidden, scale * norm(embedding)])); `inner` is the size between."""

    def __init__(self, hidden: int, inner: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(inner, 2 * hidden, dtype=dtype, device=device))
        self.up = nn.Parameter(torch.zeros(hidden, inner, dtype=dtype, device=device))
        self.scale = nn.Parameter(torch.ones(hidden, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self._kept = KeptCopies()

    def forward(
        self, hidden: Float[Tensor, "*rows hidden"], embedding: Float[Tensor, "*rows hidden"]
    ) -> Float[Tensor, "*rows hidden"]:
        """States of mask rows that know the tokens before those they are to say, whose embeddings are given."""
        wide = embedding.to(self.scale.dtype)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * self.scale
        both = torch.cat([hidden, normed.to(hidden.dtype)], -1)
        inner = silu(both @ self._as(hidden.dtype, "down").T)
        return hidden + inner @ self._as(hidden.dtype, "up").T

    def _as(self, dtype: torch.dtype, name: str) -> Tensor:
        """A matrix in the type of the rows; while nothing is learnt the cast is made once."""
        matrix: Tensor = getattr(self, name)
        if torch.is_grad_enabled() or matrix.dtype == dtype:
            return matrix.to(dtype)
        return self._kept(f"{name} {dtype}", lambda: matrix.to(dtype), matrix)
