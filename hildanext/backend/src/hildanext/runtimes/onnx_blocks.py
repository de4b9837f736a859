"""A diffusion model in ONNX Runtime: clean and noisy rows are plain rows of one graph, who sees whom is its bias."""

from typing import Any, ClassVar, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hildanext.core.errors import ModelError
from hildanext.kv_cache import BlockCache, CachedAttention, Segment
from hildanext.kv_cache.block_cache import STRETCH
from hildanext.kv_cache.draft_attention import DraftAttention
from hildanext.kv_cache.segments import sees
from hildanext.models.attention.dense import AttentionContext
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.card import Card
from hildanext.models.soft_inputs import InputTable, SoftInputs
from hildanext.runtimes.onnx_network import OnnxNetwork


class OnnxDiffusion(DiffusionModel):
    """What `DecodeState` and the engine take in place of torch's: `hidden`, `logits`, and a card.

    Documents of a forward run one behind another, so that one's numbers do not depend on the others. Over block caches
    alone: what looks at whole rows at once (training, likelihoods, `generation.cached: false`) has torch.
    """

    slots_first = STRETCH
    takes_embeddings: ClassVar[bool] = False

    def __init__(self, network: OnnxNetwork, card: Card) -> None:
        super().__init__(network.causal_lm, card)
        self.network = network

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def hidden(
        self,
        tokens: Int[Tensor, "one fed"],
        positions: Int[Tensor, "one fed"],
        attention: AttentionContext,
        soft: SoftInputs | None = None,
    ) -> Float[Tensor, "one fed hidden"]:
        """Raises `ModelError` for another attention than the block cache's and the draft's, and for soft inputs."""
        if soft is not None:
            _refuse_soft()
        if isinstance(attention, CachedAttention):
            fed = tokens[0].split([segment.num_tokens for segment in attention.segments])
            documents = zip(fed, attention.caches, attention.segments, strict=True)
            return torch.cat([self._segment(*document) for document in documents])[None]
        if not isinstance(attention, DraftAttention):
            _refuse()
        drafts = attention.by_document(tokens[0][None, :, None], True)  # a forward of masks has clean rows and masks
        outputs = []
        for own, cache, segment in zip(drafts, attention.caches, attention.segments, strict=True):
            places = torch.tensor(sum(segment.positions, []), dtype=torch.long)
            rows = self.network.rows(own[0, :, 0], cache, segment.start, places, segment.mask(self.device))
            outputs.append(rows[None])
        return attention.by_kind(outputs, True)

    def _segment(self, tokens: Int[Tensor, " fed"], cache: BlockCache, segment: Segment) -> Float[Tensor, "fed hidden"]:
        seen = sees(segment, self.card.block_size, self.card.clean_mask, self.device)
        return self.network.rows(tokens, cache, segment.start, torch.arange(segment.start, segment.end), seen)

    @property
    def input_table(self) -> InputTable:
        """Raises `ModelError`: the graph embeds tokens itself."""
        _refuse_soft()

    def embed(self, *_: Any, **__: Any) -> NoReturn:
        """Raises `ModelError`: the graph embeds tokens itself."""
        _refuse()

    def logits(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        return self.network.logits(hidden).masked_fill_(self.banned, float("-inf"))


def _refuse() -> NoReturn:
    raise ModelError("ONNX Runtime computes cached generation alone", "leave the runtime and q8 or q4 out")


def _refuse_soft() -> NoReturn:
    raise ModelError(
        "soft inputs are mixtures of embeddings, and the graph of ONNX Runtime takes tokens",
        "leave the runtime and q8 or q4 out",
    )
