"""A server on this machine that answers OpenAI's chat completions as a test tells it to."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[list[dict[str, str]]], str | int | None]


@dataclass
class StubTeacher:
    """Address of the server, and what it was asked: the JSON of every request, and its headers (lower case)."""

    url: str
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


@contextlib.contextmanager
def stub_teacher(reply: Reply) -> Iterator[StubTeacher]:
    """Serves until the end of the block.

    Args:
      reply: messages -> text; a number is an HTTP status in place of it; None: a text that was cut off.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stub.asked.append({"path": self.path, **request})
            stub.headers.append({name.lower(): value for name, value in self.headers.items()})
            said = reply(request["messages"])
            if isinstance(said, int):
                self._send(said, {"error": {"message": f"stub says {said}"}})
                return
            message = {"role": "assistant", "content": "Once upon" if said is None else said}
            choice = {"index": 0, "message": message, "finish_reason": "length" if said is None else "stop"}
            self._send(
                200, {"id": "1", "object": "chat.completion", "created": 0, "model": "stub", "choices": [choice]}
            )

        def _send(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub = StubTeacher(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
