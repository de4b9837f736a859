"""A diffusion model's block-size-1 mode: every position read from what stands left of it, many in one forward.

Under the left shift that is the clean half alone, token by token, as an autoregressive model reads. Without it every
position has a mask row of its own that sees the clean tokens before it and itself: the doubled input at block size 1.
Finished blocks keep the keys and values that they have.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hildanext.core.runtime import send
from hildanext.decoding.sequence import SequenceState
from hildanext.kv_cache import BlockCache, CachedAttention, Segment
from hildanext.kv_cache.block_cache import whole_stretches
from hildanext.kv_cache.draft_attention import DraftAttention, DraftSegment
from hildanext.models.bidirectional import DiffusionModel


def block_size_one_logits(
    model: DiffusionModel,
    rows: Sequence[SequenceState],
    tokens: Int[Tensor, "batch block"],
    where: Bool[Tensor, "batch block"],
) -> Float[Tensor, "rows vocab"]:
    """What that mode says at the positions `where` of the active blocks, row-major, if they held `tokens`.

    All before the active blocks must be committed (or uncached). Leaves no keys behind.
    """
    places = [[place for place, read in enumerate(row) if read] for row in where.tolist()]
    asked = [number for number, row in enumerate(places) if row]
    left = model.card.shift == "left"
    segments = []
    for number in asked:
        wanted = places[number]
        points = () if left else tuple(place - 1 for place in wanted)  # a mask stands behind the token before its own
        segments.append(DraftSegment(rows[number].start, wanted[-1], points, 0 if left else 1))
        rows[number].rows += segments[-1].clean + segments[-1].masks
    hidden = _forward(model, [rows[number] for number in asked], [tokens[number] for number in asked], segments)
    if not left:
        return model.logits(hidden[sum(segment.clean for segment in segments) :])
    before = [rows[number].last_clean_hidden[rows[number].start // model.card.block_size] for number in asked]
    begins = accumulate((segment.clean for segment in segments), initial=len(before))
    index = [
        begin + place - 1 if place else at
        for at, (number, begin) in enumerate(zip(asked, begins, strict=False))
        for place in places[number]
    ]
    boundary = torch.stack(before) if before else hidden[:0]
    return model.logits(torch.cat([boundary, hidden])[send(index, hidden.device, torch.long)])


def _forward(
    model: DiffusionModel,
    rows: Sequence[SequenceState],
    tokens: Sequence[Int[Tensor, " block"]],
    segments: Sequence[DraftSegment],
) -> Float[Tensor, "fed hidden"]:
    """Final states of the clean rows of all documents, then of their masks."""
    device = model.device
    whole = [part for part in zip(rows, tokens, segments, strict=True) if part[2].clean or part[2].masks]
    if not whole:
        return torch.zeros(0, model.causal_lm.config.hidden_size, dtype=model.dtype, device=device)
    segments = [segment for _, _, segment in whole]
    masks = sum(segment.masks for segment in segments)
    clean, noisy = zip(*(segment.positions for segment in segments), strict=True)
    positions = send([[*sum(clean, []), *sum(noisy, [])]], device, torch.long)
    attention = DraftAttention([_scratch(model, row, segment.end) for row, _, segment in whole], segments)
    fed = [own[: segment.clean] for _, own, segment in whole]
    fed.append(torch.full((masks,), model.card.mask_id, device=device))
    return model.hidden(torch.cat(fed)[None], positions, attention)[0]


def _scratch(model: DiffusionModel, row: SequenceState, end: int) -> BlockCache:
    """The row's cache where it has room for scratch up to `end`, else a copy that has; what is not cached is fed."""
    if row.cache is not None and whole_stretches(end) <= row.cache.capacity:
        return row.cache
    size = model.card.block_size
    cache = BlockCache.of(model, -(-end // size) * size)
    if row.cache is not None:
        cache.adopt(row.cache, row.start)
    elif row.start:
        segment = Segment(0, row.start, 0)
        context = CachedAttention([cache], [segment])
        model.hidden(row.tokens[None, : row.start], context.positions, context)
        cache.commit(row.start)
    return cache
