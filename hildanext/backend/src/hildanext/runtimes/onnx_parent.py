"""The autoregressive parent in ONNX Runtime, as the engine asks it: one token of every request a forward."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hildanext.ar import Parent
from hildanext.core.errors import ModelError
from hildanext.kv_cache import CachedAttention
from hildanext.kv_cache.block_cache import STRETCH
from hildanext.kv_cache.draft_attention import DraftSegment
from hildanext.models.attention.dense import AttentionContext
from hildanext.runtimes.onnx_network import OnnxNetwork


class OnnxParent(Parent):
    """Over block caches alone; what looks at whole rows at once (likelihoods) has torch."""

    slots_first = STRETCH

    def __init__(
        self,
        network: OnnxNetwork,
        tokenizer: PreTrainedTokenizerBase | None,
        banned: Bool[Tensor, " vocab"] | None = None,
    ) -> None:
        super().__init__(network.causal_lm, tokenizer, banned)
        self.network = network

    @property
    def device(self) -> torch.device:
        return self.network.device

    def forward(
        self, tokens: Int[Tensor, "batch fed"], position: Int[Tensor, "batch fed"], attention: AttentionContext
    ) -> Float[Tensor, "batch fed hidden"]:
        """Raises `ModelError` for another attention than the block cache's."""
        if not isinstance(attention, CachedAttention):
            raise ModelError("ONNX Runtime computes generation alone", "leave the runtime and q8 or q4 out")
        segments = [DraftSegment(segment.start, segment.num_tokens, (), 0) for segment in attention.segments]
        return self.network.forward(tokens[0].tolist(), attention.caches, segments)[None]

    def logits(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        logits = self.network.logits(hidden)
        return logits if self.banned is None else logits.masked_fill(self.banned, float("-inf"))
