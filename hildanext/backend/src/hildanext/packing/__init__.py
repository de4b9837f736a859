"""Token shards on disk, and how documents are laid out in rows."""

from hildanext.packing.rows import Layout, Piece
from hildanext.packing.shards import ShardWriter, read_manifest

__all__ = ["Layout", "Piece", "ShardWriter", "read_manifest"]
