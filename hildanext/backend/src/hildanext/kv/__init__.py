"""Keys and values of finished blocks. To add a pruner: write the file, add its row, add its case."""

from hildanext.kv.base import Run, positions_of, rows_of
from hildanext.kv.cache import BlockCache, CachedAttention, bytes_per_token

__all__ = ["BlockCache", "CachedAttention", "Run", "bytes_per_token", "positions_of", "rows_of"]
