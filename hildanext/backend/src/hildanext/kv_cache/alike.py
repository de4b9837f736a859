"""Rows of one forward that feed alike: the softmaxes of documents that differ in their tokens alone, in one call.

Small softmaxes cost their calls and not their numbers. Where segments begin at the same position and are equally long,
the documents' keys and values are gathered and the rows become a batch; each row of it is computed as if it were alone,
to the bit.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hildanext.core.runtime import send
from hildanext.kv_cache.segments import Segment

ROW_BYTES = 128 * 1024
"""Of keys and values of one row in one layer: above, to copy them takes longer than the calls that are saved."""
FORWARD_BYTES = 64 * 2**20
"""Of all that one forward gathers, which is kept until its last layer."""


@dataclass(frozen=True)
class Part:
    """One softmax of each row: tokens that see the same slots."""

    begin: int
    """First of them in the segment."""
    count: int
    seen: int
    """Slots of their document that they see."""
    mask: Float[Tensor, "query key"] | None
    """What is added to the scores, repeated for the heads that share keys; None where they see all of `seen`."""


@runtime_checkable
class Rows(Protocol):
    """Who computes the part of a forward that some documents have."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: float) -> None:
        """Write the rows' new keys and values, and their part of `output`."""


class AlikeRows:
    """Documents whose segments are equal; of one alone keys and values are read and written where they are."""

    def __init__(
        self,
        segment: Segment,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        parts: Sequence[Part],
        columns: slice | Int[Tensor, " tokens"],
    ) -> None:
        """`keys` and `values`: of each document [layers kv_heads slots head_dim], up to the segment's end. `columns`:
        where in the forward the segments are, one behind another."""
        self.segment, self.parts, self.columns = segment, list(parts), columns
        self._own = (keys, values) if len(keys) > 1 else None
        """Where the documents keep them, if those below are copies."""
        self._keys, self._values = (torch.stack(tuple(each)) if self._own else each[0][None] for each in (keys, values))

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "tokens heads head_dim"],
        key: Float[Tensor, "tokens kv_heads head_dim"],
        value: Float[Tensor, "tokens kv_heads head_dim"],
        output: Float[Tensor, "tokens heads head_dim"],
        scale: float,
    ) -> None:
        """Write the rows' new keys and values, and their part of `output`."""
        keys, values, own = self._keys[:, layer], self._values[:, layer], self._of_rows(query)
        rows, width, heads, head_dim = own.shape
        keys[:, :, self.segment.start :] = self._of_rows(key).transpose(1, 2)
        values[:, :, self.segment.start :] = self._of_rows(value).transpose(1, 2)
        if self._own is not None and layer == self._keys.shape[1] - 1:
            self._give_back()
        whole = isinstance(self.columns, slice)
        mixed = output[self.columns].view(own.shape) if whole else torch.empty_like(own)
        for part in self.parts:
            end, kv_heads = part.begin + part.count, keys.shape[1]
            one = scaled_dot_product_attention(
                own[:, part.begin : end]
                .transpose(1, 2)
                .reshape(rows, kv_heads, heads // kv_heads * part.count, head_dim),
                keys[:, :, : part.seen],
                values[:, :, : part.seen],
                attn_mask=part.mask,
                scale=scale,
            )
            mixed[:, part.begin : end] = one.reshape(rows, heads, part.count, head_dim).transpose(1, 2)
        if not isinstance(self.columns, slice):
            output.index_copy_(0, self.columns, mixed.view(rows * width, heads, head_dim))

    def _of_rows(self, fed: Float[Tensor, "tokens heads head_dim"]) -> Float[Tensor, "rows width heads head_dim"]:
        own = fed[self.columns] if isinstance(self.columns, slice) else fed.index_select(0, self.columns)
        return own.unflatten(0, (len(self._keys), self.segment.num_tokens))

    def _give_back(self) -> None:
        """Write what the forward has computed where the documents keep it, all layers at once."""
        assert self._own is not None
        start = self.segment.start
        for kept, made in zip(self._own, (self._keys, self._values), strict=True):
            torch._foreach_copy_([one[:, :, start:] for one in kept], list(made[:, :, :, start:].unbind(0)))


def alike(
    segments: Sequence[Segment], layers: int, bytes_per_slot: int, apart: Collection[int] = ()
) -> list[list[int]]:
    """Which segments are computed together: numbers in rising order. `bytes_per_slot`: of one layer. Those `apart` are
    computed by themselves."""
    groups: dict[tuple[Segment, int], list[int]] = {}
    left = FORWARD_BYTES
    for number, segment in enumerate(segments):
        size = segment.end * bytes_per_slot
        few = size <= ROW_BYTES and size * layers <= left and number not in apart
        left -= size * layers if few else 0
        groups.setdefault((segment, -1 if few else number), []).append(number)
    return list(groups.values())


def columns_of(
    numbers: Sequence[int], begins: Sequence[int], width: int, device: torch.device
) -> slice | Int[Tensor, " tokens"]:
    """The columns of the segments at `numbers`, each `width` wide; `begins` has where each segment begins."""
    first = begins[numbers[0]]
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return slice(first, first + width * len(numbers))
    return send([column for number in numbers for column in range(begins[number], begins[number] + width)], device)
