"""Runs the application until it is told to stop, and then lets what is going on come to its end."""

from __future__ import annotations

import asyncio
import socket
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette

from vita_jax.errors import UserError
from vita_jax.serving.limits import Limits
from vita_jax.serving.service import Service

# Bytes of a WebSocket message beyond `message_bytes`: what is longer than that is answered, what is longer than both
# ends the connection.
MESSAGE_MARGIN = 2**16
PING_SECONDS = 20.0


def bound_socket(host: str, port: int, limits: Limits) -> socket.socket:
    """A socket that listens; a client that acknowledges nothing for `send_seconds` is disconnected by the system.

    Raises:
      UserError: the address cannot be used.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        # localhost has two addresses; whoever asks for it tries both, but only one may be written down somewhere.
        family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        listening = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _unusable(host, port, error) from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # what is accepted has it, too
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * limits.send_seconds))
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise _unusable(host, port, error) from error
    return listening


def _unusable(host: str, port: int, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port")


class NotRefused:
    """Leaves out of the log what uvicorn says of every WebSocket that was refused with a status of its own."""

    def filter(self, record: Any) -> bool:
        """Whether it is logged."""
        return "without completing handshake" not in record.getMessage()


# Warnings and mistakes, on standard error.
LOG = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(message)s"}},
    "filters": {"not refused": {"()": NotRefused}},
    "handlers": {
        "standard error": {"class": "logging.StreamHandler", "formatter": "plain", "filters": ["not refused"]}
    },
    "loggers": {"uvicorn": {"handlers": ["standard error"], "level": "WARNING", "propagate": False}},
}


class Server(uvicorn.Server):
    """uvicorn, which on the first signal begins nothing new and waits for what runs, and on a second one stops."""

    def __init__(self, app: Starlette, service: Service, *, tls: tuple[str, str] | None = None) -> None:
        """tls: files of certificate and key."""
        certificate, key = tls or (None, None)
        super().__init__(
            uvicorn.Config(
                app,
                ssl_certfile=certificate,
                ssl_keyfile=key,
                log_config=LOG,
                proxy_headers=False,  # a client could say it were another
                access_log=False,
                server_header=False,
                ws="websockets-sansio",
                ws_max_size=service.limits.message_bytes + MESSAGE_MARGIN,
                ws_ping_interval=PING_SECONDS,
                ws_ping_timeout=service.limits.send_seconds,
                timeout_keep_alive=15,
                timeout_graceful_shutdown=int(service.limits.stop_seconds) + 1,
                lifespan="off",
            )
        )
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called with a signal."""
        if self._service.stopping or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._service.stopping = True
        self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self._ending = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        """Waits until nothing runs any more, at most `stop_seconds`."""
        service = self._service
        sessions = [asyncio.ensure_future(session.stop()) for session in list(service.sessions)]
        end = asyncio.get_running_loop().time() + service.limits.stop_seconds
        while asyncio.get_running_loop().time() < end and (any(service.worker.load) or service.sessions):
            await asyncio.sleep(0.05)
        for session in sessions:
            session.cancel()
        self.should_exit = True


def run(app: Starlette, service: Service, listening: socket.socket, tls: tuple[str, str] | None = None) -> None:
    """Serves until a signal."""
    try:
        Server(app, service, tls=tls).run([listening])
    finally:
        service.close()
