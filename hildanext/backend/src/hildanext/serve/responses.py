"""What the service gives, as types: they are checked, and they are the OpenAPI document."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


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
    bytes: list[int] | None = Field(None, description="of a token that is no whole characters, its UTF-8 bytes")


class FrameEdit(BaseModel):
    position: int
    old: int
    new: int
    old_text: str
    new_text: str
    old_bytes: list[int] | None = Field(None, description="as of a cell")
    new_bytes: list[int] | None = None
    probability: float


class Frame(BaseModel):
    """One forward's effect. Positions count from the document's first token, the prompt included."""

    forward: int
    kind: Literal["denoise", "revise", "exact"]
    block_start: int
    masks: list[int] = Field(description="masked positions before the forward")
    drafts: list[Cell] = Field(
        description="masks that it filled; in exact mode drafts that the parent kept, or its token"
    )
    edits: list[FrameEdit] = Field(description="tokens that it replaced; in exact mode a draft, by the parent's token")
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


class GenerateUsage(BaseModel):
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    total_tokens: int
    forward_passes: int = Field(description="all forwards the request took part in")
    denoising_steps: int
    edited_tokens: int
    drafted_tokens: int = Field(0, description="in exact mode: drafts that the parent was asked about")
    confirmed_tokens: int = Field(0, description="and those that it kept")
    fed_rows: int = Field(0, description="in exact mode: rows of all forwards but the prompt's")


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
    kind: Literal["diffusion", "autoregressive", "drafts"]
    max_model_len: int | None = Field(description="tokens of the context")
    block_size: int | None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class CompletionTokensDetails(BaseModel):
    denoising_steps: int
    forward_passes: int
    edited_tokens: int
    drafted_tokens: int = Field(0, description="in exact mode: drafts that the parent was asked about")
    confirmed_tokens: int = Field(0, description="and those that it kept")
    tokens_per_forward: float = Field(0.0, description="without the forwards of the prompt")


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


class ChatTokenLogprob(ChatLogprob):
    top_logprobs: list[ChatLogprob] = []


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]


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
    token_logprobs: list[float | None] = Field(description="null where nothing comes before it")
    top_logprobs: list[dict[str, float] | None] | None = None
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
    drafts: int = Field(description="forwards of exact mode that verified drafts")
    draft_tokens: int
    accepted_tokens: int
    accepted_per_position: list[int]
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
    drafts: int = Field(description="tokens that draft adapters have learnt to draft at a time; 0: there are none")
    chat_template: bool | None = Field(
        description="whether the model came with a chat template of its own: without one it was not taught to chat, "
        "and the service writes User: and Assistant:, or refuses conversations; null where it is not known"
    )
    generation_prompt: bool | None = Field(
        description="whether that template writes the header of the answer: without one the model must write it, "
        "and answers begin with it; null where it is not known"
    )


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
    modes: dict[str, dict[str, Any]] = Field(description="that a request may name here, the usual one first")
    efforts: list[str]
    decoders: dict[str, dict[str, Any]]
    """JSON Schema of what the field `decoder` of a request may hold, by name."""


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
