"""Where the wall time of a stage goes, over all its starts. The share spent on steps that count is its goodput:

    goodput = 1 - (setting up + saving + waiting for data + steps that had to be repeated) / time of all starts

Setting up lasts from the beginning of a start until its first step has finished: opening data, restoring, compiling.
Saving is what the loop waits for; what is written in the background costs nothing. Waiting is the time in which a batch
was fetched, whether the device had something to do or not. Repeated is what was made behind the last checkpoint when a
process was killed, as far as its last report tells. The time between starts is told beside, and is part of neither: a
machine that was taken away and a weekend look alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

SECONDS = "_seconds"  # of the names in reports and checkpoints
SHARE = "goodput_share"


@dataclasses.dataclass(frozen=True)
class Spent:
    """Seconds of a stage so far.

    Attributes:
      elapsed: of all starts together.
      setup, saving, waiting, repeated: parts of it that brought the stage no further.
      down: between the starts.
      unix: when this was written, since 1970.
    """

    elapsed: float = 0.0
    setup: float = 0.0
    saving: float = 0.0
    waiting: float = 0.0
    repeated: float = 0.0
    down: float = 0.0
    unix: float = 0.0

    @property
    def useful(self) -> float:
        """Seconds in which steps were made that count."""
        return self.elapsed - self.setup - self.saving - self.waiting - self.repeated

    @property
    def share(self) -> float:
        """The goodput, from 0 to 1; of no time at all, 1."""
        return self.useful / self.elapsed if self.elapsed else 1.0

    def numbers(self) -> dict[str, float]:
        """For reports and checkpoints: `goodput_share`, and all fields as `elapsed_seconds`, ..."""
        return {SHARE: self.share} | {name + SECONDS: value for name, value in dataclasses.asdict(self).items()}


def read_spent(numbers: Mapping[str, Any]) -> Spent:
    """What `Spent.numbers` gave, among other things; zeros for what is not there."""
    return Spent(**{field.name: numbers.get(field.name + SECONDS, 0.0) for field in dataclasses.fields(Spent)})


def taken_up(checkpoint: Spent, reports: Iterable[Mapping[str, Any]], now: float) -> Spent:
    """What was spent before a start.

    Args:
      checkpoint: what the checkpoint says from which the stage goes on; zeros without one.
      reports: of the stage, in order. The last is later than the checkpoint if a process was killed.
      now: seconds since 1970.
    """
    last = checkpoint
    for report in reports:
        if (told := read_spent(report)).elapsed > last.elapsed:
            last = told
    repeated = last.repeated + last.useful - checkpoint.useful
    down = last.down + (max(0.0, now - last.unix) if last.unix else 0.0)
    return dataclasses.replace(last, repeated=repeated, down=down, unix=now)


def describe_spent(spent: Spent) -> str:
    """The goodput and what took the rest, as one line without durations: `goodput 93.1 % (set-up 4.0 %, ...)`."""
    parts = {
        "set-up": spent.setup,
        "saving": spent.saving,
        "waiting for data": spent.waiting,
        "repeated steps": spent.repeated,
    }
    listed = ", ".join(f"{name} {100 * value / max(spent.elapsed, 1e-9):.1f} %" for name, value in parts.items())
    return f"goodput {100 * spent.share:.1f} % ({listed})"


class Clock:
    """Counts what one start of a stage spends.

    Args:
      seconds, today: clocks, of which the second gives seconds since 1970.

    Attributes:
      before: what earlier starts have spent; set when they are known.
    """

    def __init__(self, seconds: Callable[[], float] = time.monotonic, today: Callable[[], float] = time.time) -> None:
        self._seconds, self._today = seconds, today
        self._start = seconds()
        self._setup: float | None = None
        self._saving = self._waiting = 0.0
        self.before = Spent(unix=today())

    def stepped(self) -> None:
        """A step has finished; with the first one, setting up is over."""
        if self._setup is None:
            self._setup = self._seconds() - self._start

    def waited(self, seconds: float) -> None:
        """A batch took so long to come."""
        if self._setup is not None:
            self._waiting += seconds

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around what the loop waits for when it saves."""
        begun = self._seconds()
        yield
        if self._setup is not None:
            self._saving += self._seconds() - begun

    def spent(self) -> Spent:
        """Up to now, this start and those before."""
        own = self._seconds() - self._start
        return dataclasses.replace(
            self.before,
            elapsed=self.before.elapsed + own,
            setup=self.before.setup + (own if self._setup is None else self._setup),
            saving=self.before.saving + self._saving,
            waiting=self.before.waiting + self._waiting,
            unix=self._today(),
        )
