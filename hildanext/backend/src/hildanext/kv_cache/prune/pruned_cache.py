"""A block cache that drops what a policy thinks little of, whenever keys become final.

Compact, what is kept lies together, in the order of positions, as many slots for each head; a token behind the last
dropped one lies at the slot `position - dropped`. Else slots are positions, and `hidden` says what is out of sight.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hildanext.kv_cache.alike import Rows
from hildanext.kv_cache.block_cache import BlockCache, shape_of, whole_stretches
from hildanext.kv_cache.prune.base import SINKS, Prune, Slots
from hildanext.kv_cache.prune.pruned_row import Guide, PrunedRow
from hildanext.kv_cache.segments import Segment
from hildanext.models.bidirectional import DiffusionModel

PIECE = 256
"""Tokens of a prompt between two looks of the policy: the same however large forwards are, and what has to find room
beside what is kept."""


def piece_of(block: int) -> int:
    """`PIECE` in whole blocks."""
    return max(PIECE // block, 1) * block


def slots_for(prune: Prune | None, prompt: int, capacity: int, block: int, window: int = 0) -> int:
    """Slots that a document of `capacity` tokens takes, whole blocks, `prompt` of which are given. With `guides` those
    that a block sees are kept once more."""
    if prune is None or prune.ratio == 0:
        return capacity
    recent = prune.recent(block, window)
    if prune.guides:
        return capacity + (prune.kept(capacity, recent) + block if prune.compact else 0)
    if not prune.compact:
        return capacity
    whole = prompt // block * block
    fed = min(whole, prune.kept(whole, recent) + piece_of(block))
    return min(capacity, max(fed, prune.kept(capacity, recent) + 2 * block))


def open_cache(
    model: DiffusionModel, capacity: int, prompt: int, prune: Prune | None, window: int = 0, debug: bool = False
) -> BlockCache:
    """A cache for a document of `capacity` tokens, `prompt` of which are given, whose last `window` finished blocks may
    change. Where nothing is to be dropped it is a plain one.
    """
    if prune is None or prune.ratio == 0:
        return BlockCache.of(model, capacity, debug)
    assert model.slots_first is None, "another runtime reads whole caches"
    return PrunedCache.open(model, capacity, prompt, prune, window, debug)


class PrunedCache(BlockCache):
    """See the module. `truncate` brings back what was dropped from its position on, and nothing before it."""

    lends = False
    policy: Prune
    newest: int
    """Committed slots at the end that are never dropped."""
    prompt: int
    """Tokens of the prompt's whole blocks."""
    events: int
    """How often the policy was asked."""
    hidden: Bool[Tensor, "layers kv_heads capacity"] | None
    """True where a slot was dropped but not given up; None: compact, or nothing is ever dropped."""
    attention: Float[Tensor, "layers kv_heads capacity"] | None
    guide: Guide | None
    """What the active block sees, of policies that choose it for each block."""
    _floor: int
    """Positions before it may have moved."""
    _hides: bool

    @classmethod
    def open(
        cls, model: DiffusionModel, capacity: int, prompt: int, prune: Prune, window: int, debug: bool
    ) -> "PrunedCache":
        """As `open_cache`."""
        card = model.card
        layers, kv_heads, head_dim = shape_of(model.causal_lm.config)
        slots = capacity if prune.guides else slots_for(prune, prompt, capacity, card.block_size, window)
        cache = cls(
            layers, kv_heads, whole_stretches(slots), head_dim, block_size=card.block_size,
            clean_mask=card.clean_mask, dtype=model.dtype, device=model.device, debug=debug,
        )  # fmt: skip
        cache.keys.zero_()
        cache.values.zero_()
        cache.policy, cache.newest = prune, prune.recent(card.block_size, window)
        cache.prompt = prompt // card.block_size * card.block_size
        cache.piece = piece_of(card.block_size)
        cache.events = cache.dropped = cache._floor = 0
        cache.needs_clean = prune.wants_queries or prune.guides
        shape = cache.keys.shape[:3]
        masks = not (prune.compact or prune.guides)
        cache.hidden = torch.zeros(shape, dtype=torch.bool, device=model.device) if masks else None
        cache._hides = False
        scores = torch.promote_types(model.dtype, torch.float32)
        cache.attention = torch.zeros(shape, dtype=scores, device=model.device) if prune.wants_queries else None
        cache.guide = Guide(prune) if prune.guides else None
        return cache

    @property
    def apart(self) -> bool:
        return self.dropped > 0 or self._hides or self.needs_clean

    def row(self, segment: Segment, columns: slice, group: int) -> Rows:
        return PrunedRow(self, segment, columns, group)

    def commit(self, length: int, tokens: Int[Tensor, " seq"] | None = None) -> None:
        super().commit(length, tokens)
        if not self.policy.guides and (length >= self.prompt or length % self.piece_tokens == 0):
            self.events += 1
            self._drop()

    def truncate(self, length: int) -> None:
        super().truncate(length)
        if self.hidden is not None:
            self.hidden[:, :, length:] = False
        else:
            assert length >= self._floor, f"what was dropped before {self._floor} is gone: the window is larger"

    def adopt(self, other: BlockCache, length: int, tokens: Int[Tensor, " seq"] | None = None) -> None:
        """As a plain cache, piece by piece, as if they were fed; not for a policy that wants queries."""
        assert length <= other.length and self.length == 0 and other.lends, "only whole caches lend"
        assert not self.policy.wants_queries, "the queries of these blocks are not there"
        for begin in range(0, length, self.piece_tokens):
            end = min(begin + self.piece_tokens, length)
            self.restore(begin, other.snapshot(begin, end))
            self.commit(end, tokens)

    def snapshot(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        assert begin >= self._floor or self.hidden is not None, "slots before this one have moved"
        return super().snapshot(begin - self.dropped, end - self.dropped)

    def restore(self, begin: int, kept: tuple[Tensor, Tensor]) -> None:
        super().restore(begin - self.dropped, kept)

    def view(self, layer: int) -> tuple[Float[Tensor, "kv_heads seq head_dim"], ...]:
        """Kept keys and values; of a cache that is not compact the dropped ones as well."""
        used = self.length - self.dropped
        return self.keys[layer, :, :used], self.values[layer, :, :used]

    @property
    def piece_tokens(self) -> int:
        assert self.piece is not None
        return self.piece

    def _drop(self) -> None:
        """Drop of each layer and head what is worth least, until as many are left as the policy keeps."""
        used, target = self.length - self.dropped, self.policy.kept(self.length, self.newest)
        end = used - self.newest
        if used <= target or end <= SINKS:
            return
        for layer in range(len(self.keys)):
            live = None if self.hidden is None else ~self.hidden[layer, :, :used]
            attention = None if self.attention is None else self.attention[layer, :, :used]
            scores = self.policy.scores(Slots(self.keys[layer, :, :used], live, attention))[:, SINKS:end]
            if live is None:
                self._gather(layer, scores.argsort(dim=-1, stable=True)[:, used - target :], end, used)
            else:
                self._hide(layer, scores.masked_fill(~live[:, SINKS:end], torch.inf), live.sum(-1) - target)
        self._hides = self.hidden is not None
        if self.hidden is None:
            self.dropped += used - target
            self._floor = max(self._floor, self.length - self.newest)

    def _gather(self, layer: int, kept: Int[Tensor, "kv_heads kept"], end: int, used: int) -> None:
        """Move what is kept between the first slots and `end`, and what lies behind it, together."""
        behind = torch.arange(end, used, device=kept.device).expand(len(kept), used - end)
        index = torch.cat([kept.sort(-1).values + SINKS, behind], -1)
        there = slice(SINKS, SINKS + index.shape[1])
        for whole in (self.keys, self.values):
            whole[layer, :, there] = whole[layer].gather(1, index[..., None].expand(-1, -1, whole.shape[-1]))
        if self.attention is not None:
            self.attention[layer, :, there] = self.attention[layer].gather(1, index)

    def _hide(self, layer: int, scores: Float[Tensor, "kv_heads slots"], surplus: Int[Tensor, " kv_heads"]) -> None:
        """Hide of each head the `surplus` lowest."""
        assert self.hidden is not None
        order = scores.argsort(dim=-1, stable=True)
        rank = order.argsort(dim=-1)
        self.hidden[layer, :, SINKS : SINKS + scores.shape[1]] |= rank < surplus[:, None]
