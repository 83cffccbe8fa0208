"""Who may ask: the host and page that a request is for and from, its token, and how often it may come."""

from __future__ import annotations

import hmac
import ipaddress
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from vita_jax.serving.problems import UNAUTHORISED, Problem, as_problem, overloaded
from vita_jax.serving.responses import problem_response
from vita_jax.serving.service import Service

# A browser cannot give a WebSocket headers of its own; the API lets it name the token as a subprotocol.
TOKEN_PROTOCOL = "openai-insecure-api-key."
API = "/v1/"
NO_SUCH_PATH = "other"  # label of requests for what is not there


def hostname(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine, whoever is asked."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def given_token(headers: Headers) -> str | None:
    """The token that a request brings."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value:
        return value.strip()
    for protocol in subprotocols(headers):
        if protocol.startswith(TOKEN_PROTOCOL):
            return protocol.removeprefix(TOKEN_PROTOCOL)
    return None


def subprotocols(headers: Headers) -> list[str]:
    """What a WebSocket offers to speak."""
    return [part.strip() for part in headers.get("sec-websocket-protocol", "").split(",") if part.strip()]


def check_origin(connection: HTTPConnection, service: Service) -> None:
    """A page of another site must not use the server of whoever looks at it.

    Raises:
      Problem: 403, the page is neither the server's own nor one of `service.origins`; 421, the server is called by a
        name that is not its own, as a page of another site can arrange it (without a token only loopback names are).
    """
    host, origin = connection.headers.get("host", ""), connection.headers.get("origin")
    if origin in service.origins:
        return
    if service.token is None and not is_loopback(hostname(host)):
        raise Problem(421, "without a token this server answers to localhost only", code="wrong_host")
    if origin is not None:
        scheme = "https" if connection.scope["scheme"] in ("https", "wss") else "http"
        if origin.lower() != f"{scheme}://{host.lower()}":
            raise Problem(
                403,
                f"pages of {origin[:80]!r} may not use this server; start it with --origin and their address if they "
                "are to",
                code="wrong_origin",
            )


def check_token(headers: Mapping[str, str] | Headers, service: Service) -> None:
    """Raises `Problem` 401 unless the request brings the token, where there is one."""
    if service.token is None:
        return
    given = given_token(headers)
    if given is None or not hmac.compare_digest(given.encode(), service.token.encode()):
        raise Problem(
            401,
            "the token is missing or wrong; send it as Authorization: Bearer TOKEN",
            kind=UNAUTHORISED,
            code="invalid_api_key",
        )


def check(connection: HTTPConnection, service: Service) -> None:
    """Everything that decides whether a request is looked at. Raises `Problem`."""
    path = connection.scope["path"]
    if path == "/health":
        return
    check_origin(connection, service)
    if path.startswith(API) or path == "/metrics":
        check_token(connection.headers, service)
    if path.startswith(API):
        service.rate.take(connection.client.host if connection.client else "")
        if service.stopping:
            raise overloaded("the server is stopping", service.limits.stop_seconds)


class Guard:
    """Checks every request before its endpoint sees it, turns what is raised into answers, and counts both."""

    def __init__(self, app: ASGIApp, service: Service, paths: frozenset[str]) -> None:
        """paths: those that there are, the labels of the figures."""
        self._app, self._service, self._paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, status = time.perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            check(Request(scope), self._service)
            await self._app(scope, receive, noted)
        except (OSError, ClientDisconnect):  # the client has gone, or takes nothing (TimeoutError)
            if status:
                raise
        except Exception as error:
            problem = as_problem(error)
            if status:  # half of the answer is sent: the connection has to break
                raise
            self._service.metrics.refused.labels(problem.code or str(problem.status)).inc()
            await problem_response(problem)(scope, receive, noted)
            if problem.status == 500:
                raise
        finally:
            path = scope["path"] if scope["path"] in self._paths else NO_SUCH_PATH
            self._service.metrics.requests.labels(path, str(status or "left")).inc()
            self._service.metrics.request_seconds.labels(path).observe(time.perf_counter() - began)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        socket = WebSocket(scope, receive, send)
        try:
            check(socket, self._service)
        except Problem as problem:
            self._service.metrics.refused.labels(problem.code or str(problem.status)).inc()
            await socket.send_denial_response(problem_response(problem))
            return
        await self._app(scope, receive, send)
