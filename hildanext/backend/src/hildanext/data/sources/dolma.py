"""Dolma's shard format, version 1.6."""

from typing import ClassVar

from hildanext.core.config import config
from hildanext.data.sources.jsonl import JsonLines


@config
class Dolma(JsonLines):
    """Thousands of `.json.gz` shards of `id, text, source, added, created, metadata`; give a folder or a pattern.

    Paper: Dolma, arXiv:2402.00159.
    Differs: only `id` and `text` are needed; the other fields are not looked at, so later versions read as well.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".json.gz", ".jsonl.gz")
