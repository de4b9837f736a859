"""OpenAI's optional fields that change nothing here: what is taken of each, and what is said where it would mean more.

Null and empty pass everywhere, so that what a client was answered can be sent back as it came. A value that asks for
what this service does not do is refused with what to use instead.
"""

import json
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

Row = tuple[Any, Any]
"""Annotation and field, as `pydantic.create_model` takes them."""


MOST_TOP = 1
"""Alternatives that are known of a token: the most probable one."""


class Neutral:
    """Null and these values pass; any other is refused with what to use instead."""

    def __init__(self, values: tuple[Any, ...], instead: str) -> None:
        self.values, self.instead = values, instead

    def check(self, value: Any) -> Any:
        """The value. Raises `PydanticCustomError` (`not_offered`) for one that would mean something."""
        if value is None or any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.values
        ):
            return value
        only = " or ".join(json.dumps(one) for one in self.values or (None,))
        given = json.dumps(value, default=str)
        shown = given if len(given) <= 60 else f"{given[:57]}..."
        said = {"given": shown, "only": only, "instead": self.instead}
        raise PydanticCustomError("not_offered", "{given} is not offered, only {only}: {instead}", said)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": [None, *self.values]}


def _unused(kind: Any) -> Row:
    return kind | None, Field(None, description="accepted and not used")


def _only(*values: Any, instead: str) -> Row:
    return Annotated[Any, Neutral(values, instead)], Field(None, description=f"not offered: {instead}")


TOOLS = "no tools are called here; describe the form of the answer in a message and read its text"
PENALTIES = "a block is written at once, not token by token; use temperature and top_p against repetition"

BOTH: dict[str, Row] = {
    "presence_penalty": _only(0, instead=PENALTIES),
    "frequency_penalty": _only(0, instead=PENALTIES),
    "logit_bias": _only({}, instead="single tokens cannot be favoured; say what is wanted in the prompt"),
    "user": _unused(str),
}
"""Of both routes."""

CHAT: dict[str, Row] = {
    **BOTH,
    "response_format": _only(
        {"type": "text"}, instead="answers are plain text; ask for JSON in a message and check it"
    ),
    "tools": _only([], instead=TOOLS),
    "tool_choice": _only("none", "auto", instead=TOOLS),
    "functions": _only([], instead=TOOLS),
    "function_call": _only("none", "auto", instead=TOOLS),
    "modalities": _only(["text"], [], instead="answers are text alone"),
    "audio": _only(instead="answers are text alone"),
    "web_search_options": _only(instead="nothing is searched; put what it should know into a message"),
    "moderation": _only(instead="nothing is moderated; judge the text yourself"),
    "service_tier": _only("auto", "default", instead="all requests are served alike; leave it out"),
    "verbosity": _only("medium", instead="ask for a short or a long answer in a message, or set max_completion_tokens"),
    "parallel_tool_calls": _unused(bool),
    "prediction": _unused(dict[str, Any]),
    "prompt_cache_key": _unused(str),
    "prompt_cache_options": _unused(dict[str, Any]),
    "prompt_cache_retention": _unused(str),
    "safety_identifier": _unused(str),
    "store": _unused(bool),
    "metadata": _unused(dict[str, str]),
}
"""Of /v1/chat/completions. Nothing is stored, whatever `store` says."""

COMPLETIONS: dict[str, Row] = {
    **BOTH,
    "suffix": _only("", instead="a gap between two texts is not filled; put what comes before it into the prompt"),
}
"""Of /v1/completions."""

MESSAGE: dict[str, Row] = {
    "name": _unused(str),
    "refusal": _only("", instead="send what was answered as content"),
    "tool_calls": _only([], instead=TOOLS),
    "tool_call_id": _only("", instead=TOOLS),
    "function_call": _only(instead=TOOLS),
    "annotations": _only([], instead="a conversation is text alone; leave them out"),
    "audio": _only(instead="a conversation is text alone; send what was said as content"),
    "parsed": _only(instead="send what was answered as content"),
    "reasoning_content": _only("", instead="a conversation is what was said; leave it out"),
}
"""Of a message, as a client appends the one that it was answered."""


def known_top(count: Any) -> Any:
    """How many alternatives are asked for. Raises `PydanticCustomError` for more than there are."""
    if isinstance(count, int) and count > MOST_TOP:
        said = {"count": count, "most": MOST_TOP}
        raise PydanticCustomError("not_offered", "{count} alternatives are not offered: ask for {most} at most", said)
    return count


Top = Annotated[Annotated[int, Field(ge=0, le=MOST_TOP)] | None, BeforeValidator(known_top)]

Role = Literal["system", "developer", "user", "assistant"]


def known_role(role: Any) -> Any:
    """The role. Raises `PydanticCustomError` for those of tools."""
    return Neutral(get_args(Role), TOOLS).check(role) if role in ("tool", "function") else role


def known_part(part: Any) -> Any:
    """A part of a message's content. Raises `PydanticCustomError` for one that is no text."""
    if isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] != "text":
        Neutral(("text",), "a message is text alone; describe in words what else it should see").check(part["type"])
    return part
