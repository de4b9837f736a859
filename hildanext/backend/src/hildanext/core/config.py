"""A run, read and validated. Sections are read as plain mappings; the room that owns a section builds it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from hildanext.core.errors import ConfigError

Built = TypeVar("Built")

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""What torch's generators take; those of numpy want it 0 or more."""


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def config(cls: type[Built]) -> type[Built]:
    """A frozen, strict configuration: keyword fields, checked types, no unknown keys."""
    strict = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=False))
    return strict(cls)  # type: ignore[return-value]


def validate(cls: type[Built], section: Mapping[str, Any], where: str, strict: bool = False) -> Built:
    """Validate `section` into `cls`; unknown keys and wrong types are one `ConfigError` naming all of them.

    `strict` takes types as JSON has them, without conversion.
    """
    fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    try:
        if strict:  # as JSON: Python's strictness would want an instance of `cls`
            return TypeAdapter(cls).validate_json(json.dumps(dict(section)), strict=True)
        return TypeAdapter(cls).validate_python(dict(section))
    except ValidationError as problem:
        raise ConfigError(f"{where}: " + "; ".join(_say(error, fields) for error in problem.errors())) from None


def _say(error: Any, fields: Sequence[str]) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        close = get_close_matches(place.rsplit(".", 1)[-1], fields, n=1)
        guess = f", did you mean {close[0]!r}?" if close else f", known keys: {', '.join(fields)}"
        return f"unknown key {place!r}{guess}"
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{place!r} is missing and has no default"
    value = error.get("input")
    shown = repr(value) if len(repr(value)) < 80 else type(value).__name__
    text = error["msg"].removeprefix("Value error, ")
    return f"{place}: {text}, got {shown}" if place else text


def may_be_none(cls: type[Any]) -> frozenset[str]:
    """The fields of a configuration for which None is a value."""
    fields = cls.__pydantic_fields__.items()
    return frozenset(name for name, field in fields if NoneType in get_args(field.annotation))


def plain(section_object: Any) -> dict[str, Any]:
    """The section that would build this object again (JSON types only)."""
    return TypeAdapter(type(section_object)).dump_python(section_object, mode="json")


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `ConfigError` with the line and column of a syntax error."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no such file {str(path)!r}", "check the path given to --config") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as problem:
        raise ConfigError(f"cannot read {str(path)!r} ({problem})", "give a readable JSON file") from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as problem:
        where = f"{path} line {problem.lineno} column {problem.colno}"
        raise ConfigError(f"{where}: {problem.msg}", "mend the JSON") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {type(value).__name__}", "a run is a JSON object of sections")
    return value


def read_value(text: str) -> Any:
    """A value written on the command line: JSON where it parses, else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def override(run: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply `section.field=value` overrides; values are JSON where they parse, else text. Returns a new mapping."""
    result: dict[str, Any] = json.loads(json.dumps(run))
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
    return result


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mappings merged key by key; a mapping with another `name` is taken whole. A new mapping."""
    result: dict[str, Any] = json.loads(json.dumps(dict(below)))
    for key, value in above.items():
        base = result.get(key)
        if isinstance(base, dict) and isinstance(value, Mapping):
            same = "name" not in value or base.get("name", value["name"]) == value["name"]
            value = merge(base, value) if same else value
        result[key] = value
    return result
