"""Where numbers of a run go: JSON lines, TensorBoard, and one line of progress.

`<run_dir>/metrics.jsonl` has one object per line: `{"event": "step", "stage", "step", "loss", ...}` while training and
`{"event": "stage", "stage", "step", "title", "seconds", "trainable", "frozen", "skipped", "goodput_share"}` when a
stage ends. Numbers that are not finite are left out. Beside what the step returns (`step.train_step`) there are those
of `speed`, `data_seconds` and `data_share`: what fetching a batch took, and its part of a step's time, and those of
`goodput`: where the time of all starts went.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
from tensorboardX import SummaryWriter

from vita_jax.errors import UserError
from vita_jax.storage import Scratch, place
from vita_jax.training.goodput import Clock
from vita_jax.training.guard import STEPS_IN_FLIGHT
from vita_jax.training.speed import Speed, memory
from vita_jax.training.stages import Stage

METRICS = "metrics.jsonl"
UPLOAD_SECONDS = 300.0
# Reported as means over the steps since the last report that were not skipped, weighted by what the loss counts; of the
# skipped ones, their number; the others are those of the last step.
AVERAGED = {"loss", "accuracy", "state_loss", "state_accuracy", "infeasible"}
SKIPPED = "skipped"


def read_metrics(run_dir: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a run in order; a last line that a killed process left half written is passed over."""
    path = place(run_dir) / METRICS
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


class MetricsWriter:
    """The one sink of a run; of several processes, all but one have one that does not write.

    Where the run is in a bucket, lines and event files are kept on this machine and brought there by `send`: with every
    checkpoint, at the end of a stage, and otherwise about every `UPLOAD_SECONDS`. What is lost with a process lies
    behind its last checkpoint, and comes again. When the bucket does not answer, a line on stderr says so, and it is
    tried again: no run ends for it.
    """

    def __init__(self, run_dir: Path, *, writes: bool = True) -> None:
        self._run_dir, self._writes = run_dir, writes
        if writes:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._scratch, self._sent = Scratch(run_dir), time.monotonic()
            self._path = self._scratch.folder / METRICS
            self._file = self._reopen(list(read_metrics(run_dir)))
            self._board = SummaryWriter(str(self._scratch.folder / "tensorboard"), flush_secs=10)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._writes:
            self._file.close()
            self._board.close()
            # What ends the run is what its caller has to hear of: a signal, say.
            with self._told("lost") if kind is not None else contextlib.nullcontext():
                self._scratch.close()

    def rewind(self, stage: str, step: int) -> list[dict[str, Any]]:
        """Drops records of a stage after `step`: those steps are about to be repeated.

        Returns:
          What the stage had reported, those that are dropped included.
        """
        if not self._writes:
            return []
        records = list(read_metrics(self._scratch.folder))
        kept = [record for record in records if record["stage"] != stage or record.get("step", 0) <= step]
        self._file.close()
        self._file = self._reopen(kept)
        return [record for record in records if record["stage"] == stage and record["event"] == "step"]

    def step(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """One training step's numbers."""
        if not self._writes:
            return
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        self._write({"event": "step", "stage": stage, "step": step, **values})
        for name, value in values.items():
            self._board.add_scalar(f"{stage}/{name}", value, step)

    def stage(self, stage: str, values: Mapping[str, Any]) -> None:
        """Summary of a finished stage."""
        if self._writes:
            self._write({"event": "stage", "stage": stage, **values})

    def send(self) -> None:
        """Brings everything to the bucket, if the run is in one and it answers."""
        if self._writes:
            self._sent = time.monotonic()
            with self._told("tried again"):
                self._scratch.send()

    @contextlib.contextmanager
    def _told(self, fate: str) -> Iterator[None]:
        """Says that sending failed, and what becomes of the numbers, instead of raising it."""
        try:
            yield
        except Exception as error:  # those of a network are no OSErrors
            told = f"{self._run_dir}: its numbers cannot be brought there ({fate}): {error!r}"
            print(" ".join(told.split()), file=sys.stderr, flush=True)

    def _reopen(self, records: list[dict[str, Any]]) -> TextIO:
        """Puts the file to exactly these records and opens it for more."""
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(_line(record) for record in records), encoding="utf-8")
        partial.replace(self._path)
        return self._path.open("a", encoding="utf-8")

    def _write(self, record: Mapping[str, Any]) -> None:
        try:
            self._file.write(_line(record))
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error}; see to the disk and start again") from error
        if time.monotonic() - self._sent > UPLOAD_SECONDS:
            self.send()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def format_duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    whole = int(round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_rate(value: float) -> str:
    """Three significant digits, with k and M."""
    if not math.isfinite(value):
        return "-"
    for factor, suffix in ((1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.3g}"


class Progress:
    """One line per report: rewritten in place on a terminal, plain lines (at most one every `plain_seconds`)
    elsewhere.
    """

    def __init__(self, title: str, total_steps: int, stream: TextIO | None = None, plain_seconds: float = 5.0) -> None:
        self._title = title
        self._total = total_steps
        self._stream = stream or sys.stdout
        self._in_place = self._stream.isatty()
        self._plain_seconds = plain_seconds
        self._last = -math.inf
        self._open_line = False

    def report(self, step: int, values: Mapping[str, float], tokens_per_second: float, seconds_left: float) -> None:
        """Shows stage, step, loss, accuracy, tokens per second, the share of the machine's peak and the time left."""
        now = time.monotonic()
        if not self._in_place and now - self._last < self._plain_seconds and step < self._total:
            return
        self._last = now
        parts = [f"{self._title}  step {step}/{self._total}", f"loss {values['loss']:.4f}"]
        if "accuracy" in values:
            parts.append(f"acc {100 * values['accuracy']:.1f}%")
        parts.append(f"{format_rate(tokens_per_second)} tok/s")
        if "mfu" in values:
            parts.append(f"MFU {100 * values['mfu']:.1f}%")
        parts.append(f"ETA {format_duration(seconds_left)}")
        line = "  ".join(parts)
        if self._in_place:
            self._stream.write(f"\r\x1b[2K{line}")
            self._open_line = True
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def say(self, line: str) -> None:
        """A line of its own."""
        self.close()
        self._stream.write(f"{self._title}: {line}\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends the line that was being rewritten."""
        if self._open_line:
            self._stream.write("\n")
            self._stream.flush()
            self._open_line = False


class StepNumbers(NamedTuple):
    """A step's number (from 1), its metrics, on the device or as numbers, and how many tokens its batch held."""

    step: int
    values: Mapping[str, Any]
    tokens: int


class Reporter:
    """Collects the device's numbers of one stage and passes them on every `every_steps`, without making the device
    wait.

    Args:
      metrics: gets every report.
      stream: gets a line of progress.
      stage: what is trained.
      every_steps: between reports.
      first_step: finished steps at this start.
      speed: turns times into rates.
      clock: counts where the time goes.

    Attributes:
      on_finished: called with every step when it has finished, in order; may raise `UserError`.
    """

    def __init__(
        self,
        metrics: MetricsWriter,
        stream: TextIO,
        stage: Stage,
        every_steps: int,
        first_step: int,
        speed: Speed,
        clock: Clock,
    ) -> None:
        self._metrics = metrics
        self._stage = stage
        self._every = every_steps
        self._speed, self._clock = speed, clock
        self._progress = Progress(stage.title, stage.steps, stream)
        self._in_flight: deque[StepNumbers] = deque()
        self._window: list[StepNumbers] = []
        self._start = self._window_start = time.monotonic()
        self._first = first_step
        self._after_first: tuple[int, float] | None = None
        self._data_seconds = 0.0
        self.on_finished: Callable[[StepNumbers], None] = lambda numbers: None

    def say(self, line: str) -> None:
        """Shows a line of its own."""
        self._progress.say(line)

    def elapsed(self) -> float:
        """Seconds since this start of the stage."""
        return time.monotonic() - self._start

    def waited(self, seconds: float) -> None:
        """A batch took so long to come."""
        self._data_seconds += seconds
        self._clock.waited(seconds)

    def add(self, step: int, values: Mapping[str, jax.Array], num_tokens: int) -> None:
        """Takes the results of step number `step` (from 1), which may still be computing."""
        for value in values.values():
            value.copy_to_host_async()
        self._in_flight.append(StepNumbers(step, values, num_tokens))
        self.settle(STEPS_IN_FLIGHT)

    def settle(self, in_flight: int = 0) -> None:
        """Waits until no more than so many steps are still computing."""
        while len(self._in_flight) > in_flight:
            numbers = self._in_flight.popleft()
            jax.block_until_ready(numbers.values)
            self._clock.stepped()
            self._window.append(numbers)
            self.on_finished(numbers)
            if numbers.step % self._every == 0:
                self._report()

    def state(self) -> list[list[Any]]:
        """The steps since the last report, for a checkpoint; waits for them."""
        self.settle()
        return [[step, _floats(values), tokens] for step, values, tokens in self._window]

    def set_state(self, state: list[list[Any]]) -> None:
        """Takes what `state` gave, so that reports are those of an uninterrupted run."""
        self._window = [StepNumbers(*entry) for entry in state]

    def finish(self) -> None:
        """Reports what is left, waiting for it."""
        self.settle()
        if self._window:
            self._report()
        self._progress.close()

    def close(self) -> None:
        """Ends the line of progress; what is left is not reported."""
        self._progress.close()

    def _report(self) -> None:
        window, self._window = self._window, []
        last, history = window[-1].step, [_floats(numbers.values) for numbers in window]
        now = time.monotonic()
        latest = {**history[-1], SKIPPED: sum(values[SKIPPED] for values in history)}
        good = [values for values in history if not values[SKIPPED]]
        for name in AVERAGED & set(latest):
            total = sum(values["tokens"] * values[name] for values in good)
            latest[name] = total / max(sum(values["tokens"] for values in good), 1.0) if good else math.nan
        # What a checkpoint brought along took no time here.
        fresh = [numbers for numbers in window if numbers.step > self._first]
        seconds = now - self._window_start
        latest |= self._speed.rates(sum(numbers.tokens for numbers in fresh), len(fresh), seconds)
        latest |= {"data_seconds": self._data_seconds / len(fresh), "data_share": self._data_seconds / seconds}
        self._metrics.step(self._stage.name, last, {**latest, **self._clock.spent().numbers(), **memory()})
        self._progress.report(last, latest, latest["tokens_per_second"], self._seconds_left(last, now))
        self._window_start, self._data_seconds = now, 0.0

    def _seconds_left(self, step: int, now: float) -> float:
        """From the pace since the first report, which the compilation has slowed down."""
        if self._after_first is None:
            self._after_first = (step, now)
            pace = (now - self._start) / (step - self._first)
        else:
            pace = (now - self._after_first[1]) / (step - self._after_first[0])
        return (self._stage.steps - step) * pace


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(dict(values)).items()}
