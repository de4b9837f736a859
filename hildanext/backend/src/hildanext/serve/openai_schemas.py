"""Bodies and answers of the OpenAI-compatible routes: the published fields, and ours beside them.

Fields that change nothing here are taken only with the value that changes nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from hildanext.serve.fields import REASONING, Answer, Body, Count, Decoding, Seed
from hildanext.serve.refusals import Refused
from hildanext.serve.schemas import StopWord, TokenId


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Taken and not done: nothing is padded."""


class ResponseFormat(Body):
    type: Literal["text"]


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatTurn(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    """Taken and not shown to the model."""

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class OpenAIBody(Decoding):
    """What both completion routes take."""

    model: str | None = Field(None, max_length=512)
    """A name of GET /v1/models; default: the diffusion model."""
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: int | None = Field(None, ge=1, le=128)
    """Texts for each prompt, of the seeds `seed`, `seed` + 1, ..."""
    stop: StopWord | Annotated[list[StopWord], Field(max_length=4)] | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    reasoning_effort: str | None = Field(None, json_schema_extra={"enum": [*REASONING, None]})
    diffusing: bool | None = None
    """With `stream`: every delta is a whole frame that replaces the one before."""
    stream_denoising: bool | None = None
    """With `stream`: committed deltas, and between them chunks with an empty delta and a `diffusion` object."""
    ignore_eos: bool | None = None
    deadline_seconds: float | None = Field(None, gt=0.0, le=86400.0)
    user: str | None = None
    metadata: dict[str, str] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    def new_tokens(self) -> int | None:
        """Raises `Refused` where the two names of the limit disagree."""
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise Refused(400, "max_tokens and max_completion_tokens are one limit", "give one of them", "max_tokens")
        return next(iter(given), None)

    def effort_name(self) -> str | None:
        """Our effort for `reasoning_effort`. Raises `Refused` for one that nobody has."""
        if self.reasoning_effort is None:
            return None
        if self.reasoning_effort not in REASONING:
            raise Refused(
                400, f"unknown reasoning_effort {self.reasoning_effort[:40]!r}", f"choices: {', '.join(REASONING)}",
                "reasoning_effort",
            )  # fmt: skip
        return REASONING[self.reasoning_effort]


class ChatBody(OpenAIBody):
    messages: list[ChatTurn] = Field(min_length=1, max_length=1024)
    logprobs: bool | None = None
    """The probability with which each token was last written."""
    top_logprobs: Literal[0] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionBody(OpenAIBody):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
        | None
    ) = None
    """Text, texts, token ids, or several of them; default: the beginning of a document."""
    echo: bool | None = None
    """Put the prompt before its text; not for prompts of token ids, not in a stream."""
    logprobs: Annotated[int, Field(ge=0, le=1)] | None = None
    """0: the probability of each written token; 1: the same as `top_logprobs` too, at temperature 0."""
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None


class PromptDetails(Answer):
    cached_tokens: int


class CompletionDetails(Answer):
    denoising_steps: int
    forward_passes: int
    edited_tokens: int
    reasoning_tokens: int = 0


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class Extras(Answer):
    """Ours: what was applied and what it took, of one choice."""

    seed: int
    decoder: dict[str, Any]
    engine: str
    edits_supported: bool
    queue_seconds: float
    first_block_seconds: float
    seconds: float
    tokens_per_second: float
    tokens_per_forward: float


class ChatMessage(Answer):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class TokenLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[Any]


class ChatLogprobs(Answer):
    content: list[TokenLogprob]
    refusal: None = None


class ChatChoice(Answer):
    index: int
    message: ChatMessage
    finish_reason: Literal["stop", "length"]
    logprobs: ChatLogprobs | None = None
    hilda: Extras


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(Answer):
    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: TextLogprobs | None = None
    hilda: Extras


class TextCompletion(Answer):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ModelCard(Answer):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    kind: Literal["diffusion", "autoregressive"]
    context_length: int | None
    block_size: int | None


class ModelList(Answer):
    object: Literal["list"] = "list"
    data: list[ModelCard]
