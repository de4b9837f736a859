"""A preallocated block cache of one document: slot = absolute position, written in place, never copied.

Keys and values are kept only from a forward whose input was the block's final tokens as clean rows (or as
noisy ones where the two are the same by the block-causal rule); `commit` says so. Exactness: a block's keys and
values depend on blocks up to itself alone, so dropping everything from an edited block on and running it again
restores the cache (`truncate`), and a document that begins with the same blocks may take them over (`adopt`).
"""

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from hildanext.ar import Parent
from hildanext.kv_cache.alike import AlikeRows, Part, Rows, alike, columns_of
from hildanext.kv_cache.segments import Segment, positions_of, sees
from hildanext.masks import CleanMask
from hildanext.models.bidirectional import DiffusionModel

STRETCH = 64
"""Slots that attention of an exact forward looks at are a multiple of so many, hidden ones among them: sums over slots
then add the same numbers in the same order however many slots a forward writes behind a row."""


def whole_stretches(slots: int) -> int:
    """So many slots, in whole stretches."""
    return -(-slots // STRETCH) * STRETCH


class BlockCache:
    """Keys and values after the rotary embedding, [layers kv_heads capacity head_dim].

    `length` tokens are committed. Slots beyond are scratch of the active block. With `debug`,
    the tokens of every committed block are hashed and `verify` compares them.
    """

    dropped: int = 0
    """Slots of each head that were given up: a position behind them lies so many slots further left."""
    piece: int | None = None
    """The prompt is fed in pieces that do not cross a multiple of so many tokens; None: in any."""
    needs_clean: bool = False
    """Blocks are committed from clean rows alone."""
    lends: ClassVar[bool] = True
    """Other documents may take its blocks over."""

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        block_size: int,
        clean_mask: CleanMask,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        debug: bool = False,
        slots_first: int | None = None,
    ) -> None:
        """`slots_first` lays memory out as [layers slots kv_heads head_dim], zeroed, for a multiple of so many slots,
        which is how runtimes other than torch look at it; the shape stays as it is."""
        if slots_first is None:
            shape = (layers, kv_heads, capacity, head_dim)
            self.keys = torch.empty(shape, dtype=dtype, device=device)
            self.values = torch.empty(shape, dtype=dtype, device=device)
        else:
            shape = (layers, -(-capacity // slots_first) * slots_first, kv_heads, head_dim)
            self.keys = torch.zeros(shape, dtype=dtype, device=device)[:, :capacity].transpose(1, 2)
            self.values = torch.zeros(shape, dtype=dtype, device=device)[:, :capacity].transpose(1, 2)
        self.block_size = block_size
        self.clean_mask = clean_mask
        self.length = 0
        self.debug = debug
        self._hashes: list[bytes] = []

    @classmethod
    def of(cls, model: DiffusionModel, capacity: int, debug: bool = False) -> "BlockCache":
        """A cache of the model's shape, for a document of `capacity` tokens: in whole `STRETCH`es and zeroed, since
        attention of the block-size-1 mode looks at no part of one."""
        card = model.card
        layers, kv_heads, head_dim = shape_of(model.causal_lm.config)
        cache = cls(
            layers, kv_heads, whole_stretches(capacity), head_dim, block_size=card.block_size,
            clean_mask=card.clean_mask, dtype=model.dtype, device=model.device, debug=debug,
            slots_first=model.slots_first,
        )  # fmt: skip
        cache.keys.zero_()
        cache.values.zero_()
        return cache

    @classmethod
    def of_parent(cls, parent: Parent, capacity: int) -> "BlockCache":
        """The same for an autoregressive model: every token is a block of its own, and sees those before it."""
        layers, kv_heads, head_dim = shape_of(parent.causal_lm.config)
        return cls(
            layers, kv_heads, capacity, head_dim, block_size=1, clean_mask="token_causal",
            dtype=parent.causal_lm.dtype, device=parent.device, slots_first=parent.slots_first,
        )  # fmt: skip

    @classmethod
    def of_causal(cls, causal_lm: PreTrainedModel, capacity: int) -> "BlockCache":
        """The same for the bare weights of one, in whole `STRETCH`es and zeroed: attention looks at no part of one."""
        layers, kv_heads, head_dim = shape_of(causal_lm.config)
        cache = cls(
            layers,
            kv_heads,
            whole_stretches(capacity),
            head_dim,
            block_size=1,
            clean_mask="token_causal",
            dtype=causal_lm.dtype,
            device=causal_lm.device,
        )
        cache.keys.zero_()
        cache.values.zero_()
        return cache

    @property
    def apart(self) -> bool:
        """Whether its tokens see anything but all slots: `row` then computes its part of a forward."""
        return False

    def row(self, segment: Segment, columns: slice, group: int) -> Rows:
        """`columns`: where in the forward the segment is; `group` heads share keys."""
        raise NotImplementedError("a whole cache is computed with others")

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def context(self, clean: int, noisy: int, start: int | None = None) -> "CachedAttention":
        """Attention of a forward that feeds `clean` final tokens, then `noisy` of the active block.

        `start` defaults to the committed length.
        """
        return CachedAttention([self], [Segment(self.length if start is None else start, clean, noisy)])

    def commit(self, length: int, tokens: Int[Tensor, " seq"] | None = None) -> None:
        """Declare the first `length` tokens final; their keys and values have been written.

        `tokens` are the document's tokens, needed under the debug flag.
        """
        assert length % self.block_size == 0, "only whole blocks are committed"
        if self.debug:
            assert tokens is not None, "the debug flag needs the tokens"
            self._hashes += self._hash(tokens, range(len(self._hashes), length // self.block_size))
        self.length = length

    def truncate(self, length: int) -> None:
        """Forget the blocks from position `length` on."""
        assert length % self.block_size == 0 and length <= self.length, "truncate at a committed block"
        self.length = length
        del self._hashes[length // self.block_size :]

    def adopt(self, other: "BlockCache", length: int, tokens: Int[Tensor, " seq"] | None = None) -> None:
        """Copy the first `length` committed tokens of a document that begins with the same ones, and commit them.

        Pages in common would save the memory, too, but every layer would gather them; this is one pass at the start.
        """
        assert length <= other.length and self.length == 0, "only committed blocks, and only into an empty cache"
        assert other.lends, "only whole caches lend"
        self.keys[:, :, :length] = other.keys[:, :, :length]
        self.values[:, :, :length] = other.values[:, :, :length]
        self.commit(length, tokens)

    def verify(self, tokens: Int[Tensor, " seq"]) -> None:
        """Assert that every committed block still holds the tokens its keys and values came from (debug flag)."""
        if not self.debug:
            return
        now = self._hash(tokens, range(len(self._hashes)))
        stale = [block for block, (old, new) in enumerate(zip(self._hashes, now, strict=True)) if old != new]
        assert not stale, f"stale cache: blocks {stale} were edited after they were committed"

    def view(self, layer: int) -> tuple[Float[Tensor, "kv_heads seq head_dim"], ...]:
        """Committed keys and values, without a copy."""
        return self.keys[layer, :, : self.length], self.values[layer, :, : self.length]

    def snapshot(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """A copy of the slots from `begin` to `end`, for `restore`."""
        return self.keys[:, :, begin:end].clone(), self.values[:, :, begin:end].clone()

    def restore(self, begin: int, kept: tuple[Tensor, Tensor]) -> None:
        """Put back what `snapshot` took."""
        end = begin + kept[0].shape[2]
        self.keys[:, :, begin:end], self.values[:, :, begin:end] = kept

    def _hash(self, tokens: Tensor, blocks: range) -> list[bytes]:
        size = self.block_size
        cells = tokens[: blocks.stop * size].tolist()
        return [hashlib.sha256(repr((b, cells[b * size : (b + 1) * size])).encode()).digest() for b in blocks]


def shape_of(config: Any) -> tuple[int, int, int]:
    """Layers, key-value heads, head dimension."""
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim if head_dim is not None else config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_key_value_heads, head_dim


def bytes_per_token(causal_lm: PreTrainedModel) -> int:
    """Bytes of keys and values that one token of a document takes."""
    layers, kv_heads, head_dim = shape_of(causal_lm.config)
    return 2 * layers * kv_heads * head_dim * causal_lm.dtype.itemsize


class CachedAttention:
    """One forward of segments of several documents, one behind another: writes each segment's keys and values at its
    slots, attends to the document's prefix and to the segment itself.

    Clean tokens see the prefix and each other by the clean rule, noisy ones see everything of their document; so
    no mask is needed but for more than one block of clean tokens (or of token-causal ones). Whatever does not
    depend on the layer is made once, here.
    """

    def __init__(self, caches: Sequence[BlockCache], segments: Sequence[Segment]) -> None:
        for cache, segment in zip(caches, segments, strict=True):
            assert segment.end - cache.dropped <= cache.capacity, "the cache is too small for this segment"
        self.caches, self.segments = list(caches), list(segments)
        keys = caches[0].keys
        self.positions = positions_of(segments, keys.device)
        self._begins = [0, *accumulate(segment.num_tokens for segment in segments)]
        """Where each segment begins in the forward."""
        apart = [number for number, cache in enumerate(caches) if cache.apart]
        self._groups = alike(segments, len(keys), 2 * keys[0, :, :1].numel() * keys.element_size(), apart)
        self._rows: list[Rows] = []
        """Made at the first layer, which knows how many heads share keys."""

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "batch heads query head_dim"],
        key: Float[Tensor, "batch kv_heads query head_dim"],
        value: Float[Tensor, "batch kv_heads query head_dim"],
        scale: float,
    ) -> Float[Tensor, "batch heads query head_dim"]:
        if not self._rows:
            self._rows = [self._alike(numbers, query.shape[1] // key.shape[1]) for numbers in self._groups]
        queries, keys, values = (fed[0].transpose(0, 1) for fed in (query, key, value))
        # Laid out as the output projection reads it: the seam's transposition then copies nothing.
        output = torch.empty(queries.shape, dtype=query.dtype, device=query.device)
        for rows in self._rows:
            rows.attend(layer, queries, keys, values, output, scale)
        return output.transpose(0, 1)[None]

    def _alike(self, numbers: Sequence[int], group: int) -> Rows:
        """The documents at `numbers`, whose segments are equal; `group` heads share keys."""
        caches, segment = [self.caches[number] for number in numbers], self.segments[numbers[0]]
        columns = columns_of(numbers, self._begins, segment.num_tokens, caches[0].keys.device)
        if caches[0].apart:
            assert isinstance(columns, slice), "one segment lies together"
            return caches[0].row(segment, columns, group)
        parts, end = [], segment.end
        if segment.clean > 0:
            mask = clean_mask_of(caches[0], segment)
            seen = segment.start + segment.clean
            parts.append(Part(0, segment.clean, seen, None if mask is None else mask.repeat(group, 1)))
        if segment.noisy > 0:
            parts.append(Part(segment.clean, segment.noisy, end, None))
        keys, values = [one.keys[:, :, :end] for one in caches], [one.values[:, :, :end] for one in caches]
        return AlikeRows(segment, keys, values, parts, columns)


def clean_mask_of(cache: BlockCache, segment: Segment) -> Float[Tensor, "query key"] | None:
    """What clean tokens see of the prefix and of each other: 0 or -inf, or None where they see all of it."""
    one_block = segment.clean <= cache.block_size and segment.start % cache.block_size == 0
    if (one_block and cache.clean_mask == "block_causal") or segment.clean == 1:
        return None
    device = cache.keys.device
    allowed = sees(Segment(segment.start, segment.clean, 0), cache.block_size, cache.clean_mask, device)
    return torch.zeros(allowed.shape, dtype=cache.keys.dtype, device=device).masked_fill_(~allowed, float("-inf"))
