"""What every request passes before a route sees it: an id, a name, a key, and a body that is JSON and not too large.

Pure ASGI, so that nothing is buffered on the way out and a client that goes away is noticed.
"""

import asyncio
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import MutableMapping
from typing import Any, NoReturn

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hildanext.core.errors import HildaError
from hildanext.core.json_text import BROKEN, HALF, NAN, TOO_LONG, TWICE, BadJson, parse
from hildanext.core.registry import under_profile
from hildanext.serve.errors import Refused, answer
from hildanext.serve.metrics import Metrics
from hildanext.serve.settings import ServeConfig

access = logging.getLogger("hildanext.access")

SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
OPEN = ("/health", "/health/live", "/health/ready", "/", "/docs", "/openapi.json", "/favicon.ico")
"""Routes that never ask for a key; so do the page's files, below `/static/`."""
WITH_BODY = ("POST", "PUT", "PATCH", "DELETE")
FINISH_SECONDS = 2.0
BROKEN_BODY = "broken"
"""Set in a request's state where its body was no HTTP, which the connection has answered itself."""
ENDLESS = "/events"
"""The end of paths whose answer has no end: they have no HEAD."""

HEADERS: list[tuple[bytes, bytes]] = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
        b"frame-ancestors 'none'",
    ),
]
"""On every answer that does not have its own: nothing is loaded from elsewhere, nor shown inside another page."""


class UnderProfile:
    """Whatever a request makes the service build, it builds under the service's profile."""

    def __init__(self, app: ASGIApp, profile: str) -> None:
        self.app, self.profile = app, profile

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with under_profile(self.profile, "request"):
            await self.app(scope, receive, send)


class RequestId:
    """Gives every request an id, logs it as one JSON line when it is over, and counts it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name = _header(scope, b"x-request-id")
        name = name if SANE_ID.fullmatch(name) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = name
        method = scope["method"]
        headless = method == "HEAD" and not scope["path"].endswith(ENDLESS)
        if headless:
            scope["method"] = "GET"
        begun = time.perf_counter()
        answered: dict[str, Any] = {"status": 500, "bytes": 0}
        begins = False

        async def send_marked(message: Message) -> None:
            nonlocal begins
            if message["type"] == "http.response.start":
                answered["status"], begins = message["status"], True
                there = {key for key, _ in message["headers"]}
                more = [pair for pair in HEADERS if pair[0] not in there]
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode()), *more]
            elif message["type"] == "http.response.body":
                answered["bytes"] += len(message.get("body", b""))
                if headless:
                    message = {**message, "body": b""}
            await send(message)

        try:
            if _header(scope, b"content-length") and _header(scope, b"transfer-encoding"):
                await _refuse_framing(scope, receive, send_marked)
            else:
                await self.app(scope, receive, send_marked)
            if not begins:  # the client went, or broke its own body: no fault of ours
                answered["status"] = 400 if scope["state"].get(BROKEN_BODY) else 499
        finally:
            seconds = time.perf_counter() - begun
            route = getattr(scope.get("route"), "path", "unknown")
            self.metrics.requests.labels(_known_method(method), route, str(answered["status"])).inc()
            client = scope.get("client")
            line = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "id": name,
                "client": client[0] if client else None,
                "method": method[:20],
                "path": scope["path"][:300],
                "seconds": round(seconds, 4),
                **answered,
            }
            access.info(json.dumps(line))


class Auth:
    """Refuses requests for another host's name, and those without the key where there is one."""

    def __init__(self, app: ASGIApp, settings: ServeConfig, key: str | None) -> None:
        self.app = app
        self.hosts = settings.allowed_hosts()
        self.key = key.encode() if key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except Refused as error:
                await answer(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        host = _host(_header(scope, b"host"))
        if self.hosts is not None and host not in self.hosts:
            raise Refused(
                f"this service is not called {host[:100]!r}",
                "name it in serve.hosts to allow that",
                421,
                "unknown_host",
            )
        path = scope["path"]
        if self.key is None or path in OPEN or path.startswith("/static/"):
            return
        kind, _, key = _header(scope, b"authorization").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1"), self.key):
            what = "the key is wrong" if key else "this service asks for a key"
            raise Refused(what, "send it as Authorization: Bearer KEY", 401, "invalid_api_key")


class BodyLimit:
    """Reads a body whole before anything else runs: so long, so large, and JSON, or a clear refusal."""

    def __init__(self, app: ASGIApp, settings: ServeConfig) -> None:
        self.app, self.limit, self.seconds = app, settings.max_body_bytes, settings.body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in WITH_BODY:
            await self.app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
            if body is None:  # gone before it had said all
                return
            if body:
                _check_kind(scope)
                check_json(body)
        except HildaError as error:
            if error.status == 413 and not _header(scope, b"expect"):
                await _let_finish(receive)
            response = answer(error)
            if error.status in (408, 413):  # what follows on this connection is no request
                response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> MutableMapping[str, Any]:
            return first.pop() if first else await receive()

        await self.app(scope, receive_again, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        announced = _header(scope, b"content-length")
        if announced.isascii() and announced.isdigit() and int(announced[:20]) > self.limit:
            self._too_large()
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.limit:
                        self._too_large()
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise Refused(
                f"the body was not whole after {self.seconds:g} s", "send it faster", 408, "request_timeout"
            ) from None

    def _too_large(self) -> NoReturn:
        raise Refused(f"the body is larger than {self.limit} bytes", "send less", 413, "body_too_large")


async def _refuse_framing(scope: Scope, receive: Receive, send: Send) -> None:
    """Of two lengths a proxy may believe the other one, and take what follows for another request."""
    await _let_finish(receive)
    message = "the request has both Content-Length and Transfer-Encoding"
    response = answer(Refused(message, "send one of them", 400, "invalid_http"))
    response.headers["Connection"] = "close"
    await response(scope, receive, send)


async def _let_finish(receive: Receive) -> None:
    """Throw away what a client still sends, for a while: many read no answer before they have said all."""
    try:
        async with asyncio.timeout(FINISH_SECONDS):
            while (await receive()).get("more_body", False):
                pass
    except TimeoutError:
        return


def check_json(body: bytes) -> None:
    """Raise `Refused` for what is no JSON text: `core.json_text` says what that is. A mark of byte order is none."""
    try:
        parse(body.decode("utf-8"))
    except UnicodeDecodeError as problem:
        raise Refused(
            f"the body is no UTF-8 (at byte {problem.start})", "send JSON in UTF-8", code="invalid_json"
        ) from None
    except BadJson as problem:
        message, hint = SAID[problem.kind]
        code = "invalid_text" if problem.kind == HALF else "invalid_json"
        raise Refused(message.format(problem.detail), hint, code=code) from None


SAID = {
    BROKEN: ("the body is no JSON ({})", "mend it"),
    HALF: ("a text in the body holds half a character (a lone surrogate)", "send whole characters"),
    NAN: ("the body holds {}", "send finite numbers"),
    TOO_LONG: ("the body holds a number beyond reason (thousands of digits)", "mend it"),
    TWICE: ("the body holds a key twice in one object ({})", "send it once"),
}
"""What a client is told, and what to do, by the kind of what is wrong."""


def _check_kind(scope: Scope) -> None:
    media_type = _header(scope, b"content-type").partition(";")[0].strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise Refused(
            f"the body is said to be {media_type[:100] or 'nothing'!r}",
            "send Content-Type: application/json",
            415,
            "media_type",
        )


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _host(header: str) -> str:
    """A Host header without its port; an IPv6 address without its brackets."""
    host = header.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _known_method(method: str) -> str:
    """Bounded, for a label that a client could otherwise choose."""
    return method if method in ("GET", "HEAD", "OPTIONS", *WITH_BODY) else "other"
