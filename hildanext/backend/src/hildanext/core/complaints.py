"""What is wrong with values, in words: where, what was given, and what may be given, read from the JSON Schema."""

import json
import re
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

Schema = Mapping[str, Any]

BROKEN = {
    "greater_than_equal": "is below {ge}",
    "greater_than": "is not above {gt}",
    "less_than_equal": "is above {le}",
    "less_than": "is not below {lt}",
    "finite_number": "is not finite",
    "literal_error": "is no choice",
    "enum": "is no choice",
}
"""By the type of pydantic's error, with its context."""

NOT = {
    "float": "is no number",
    "int": "is no whole number",
    "bool": "is neither true nor false",
    "string": "is no text",
    "path": "is no path",
    "list": "is no list",
    "tuple": "is no list",
    "dict": "is no JSON object",
    "dataclass": "is no JSON object",
    "model": "is no JSON object",
}
"""By how the types of pydantic's errors of a wrong type begin."""

WORDS = {
    "number": ("a number", "numbers"),
    "integer": ("a whole number", "whole numbers"),
    "boolean": ("true or false", "true or false"),
    "string": ("text", "texts"),
    "array": ("a list", "lists"),
    "object": ("a JSON object", "JSON objects"),
    "null": ("null", "nulls"),
}
"""By the type in a schema: one, and several of them."""

_brief = reprlib.Repr()
_brief.maxlevel, _brief.maxstring, _brief.maxother, _brief.maxlong = 2, 78, 78, 78
LONGEST_NAME = 80


def complaints(
    problems: Iterable[Mapping[str, Any]], schema: Schema, own: Collection[str] = ()
) -> list[tuple[str, str]]:
    """Of pydantic's errors, each place (`a.b[0]`, empty for the whole) and what is to be said of it.

    Errors of one place are one, since the branches of a union complain each; those of a part stand for the whole's.
    `schema` is that of what was validated. What is complained of under a type in `own` is said as it is.
    """
    said: list[tuple[str, str]] = []
    gathered: dict[str, tuple[list[Schema], list[Mapping[str, Any]]]] = {}
    for problem in problems:
        place, allowed = _find(schema, problem["loc"])
        if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            said.append(("", _unknown(place, str(problem["loc"][-1]), allowed)))
        else:
            gathered.setdefault(place, (allowed, []))[1].append(problem)
    outer = {place[: mark.start()] for place in gathered for mark in re.finditer(r"[.\[]", place)}
    return [*said, *((place, _complaint(*faults, own)) for place, faults in gathered.items() if place not in outer)]


def _find(schema: Schema, location: Sequence[str | int]) -> tuple[str, list[Schema]]:
    """A place as one writes it, and what may stand there. Names of a union's branches lead nowhere and are left out."""
    place, allowed = "", _branches([schema], schema)
    for part in location:
        below = _branches([inner for branch in allowed for inner in _inside(branch, part)], schema)
        if below:
            allowed = below
            place += f"[{part}]" if isinstance(part, int) else f".{part[:LONGEST_NAME]}"
    return place.removeprefix("."), allowed


def _branches(schemas: Iterable[Schema], root: Schema) -> list[Schema]:
    """The schemas, references followed and unions taken apart."""
    branches: list[Schema] = []
    for schema in schemas:
        if "$ref" in schema:
            branches += _branches([root["$defs"][schema["$ref"].rpartition("/")[2]]], root)
        elif union := schema.get("anyOf", schema.get("oneOf")):
            branches += _branches(union, root)
        else:
            branches.append(schema)
    return branches


def _inside(schema: Schema, part: str | int) -> list[Schema]:
    if isinstance(part, int):
        first = schema.get("prefixItems", [])
        inner = first[part] if part < len(first) else schema.get("items")
    else:
        inner = schema.get("properties", {}).get(part, schema.get("additionalProperties"))
    return [] if inner is None or inner is False else [{} if inner is True else inner]


def _unknown(place: str, name: str, allowed: Sequence[Schema]) -> str:
    known = list(dict.fromkeys(key for schema in allowed for key in schema.get("properties", {})))
    close = get_close_matches(name, known, n=1)
    guess = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
    return f"unknown key {f'{place}.{name}'.removeprefix('.')!r}, {guess}"


def _complaint(allowed: Sequence[Schema], problems: Sequence[Mapping[str, Any]], own: Collection[str]) -> str:
    # Of a union's branches, one whose type the value has says most.
    problem = min(problems, key=lambda problem: _is_of_type(problem["type"]))
    kind, value = problem["type"], problem.get("input")
    text = BROKEN.get(kind) if value == value else NOT["float"]  # NaN is neither above nor below
    if text is None and _is_of_type(kind):
        text = NOT.get(kind.partition("_")[0])
    if text is not None:
        bounds = {name: _number(bound) for name, bound in problem.get("ctx", {}).items()}
        broken = f"{_shown(value)} {text.format_map(bounds)}"
    elif kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        broken = "it is missing"
    else:
        said = str(problem["msg"]).removeprefix("Value error, ")
        return said if kind in own or isinstance(value, dict | list) else f"{said}, got {_shown(value)}"
    choices = _choices(allowed)
    return f"{broken}, give {choices}" if choices else broken


def _is_of_type(kind: str) -> bool:
    return kind.endswith(("_type", "_parsing")) or kind in ("int_from_float", "literal_error", "enum")


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = _brief.repr(value)
    return text if len(text) <= _brief.maxstring + 2 else type(value).__name__


def _number(value: Any) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _choices(allowed: Iterable[Schema]) -> str:
    words = list(dict.fromkeys(word for schema in allowed for word in _words(schema)))
    values = [word for word in words if word != "null"]
    *most, last = values or [""]
    text = f"{', '.join(most)} or {last}" if most else last
    return f"{text}, or null" if text and "null" in words else text or "".join(words)


def _words(schema: Schema) -> list[str]:
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return [repr(value) if isinstance(value, str) else json.dumps(value) for value in values]
    kind = schema.get("type")
    if kind in ("number", "integer"):
        return [_range(WORDS[kind][0], schema)]
    if kind == "array":
        inner = schema.get("items")
        several = WORDS[inner["type"]][1] if isinstance(inner, dict) and inner.get("type") in WORDS else ""
        return [f"a list of {several}" if several else "a list"]
    if schema.get("format") == "path":
        return ["a path"]
    return [WORDS[kind][0]] if kind in WORDS else []


def _range(kind: str, schema: Schema) -> str:
    bounds = {
        name: _number(schema[name])
        for name in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
        if name in schema
    }
    if set(bounds) == {"minimum", "maximum"}:
        low, high = bounds.values()
        between = low if low == high else f"{low} to {high}"
        return between if kind == WORDS["number"][0] or low == high else f"{kind} from {between}"
    before = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    text = " and ".join(f"{before[name]} {bound}" for name, bound in bounds.items())
    return " ".join(filter(None, [kind, "of" if text.startswith("at") else "", text]))
