"""What exact decoding asks of a network, whatever computes it: rows of several documents in, final states out.

`TorchNetwork` is a `Drafter`; another runtime brings a class of its own. Caches are `BlockCache`s of whatever layout
the runtime likes, so that prefixes are shared and forgotten the same way everywhere.
"""

from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from hildanext.core.runtime import send
from hildanext.kv_cache import BlockCache
from hildanext.kv_cache.draft_attention import DraftAttention, DraftSegment, attention_alone
from hildanext.models.drafter import Drafter
from hildanext.models.packed_linear import rows_alone


@runtime_checkable
class Network(Protocol):
    """A kept parent and the adapters that draft for it, ready for forwards of any rows."""

    @property
    def device(self) -> torch.device:
        """Where states and logits lie."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What states are computed in."""
        ...

    @property
    def rows_alone(self) -> bool:
        """Whether a row's numbers are its own, however many rows are fed with it; in fp32 but for near ties."""
        ...

    @property
    def places(self) -> int:
        """Mask rows of a group at most."""
        ...

    @property
    def causal_lm(self) -> PreTrainedModel:
        """Configuration and shapes; a skeleton on the meta device where the weights lie elsewhere."""
        ...

    @property
    def costs_key(self) -> Hashable:
        """What decides, beside the device, how long a forward takes."""
        ...

    def new_cache(self, capacity: int) -> BlockCache:
        """For a document of so many slots, the scratch of masks included."""
        ...

    def forward(
        self, tokens: Sequence[int], caches: Sequence[BlockCache], segments: Sequence[DraftSegment]
    ) -> Float[Tensor, "rows hidden"]:
        """Final (normed) states of the clean rows of all documents, one behind another, and then of their mask rows.

        `tokens` are those of the clean rows. Keys and values of every row are in its cache afterwards, at the slots
        that `DraftSegment` names; nothing is committed.
        """
        ...

    @property
    def has_sampler(self) -> bool:
        """Whether mask rows may be told the token before the one they are to say."""
        ...

    def shortlist(
        self, hidden: Float[Tensor, "*rows hidden"], count: int
    ) -> tuple[Int[Tensor, "*rows count"], Float[Tensor, "*rows count hidden"]]:
        """Ids of at most `count` tokens that mask rows are likeliest to say before they are told anything, likeliest
        first, and those tokens' rows of the output matrix."""
        ...

    def told(
        self, hidden: Float[Tensor, "*rows hidden"], before: Int[Tensor, "*rows"]
    ) -> Float[Tensor, "*rows hidden"]:
        """States of mask rows that know the tokens before theirs."""
        ...

    def logits(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        """The parent's head, in fp32 (fp64 stays fp64)."""
        ...


class TorchNetwork:
    """A `Drafter` as exact decoding asks it."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.causal_lm = drafter.causal_lm

    @cached_property
    def rows_alone(self) -> bool:
        if self.dtype not in (torch.bfloat16, torch.float16):
            return True
        return rows_alone(self.causal_lm) and attention_alone(self.dtype)

    @property
    def device(self) -> torch.device:
        return self.drafter.device

    @property
    def dtype(self) -> torch.dtype:
        return self.drafter.dtype

    @property
    def places(self) -> int:
        return self.drafter.places

    @property
    def costs_key(self) -> Hashable:
        lora, chosen = self.drafter.lora, self.drafter.draft_tokens
        rank, words = lora.rank if lora is not None else None, len(chosen) if chosen is not None else None
        return self.drafter.enter, rank, self.has_sampler, words

    @property
    def has_sampler(self) -> bool:
        return self.drafter.sampler is not None

    def new_cache(self, capacity: int) -> BlockCache:
        return BlockCache.of_causal(self.causal_lm, capacity)

    def forward(
        self, tokens: Sequence[int], caches: Sequence[BlockCache], segments: Sequence[DraftSegment]
    ) -> Float[Tensor, "rows hidden"]:
        device = self.device
        clean, masks = zip(*(segment.positions for segment in segments), strict=True)
        positions = send([[*sum(clean, []), *sum(masks, [])]], device, torch.long)
        attention = DraftAttention(caches, segments)
        fed = send([tokens], device, torch.long)
        anchors, places = anchors_and_places(segments)
        if not anchors:
            return self.drafter.clean(fed, positions, attention)[0][0]
        index = send([anchors, places], device, torch.long)
        hidden: Tensor = self.drafter(fed, index[0], index[1], positions, attention)[0]
        return hidden

    def shortlist(
        self, hidden: Float[Tensor, "*rows hidden"], count: int
    ) -> tuple[Int[Tensor, "*rows count"], Float[Tensor, "*rows count hidden"]]:
        return self.drafter.shortlist(hidden, count)

    def told(
        self, hidden: Float[Tensor, "*rows hidden"], before: Int[Tensor, "*rows"]
    ) -> Float[Tensor, "*rows hidden"]:
        return self.drafter.told(hidden, before)

    def logits(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        return self.drafter.logits(hidden)


def network_of(source: "Drafter | Network") -> Network:
    """A drafter's network; a network is its own."""
    return TorchNetwork(source) if isinstance(source, Drafter) else source


def anchors_and_places(segments: Sequence[DraftSegment]) -> tuple[list[int], list[int]]:
    """For each mask row of a forward: the clean row that it stands behind, and its place in its group."""
    begins = begins_of([segment.clean for segment in segments])
    anchors = [begin + at for begin, segment in zip(begins, segments, strict=True) for at in segment.anchors]
    places = [place for segment in segments for _ in segment.points for place in range(segment.places)]
    return anchors, places


def begins_of(widths: Sequence[int]) -> list[int]:
    """Where each of several stretches begins, one behind another."""
    begins = [0]
    for width in widths[:-1]:
        begins.append(begins[-1] + width)
    return begins
