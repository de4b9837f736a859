"""The section `serve` of a configuration: where the service listens, what it serves, and what it allows."""

from typing import Any, Literal

from pydantic import Field

from hildanext.core.config import config
from hildanext.core.errors import ConfigError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@config
class ServeConfig:
    """Address, models, and a bound for everything that somebody else decides."""

    host: str = "127.0.0.1"
    """Loopback alone by default: whoever opens it to a network sets `api_key_env`, too."""
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes any free one; the startup line names it."""
    hosts: tuple[str, ...] | None = None
    """Names under which clients may reach it (the Host header), against pages elsewhere that rebind a name of theirs.
    None: loopback's own where it listens there, any otherwise."""
    engine: dict[str, Any] = Field(default_factory=lambda: {"name": "auto"})
    """Section of an engine: its name (auto, or a row of `engine.ENGINES`) and its knobs."""
    profile: Literal["SAFE", "FULL"] = "SAFE"
    """FULL: requests may name research methods."""
    model: str = "tiny"
    parent: str | None = None
    """Autoregressive model that answers beside it; None: there is none."""
    chat_template: Literal["own", "plain"] = "own"
    """plain: conversations of a model whose tokenizer has no template are written as `User:` and `Assistant:`."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; the key itself stands in no file and no log."""
    cors: tuple[str, ...] = ()
    """Origins of pages elsewhere that may call the service; none by default."""
    max_body_bytes: int = Field(default=4 << 20, ge=1024)
    max_prompt_characters: int = Field(default=200_000, ge=1)
    max_new_tokens: int = Field(default=4096, ge=1)
    max_choices: int = Field(default=16, ge=1)
    """Texts of one call: prompts times n."""
    request_seconds: float = Field(default=300.0, gt=0)
    """From arrival on; a request may ask for less."""
    header_seconds: float = Field(default=10.0, gt=0)
    """A client's time for the head of a request."""
    body_seconds: float = Field(default=30.0, gt=0)
    """A client's time for the body of a request."""
    write_seconds: float = Field(default=60.0, gt=0)
    """How long a client may leave what was sent to it unread."""
    idle_seconds: float = Field(default=15.0, gt=0)
    """How long a connection is kept between two requests."""
    keep_alive_seconds: float = Field(default=10.0, gt=0)
    """Between two signs of life in a stream of events."""
    max_connections: int = Field(default=512, ge=1)
    jobs_folder: str | None = "runs/jobs"
    """None: no jobs."""
    job_limit: int = Field(default=1, ge=1)
    """Jobs that run at a time."""
    shutdown_seconds: float = Field(default=20.0, ge=0)
    """How long running requests may go on after the service was told to end."""

    def allowed_hosts(self) -> frozenset[str] | None:
        """Names that the Host header may hold; None: any."""
        if self.hosts is not None:
            return frozenset(name.lower() for name in self.hosts)
        return frozenset(LOOPBACK) if self.host in LOOPBACK else None

    def __post_init__(self) -> None:
        for origin in self.cors:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise ConfigError(f"cors names {origin!r}", "an origin is http://name:port, without a path")
