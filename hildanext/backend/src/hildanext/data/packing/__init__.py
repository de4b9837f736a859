"""Token shards on disk, and how documents are laid out in rows. Knows nothing of where documents come from."""

from hildanext.data.packing.encode import Encoder, tokenizer_hash
from hildanext.data.packing.rows import Layout, Piece, RowOrder, WholeLayout, row_order
from hildanext.data.packing.shards import ShardWriter

__all__ = ["Encoder", "Layout", "Piece", "RowOrder", "ShardWriter", "WholeLayout", "row_order", "tokenizer_hash"]
