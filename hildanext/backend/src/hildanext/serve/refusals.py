"""What a client hears when something is wrong: one shape, whatever went wrong, and a status that says whose fault.

{"error": {"message": what happened and what to do, "type": ..., "param": the field or null, "code": a short name}}
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from hildanext.errors import HildaError

logger = logging.getLogger(__name__)

TYPES = {401: "authentication_error", 403: "permission_error", 408: "timeout_error", 409: "conflict_error"} | {
    429: "rate_limit_error",
    499: "cancelled",
    500: "server_error",
    502: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""The `type` of a status; any other is an `invalid_request_error`."""

CODES = {400: "invalid_request", 401: "invalid_api_key", 403: "forbidden", 404: "not_found"} | {
    405: "method_not_allowed",
    408: "request_timeout",
    413: "body_too_large",
    415: "unsupported_media_type",
    500: "internal_error",
    503: "overloaded",
}

MEANING = {
    400: "The request makes no sense as it is.",
    401: "The key is missing or wrong.",
    403: "The host or the page that asks is not allowed.",
    404: "There is no such thing.",
    405: "The route has other methods.",
    408: "The request took too long to arrive.",
    409: "Not in this state.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    500: "A fault of the service; the log has it under the request's id.",
    502: "The engine failed.",
    503: "Too much to do, or closing; `Retry-After` says when to ask again.",
    504: "The deadline passed before the text was whole.",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class Refused(HildaError):
    """A request that is turned away with a status of its own."""

    def __init__(self, status: int, message: str, hint: str = "", param: str | None = None, code: str = "") -> None:
        super().__init__(message, hint)
        self.status, self.param = status, param
        self.code = code if code else CODES.get(status, "invalid_request")
        self.headers: dict[str, str] = {}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route, for OpenAPI; what any request may meet is always among them."""
    always = {400, 401, 403, 405, 408, 413, 415, 500, 503}
    return {status: {"model": ErrorBody, "description": MEANING[status]} for status in sorted(always | set(statuses))}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The one shape. Half characters of what a client sent are shown escaped."""
    shown = {"message": message, "type": TYPES.get(status, "invalid_request_error"), "param": param, "code": code}
    clean = {key: _printable(value) if isinstance(value, str) else value for key, value in shown.items()}
    return {"error": clean}


def error_of(error: HildaError) -> dict[str, Any]:
    """The shape of an error of ours."""
    code = error.code if isinstance(error, Refused) else _snake(type(error).__name__)
    return error_body(error.status, str(error), getattr(error, "param", None), code)


def refusal(error: HildaError) -> JSONResponse:
    """The answer to a request that met `error`."""
    headers = dict(getattr(error, "headers", {}))
    retry = getattr(error, "retry_after", None)
    if retry is not None:
        headers["Retry-After"] = str(max(1, round(retry)))
    elif error.status in (429, 503):
        headers["Retry-After"] = "1"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_of(error), error.status, headers)


def install(app: FastAPI) -> None:
    """Answer every error in the one shape."""

    async def ours(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HildaError)
        return refusal(error)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return refusal(_of_http(request, error))

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return refusal(_of_validation(error))

    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        name = request.scope.get("state", {}).get("request_id", "-")
        logger.error("request %s: %s", name, type(error).__name__, exc_info=error)
        body = error_body(500, f"a fault of the service: report it with the request id {name}", code="internal_error")
        return JSONResponse(body, 500, {"X-Request-ID": name})

    app.add_exception_handler(HildaError, ours)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, unexpected)


def _of_http(request: Request, error: HTTPException) -> Refused:
    path, method = request.url.path, request.method
    if error.status_code == 404:
        found = Refused(404, f"nothing is at {path[:200]!r}", "GET /openapi.json lists the routes")
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "others")
        found = Refused(405, f"{path[:200]!r} has no method {method}", f"it has: {allowed}")
    else:
        found = Refused(error.status_code, str(error.detail), "see GET /openapi.json")
    found.headers = dict(error.headers or {})
    return found


def _of_validation(error: RequestValidationError) -> Refused:
    """All that is wrong, of at most five fields; the first names `param`."""
    seen: dict[str, str] = {}
    for one in error.errors():
        place = _place(one)
        seen.setdefault(place, _say(one))
    told = [f"{place}: {text}" if place else text for place, text in list(seen.items())[:5]]
    more = f" (and {len(seen) - 5} more)" if len(seen) > 5 else ""
    first = next(iter(seen), "")
    return Refused(400, "; ".join(told) + more, "see GET /openapi.json for what it takes", first or None)


def _place(one: Mapping[str, Any]) -> str:
    context = one.get("ctx") or {}
    parts = [str(part) for part in one["loc"] if part not in ("body", "query", "path", "header")]
    # The branches of a union are named in a location: they are types, not fields.
    parts = [part for part in parts if not re.search(r"[\[\]]|^(str|int|float|bool|function-)", part)]
    return ".".join([*parts, *([context["field"]] if "field" in context else [])])[:200]


def _say(one: Mapping[str, Any]) -> str:
    if one["type"] == "missing":
        return "the body is missing" if list(one["loc"]) == ["body"] else "is missing"
    text = str(one["msg"]).removeprefix("Value error, ")
    got = one.get("input")
    if one["type"] in ("unknown_field", "value_error") or isinstance(got, dict | list):
        return text
    shown = repr(got)
    return f"{text}, got {shown if len(shown) < 60 else type(got).__name__}"


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
