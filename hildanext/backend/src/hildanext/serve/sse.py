"""Server-sent events: how they are written, and a response that ends them properly."""

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from hildanext.engine.base import Cancelled

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"

DOCUMENTED: dict[str, Any] = {
    "text/event-stream": {
        "itemSchema": {
            "type": "object",
            "properties": {
                "event": {"type": "string"},
                "id": {"type": "string"},
                "data": {"type": "string", "contentMediaType": "application/json"},
            },
            "required": ["data"],
        }
    }
}
"""Content of a response in the OpenAPI document."""


def event(data: Any, name: str | None = None, id: int | None = None) -> bytes:
    """One event with JSON data, which holds no line break."""
    head = (f"id: {id}\n" if id is not None else "") + (f"event: {name}\n" if name is not None else "")
    return f"{head}data: {json.dumps(data, ensure_ascii=False, allow_nan=False)}\n\n".encode()


class EventStream(Response):
    """Sends what a generator yields, as it comes. However it ends, even before it began, `close` is called."""

    media_type = "text/event-stream"
    charset = "utf-8"

    def __init__(self, source: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        self.source, self.close = source, close
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self.source:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Cancelled:  # nobody is there to be told
            return
        finally:
            self.close()
            await self.source.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
