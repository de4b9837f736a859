"""What the service takes, as types: they are checked, and they are the OpenAPI document. `responses` has what it gives.

Requests are strict: no unknown fields, no text for a number. A field of a request may have other names (`ALIASES`).
"""

from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    create_model,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from hildanext.core.config import AnySeed, may_be_none
from hildanext.core.knobs import knobs_of
from hildanext.decoding import DECODERS, MODES
from hildanext.serve.decoders import DecoderSection, request_maxima
from hildanext.serve.openai_fields import CHAT, COMPLETIONS, MESSAGE, Role, Top, known_part, known_role

DECODING_ALIASES = {
    "threshold": "tau_mask",
    "editing_threshold": "tau_edit",
    "edit_threshold": "tau_edit",
    "max_post_steps": "max_post",
    "block_length": "block_size",
    "max_denoising_steps": "steps",
    "num_inference_steps": "steps",
}
"""Names that other engines have for the same knob."""

TOP = "1: also the most probable token in its place, which is the token itself where none is drawn"
MOST_IDS = 1 << 20
"""In one prompt: more than any model's context, and few enough to be walked at once."""
Text = Annotated[str, Field(description="Unicode text; half a character (a lone surrogate) is refused")]
# The first wrong item refuses a list: a complaint about each of 200,000 holds the event loop for seconds.
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=MOST_IDS, fail_fast=True)]


class Strict(BaseModel):
    """A part of a request: known fields only, types as JSON has them, finite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    ALIASES: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        content: dict[str, Any] = {}
        for written, value in body.items():
            name = cls.ALIASES.get(written, written)
            if name not in cls.model_fields:
                names = [*cls.model_fields, *cls.ALIASES]
                close = get_close_matches(written, names, n=3)
                guess = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(cls.model_fields)}"
                raise PydanticCustomError(
                    "unknown_field", "unknown field {name}: {guess}", {"name": repr(written[:80]), "guess": guess}
                )
            if name in content:
                raise PydanticCustomError(
                    "given_twice", "{name} is given twice, as {given} too", {"name": name, "given": written}
                )
            content[name] = value
        return content

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Show the other names as properties too."""
        shown = handler.resolve_ref_schema(handler(schema))
        properties = shown.get("properties", {})
        for alias, name in cls.ALIASES.items():
            properties[alias] = {**properties[name], "description": f"Another name of {name}.", "title": alias}
        return shown


class ChatMessagePart(Strict):
    type: Literal["text"]
    text: Text


class SaidMessage(Strict):
    role: Annotated[Role, BeforeValidator(known_role)]
    content: (
        Text | Annotated[list[Annotated[ChatMessagePart, BeforeValidator(known_part)]], Field(fail_fast=True)] | None
    ) = Field(None, validate_default=True, description="null of an assistant alone, which then said nothing")

    @field_validator("content", mode="before")
    @classmethod
    def _is_there(cls, content: Any, info: Any) -> Any:
        role = info.data.get("role", "assistant")
        if content is None and role != "assistant":
            raise PydanticCustomError("no_content", "of a {role} message it is missing: give its text", {"role": role})
        return content

    @property
    def text(self) -> str:
        said = self.content if self.content is not None else ""
        return said if isinstance(said, str) else "".join(part.text for part in said)


def _knob(name: str, knob: FieldInfo, text: str) -> Any:
    """A knob as a field of a body, which may be left out; "off" is null for those that may be null."""
    annotation: Any = knob.annotation
    bounds = [*knob.metadata, *([Field(le=MAXIMA[name])] if name in MAXIMA else [])]
    kind = Annotated[annotation, *bounds] if bounds else annotation
    shape = knob.json_schema_extra if isinstance(knob.json_schema_extra, dict) else {}
    shape = {"anyOf": shape["anyOf"]} if "anyOf" in shape else {}
    if name in OPTIONAL:
        return kind | Literal["off"], Field(None, description=f"{text} Null is off.", json_schema_extra=shape)
    return kind | None, Field(None, description=text, json_schema_extra=shape)


PRESET: type[Any] = DECODERS[MODES["S_MODE"]["name"]]
"""The decoder that modes are presets of: its knobs are fields of a body."""
OPTIONAL = may_be_none(PRESET)
MAXIMA = request_maxima(PRESET)
KNOBS = {knob.name: _knob(knob.name, PRESET.__pydantic_fields__[knob.name], knob.help) for knob in knobs_of(PRESET)}


class DecodingFields(Strict):
    """How a text is written. What is left out is as the mode has it."""

    ALIASES = DECODING_ALIASES
    mode: Text | None = Field(
        None, description="S_MODE (the default; alias speed), Q_MODE (alias quality), or the checkpoint's own fast"
    )
    effort: Text | None = Field(None, description="instant, low, medium, high or adaptive: laid over the mode")
    decoder: Annotated[dict[str, Any] | None, DecoderSection] = Field(
        None, description="a decoder by its name, and its knobs; without the name those of the mode's own"
    )
    block_size: int | None = Field(None, ge=1, description="must be the model's own: a property of the checkpoint")
    steps: int | None = Field(
        None, ge=1, description="most forwards that fill masks of a block; fewer than its size cannot be promised"
    )
    seed: AnySeed | None = Field(None, description="0 where it is left out; choice i draws from seed + i")
    stop: Text | Annotated[list[Text], Field(fail_fast=True)] | None = Field(
        None, description="the text ends before the first of these, at most 4"
    )
    ignore_eos: bool | None = Field(False, description="go on after an end of text, up to the length")
    deadline_seconds: float | None = Field(None, gt=0, description="at most the server's own limit")


if TYPE_CHECKING:
    Decoding = DecodingFields
    ChatMessage = SaidMessage
else:
    Decoding = create_model("Decoding", __base__=DecodingFields, __module__=__name__, **KNOBS)
    ChatMessage = create_model("ChatMessage", __base__=SaidMessage, __module__=__name__, **MESSAGE)


class GenerateBody(Decoding):
    """One text. Exactly one of prompt, messages and tokens."""

    ALIASES = {**DECODING_ALIASES, "max_tokens": "max_new_tokens"}
    prompt: Text | None = Field(None, description="text to continue")
    messages: list[ChatMessage] | None = Field(
        None, fail_fast=True, description="a conversation, in the model's chat template"
    )
    tokens: TokenIds | None = Field(None, description="a prompt of token ids")
    max_new_tokens: int | None = Field(None, ge=1, description="256 where it is left out, or what the context leaves")
    parent: bool = Field(False, description="the autoregressive parent answers")
    frames: bool | None = Field(None, description="tell every forward; streams do unless false, whole answers if true")


class StreamOptions(Strict):
    include_usage: bool | None = False
    include_obfuscation: bool | None = Field(False, description="accepted and not used")


class OpenAIBody(Decoding):
    """What both OpenAI routes share."""

    model: Text = Field(description="a name of GET /v1/models")
    n: int | None = Field(None, ge=1, le=128)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    diffusing: bool | None = Field(False, description="stream whole frames: each delta replaces the text so far")
    stream_denoising: bool | None = Field(False, description="between deltas, chunks with a `diffusion` object")


class ChatFields(OpenAIBody):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = Field(False, description="probability of each token when it was committed")
    top_logprobs: Top = Field(None, description=TOP)
    reasoning_effort: Text | None = Field(None, description="none, minimal, low, medium, high, xhigh: an effort")


class CompletionFields(OpenAIBody):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, fail_fast=True)]
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
        | None
    ) = Field(description="null begins a new document")
    max_tokens: int | None = Field(None, ge=0, description="0 with echo alone: only the prompt is looked at")
    logprobs: Top = Field(None, description=f"probability of each token; {TOP}")
    echo: bool | None = Field(
        False, description="the prompt comes before the text; with logprobs the exact likelihood of both"
    )
    best_of: int | None = Field(None, ge=1, le=128, description="not supported beyond n")


if TYPE_CHECKING:
    ChatBody = ChatFields
    CompletionBody = CompletionFields
else:
    ChatBody = create_model("ChatBody", __base__=ChatFields, __module__=__name__, **CHAT)
    CompletionBody = create_model("CompletionBody", __base__=CompletionFields, __module__=__name__, **COMPLETIONS)


class JobBody(Strict):
    """POST /jobs/submit."""

    kind: Text = Field(description="a stage's name, or run: a whole recipe")
    config: dict[str, Any] = Field(description="its sections, as in a configuration file")
