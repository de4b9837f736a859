"""Exact decoding's network in ONNX Runtime: the parent's rows and the masks' rows in one graph, the head in another."""

from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from hildanext.decoding.exact.network import anchors_and_places
from hildanext.export.network_weights import NetworkWeights
from hildanext.export.onnx_graph import SLOTS, GraphKind, head_graph, network_graph
from hildanext.kv_cache import BlockCache
from hildanext.kv_cache.draft_attention import DraftSegment
from hildanext.runtimes.onnx_session import BoundSession, has_dot_products


class _Rows(BoundSession):
    """A graph of rows over a document's keys and values."""

    cache: BlockCache | None = None
    seen = 0

    def look_at(self, cache: BlockCache, seen: int) -> None:
        """Bind the first `seen` slots of every layer, to be read and written in place."""
        if cache is self.cache and seen == self.seen:
            return
        self.cache, self.seen = cache, seen
        for part, whole in (("keys", cache.keys), ("values", cache.values)):
            layers, kv_heads, _, head_dim = whole.shape
            for layer in range(layers):
                # Slots come first in memory, and there are as many as the multiple that the cache was made for.
                slots = whole.as_strided(
                    (seen, kv_heads, head_dim), (kv_heads * head_dim, head_dim, 1), whole[layer].storage_offset()
                )
                self.bind(f"{part}.{layer}", slots)
                self.bind(f"{part}_out.{layer}", slots)


class OnnxNetwork:
    """A `Network` (see `decoding.exact.network`) of weights in memory."""

    device = torch.device("cpu")
    dtype = torch.float32
    """Of states and logits. Matrices are in 8 or 4 bits in quantised graphs; a row's numbers are its own in all."""

    def __init__(self, weights: NetworkWeights, causal_lm: PreTrainedModel, dtype: str, threads: int) -> None:
        """`causal_lm` may be a skeleton on the meta device; `dtype` is fp32, q8 or q4."""
        self.causal_lm, self.precision, self.threads = causal_lm, dtype, threads
        self.places = 0 if weights.places is None else len(weights.places)
        self.enter = weights.enter
        self._group = weights.group
        self._shape = len(weights.layers), weights.kv_heads, weights.head_dim
        self._inv_freq = torch.from_numpy(weights.inv_freq)
        self._rope_scale = weights.rope_scale
        self._hidden_size, self._vocab = weights.hidden, len(weights.head)
        unsigned = not has_dot_products()
        self._clean = _Rows(_bytes(network_graph(weights, GraphKind(dtype, False, unsigned))), threads)
        self._head = BoundSession(_bytes(head_graph(weights, GraphKind(dtype, False, unsigned))), threads)
        self._both: _Rows | None = None
        if self.places:
            self._both = _Rows(_bytes(network_graph(weights, GraphKind(dtype, True, unsigned))), threads)

    @property
    def costs_key(self) -> Hashable:
        return "onnx", self.precision, self.enter, self.places

    def new_cache(self, capacity: int) -> BlockCache:
        layers, kv_heads, head_dim = self._shape
        return BlockCache(
            layers, kv_heads, capacity, head_dim, block_size=1, clean_mask="token_causal", slots_first=SLOTS
        )

    def forward(
        self, tokens: Sequence[int], caches: Sequence[BlockCache], segments: Sequence[DraftSegment]
    ) -> Float[Tensor, "rows hidden"]:
        clean: list[Tensor] = []
        masks: list[Tensor] = []
        begin = 0
        for cache, segment in zip(caches, segments, strict=True):
            hidden = self._document(tokens[begin : begin + segment.clean], cache, segment)
            clean.append(hidden[: segment.clean])
            masks.append(hidden[segment.clean :])
            begin += segment.clean
        return torch.cat([*clean, *masks]) if len(clean) > 1 else hidden

    def _document(
        self, tokens: Sequence[int], cache: BlockCache, segment: DraftSegment
    ) -> Float[Tensor, "rows hidden"]:
        session = self._both if segment.masks else self._clean
        assert session is not None, "masks need adapters"
        rows = segment.clean + segment.masks
        seen = -(-segment.end // SLOTS) * SLOTS
        session.look_at(cache, seen)
        session.bind("tokens", torch.tensor(tokens))
        positions = torch.tensor(sum(segment.positions, []))
        bias = torch.full((rows, seen), float("-inf"))
        bias[:, : segment.end].masked_fill_(segment.mask(self.device), 0.0)
        self._bind_rows(session, "", positions, segment.start, bias)
        if segment.masks:
            if self.enter:
                self._bind_rows(
                    session, "clean_", positions[: segment.clean], segment.start, bias[: segment.clean].contiguous()
                )
            anchors, places = anchors_and_places([segment])
            session.bind("anchors", torch.tensor(anchors))
            session.bind("places", torch.tensor(places))
            gate = torch.ones(1, rows, 1)
            gate[:, : segment.clean] = 0.0
            session.bind("gate", gate)
        hidden = torch.empty(1, rows, self._hidden_size)
        session.bind("hidden", hidden)
        session.run()
        return hidden[0]

    def _bind_rows(self, session: BoundSession, which: str, positions: Tensor, start: int, bias: Tensor) -> None:
        rows = len(positions)
        angles = positions[:, None].float() * self._inv_freq
        session.bind(f"{which}order", torch.arange(rows)[None])
        session.bind(f"{which}cos", angles.cos() * self._rope_scale)
        session.bind(f"{which}sin", angles.sin() * self._rope_scale)
        session.bind(f"{which}slots", torch.arange(start, start + rows)[:, None])
        session.bind(f"{which}bias", bias.repeat_interleave(self._group, 0))

    def logits(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        rows = hidden.reshape(-1, self._hidden_size).contiguous()
        logits = torch.empty(len(rows), self._vocab)
        self._head.bind("hidden", rows)
        self._head.bind("logits", logits)
        self._head.run()
        return logits.view(*hidden.shape[:-1], self._vocab)


def _bytes(graph: object) -> bytes:
    serialized: bytes = graph.SerializeToString()  # type: ignore[attr-defined]
    return serialized
