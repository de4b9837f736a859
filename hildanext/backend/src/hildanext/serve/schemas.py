"""What the service takes and gives, as types: they are checked, and they are the OpenAPI document.

Requests are strict: no unknown fields, no text for a number. A field of a request may have other names (`ALIASES`).
"""

from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

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

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Text = Annotated[str, Field(description="Unicode text; half a character (a lone surrogate) is refused")]


class Strict(BaseModel):
    """A part of a request: known fields only, types as JSON has them, finite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    ALIASES: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        found: dict[str, Any] = {}
        for given, content in value.items():
            name = cls.ALIASES.get(given, given)
            if name not in cls.model_fields:
                names = [*cls.model_fields, *cls.ALIASES]
                close = get_close_matches(given, names, n=3)
                guess = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(cls.model_fields)}"
                raise PydanticCustomError(
                    "unknown_field", "unknown field {name}: {guess}", {"name": repr(given[:80]), "guess": guess}
                )
            if name in found:
                raise PydanticCustomError(
                    "given_twice", "{name} is given twice, as {given} too", {"name": name, "given": given}
                )
            found[name] = content
        return found

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


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[ChatMessagePart]
    name: Text | None = None
    """Accepted and not used."""

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Decoding(Strict):
    """How a text is written. What is left out is as the mode has it."""

    ALIASES = DECODING_ALIASES
    mode: Text | None = Field(None, description="S_MODE (the default; alias speed) or Q_MODE (alias quality)")
    effort: Text | None = Field(None, description="instant, low, medium, high or adaptive: laid over the mode")
    tau_mask: float | None = Field(None, ge=0, le=1, description="fill a mask above this probability")
    tau_edit: Annotated[float, Field(ge=0, le=1)] | Literal["off"] | None = Field(
        None, description="replace a written token above this probability; null or off: do not edit"
    )
    tau_cautious: float | None = Field(None, ge=0, le=1, description="threshold where the masks are unsure on average")
    max_post: int | None = Field(None, ge=0, le=1024, description="forwards of a block after its last mask is filled")
    window: int | None = Field(None, ge=0, le=1024, description="finished blocks that may still be edited")
    kv_safe: bool | None = Field(None, description="end a block only with a forward that changed nothing")
    block_size: int | None = Field(None, ge=1, description="must be the model's own: a property of the checkpoint")
    steps: int | None = Field(
        None, ge=1, description="most forwards that fill masks of a block; fewer than its size cannot be promised"
    )
    temperature: float | None = Field(None, ge=0, le=100, description="0 (the default) is greedy")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, le=2**31)
    seed: Seed | None = Field(None, description="0 where it is left out; choice i draws from seed + i")
    stop: Text | list[Text] | None = Field(None, description="the text ends before the first of these, at most 4")
    ignore_eos: bool = Field(False, description="go on after an end of text, up to the length")
    deadline_seconds: float | None = Field(None, gt=0, description="at most the server's own limit")


class GenerateBody(Decoding):
    """One text. Exactly one of prompt, messages and tokens."""

    ALIASES = {**DECODING_ALIASES, "max_tokens": "max_new_tokens"}
    prompt: Text | None = Field(None, description="text to continue")
    messages: list[ChatMessage] | None = Field(None, description="a conversation, in the model's chat template")
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(None, description="a prompt of token ids")
    max_new_tokens: int | None = Field(None, ge=1, description="256 where it is left out, or what the context leaves")
    parent: bool = Field(False, description="the autoregressive parent answers")
    frames: bool | None = Field(None, description="tell every forward; streams do unless false, whole answers if true")


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted and not used."""


class OpenAIBody(Decoding):
    """What both OpenAI routes share."""

    model: Text = Field(description="a name of GET /v1/models")
    n: int | None = Field(None, ge=1, le=128)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(None, ge=0, le=0, description="not supported: 0")
    frequency_penalty: float | None = Field(None, ge=0, le=0, description="not supported: 0")
    logit_bias: dict[str, float] | None = Field(None, max_length=0, description="not supported: empty")
    user: Text | None = Field(None, description="accepted and not used")
    diffusing: bool = Field(False, description="stream whole frames: each delta replaces the text so far")
    stream_denoising: bool = Field(False, description="between deltas, chunks with a `diffusion` object")


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatBody(OpenAIBody):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = Field(False, description="probability of each token when it was committed")
    top_logprobs: int | None = Field(None, ge=0, le=0, description="not supported: 0")
    reasoning_effort: Text | None = Field(None, description="none, minimal, low, medium, high, xhigh: an effort")
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = Field(None, max_length=0, description="not supported: empty")
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = Field(None, description="accepted and not used")
    store: bool | None = Field(None, description="accepted and not used: nothing is stored")
    metadata: dict[str, str] | None = Field(None, description="accepted and not used")


class CompletionBody(OpenAIBody):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
        | Annotated[list[list[Annotated[int, Field(ge=0, lt=2**31)]]], Field(min_length=1)]
    )
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=0, description="0: probability of each token when it was committed")
    echo: Literal[False] | None = Field(False, description="not supported: false")
    suffix: Literal[""] | None = Field(None, description="not supported: empty")
    best_of: int | None = Field(None, ge=1, le=128, description="not supported beyond n")


class JobBody(Strict):
    """POST /jobs/submit."""

    kind: Text = Field(description="a stage's name, or run: a whole recipe")
    config: dict[str, Any] = Field(description="its sections, as in a configuration file")


class ErrorDetail(BaseModel):
    message: str = Field(description="what happened, and what to do")
    type: str
    param: str | None = Field(description="the field at fault")
    code: str | None


class ErrorAnswer(BaseModel):
    """Every error, whatever its status."""

    error: ErrorDetail


class Cell(BaseModel):
    position: int
    token: int
    text: str
    probability: float | None = None


class FrameEdit(BaseModel):
    position: int
    old: int
    new: int
    old_text: str
    new_text: str
    probability: float


class Frame(BaseModel):
    """One forward's effect. Positions count from the document's first token, the prompt included."""

    forward: int
    kind: Literal["denoise", "revise"]
    block_start: int
    masks: list[int] = Field(description="masked positions before the forward")
    drafts: list[Cell] = Field(description="masks that it filled")
    edits: list[FrameEdit] = Field(description="written tokens that it replaced")
    final: bool = Field(description="its block is finished")
    seconds: float = Field(description="since the request arrived")


class StartEvent(BaseModel):
    """SSE event `start`."""

    id: str
    model: str
    engine: str
    parent: bool
    seed: int
    block_size: int | None
    prompt_tokens: int
    cached_tokens: int
    queue_seconds: float
    prompt: list[Cell] = Field(description="the prompt's tokens, where frames are sent and the engine tells them")
    decoder: dict[str, Any]


class BlockEvent(BaseModel):
    """SSE event `block`: text that is final. All of them, joined, are the answer's text."""

    index: int
    text: str
    seconds: float


class GenerateUsage(BaseModel):
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    total_tokens: int
    forward_passes: int = Field(description="all forwards the request took part in")
    denoising_steps: int
    edited_tokens: int


class Timing(BaseModel):
    queue_seconds: float
    prefill_seconds: float
    first_block_seconds: float = Field(description="from submission to the first committed text")
    seconds: float = Field(description="from submission to the end")
    tokens_per_second: float
    tokens_per_forward: float


class GenerateAnswer(BaseModel):
    """A whole answer; the data of SSE event `done`."""

    id: str
    model: str
    engine: str
    parent: bool
    text: str
    tokens: list[int]
    finish_reason: Literal["eos", "stop", "length"]
    seed: int
    decoder: dict[str, Any]
    edits_supported: bool
    usage: GenerateUsage
    timing: Timing
    frames: list[Frame] | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "hilda"
    kind: Literal["diffusion", "autoregressive"]
    max_model_len: int | None = Field(description="tokens of the context")
    block_size: int | None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class CompletionTokensDetails(BaseModel):
    denoising_steps: int
    forward_passes: int
    edited_tokens: int


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionTokensDetails
    prompt_tokens_details: PromptTokensDetails


class ChatLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Any] = []


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatAnswer(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: None = None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class CompletionAnswer(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Load(BaseModel):
    """What the engine is doing, and what it has done since it started."""

    waiting: int
    running: int
    alive: bool
    cache_bytes: int
    cache_limit_bytes: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    forwards: int
    denoising_steps: int
    edits: int
    blocks: int
    finished: dict[str, int]


class EngineAnswer(BaseModel):
    name: str
    reason: str = Field(description="why this engine was chosen")
    slots: int
    queue: int
    block_size: int | None
    context: int | None
    supports_editing: bool
    supports_steps: bool


class HealthAnswer(BaseModel):
    status: Literal["ready", "closing"]
    model: str
    parent: str | None
    engine: EngineAnswer
    device: str
    dtype: str
    threads: int | None
    versions: dict[str, str] = Field(description="empty where a package is not installed")
    load: Load
    uptime_seconds: float
    jobs: bool = Field(description="whether jobs can be submitted")
    key_required: bool
    limits: dict[str, int | float] = Field(description="what a request may be at most")
    modes: dict[str, dict[str, Any]]
    efforts: list[str]


class LiveAnswer(BaseModel):
    status: Literal["live"] = "live"


class JobAnswer(BaseModel):
    """A job. Times are ISO 8601, UTC."""

    model_config = ConfigDict(extra="allow")
    id: str
    kind: str
    state: Literal["queued", "running", "succeeded", "failed", "cancelled", "interrupted"]
    config: dict[str, Any]
    folder: str
    created: str
    started: str | None
    ended: str | None
    attempts: int
    cancelling: bool
    exit_code: int | None
    error: str | None
    progress: dict[str, Any]
    outcomes: dict[str, Any] | None = Field(None, description="what its finished stages returned; of one job only")


class JobList(BaseModel):
    jobs: list[JobAnswer]
    next: str | None = Field(description="give it as `before` for the next page")
    kinds: list[str] = Field(description="what can be submitted")


class ArtefactAnswer(BaseModel):
    path: str
    size: int
    modified: str


class ArtefactList(BaseModel):
    artefacts: list[ArtefactAnswer]
