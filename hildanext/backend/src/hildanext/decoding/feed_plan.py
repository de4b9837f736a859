"""What goes into a forward: of each row a segment, its pending clean blocks and then its active noisy one."""

from collections.abc import Sequence
from typing import NamedTuple

from hildanext.decoding.sequence import SequenceState
from hildanext.kv_cache import Segment
from hildanext.models.attention import PREFILL_TOKENS


class Feed(NamedTuple):
    """A row's part of a forward."""

    row: SequenceState
    segment: Segment


def active_blocks(rows: Sequence[SequenceState], noisy: int) -> list[Feed]:
    """The active block of every row, `noisy` tokens of it, behind the finished blocks that are not cached yet."""
    return [Feed(row, Segment(row.cached, row.pending, noisy)) for row in rows]


def pending_blocks(rows: Sequence[SequenceState]) -> list[Feed]:
    """The finished blocks that are not cached yet, alone."""
    return [Feed(row, Segment(row.cached, row.pending, 0)) for row in rows if row.pending > 0]


def prompt_pieces(joining: Sequence[SequenceState], budget: int, block: int) -> list[Feed]:
    """What joining rows feed within a budget of tokens: whole blocks, one at least, first come first served."""
    pieces: list[Feed] = []
    for row in joining:
        chunk = max(min(budget, PREFILL_TOKENS) // block, not pieces) * block
        if chunk == 0:
            break
        if row.cache is not None and row.cache.piece is not None:  # what is dropped there hangs on no budget
            chunk = min(chunk, row.cache.piece - row.cached % row.cache.piece)
        pieces.append(Feed(row, Segment(row.cached, min(chunk, row.unfed), 0)))
        budget -= pieces[-1].segment.num_tokens
    return pieces


def revised_blocks(row: SequenceState, first: int) -> Feed:
    """Finished blocks from `first` on as one noisy block; without a cache all before it is fed as well."""
    clean = 0 if row.cache is not None else first
    return Feed(row, Segment(first - clean, clean, row.start - first))
