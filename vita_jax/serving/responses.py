"""Bodies of requests in, bodies of answers out, each within its time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vita_jax.serving.limits import Limits
from vita_jax.serving.problems import Problem, as_problem, invalid


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII, which holds any text."""
    return Response(json.dumps(content), status, headers, "application/json")


def problem_response(problem: Problem) -> Response:
    """An error as it is sent."""
    return json_response(problem.body, problem.status, problem.headers)


def sent_event(content: Any) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(content)}\n\n".encode()


END_OF_EVENTS = b"data: [DONE]\n\n"


async def read_body(request: Request, limits: Limits, kind: str) -> bytes:
    """The body of a request.

    Args:
      kind: media type that it must have. A browser sends a page of another site no such one without being asked.

    Raises:
      Problem: 415, another type; 413, too long; 408, it takes too long.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != kind:
        raise Problem(415, f"the request must have Content-Type: {kind}")
    too_long = Problem(
        413, f"the request has more than {limits.body_bytes} bytes (limit body_bytes)", code="limit_exceeded"
    )
    promised = request.headers.get("content-length", "0")
    if not promised.isdecimal() or len(promised) > 15:
        raise invalid("Content-Length is no number")
    if int(promised) > limits.body_bytes:
        raise too_long
    pieces, size = [], 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for piece in request.stream():
                pieces.append(piece)
                size += len(piece)
                if size > limits.body_bytes:
                    raise too_long
    except TimeoutError:
        raise Problem(
            408, f"the request did not arrive within {limits.body_seconds:g} s (limit body_seconds)", code="timeout"
        ) from None
    return b"".join(pieces)


class StreamedResponse(Response):
    """A body that comes in pieces; a client that does not take one in time is left.

    A mistake on the way becomes an event of its own where the body is one of events; elsewhere the body breaks off, so
    that it cannot be taken for whole.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[bytes],
        media_type: str,
        send_seconds: float,
        close: Callable[[], Awaitable[None]],
    ) -> None:
        """
        Args:
          pieces: of the body.
          media_type: of the body.
          send_seconds: in which a client takes a piece.
          close: called in the end, whatever happens.
        """
        super().__init__(None, 200, {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}, media_type)
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        self._pieces, self._send_seconds, self._close = pieces, send_seconds, close
        self._events = media_type == "text/event-stream"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def give(message: Mapping[str, Any]) -> None:
            async with asyncio.timeout(self._send_seconds):
                await send(message)

        try:
            await give({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for piece in self._pieces:
                    await give({"type": "http.response.body", "body": piece, "more_body": True})
            except (TimeoutError, OSError):
                raise
            except Exception as error:
                if not self._events:
                    raise
                await give(
                    {"type": "http.response.body", "body": sent_event(as_problem(error).body), "more_body": True}
                )
            await give({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._pieces.aclose()
            await self._close()
