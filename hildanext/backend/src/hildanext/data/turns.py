"""The keys of a conversation's turn, and of the record around it: read, saying nothing here, or refused by name."""

from collections.abc import Collection, Mapping
from typing import Any

ROLES = ("system", "user", "assistant")
WEIGHT = "weight"
"""Of an answer: 0 for one that is read and not learnt, 1 (or nothing) for one that is learnt."""
HARMLESS = frozenset(("id", "index", "turn", "timestamp", "created", "created_at", "language", "lang", "model"))
"""Keys that say where a turn comes from, not what it says."""
OF_RECORDS = ("tools", "functions", "history")
"""Keys of a record, beside its turns, that would belong into what the model reads."""


def unknown_key(turn: Mapping[str, Any], known: Collection[str]) -> str | None:
    """The first key of a turn that says something and that nobody reads; keys that are null or empty say nothing."""
    return next((key for key, value in turn.items() if key not in (*known, *HARMLESS) and _says(value)), None)


def unread_key(record: Mapping[str, Any], names: Collection[str] = OF_RECORDS) -> str | None:
    """The first of `names` that says something in a record."""
    return next((key for key in names if _says(record.get(key))), None)


def _says(value: Any) -> bool:
    return value is not None and value not in ("", [], {})
