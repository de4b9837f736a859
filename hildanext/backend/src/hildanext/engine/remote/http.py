"""What speaking to a server elsewhere takes, whoever speaks: address, key, server-sent events, failures in words."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

from hildanext.core.errors import ConfigError, HildaError, ModelError
from hildanext.core.json_text import BadJson, parse
from hildanext.engine.base import DeadlineExceeded, EngineFailed, Overloaded

LONGEST_EVENT = 16 << 20
"""Bytes of a line or an event that a server may send; more is no answer to any request of ours."""


class ServerEvent(NamedTuple):
    """A server-sent event. `name` is empty where it has none."""

    name: str
    data: str


class SSEDecoder:
    """Bytes as they arrive in, whole events out. Lines end at a newline only: JSON may hold all other separators."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._name, self._data, self._size = "", list[str](), 0

    def feed(self, arrived: bytes) -> list[ServerEvent]:
        """The events that these bytes complete. Raises `EngineFailed` for what is no text or has no end."""
        events = []
        *lines, rest = arrived.split(b"\n")
        for line in lines:
            self._line += line
            event = self._take(bytes(self._line).removesuffix(b"\r"))
            self._line.clear()
            if event is not None:
                events.append(event)
        self._line += rest
        if len(self._line) + self._size > LONGEST_EVENT:
            raise EngineFailed("the server sent an event without an end", "is it a server of language models?")
        return events

    def _take(self, line: bytes) -> ServerEvent | None:
        if not line:
            event = ServerEvent(self._name, "\n".join(self._data)) if self._data else None
            self._name, self._data, self._size = "", [], 0
            return event
        try:
            field, _, value = line.decode("utf-8").partition(":")
        except UnicodeDecodeError:
            raise EngineFailed("the server sent an event that is no text", "see the server's log") from None
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
            self._size += len(value)
        elif field == "event":
            self._name = value
        return None


@dataclass(frozen=True)
class ServerInfo:
    """A server, as it describes itself."""

    model: str
    parent: str | None
    context: int | None
    hilda: dict[str, Any] = field(default_factory=dict)
    """GET /health of a HILDA server; of any other nothing."""


def probe_server(client: httpx.Client, address: str, model: str | None, parent: str | None) -> ServerInfo:
    """GET /v1/models and /health. `model` None is the server's first, `parent` "auto" the one a HILDA server tells.

    Raises `ConfigError`, `ModelError` for a model it does not have, `EngineFailed`, and what a server's refusal means.
    """
    try:
        listed = client.get("/v1/models")
        if listed.status_code != 200:
            raise refusal(listed.status_code, listed.headers, listed.content)
        health = client.get("/health")
    except httpx.HTTPError as problem:
        raise unreachable(address, problem) from None
    except httpx.InvalidURL as problem:
        raise ConfigError(f"{address!r} is no address ({problem})", "write it as http://127.0.0.1:8000") from None
    cards = parsed(listed.content, f"{address}/v1/models").get("data")
    if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
        raise EngineFailed(f"{address}/v1/models lists no models", "is it an OpenAI-compatible server?")
    known = {str(card.get("id")): card for card in cards}
    if not known:
        raise ModelError(f"{address} has no model", "start it with one")
    hilda = _hilda(health)
    model = model if model is not None else next(iter(known))
    parent = hilda.get("parent") if parent == "auto" else parent
    for name in (model, *([parent] if parent is not None else [])):
        if name not in known:
            raise ModelError(f"{address} has no model {name!r}", f"it has {', '.join(sorted(known))}")
    context = known[model].get("max_model_len", known[model].get("context_length"))
    return ServerInfo(model, parent, context if isinstance(context, int) else None, hilda)


def _hilda(health: httpx.Response) -> dict[str, Any]:
    try:
        status = parsed(health.content, "/health") if health.status_code == 200 else {}
    except EngineFailed:
        return {}
    engine = status.get("engine")
    ours = isinstance(engine, dict) and {"supports_steps", "supports_editing", "block_size"} <= set(engine)
    return status if ours and isinstance(status.get("limits"), dict) else {}


def address_of(url: str) -> str:
    """A server's address without a final slash or `/v1`. Raises `ConfigError`."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment:
        raise ConfigError(f"{url!r} is no address of a server", "write it as http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def key_header(variable: str | None, needed: bool = True) -> dict[str, str]:
    """The header with the key that an environment variable holds; nothing where none is named, or none is needed.

    Raises `ConfigError`.
    """
    key = os.environ.get(variable, "") if variable is not None else ""
    if variable is None or (not key and not needed):
        return {}
    if not key or not key.isascii() or key != key.strip() or "\n" in key:
        raise ConfigError(f"the environment variable {variable!r} holds no key", "set it to ASCII text")
    return {"Authorization": f"Bearer {key}"}


def parsed(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object that a server sent. Raises `EngineFailed`."""
    try:
        value = parse(text, allow_nan=True, allow_duplicates=True)
    except BadJson:
        value = None
    if not isinstance(value, dict):
        raise EngineFailed(f"{what} is no JSON object", "is it a server of language models?")
    return value


def unreachable(address: str, problem: httpx.HTTPError) -> EngineFailed:
    """Why nothing came, or not all of it."""
    if isinstance(problem, httpx.ConnectError | httpx.ConnectTimeout):
        return EngineFailed(f"no server answers at {address}", "start it, or mend the address")
    if isinstance(problem, httpx.TimeoutException):
        return EngineFailed(f"{address} fell silent ({type(problem).__name__})", "see its log, or allow it more time")
    return EngineFailed(f"{address} cut the answer off ({type(problem).__name__})", "see the server's log; ask again")


def refusal(status: int, headers: Mapping[str, str], body: bytes) -> HildaError:
    """The error that a response other than 200 stands for."""
    message = _message(body)
    reason = f" ({message})" if message else ""
    if status in (401, 403):
        return EngineFailed(f"the server refuses the key{reason}", "set the key's environment variable, and name it")
    if status == 404:
        return ModelError(f"the server has no such model or route{reason}", "GET /v1/models lists what it has")
    if status in (429, 503):
        wait = retry_after(headers)
        return Overloaded(f"the server is overloaded{reason}", "ask again later", 1.0 if wait is None else wait)
    if status in (408, 504):
        return DeadlineExceeded(f"the server gave up in time{reason}", "ask for less, or allow more")
    if 400 <= status < 500:
        return ConfigError(f"the server refuses the request with {status}{reason}")
    return EngineFailed(f"the server answers {status}{reason}", "see the server's log")


def failure(error: Any) -> HildaError:
    """The error that an `error` object inside a stream stands for."""
    fields = error if isinstance(error, dict) else {"message": str(error)}
    message = str(fields.get("message") or "no reason given")[:300]
    kinds = {"timeout_error": 504, "overloaded_error": 503, "rate_limit_error": 429, "not_found_error": 404}
    status = kinds.get(str(fields.get("type")), 400 if fields.get("type") == "invalid_request_error" else 502)
    return refusal(status, {}, json.dumps({"error": {"message": message}}).encode())


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of the header Retry-After, which is a number or a date; None where there is none that makes sense."""
    text = headers.get("retry-after", headers.get("Retry-After", ""))
    try:
        seconds = float(text)
    except ValueError:
        try:
            then = parsedate_to_datetime(text)
        except (ValueError, TypeError):
            return None
        then = then if then.tzinfo is not None else then.replace(tzinfo=UTC)
        seconds = (then - datetime.now(UTC)).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _message(body: bytes) -> str:
    """What a server says about its error, in whichever of the usual shapes, on one line."""
    try:
        value = parse(body, allow_nan=True, allow_duplicates=True)
    except BadJson:
        return ""
    for _ in range(3):
        if not isinstance(value, dict):
            break
        value = value.get("error", value.get("message", value.get("detail")))
    return " ".join(str(value).split())[:300] if isinstance(value, str) else ""
