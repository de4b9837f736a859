"""Bodies and answers of our own routes."""

from typing import Annotated, Any, Literal

from pydantic import Field

from hildanext.serve.fields import Answer, Body, Count, Decoding, Seed

StopWord = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]


class Turn(Body):
    role: Literal["system", "user", "assistant"]
    content: str


class GenerateBody(Decoding):
    """One text to write: give exactly one of `prompt`, `messages` and `tokens`."""

    prompt: str | None = None
    """Text to continue; may be empty."""
    messages: list[Turn] | None = Field(None, min_length=1, max_length=1024)
    tokens: list[TokenId] | None = Field(None, min_length=1)
    max_new_tokens: Count | None = None
    """Default: 256, or what the context leaves."""
    seed: Seed | None = None
    """Default: drawn, and told in the answer."""
    stop: StopWord | list[StopWord] | None = None
    ignore_eos: bool | None = None
    deadline_seconds: float | None = Field(None, gt=0.0, le=86400.0)
    parent: bool | None = None
    """The autoregressive parent answers; of the decoding only its sampling counts then."""
    steps: bool | None = None
    """Tell every forward: as `steps` of the answer, or as frames of the stream (there the default)."""


class Stats(Answer):
    """Counts of one text. `seconds` run from its start, not from its submission."""

    forwards: int
    prefill_forwards: int
    denoise_forwards: int
    commit_forwards: int
    revise_forwards: int
    tokens: int
    edits: int
    seconds: float
    prefill_seconds: float
    tokens_per_forward: float
    tokens_per_second: float


class GenerateAnswer(Answer):
    """A text, and what it took."""

    id: str
    model: str
    text: str
    tokens: list[int]
    """With the end of text that ended it, if one did."""
    finish_reason: Literal["eos", "stop", "length"]
    prompt_tokens: int
    cached_tokens: int
    seed: int
    decoder: dict[str, Any]
    """What was applied; of the parent, its sampling."""
    edits_supported: bool
    stats: Stats
    queue_seconds: float
    first_block_seconds: float
    """From submission to the first committed block."""
    seconds: float
    """From submission to the end."""
    steps: list[dict[str, Any]] | None = None


class Load(Answer):
    running: int
    waiting: int
    cache_bytes: int
    cache_limit_bytes: int


class Health(Answer):
    """`status` is ok, or closing, or failed (the engine has ended)."""

    status: Literal["ok", "closing", "failed"]
    ready: bool
    model: str
    parent: str | None
    engine: str
    engine_reason: str
    device: str
    dtype: str
    threads: int | None
    block_size: int | None
    context: int | None
    slots: int
    queue: int
    supports_editing: bool
    supports_steps: bool
    versions: dict[str, str]
    uptime_seconds: float
    load: Load
    jobs: bool
    """Whether background jobs may be submitted here."""
    key_required: bool


class Live(Answer):
    status: Literal["ok", "closing", "failed"]


class JobBody(Body):
    """A stage to run in the background, with its sections; or a whole recipe, as kind `run`."""

    kind: str = Field(max_length=64)
    config: dict[str, Any]


class JobProgress(Answer):
    stage: str | None
    stages_done: int
    stages: int
    step: int | None
    done: int | None
    total: int | None
    unit: str | None
    loss: float | None
    eta_seconds: float | None


class JobRecord(Answer):
    """A job. Times are ISO 8601 in UTC."""

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
    pid: int | None
    heartbeat: str | None
    progress: JobProgress


class JobList(Answer):
    jobs: list[JobRecord]
    next: str | None
    """`before` of the next page; null on the last."""


class ArtefactRecord(Answer):
    path: str
    size: int
    modified: str


class ArtefactList(Answer):
    artefacts: list[ArtefactRecord]
