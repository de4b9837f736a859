"""The decoders as clients are told of them: JSON Schema of each one's section, with the text under its knobs."""

from functools import cache
from typing import Any

from pydantic import GetJsonSchemaHandler, TypeAdapter
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from hildanext.core.knobs import knobs_of
from hildanext.decoding import MODES, methods


def decoder_schemas() -> dict[str, dict[str, Any]]:
    """By name, what the field `decoder` of a request may hold."""
    members: dict[str, Any] = dict(methods())
    return {name: _schema(name, cls) for name, cls in members.items()}


class DecoderSection:
    """An annotation: the schema of a field that holds the section of any decoder."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [*decoder_schemas().values(), {"type": "null"}]}


def request_maxima(cls: type[Any]) -> dict[str, int | float]:
    """The knobs that end sooner in a request than anywhere else (`request_maximum` on the field), and where."""
    extras = {name: field.json_schema_extra for name, field in cls.__pydantic_fields__.items()}
    return {
        name: extra["request_maximum"]
        for name, extra in extras.items()
        if isinstance(extra, dict) and "request_maximum" in extra
    }


@cache
def _schema(name: str, cls: type[Any]) -> dict[str, Any]:
    schema = TypeAdapter(cls).json_schema()
    knobs = schema.get("properties", {})
    for knob in knobs_of(cls):
        knobs[knob.name]["description"] = knob.help
        if "request_maximum" in knobs[knob.name]:
            knobs[knob.name]["maximum"] = knobs[knob.name].pop("request_maximum")
    summary = (cls.__doc__ or name).strip().partition("\n\n")[0]
    return {
        **schema,
        "title": name,
        "description": " ".join(summary.split()),
        "properties": {"name": {"const": name, "title": "Name", "type": "string"}, **knobs},
        "required": [*([] if name == MODES["S_MODE"]["name"] else ["name"]), *schema.get("required", [])],
    }
