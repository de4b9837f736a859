"""Families of interchangeable algorithms: a table and `build`."""

from collections.abc import Mapping
from typing import Any, TypeVar

from hildanext.core.config import validate
from hildanext.core.errors import ConfigError, UnknownChoice

Member = TypeVar("Member")


def build(kind: str, table: Mapping[str, type[Member]], section: Mapping[str, Any]) -> Member:
    """Build a family member from its section `{"name": ..., knobs}`.

    Raises `UnknownChoice` for a name outside the table and `ConfigError` for a knob that the
    member does not have or a value of the wrong type.
    """
    config = dict(section)
    name = config.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{kind} has no name", f'give one: {{"name": ...}}, of {", ".join(sorted(table))}')
    if name not in table:
        raise UnknownChoice(kind, name, table)
    return validate(table[name], config, where=f"{kind} {name}")
