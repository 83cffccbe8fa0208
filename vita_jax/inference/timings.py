"""How long an answer takes: when each stage has its first result, and how fast those go that make or take sound."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

# What happens from the end of a question to the beginning of an answer, in order.
SPEECH_ENDS, SOUND_ENCODED, FIRST_TOKEN, FIRST_PIECE, FIRST_CODE, FIRST_SAMPLE = EVENTS = (
    "end of speech",
    "last encoder chunk",
    "first LLM token",
    "first piece of text",
    "first speech token",
    "first audio sample",
)
# Stages whose work is measured in seconds of sound.
ENCODER, AR_DECODER, CODEC = STAGES = ("encoder", "AR decoder", "codec")


@dataclass
class Timeline:
    """Measures one exchange; nothing is printed.

    Attributes:
      marks: event -> seconds at which it happened first.
      worked: stage -> seconds it has been at work.
      sound: stage -> seconds of sound that it took or made.
      clock: seconds from some moment on.
    """

    marks: dict[str, float] = field(default_factory=dict)
    worked: dict[str, float] = field(default_factory=dict)
    sound: dict[str, float] = field(default_factory=dict)
    clock: Callable[[], float] = time.perf_counter

    def mark(self, event: str) -> None:
        """Notes that something has happened, if it is the first time."""
        self.marks.setdefault(event, self.clock())

    @contextmanager
    def work(self, stage: str, seconds: float = 0.0) -> Iterator[None]:
        """Measures a stage's work on that many seconds of sound."""
        start = self.clock()
        try:
            yield
        finally:
            self.worked[stage] = self.worked.get(stage, 0.0) + self.clock() - start
            self.made(stage, seconds)

    def made(self, stage: str, seconds: float) -> None:
        """Notes that a stage's work, measured elsewhere, was on so many seconds of sound."""
        self.sound[stage] = self.sound.get(stage, 0.0) + seconds

    def watch(self, stage: str, items: Iterable[T], seconds: float, first: str | None = None) -> Iterator[T]:
        """The items, each of that many seconds of sound, while the time they take is measured.

        first: event of the first one.
        """
        iterator = iter(items)
        try:
            while True:
                with self.work(stage):
                    try:
                        item = next(iterator)
                    except StopIteration:
                        return
                self.made(stage, seconds)
                if first is not None:
                    self.mark(first)
                yield item
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()

    def since(self, event: str, start: str = SPEECH_ENDS) -> float | None:
        """Seconds from one event to another; None if one of them has not happened."""
        if event not in self.marks or start not in self.marks:
            return None
        return self.marks[event] - self.marks[start]

    def real_time_factor(self, stage: str) -> float | None:
        """Seconds of work per second of sound, below 1 is faster than it plays; None if there was none."""
        return self.worked[stage] / self.sound[stage] if self.sound.get(stage) else None
