"""A small HTTP server whose answers to POST are what a test says, byte for byte."""

import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CARDS = {"data": [{"id": "small", "max_model_len": 512}, {"id": "other"}]}


class Handler(BaseHTTPRequestHandler):
    """GET lists models; POST does what `server.act(handler, body)` does."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        answer = self.server.routes.get(self.path)
        if answer is None:
            self.whole(404, {"error": {"message": "no such route"}})
        else:
            self.whole(200, answer)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.path, body, dict(self.headers)))
        try:
            self.server.act(self, body)
        except (BrokenPipeError, ConnectionResetError):
            self.server.gone.set()

    def whole(self, status: int, value: Any, kind: str = "application/json", **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(data)

    def begin(self, kind: str = "text/event-stream") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def say(self, *chunks: Any) -> None:
        for chunk in chunks:
            data = chunk if isinstance(chunk, bytes) else f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()
            self.wfile.write(data)
            self.wfile.flush()

    def reset(self) -> None:
        """End the connection by a TCP reset (RST), as a process that was killed does."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def cut(self) -> None:
        """Close the connection in the middle of a chunked answer."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()


@contextmanager
def misbehaving(act: Callable[[Handler, Any], None]) -> Iterator[Any]:
    """The server; `url`, `asked` (path, body, headers) and `gone` (a client went away) tell of it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.act, server.asked, server.gone = act, [], threading.Event()
    server.routes = {"/v1/models": CARDS}
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def chunk(text: str | None = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    """A chunk of /v1/completions."""
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}], **more}


def tells(handler: Handler, body: Any) -> None:
    """A well-behaved answer of three pieces."""
    handler.begin()
    handler.say(chunk("one "), chunk("two "), chunk("three"), chunk("", "length"))
    handler.say({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 3}}, b"data: [DONE]\n\n")
