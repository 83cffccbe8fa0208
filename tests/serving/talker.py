"""A user of a realtime session, by the official client."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.serving.server import MODEL, Served
from vita_jax.serving.sounds import RATE, from_bytes, to_bytes

PATIENCE = 40  # seconds
BLOCK = RATE // 5
DONE = "response.done"
IGNORED = "vita_jax.input_audio_buffer.ignored"


class Talker:
    """One connection."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def update(self, **session: Any) -> Any:
        """Changes the session; what is answered."""
        self.connection.session.update(session={"type": "realtime", **session})
        return self.listen(("session.updated", "error"))[-1]

    def say(self, samples: np.ndarray, rate: int = RATE) -> None:
        """(n,) float32, block by block, faster than it is spoken."""
        for start in range(0, len(samples), rate // 5):
            data = base64.b64encode(to_bytes(samples[start : start + rate // 5])).decode()
            self.connection.input_audio_buffer.append(audio=data)

    def show(self, picture: bytes) -> None:
        """A picture for the next question."""
        url = "data:image/png;base64," + base64.b64encode(picture).decode()
        self._item({"type": "input_image", "image_url": url})

    def ask(self, text: str) -> None:
        """A typed question."""
        self._item({"type": "input_text", "text": text})
        self.connection.response.create()

    def _item(self, part: dict[str, Any]) -> None:
        self.connection.conversation.item.create(item={"type": "message", "role": "user", "content": [part]})

    def listen(self, until: str | tuple[str, ...] | Callable[[Any], bool]) -> list[Any]:
        """The events up to the first of some types, or that is meant."""
        kinds = (until,) if isinstance(until, str) else until
        wanted = until if callable(until) else lambda event: event.type in kinds
        events: list[Any] = []
        while True:
            try:
                data = self.connection._connection.recv(timeout=PATIENCE, decode=False)
            except TimeoutError:
                raise AssertionError(f"no {until} after {types(events)}") from None
            events.append(self.connection.parse_event(data))
            if wanted(events[-1]):
                return events


@contextlib.contextmanager
def talking(served: Served, **options: Any) -> Iterator[Talker]:
    """A session as long as the block lasts."""
    with served.client(**options).realtime.connect(model=MODEL) as connection:
        talker = Talker(connection)
        talker.listen("session.created")
        yield talker


def transcript(events: list[Any]) -> str:
    """What an answer says."""
    kinds = ("response.output_audio_transcript.delta", "response.output_text.delta")
    return "".join(event.delta for event in events if event.type in kinds)


def sound(events: list[Any]) -> np.ndarray:
    """An answer's sound, (n,) float32 at 24 kHz."""
    data = [base64.b64decode(event.delta) for event in events if event.type == "response.output_audio.delta"]
    return from_bytes(b"".join(data))


def types(events: list[Any]) -> list[str]:
    """Their types; of several alike that follow each other one."""
    found: list[str] = []
    for event in events:
        if not found or found[-1] != event.type:
            found.append(event.type)
    return found
