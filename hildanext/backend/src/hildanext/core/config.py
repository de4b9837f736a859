"""A run, read and validated. Sections are read as plain mappings; the room that owns a section builds it."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from hildanext.core.complaints import complaints
from hildanext.core.errors import ConfigError
from hildanext.core.json_text import BROKEN, DEEPEST, BadJson, as_read_back, parse

Built = TypeVar("Built")

Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What every generator takes."""
RowLength = Annotated[int, Field(ge=2, le=2**20)]
"""Tokens of a row. More are no model's context, and far more would end in numpy's own error."""
AnySeed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""What torch's generators take; those of numpy want it 0 or more."""


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def config(cls: type[Built]) -> type[Built]:
    """A frozen, strict configuration: keyword fields, checked types, no unknown keys."""
    strict = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=False))
    return strict(cls)  # type: ignore[return-value]


def validate(
    cls: type[Built], section: Mapping[str, Any], where: str, strict: bool = False, besides: Collection[str] = ()
) -> Built:
    """Validate `section` into `cls`; unknown keys and wrong values are one `ConfigError` naming all of them.

    `strict` takes types as JSON has them, without conversion. `besides` are names that stand beside the fields in the
    file and that an unknown key may have been meant for.
    """
    try:
        if strict:  # as JSON: Python's strictness would want an instance of `cls`
            return _adapter(cls).validate_json(json.dumps(dict(section)), strict=True)
        return _adapter(cls).validate_python(dict(section))
    except ValidationError as problem:
        schema = _adapter(cls).json_schema()
        schema["properties"] = {**schema.get("properties", {}), **{name: {} for name in sorted(besides)}}
        said = complaints(problem.errors(), schema)
        text = "; ".join(f"{place}: {words}" if place else words for place, words in said)
        raise ConfigError(f"{where}: {text}") from None


def may_be_none(cls: type[Any]) -> frozenset[str]:
    """The fields of a configuration for which None is a value."""
    fields = cls.__pydantic_fields__.items()
    return frozenset(name for name, field in fields if NoneType in get_args(field.annotation))


def plain(section_object: Any) -> dict[str, Any]:
    """The section that would build this object again (JSON types only)."""
    return _adapter(type(section_object)).dump_python(section_object, mode="json")


_adapters: dict[type[Any], TypeAdapter[Any]] = {}
"""Kept: every request of an engine builds a decoder, and to make an adapter takes longer than to use it."""


def _adapter(cls: type[Any]) -> Any:
    if cls not in _adapters:
        _adapters[cls] = TypeAdapter(cls)
    return _adapters[cls]


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `ConfigError`, with the line and column of a syntax error."""
    path = Path(path)
    try:
        value = parse(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"no such file {str(path)!r}", "check the path given to --config") from None
    except OSError as problem:
        raise ConfigError(f"cannot read {str(path)!r} ({problem.strerror})", "give a readable JSON file") from None
    except BadJson as problem:
        raise ConfigError(f"cannot read {str(path)!r} ({problem})", "mend the JSON") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {type(value).__name__}", "a run is a JSON object of sections")
    return value


def read_value(text: str) -> Any:
    """A value written on the command line: JSON where it is JSON, else the text itself.

    Raises `ConfigError` for JSON that is not taken (NaN, a number of thousands of digits, a key twice).
    """
    try:
        return parse(text)
    except BadJson as problem:
        if problem.kind == BROKEN:
            return text
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise ConfigError(
            f"the value {shown} cannot be taken: {problem}", "mend it, or quote a text: '\"...\"'"
        ) from None


def override(run: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply `section.field=value` overrides; values are JSON where they parse, else text. Returns a new mapping.

    Raises `ConfigError` for what is no assignment, and for a nest without end.
    """
    result: dict[str, Any] = as_read_back(run)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {assignment!r}", "write section.field=value")
        value = read_value(text)
        place = result
        *parents, last = path.split(".")
        for name in parents:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set {assignment!r}", f"{name!r} is not a section")
        place[last] = value
    _refuse_nests(result)
    return result


def _refuse_nests(run: Mapping[str, Any]) -> None:
    level: list[Any] = [run]
    for _ in range(DEEPEST):
        values = [list(value.values()) if isinstance(value, Mapping) else value for value in level]
        level = [inner for held in values for inner in held if isinstance(inner, Mapping | list)]
    if level:
        raise ConfigError(f"the configuration is nested more than {DEEPEST} deep", "no section is")
    if "\\u0000" in json.dumps(run):  # no path can hold it, and no text means it
        raise ConfigError("a text of the configuration holds a zero byte", "leave it out")


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mappings merged key by key; a mapping with another `name` is taken whole. A new mapping."""
    result: dict[str, Any] = as_read_back(dict(below))
    for key, value in above.items():
        base = result.get(key)
        if isinstance(base, dict) and isinstance(value, Mapping):
            same = "name" not in value or base.get("name", value["name"]) == value["name"]
            value = merge(base, value) if same else value
        result[key] = value
    return result
