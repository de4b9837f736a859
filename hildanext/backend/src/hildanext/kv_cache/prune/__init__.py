"""Which committed keys and values a document keeps. To add one: write the file, add its row, add its case; the setting
`cache` of a generation names it.

A policy gives scores; `pruned_cache` keeps to them, `pruned_row` is what a forward sees of such a cache.
"""

from collections.abc import Mapping
from typing import Any

from hildanext.core.registry import build
from hildanext.kv_cache.prune.base import Prune
from hildanext.kv_cache.prune.keydiff import KeyDiff
from hildanext.kv_cache.prune.knorm import KNorm
from hildanext.kv_cache.prune.mask_guided import MaskGuided
from hildanext.kv_cache.prune.noncausal import NonCausal
from hildanext.kv_cache.prune.streaming import Streaming

PRUNES: dict[str, type[Prune]] = {
    "knorm": KNorm,
    "keydiff": KeyDiff,
    "streaming": Streaming,
    "noncausal": NonCausal,
    "mask_guided": MaskGuided,
}


def make_prune(section: Mapping[str, Any] | str | None) -> Prune | None:
    """A policy from its section or its name; None (or "off") is none. Raises `UnknownChoice`, `ConfigError`."""
    if section is None or section == "off":
        return None
    return build("cache", PRUNES, {"name": section} if isinstance(section, str) else section, strict=True)


__all__ = ["PRUNES", "Prune", "make_prune"]
