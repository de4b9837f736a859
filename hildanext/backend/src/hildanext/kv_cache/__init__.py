"""Keys and values of finished blocks.

Read `segments` (what one forward holds of each document), `block_cache` (a document's blocks, preallocated; `commit` is
where a block's keys become final), `prefix_cache` (blocks that earlier documents have left), `prune` (what
of them is kept).
"""

from hildanext.kv_cache.block_cache import BlockCache, CachedAttention, bytes_per_token
from hildanext.kv_cache.segments import Segment, positions_of, rows_of

__all__ = ["BlockCache", "CachedAttention", "Segment", "bytes_per_token", "positions_of", "rows_of"]
