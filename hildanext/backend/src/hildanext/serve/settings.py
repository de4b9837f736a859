"""What a service may be told: address, engine, limits. Nothing here is a secret; the key stays in the environment."""

import ipaddress
import os
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from hildanext.config import knobs
from hildanext.errors import ConfigError


@knobs
class ServeKnobs:
    """The section `serve` of a run."""

    host: str = "127.0.0.1"
    """Address to listen on: loopback, unless the machine is meant to answer others."""
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes any free one."""
    model: str = "tiny"
    """Diffusion checkpoint: a folder, or a name."""
    model_name: str | None = None
    """What clients call it; None: the model's own name, of a folder its last part."""
    parent: str | None = None
    """Autoregressive model that answers beside it."""
    engine: Mapping[str, Any] = Field(default_factory=lambda: {"name": "auto"})
    """Section of an engine."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key clients must send; None: no key is asked for."""
    origins: tuple[str, ...] = ()
    """Web pages of other hosts that may call the service (CORS), as `https://example.org`; empty: none."""
    hosts: tuple[str, ...] = ()
    """Names by which the service may be called, beside loopback's. Empty: any, but on loopback only loopback's."""
    max_body_bytes: int = Field(default=4 << 20, ge=1024)
    max_prompt_characters: int = Field(default=200_000, ge=1)
    """Of one prompt, or of all messages of a conversation."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """None: what the context and the engine's memory hold."""
    max_new_tokens: int = Field(default=4096, ge=1)
    max_choices: int = Field(default=64, ge=1)
    """Texts that one request may ask for: prompts times `n`."""
    max_connections: int = Field(default=512, ge=1)
    max_requests: int = Field(default=256, ge=1)
    """Requests that may be open at the same time, health and metrics not counted."""
    request_seconds: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    """Longest that a text may take from its submission on; a request may ask for less."""
    header_seconds: float = Field(default=15.0, gt=0, allow_inf_nan=False)
    """Longest that the head of a request may take to arrive."""
    body_seconds: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    """Longest that the body of a request may take to arrive."""
    write_seconds: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """Longest that a client may leave an answer unread."""
    keep_alive_seconds: int = Field(default=15, ge=1)
    ping_seconds: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    """Between two comments that keep an idle event stream open."""
    shutdown_seconds: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    """What running requests get to end when the service is told to stop."""
    jobs: str | None = "runs/jobs"
    """Folder of background jobs; None: no jobs."""
    job_limit: int = Field(default=1, ge=1)
    """Jobs that run at the same time."""

    def __post_init__(self) -> None:
        for origin in self.origins:
            if not origin.startswith(("http://", "https://")) or origin.rstrip("/").count("/") != 2:
                raise ConfigError(f"origin {origin!r} is none", "write it as https://example.org, '*' is not accepted")


def read_key(settings: ServeKnobs) -> bytes | None:
    """The key clients must send. Raises `ConfigError` where the variable is named but holds none."""
    if settings.api_key_env is None:
        return None
    key = os.environ.get(settings.api_key_env, "")
    if not key.strip():
        raise ConfigError(
            f"the environment variable {settings.api_key_env!r} holds no key", "set it, or leave api_key_env out"
        )
    return key.strip().encode("utf-8")


def is_loopback(host: str) -> bool:
    """Whether a host's name or address can only be reached from this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.rstrip(".").lower() == "localhost"
