"""What one forward sees of a pruned document: softmaxes of its own, with a mask for each head where one is needed."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hildanext.kv_cache.block_cache import clean_mask_of
from hildanext.kv_cache.prune.base import SINKS, Prune, received
from hildanext.kv_cache.segments import Segment

if TYPE_CHECKING:
    from hildanext.kv_cache.prune.pruned_cache import PrunedCache


class Guide:
    """Which slots before the active block its forwards see, chosen by its first one."""

    def __init__(self, policy: Prune) -> None:
        self.policy = policy
        self.start = -1
        """Of the block that has chosen."""
        self.blocks = 0
        """How many have."""
        self.layers: list[tuple[Tensor, Tensor] | Bool[Tensor, "kv_heads slots"]] = []
        """Keys and values that are seen, with room for the block behind them; or which slots are not."""

    def choose(
        self, keys: Tensor, values: Tensor, attention: Float[Tensor, "kv_heads slots"], newest: int, block: int
    ) -> None:
        """The next layer's choice among the slots before the block, by what they received."""
        start = attention.shape[1]
        kept, end = self.policy.kept(start, newest), start - newest
        order = attention[:, SINKS:end].argsort(dim=-1, stable=True)
        if not self.policy.compact:
            hidden = torch.zeros_like(attention, dtype=torch.bool)
            self.layers.append(hidden.scatter_(-1, order[:, : start - kept] + SINKS, True))
            return
        heads, device = len(attention), attention.device
        first, last = (torch.arange(*span, device=device).expand(heads, -1) for span in ((0, SINKS), (end, start)))
        index = torch.cat([first, order[:, start - kept :].sort(-1).values + SINKS, last], -1)[..., None]
        own = []
        for whole in (keys, values):
            room = whole.new_empty(heads, kept + block, whole.shape[-1])
            room[:, :kept] = whole.gather(1, index.expand(-1, -1, whole.shape[-1]))
            own.append(room)
        self.layers.append((own[0], own[1]))


class PrunedRow:
    """One document's part of a forward."""

    def __init__(self, cache: "PrunedCache", segment: Segment, columns: slice, group: int) -> None:
        """`columns`: where in the forward the segment is; `group` heads share keys."""
        self.cache, self.segment, self.columns, self.group = cache, segment, columns, group
        self.begin = segment.start - cache.dropped
        """Slot of the first fed token."""
        clean = clean_mask_of(cache, segment) if segment.clean > 0 else None
        self._clean = None if clean is None else clean[:, cache.dropped :].repeat(group, 1)
        active = segment.start + segment.clean
        # A revision, which feeds several blocks, sees everything; and so does a block with little before it.
        guided = segment.noisy == cache.block_size and cache.policy.kept(active, cache.newest) < active
        self._guide = cache.guide if guided else None
        self._chooses = self._guide is not None and self._guide.start != active

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "tokens heads head_dim"],
        key: Float[Tensor, "tokens kv_heads head_dim"],
        value: Float[Tensor, "tokens kv_heads head_dim"],
        output: Float[Tensor, "tokens heads head_dim"],
        scale: float,
    ) -> None:
        """Write the row's new keys and values, and its part of `output`."""
        cache, clean = self.cache, self.segment.clean
        seen, end = self.begin + clean, self.begin + self.segment.num_tokens
        keys, values = cache.keys[layer], cache.values[layer]
        keys[:, self.begin : end] = key[self.columns].transpose(0, 1)
        values[:, self.begin : end] = value[self.columns].transpose(0, 1)
        own, mixed = query[self.columns], output[self.columns]
        if clean > 0:
            rows = self._folded(own[:clean])
            mask = self._mask(layer, seen, self._clean, rows)
            mixed[:clean] = self._apart(_mix(rows, keys[:, :seen], values[:, :seen], mask, scale), clean)
            if cache.attention is not None:
                cache.attention[layer, :, self.begin : seen] = self._received(
                    own[:clean], keys[:, self.begin : seen], scale
                )
        if self.segment.noisy > 0:
            rows = self._folded(own[clean:])
            one = self._noisy(layer, rows, keys[:, :end], values[:, :end], scale)
            mixed[clean:] = self._apart(one, self.segment.noisy)

    def _noisy(
        self,
        layer: int,
        rows: Float[Tensor, "kv_heads rows head_dim"],
        keys: Float[Tensor, "kv_heads slots head_dim"],
        values: Float[Tensor, "kv_heads slots head_dim"],
        scale: float,
    ) -> Float[Tensor, "kv_heads rows head_dim"]:
        guide, fed = self._guide, self.segment.noisy
        if guide is None or self._chooses:
            one = _mix(rows, keys, values, self._mask(layer, keys.shape[1], None, rows), scale)
            if guide is not None:
                self._choose(guide, layer, received(rows[None], keys[None], scale)[0], keys, values)
            return one
        choice = guide.layers[layer]
        if isinstance(choice, tuple):
            for room, fresh in zip(choice, (keys, values), strict=True):
                room[:, -fed:] = fresh[:, -fed:]
            return _mix(rows, *choice, None, scale)
        mask = rows.new_zeros(len(rows), 1, keys.shape[1])
        mask[:, 0, : choice.shape[1]].masked_fill_(choice, float("-inf"))
        return _mix(rows, keys, values, mask, scale)

    def _choose(self, guide: Guide, layer: int, attention: Tensor, keys: Tensor, values: Tensor) -> None:
        start = self.segment.start + self.segment.clean
        if layer == 0:
            guide.layers = []
        guide.choose(keys, values, attention[:, :start], self.cache.newest, self.segment.noisy)
        if layer == len(self.cache.keys) - 1:
            guide.start, guide.blocks = start, guide.blocks + 1
            self.cache.events += 1

    def _mask(self, layer: int, seen: int, clean: Tensor | None, rows: Tensor) -> Tensor | None:
        """What is added to the scores. What the forward itself feeds was never dropped."""
        hidden = self.cache.hidden
        if hidden is None or self.begin == 0:
            return clean
        mask = rows.new_zeros(len(rows), 1, seen)
        mask[:, 0, : self.begin].masked_fill_(hidden[layer, :, : self.begin], float("-inf"))
        return mask if clean is None else mask + clean

    def _received(
        self, query: Float[Tensor, "clean heads head_dim"], key: Float[Tensor, "kv_heads clean head_dim"], scale: float
    ) -> Float[Tensor, "kv_heads clean"]:
        """What each clean token receives from those of its own block."""
        block, heads = self.cache.block_size, len(key)
        rows = query.unflatten(0, (-1, block)).transpose(1, 2).unflatten(1, (heads, self.group)).flatten(2, 3)
        return received(rows, key.unflatten(1, (-1, block)).transpose(0, 1), scale).transpose(0, 1).flatten(1)

    def _folded(self, query: Float[Tensor, "fed heads head_dim"]) -> Float[Tensor, "kv_heads rows head_dim"]:
        """The heads that share keys as more rows."""
        fed, heads, head_dim = query.shape
        return query.transpose(0, 1).reshape(heads // self.group, self.group * fed, head_dim)

    def _apart(self, mixed: Float[Tensor, "kv_heads rows head_dim"], fed: int) -> Float[Tensor, "fed heads head_dim"]:
        return mixed.reshape(-1, fed, mixed.shape[-1]).transpose(0, 1)


def _mix(rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    attn_mask = None if mask is None else mask if mask.dim() == 2 else mask[None]
    return scaled_dot_product_attention(rows[None], keys[None], values[None], attn_mask=attn_mask, scale=scale)[0]
