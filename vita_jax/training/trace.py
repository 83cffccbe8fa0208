"""A profile of some steps on request, for XProf: `--config.profile.start=10` writes `<run_dir>/profile/<stage>`.

View it with `tensorboard --logdir=<run_dir>/profile` and the plug-in `xprof`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from vita_jax.errors import UserError

PROFILE = "profile"


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Which steps of every stage are profiled.

    Attributes:
      start: the first one, counted from 1 as in the metrics; the first step of a start also compiles. None: none.
      count: how many.
    """

    start: int | None = None
    count: int = 3


def validate_profile(config: ProfileConfig) -> None:
    """Raises UserError naming the field that is out of range."""
    for field, value in (("start", config.start), ("count", config.count)):
        if value is not None and value < 1:
            raise UserError(f"profile.{field}={value}: must be at least 1")


class StepTrace:
    """Starts and stops the profiler around the steps asked for. Use as a context manager."""

    def __init__(self, config: ProfileConfig, run_dir: Path, stage: str) -> None:
        self._config, self._folder = config, run_dir / PROFILE / stage
        self._running = False

    def __enter__(self) -> StepTrace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """What is asked for may go beyond the end of the stage, or the stage may end early."""
        self._stop()

    def step(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """To be entered around step `number`; names it in the profile."""
        if number == self._config.start:
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(self._folder)
            self._running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number) if self._running else contextlib.nullcontext()

    def done(self, number: int, results: Any) -> None:
        """After step `number` was given to the device; waits for its results only if it is the last to be profiled."""
        if self._running and number >= self._config.start + self._config.count - 1:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
