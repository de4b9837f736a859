"""The OpenAPI document: FastAPI's, with our one shape of errors in place of its own."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from hildanext.serve.responses import ErrorAnswer

FOREIGN = ("HTTPValidationError", "ValidationError")
"""FastAPI's shape of a 422, which this service never answers."""


def document(app: FastAPI, asks_key: bool) -> dict[str, Any]:
    """The document of an app's routes."""
    made = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    for methods in made["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            for response in operation["responses"].values():
                for content in response.get("content", {}).values():
                    if "itemSchema" in content:  # FastAPI adds that the whole stream is a text
                        content.pop("schema", None)
    components = made.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in FOREIGN:
        schemas.pop(name, None)
    whole = ErrorAnswer.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(whole.pop("$defs"))
    schemas["ErrorAnswer"] = whole
    if asks_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
    return made
