"""Whatever goes wrong, in one shape: {"error": {"message", "type", "param", "code"}}, as OpenAI's clients expect it."""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from http import HTTPStatus
from typing import Any, get_type_hints

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, TypeAdapter
from starlette.exceptions import HTTPException

from hildanext.core.complaints import complaints
from hildanext.core.errors import HildaError

logger = logging.getLogger(__name__)

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    429: "rate_limit_error",
    499: "cancelled_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""The rest are invalid requests below 500, and the server's own errors from there on."""

MEANINGS = {
    400: "the request makes no sense: the message says what and where",
    401: "no key, or a wrong one",
    404: "there is no such thing",
    405: "the route has other methods",
    408: "the body came too slowly",
    409: "it is not in a state for that",
    413: "the body is too large",
    415: "the body is no JSON",
    421: "the service has another name",
    431: "the headers are too large",
    499: "whoever asked has gone away",
    500: "a fault of the service, logged under the request's id",
    502: "the engine failed",
    503: "too much to do, or closing: Retry-After says when to come again",
    504: "no whole answer within the deadline",
    507: "the service's disk is full, or cannot be written",
}

MOST_READ = 100
"""How many of a body's faults are looked into: a list of a million wrong items has as many."""

OWN_CODES = {
    "unknown_field": "unknown_field",
    "given_twice": "invalid_value",
    "not_offered": "unsupported_value",
    "no_content": "invalid_value",
}
"""Our own complaints about a body, by their type: their words are said whole, under these codes."""

CONTENT: dict[str, Any] = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}
"""Of an error's response in the OpenAPI document, whatever the route's own answer is."""


class Refused(HildaError):
    """A request that the service itself does not take."""

    def __init__(
        self, message: str, hint: str = "", status: int = 400, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message, hint)
        self.status, self.code, self.param = status, code, param


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors that every route may answer with, and these, for the OpenAPI document."""
    known = sorted({400, 401, 405, 421, 500, 503, *statuses})
    return {status: {"description": MEANINGS[status], "content": CONTENT} for status in known}


def shape(message: str, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The one shape. Text that is no Unicode is escaped, so that it can be sent."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": _clean(message), "type": kind, "param": _clean(param), "code": code}}


def shape_of(error: HildaError) -> dict[str, Any]:
    """A `HildaError` in the one shape; its code is the error's name where it has none of its own."""
    code = getattr(error, "code", None) or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).lower()
    return shape(str(error), error.status, code, getattr(error, "param", None))


def answer(error: HildaError) -> JSONResponse:
    """A `HildaError` as a response."""
    headers: dict[str, str] = {}
    if hasattr(error, "retry_after"):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(shape_of(error), error.status, headers)


def install(app: FastAPI) -> None:
    """Answer everything that is raised inside `app` in the one shape."""
    app.add_exception_handler(HildaError, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _of_framework)
    app.add_exception_handler(Exception, _unexpected)


async def _known(request: Request, error: Exception) -> Response:
    assert isinstance(error, HildaError)
    return answer(error)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    message, param, code = describe(error.errors(), _schema(request.scope["endpoint"], error.errors()))
    return JSONResponse(shape(message, 400, code, param), 400)


async def _of_framework(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        if request.method == "OPTIONS":
            head = ", HEAD" if "GET" in allowed else ""
            return Response(status_code=204, headers={"Allow": f"{allowed}{head}, OPTIONS"})
        message = f"{request.method} is not for {path}: use {allowed}"
        return JSONResponse(shape(message, 405, "method_not_allowed"), 405, error.headers)
    if error.status_code == 404:
        return JSONResponse(shape(f"no route {path}: GET /docs lists what there is", 404, "no_route"), 404)
    code = HTTPStatus(error.status_code).name.lower()
    return JSONResponse(shape(str(error.detail), error.status_code, code), error.status_code, error.headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    name = request.scope.get("state", {}).get("request_id", "-")
    logger.error("request %s: %s", name, type(error).__name__, exc_info=error)
    message = f"a fault of the service: report it with the request's id {name}, under which it was logged"
    return JSONResponse(shape(message, 500, "internal_error"), 500, {"X-Request-ID": name})


def describe(problems: Sequence[Mapping[str, Any]], schema: Mapping[str, Any]) -> tuple[str, str | None, str]:
    """Message, field and code of what a request's types do not allow, as `_schema` has them."""
    first = problems[0]
    if first["loc"] == ("body",) and first["type"] == "missing":
        return "the body is missing: send a JSON object", None, "invalid_value"
    if first["loc"] == ("body",) and first["type"].endswith("_type"):
        return "give a JSON object", None, "invalid_value"
    problems = [each for each in problems if each["type"] == "not_offered"] or problems  # not that it is no text, too
    read = problems[:MOST_READ]
    said = complaints([{**problem, "loc": problem["loc"][1:]} for problem in read], schema, OWN_CODES)
    parts = [f"{place}: {text}" if place else text for place, text in said]
    more = f" (and {len(parts) - 3 + len(problems) - len(read)} more)" if len(parts) > 3 else ""
    code = OWN_CODES.get(problems[0]["type"], "invalid_value")
    return "; ".join(parts[:3]) + more, said[0][0] or None, code


def _schema(endpoint: Callable[..., Any], problems: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """JSON Schema of an endpoint's body, or of an object of those of its other parameters that are wrong."""
    kinds = get_type_hints(endpoint, include_extras=True)
    kinds.pop("return", None)
    if problems[0]["loc"][0] == "body":
        return _body_schema(next(kind for kind in kinds.values() if isinstance(kind, type(BaseModel))))
    names = dict.fromkeys(problem["loc"][1] for problem in problems)
    return {"properties": {name: TypeAdapter(kinds[name]).json_schema() for name in names if name in kinds}}


@cache
def _body_schema(body: type[BaseModel]) -> dict[str, Any]:
    return body.model_json_schema()


def _clean(text: str | None) -> Any:
    return None if text is None else text.encode("utf-8", "backslashreplace").decode("utf-8")
