"""What a client may ask for: sizes, numbers, durations and rates. Each is answered with an error that names it."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from vita_jax.errors import UserError
from vita_jax.serving.problems import LIMITED, Problem

MAX_CLIENTS = 10_000  # addresses that a rate is remembered of


@dataclass(frozen=True)
class Limits:
    """Bounds of what is served; `--limit NAME=VALUE` changes one.

    Attributes:
      body_bytes: of an HTTP request.
      body_seconds: in which it has to arrive.
      message_bytes: of a WebSocket message.
      messages: of a chat request.
      text_characters: of all text of a request, and of what is to be spoken.
      images, sounds: of a request.
      image_pixels: of one picture.
      audio_seconds: of one sound; never more than the model's own limit.
      new_tokens: of one answer.
      requests_per_minute: of one client address, HTTP and new sessions together.
      messages_per_minute: of a session.
      audio_speed: seconds of sound per second that a session may send; a quarter of a minute's may come at once.
      waiting: requests that wait for their turn.
      request_seconds: from the beginning of an answer to its end.
      sessions: realtime sessions at a time.
      session_images: pictures that one may show.
      session_seconds: the longest one.
      idle_seconds: a session in which nothing is sent for so long is over.
      send_seconds: a client that takes nothing for so long is gone.
      stop_seconds: what running answers and sessions have left when the server is told to stop.
    """

    body_bytes: int = 32 * 2**20
    body_seconds: float = 30.0
    message_bytes: int = 4 * 2**20
    messages: int = 256
    text_characters: int = 32_000
    images: int = 16
    sounds: int = 16
    image_pixels: int = 16_000_000
    audio_seconds: float = 60.0
    new_tokens: int = 1024
    requests_per_minute: int = 240
    messages_per_minute: int = 6000
    audio_speed: float = 2.0
    waiting: int = 16
    request_seconds: float = 120.0
    sessions: int = 4
    session_images: int = 200
    session_seconds: float = 1800.0
    idle_seconds: float = 300.0
    send_seconds: float = 15.0
    stop_seconds: float = 10.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("waiting", "stop_seconds") else 1
            if value < least:
                raise UserError(f"limit {field.name} is {value}; it must be at least {least}")


def changed_limits(limits: Limits, changes: Sequence[str]) -> Limits:
    """Limits with some `NAME=VALUE` changed. Raises UserError for an unknown name or a value that is no number."""
    types = {field.name: type(getattr(limits, field.name)) for field in fields(limits)}
    values = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals or name not in types:
            raise UserError(f"--limit {change} is none; write NAME=VALUE with one of {', '.join(types)}")
        try:
            values[name] = types[name](value)
        except ValueError:
            kind = "a whole number" if types[name] is int else "a number"
            raise UserError(f"--limit {change}: {value!r} is not {kind}") from None
    return replace(limits, **values)


class Rate:
    """So many in a minute from each client; a quarter of a minute's may come at once."""

    def __init__(
        self, per_minute: int, name: str = "requests_per_minute", clock: Callable[[], float] = time.monotonic
    ) -> None:
        """name: of the limit."""
        self.per_minute, self._name, self._clock = per_minute, name, clock
        self._room = max(1.0, per_minute / 4)
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> how many, at which time

    def take(self, client: str) -> None:
        """Counts one. Raises a `Problem` 429 if it is one too many."""
        now = self._clock()
        left, since = self._left.pop(client, (self._room, now))
        left = min(self._room, left + (now - since) * self.per_minute / 60)
        allowed = left >= 1
        self._left[client] = (left - 1 if allowed else left, now)
        while len(self._left) > MAX_CLIENTS:
            self._left.popitem(last=False)
        if not allowed:
            raise Problem(
                429,
                f"more than {self.per_minute} a minute (limit {self._name}); slow down",
                kind=LIMITED,
                code="rate_limit_exceeded",
                retry_after=(1 - left) * 60 / self.per_minute,
            )
