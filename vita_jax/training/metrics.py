"""Where numbers of a run go: JSON lines, TensorBoard, and one line of progress.

`<run_dir>/metrics.jsonl` has one object per line: `{"event": "step", "stage", "step", "loss", ...}` while training and
`{"event": "stage", "stage", "step", "title", "seconds", "trainable", "frozen"}` when a stage ends.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
from tensorboardX import SummaryWriter

from vita_jax.errors import UserError
from vita_jax.training.stages import Stage

METRICS = "metrics.jsonl"
# Reported as means over the steps since the last report, weighted by what the loss counts; the others are those of the
# last step.
AVERAGED = {"loss", "accuracy", "state_loss", "state_accuracy", "infeasible"}
# getrusage counts bytes on macOS and kibibytes elsewhere.
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


def read_metrics(run_dir: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a run in order; a last line that a killed process left half written is passed over."""
    path = Path(run_dir) / METRICS
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


class MetricsWriter:
    """The one sink of a run."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / METRICS
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        self._file = self._reopen(list(read_metrics(run_dir)))
        self._board = SummaryWriter(str(run_dir / "tensorboard"), flush_secs=10)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._board.close()

    def rewind(self, stage: str, step: int) -> None:
        """Drops records of a stage after `step`: those steps are about to be repeated."""
        kept = [
            record
            for record in read_metrics(self._run_dir)
            if record["stage"] != stage or record.get("step", 0) <= step
        ]
        self._file.close()
        self._file = self._reopen(kept)

    def step(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """One training step's numbers."""
        self._write({"event": "step", "stage": stage, "step": step, **values})
        for name, value in values.items():
            self._board.add_scalar(f"{stage}/{name}", value, step)

    def stage(self, stage: str, values: Mapping[str, Any]) -> None:
        """Summary of a finished stage."""
        self._write({"event": "stage", "stage": stage, **values})

    def _reopen(self, records: list[dict[str, Any]]) -> TextIO:
        """Puts the file to exactly these records and opens it for more."""
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(_line(record) for record in records), encoding="utf-8")
        partial.replace(self._path)
        return self._path.open("a", encoding="utf-8")

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(_line(record))
        self._file.flush()


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
        """Shows stage, step, loss, accuracy, tokens per second and the time left."""
        now = time.monotonic()
        if not self._in_place and now - self._last < self._plain_seconds and step < self._total:
            return
        self._last = now
        parts = [f"{self._title}  step {step}/{self._total}", f"loss {values['loss']:.4f}"]
        if "accuracy" in values:
            parts.append(f"acc {100 * values['accuracy']:.1f}%")
        parts += [f"{format_rate(tokens_per_second)} tok/s", f"ETA {format_duration(seconds_left)}"]
        line = "  ".join(parts)
        if self._in_place:
            self._stream.write(f"\r\x1b[2K{line}")
            self._open_line = True
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends the line that was being rewritten."""
        if self._open_line:
            self._stream.write("\n")
            self._stream.flush()
            self._open_line = False


class Reporter:
    """Collects the device's numbers of one stage and passes them on every `every_steps`, without making the device
    wait.

    Attributes:
      data_seconds: time spent fetching batches since the last report; added to by the loop.
    """

    # Steps that may be queued on the device before the host waits for the oldest.
    STEPS_IN_FLIGHT = 2

    def __init__(self, metrics: MetricsWriter, stream: TextIO, stage: Stage, every_steps: int, first_step: int) -> None:
        self._metrics = metrics
        self._stage = stage
        self._every = every_steps
        self._progress = Progress(stage.title, stage.steps, stream)
        self._pending: list[tuple[int, Mapping[str, jax.Array], int]] = []
        self._start = self._window_start = time.monotonic()
        self._first = first_step
        self._after_first: tuple[int, float] | None = None
        self.data_seconds = 0.0

    def elapsed(self) -> float:
        """Seconds since this start of the stage."""
        return time.monotonic() - self._start

    def add(self, step: int, values: Mapping[str, jax.Array], num_tokens: int) -> None:
        """Takes the results of step number `step` (from 1), which may still be computing."""
        self._pending.append((step, values, num_tokens))
        if len(self._pending) > self.STEPS_IN_FLIGHT:
            jax.block_until_ready(self._pending[-1 - self.STEPS_IN_FLIGHT][1])
        if len(self._pending) > 1 and self._pending[-2][0] % self._every == 0:
            self._report(self._pending[:-1])
            self._pending = self._pending[-1:]

    def finish(self) -> None:
        """Reports what is left, waiting for it."""
        if self._pending:
            self._report(self._pending)
            self._pending = []
        self._progress.close()

    def _report(self, window: list[tuple[int, Mapping[str, jax.Array], int]]) -> None:
        last = window[-1][0]
        history = [{name: float(value) for name, value in values.items()} for _, values, _ in jax.device_get(window)]
        now = time.monotonic()
        weights = [values["tokens"] for values in history]
        latest = dict(history[-1])
        for name in AVERAGED & set(latest):
            total = sum(weight * values[name] for weight, values in zip(weights, history, strict=True))
            latest[name] = total / max(sum(weights), 1.0)
        if not math.isfinite(latest["loss"]):
            self._progress.close()
            raise UserError(
                f"stage {self._stage.name!r}: the loss is {latest['loss']} at step {last}; lower its learning rate "
                f"(--config.stages.{self._stage.name}.learning_rate) or look at its data, "
                "and start again from the last checkpoint"
            )
        seconds = now - self._window_start
        tokens_per_second = sum(tokens for _, _, tokens in window) / seconds
        self._metrics.step(
            self._stage.name,
            last,
            {
                **latest,
                "tokens_per_second": tokens_per_second,
                "step_seconds": seconds / len(window),
                "data_seconds": self.data_seconds / len(window),
                "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT / 2**30,
            },
        )
        self._progress.report(last, latest, tokens_per_second, self._seconds_left(last, now))
        self._window_start, self.data_seconds = now, 0.0

    def _seconds_left(self, step: int, now: float) -> float:
        """From the pace since the first report, which the compilation has slowed down."""
        if self._after_first is None:
            self._after_first = (step, now)
            pace = (now - self._start) / (step - self._first)
        else:
            pace = (now - self._after_first[1]) / (step - self._after_first[0])
        return (self._stage.steps - step) * pace
