"""A preallocated block cache: slot = absolute position in the document, written in place, never copied.

Keys and values are kept only from a forward whose input was the block's final tokens as clean rows (or as
noisy ones where the two are the same by the block-causal rule); `commit` says so. Exactness: a block's keys and
values depend on blocks up to itself alone, so dropping everything from an edited block on and running it again
restores the cache (`truncate`).
"""

import hashlib
from collections.abc import Sequence
from copy import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hildanext.kv.base import Segment
from hildanext.masks import CleanMask
from hildanext.models.bidirectional import DiffusionModel


class BlockCache:
    """Keys and values after the rotary embedding, [layers batch kv_heads capacity head_dim].

    `lengths[r]` tokens of row r are committed. Slots beyond are scratch of the active block. With `debug`,
    the tokens of every committed block are hashed and `verify` compares them.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        group: int = 1,
        *,
        block_size: int,
        clean_mask: CleanMask,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        debug: bool = False,
    ) -> None:
        # One slot more than the capacity: padding writes there. Zeros, since a masked NaN is still a NaN.
        shape = (layers, batch, kv_heads, capacity + 1, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.capacity = capacity
        self.group = group
        self.block_size = block_size
        self.clean_mask = clean_mask
        self.lengths = [0] * batch
        self.debug = debug
        self._hashes: list[list[bytes]] = [[] for _ in range(batch)]

    @classmethod
    def of(cls, model: DiffusionModel, batch: int, capacity: int, debug: bool = False) -> "BlockCache":
        """A cache of the model's shape, for `batch` rows of up to `capacity` tokens."""
        config = model.causal_lm.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim if head_dim is not None else config.hidden_size // heads
        return cls(
            config.num_hidden_layers,
            batch,
            kv_heads,
            capacity,
            head_dim,
            heads // kv_heads,
            block_size=model.card.block_size,
            clean_mask=model.card.clean_mask,
            dtype=model.dtype,
            device=model.device,
            debug=debug,
        )

    @property
    def batch(self) -> int:
        return len(self.lengths)

    def context(self, clean: Sequence[int], noisy: int, start: Sequence[int] | None = None) -> "CachedAttention":
        """Attention of a forward that feeds each row `clean[r]` final tokens, then `noisy` of its active block.

        `start` defaults to the committed lengths.
        """
        begins = tuple(self.lengths if start is None else start)
        return CachedAttention(self, Segment(begins, tuple(clean), noisy, self.block_size, self.clean_mask))

    def commit(self, row: int, length: int, tokens: Int[Tensor, " seq"] | None = None) -> None:
        """Declare the first `length` tokens of a row final; their keys and values have been written.

        `tokens` are the row's tokens, needed under the debug flag.
        """
        assert length % self.block_size == 0, "only whole blocks are committed"
        if self.debug:
            assert tokens is not None, "the debug flag needs the tokens"
            done = len(self._hashes[row])
            self._hashes[row] += self._hash(tokens, range(done, length // self.block_size))
        self.lengths[row] = length

    def truncate(self, row: int, length: int) -> None:
        """Forget the row's blocks from position `length` on."""
        assert length % self.block_size == 0 and length <= self.lengths[row], "truncate at a committed block"
        self.lengths[row] = length
        del self._hashes[row][length // self.block_size :]

    def verify(self, tokens: Int[Tensor, "batch seq"]) -> None:
        """Assert that every committed block still holds the tokens its keys and values came from (debug flag)."""
        if not self.debug:
            return
        for row, hashes in enumerate(self._hashes):
            now = self._hash(tokens[row], range(len(hashes)))
            stale = [block for block, (old, new) in enumerate(zip(hashes, now, strict=True)) if old != new]
            assert not stale, f"stale cache: row {row}, blocks {stale} were edited after they were committed"

    def view(self, layer: int, row: int) -> tuple[Float[Tensor, "kv_heads seq head_dim"], ...]:
        """Committed keys and values of one row, without a copy."""
        length = self.lengths[row]
        return self.keys[layer, row, :, :length], self.values[layer, row, :, :length]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these (in rising order), packing the others to the front."""
        if list(rows) == list(range(self.batch)):
            return
        extent = max((self.lengths[row] for row in rows), default=0)
        for store in (self.keys, self.values):
            for new, old in enumerate(rows):
                if new != old:
                    store[:, new, :, :extent] = store[:, old, :, :extent]
        self.lengths = [self.lengths[row] for row in rows]
        self._hashes = [self._hashes[row] for row in rows]

    def only(self, row: int) -> "BlockCache":
        """One row as a cache of its own over the same memory. Commit and truncate through the whole cache."""
        alone = copy(self)
        alone.keys, alone.values = self.keys[:, row : row + 1], self.values[:, row : row + 1]
        alone.lengths, alone._hashes = [self.lengths[row]], [self._hashes[row]]
        return alone

    def snapshot(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """A copy of the slots from `begin` to `end`, for `restore`."""
        return self.keys[:, :, :, begin:end].clone(), self.values[:, :, :, begin:end].clone()

    def restore(self, begin: int, kept: tuple[Tensor, Tensor]) -> None:
        """Put back what `snapshot` took."""
        end = begin + kept[0].shape[3]
        self.keys[:, :, :, begin:end], self.values[:, :, :, begin:end] = kept

    def _hash(self, tokens: Tensor, blocks: range) -> list[bytes]:
        size = self.block_size
        cells = tokens[: blocks.stop * size].tolist()
        return [hashlib.sha256(repr((b, cells[b * size : (b + 1) * size])).encode()).digest() for b in blocks]


class CachedAttention:
    """One forward over the cache: writes the segment's keys and values at its slots, attends to prefix + segment.

    Everything that does not depend on the layer (slots, mask) is made once, here.
    """

    def __init__(self, cache: BlockCache, segment: Segment) -> None:
        assert segment.extent <= cache.capacity, "the cache is too small for this segment"
        self.cache = cache
        self.segment = segment
        device = cache.keys.device
        self.positions, padding = segment.positions(device)
        self._slots: Tensor | None = None
        self._mask: Tensor | None = None
        if not segment.uniform:
            self._slots = self.positions.masked_fill(padding, cache.capacity)
            self._rows = torch.arange(cache.batch, device=device)[:, None]
        if not segment.sees_all:
            allowed = segment.may_attend(self.positions, padding)
            # Additive and folded over the group here: attention would do both again in every layer.
            mask = torch.zeros(allowed.shape, dtype=cache.keys.dtype, device=device)
            self._mask = mask.masked_fill_(~allowed, float("-inf"))[:, None].repeat(1, 1, cache.group, 1)

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "batch heads query head_dim"],
        key: Float[Tensor, "batch kv_heads query head_dim"],
        value: Float[Tensor, "batch kv_heads query head_dim"],
        scale: float,
    ) -> Float[Tensor, "batch heads query head_dim"]:
        batch, heads, seq, head_dim = query.shape
        kv_heads = key.shape[1]
        keys, values = self.cache.keys[layer, :batch], self.cache.values[layer, :batch]
        if self._slots is None:
            begin = self.segment.start[0]
            keys[:, :, begin : begin + seq] = key
            values[:, :, begin : begin + seq] = value
        else:
            keys[self._rows, :, self._slots] = key.transpose(1, 2)
            values[self._rows, :, self._slots] = value.transpose(1, 2)
        extent = self.segment.extent
        out = scaled_dot_product_attention(
            query.reshape(batch, kv_heads, heads // kv_heads * seq, head_dim),
            keys[:, :, :extent],
            values[:, :, :extent],
            attn_mask=self._mask,
            scale=scale,
        )
        return out.reshape(batch, heads, seq, head_dim)
