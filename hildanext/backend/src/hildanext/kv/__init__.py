"""Keys and values of finished blocks. To add a pruner: write the file, add its row, add its case."""

from hildanext.kv.base import Segment
from hildanext.kv.cache import BlockCache, CachedAttention

__all__ = ["BlockCache", "CachedAttention", "Segment"]
