"""What keeps a run from going wrong unnoticed: steps with bad numbers, steps that are compiled again, steps that hang.

A bad step is one whose loss or gradients are not finite or, if asked for, whose loss is a spike. Whether it is one is
decided inside the compiled step, which then keeps parameters and optimiser as they were: nothing waits for the host.
The host learns of it two steps later, from the metrics, and writes the batch, which it has kept until then, to
`<run_dir>/bad_batches/<stage>_<step>.npz`; of several processes each writes its part, `..._p<process>.npz`, and all
decide alike. Everything that such decisions depend on is saved with the checkpoint.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import io
import math
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from vita_jax.errors import UserError
from vita_jax.parallel.processes import own_file
from vita_jax.storage import append, write_whole
from vita_jax.training.stages import Stage

BAD_BATCHES = "bad_batches"
HANG = "hang.txt"
# Steps that may be queued on the device before the host waits for the oldest, and so learns of it.
STEPS_IN_FLIGHT = 2

Policy = Literal["skip", "stop"]
POLICIES = list(get_args(Policy))
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """What a run does about steps that go wrong.

    Attributes:
      policy: "skip": goes on behind a bad step; "stop": ends the run at the first one. Its update is not applied in
        either case.
      spike_factor: a step is bad, too, if its loss is more than so many times the median loss of the last `window` good
        steps of the stage. None: only numbers that are not finite are bad. It has to be asked for, since some losses
        jump on purpose (when the codec's discriminators start) and since it decides what a run computes.
      window: of the median; the first so many steps of a stage are no spikes.
      max_skips: bad steps in a row that are skipped; one more ends the run.
      saved_batches: batches of bad steps that are written in a run; later ones are only counted.
      hang_seconds: without a finished step for so long, the stacks of all threads go to `<run_dir>/hang.txt` and to
        stderr. The run goes on.
      compile_seconds: the same limit for the first step, which is compiled.
    """

    policy: Policy = "skip"
    spike_factor: float | None = None
    window: int = 100
    max_skips: int = 3
    saved_batches: int = 16
    hang_seconds: float = 1800.0
    compile_seconds: float = 7200.0

    @property
    def loss_window(self) -> int | None:
        """How many losses the state of a step holds; None = none."""
        return None if self.spike_factor is None else self.window


# What may change between two starts of a run: it decides whether one stops, not what it computes.
RESTARTABLE = ("policy", "max_skips", "saved_batches", "hang_seconds", "compile_seconds")


def validate_guard(config: GuardConfig) -> None:
    """Raises UserError naming the field that is out of range."""
    if config.policy not in POLICIES:
        raise UserError(f"guard.policy={config.policy!r} is unknown; use one of {', '.join(POLICIES)}")
    if config.spike_factor is not None and not config.spike_factor > 1:
        raise UserError(f"guard.spike_factor={config.spike_factor}: must be above 1, or none")
    for field, least in (("window", 1), ("max_skips", 0), ("saved_batches", 0)):
        if getattr(config, field) < least:
            raise UserError(f"guard.{field}={getattr(config, field)}: must be at least {least}")
    for field in ("hang_seconds", "compile_seconds"):
        if not getattr(config, field) > 0:
            raise UserError(f"guard.{field}={getattr(config, field)}: must be above 0")


# ---------------------------------------------------------------------------------------------------------------------
# Inside the compiled step
# ---------------------------------------------------------------------------------------------------------------------


@struct.dataclass
class LossWindow:
    """The losses that a spike is judged by.

    Attributes:
      losses: (w,) float32, those of the last w good steps in a ring.
      count: () int32, good steps so far.
    """

    losses: jax.Array
    count: jax.Array


def empty_window(size: int) -> LossWindow:
    """Before the first step."""
    return LossWindow(jnp.zeros((size,), jnp.float32), jnp.zeros((), jnp.int32))


def is_spike(window: LossWindow, loss: jax.Array, factor: float) -> jax.Array:
    """() bool: the window is full and the loss is more than `factor` times its median."""
    return (window.count >= window.losses.shape[0]) & (loss > factor * jnp.median(window.losses))


def push_loss(window: LossWindow, loss: jax.Array, good: jax.Array) -> LossWindow:
    """The window with the loss in place of the oldest; unchanged if `good` () bool is False."""
    losses = window.losses.at[window.count % window.losses.shape[0]].set(loss)
    return LossWindow(jnp.where(good, losses, window.losses), window.count + good.astype(jnp.int32))


def choose(good: jax.Array, new: Any, old: Any) -> Any:
    """`new` where `good` () bool, else `old`: trees of equal shapes.

    A selection element by element becomes part of the update, which is computed anyway, and needs no second copy of the
    state, which a branch would.
    """
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)


# ---------------------------------------------------------------------------------------------------------------------
# On the host
# ---------------------------------------------------------------------------------------------------------------------


class BadSteps:
    """Counts the steps that were skipped, writes their batches, and ends the run if there are too many.

    Attributes:
      skipped: bad steps of the stage so far, over all its starts.
      in_a_row: those right before the next step.
    """

    def __init__(self, config: GuardConfig, run_dir: Path, stage: Stage, say: Say) -> None:
        self._config, self._stage, self._say = config, stage, say
        self._folder = run_dir / BAD_BATCHES
        self._kept: deque[tuple[int, Mapping[str, np.ndarray]]] = deque(maxlen=STEPS_IN_FLIGHT + 1)
        self.skipped = self.in_a_row = 0

    def keep(self, step: int, batch: Mapping[str, np.ndarray]) -> None:
        """Holds on to a host batch until its step has finished."""
        self._kept.append((step, batch))

    def observe(self, step: int, skipped: bool, loss: float, grad_norm: float) -> None:
        """Takes the outcome of a finished step; they come in order.

        Raises:
          UserError: the policy is to stop, or too many steps in a row were bad. Names the file of the batch.
        """
        if not skipped:
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        file = self._write(step, loss, grad_norm)
        where = f"its batch is in {file}" if file else "its batch was not written"
        told = f"stage {self._stage.name!r}: {self._reason(loss, grad_norm)} at step {step}; {where}"
        if self._config.policy == "stop" or self.in_a_row > self._config.max_skips:
            times = f"{self.in_a_row} bad steps in a row; " if self.in_a_row > 1 else ""
            raise UserError(
                f"{told}. {times}none of their updates was applied. Look at that data, lower the learning rate "
                f"(--config.stages.{self._stage.name}.learning_rate), and start again from the last checkpoint; "
                f"--config.guard.policy and --config.guard.max_skips (now {self._config.policy!r} and "
                f"{self._config.max_skips}) say what is skipped"
            )
        self._say(f"{told}; the update was left out")

    def _reason(self, loss: float, grad_norm: float) -> str:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the norm of the gradient is {grad_norm} (the loss {loss:.6g})"
        return f"the loss of {loss:.6g} is a spike"

    def state(self) -> dict[str, int]:
        """What a checkpoint has to hold."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Takes what `state` gave."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def _write(self, step: int, loss: float, grad_norm: float) -> Path | None:
        batch = next((batch for number, batch in self._kept if number == step), None)
        file = own_file(self._folder / f"{self._stage.name}_{step}.npz")
        pattern = own_file(Path("*.npz")).name
        own = list(self._folder.glob(pattern)) if self._folder.is_dir() else []
        full = len(own) >= self._config.saved_batches
        if batch is None or (full and not file.exists()) or not self._config.saved_batches:
            return None
        about = {"step": step, "stage": self._stage.name, "loss": loss, "grad_norm": grad_norm}
        try:
            content = io.BytesIO()
            np.savez(content, **{name: np.asarray(value) for name, value in {**batch, **about}.items()})
            write_whole(file, content.getvalue())
        except Exception as error:  # neither a full disk nor the network, whose are no OSErrors, ends the run here
            self._say(f"{file} cannot be written: {error}")
            return None
        return file


class Compilations:
    """Notices that a compiled step is compiled again, which every step should be once.

    Args:
      step_fn: what `jax.jit` returned.
      state: the first state, what else is the same in every step included.
      say: gets a line.
    """

    def __init__(self, step_fn: Any, state: Any, say: Say) -> None:
        self._step_fn, self._say = step_fn, say
        self._count, self._first_state = 0, _layouts(state)
        self._batch: dict[str, str] = {}

    def check(self, step: int, state: Any, batch: Mapping[str, jax.Array]) -> None:
        """After the call for step number `step`: `state` is what it returned, `batch` what it was given."""
        count, now = self._step_fn._cache_size(), _layouts(batch)
        if self._count and count > self._count:
            changed = _differences(self._batch, now) or _differences(self._first_state, _layouts(state))
            named = "; ".join(changed) or "no array differs in shape, type or layout"
            self._say(f"step {step} was compiled again, which takes time: {named}")
        self._count, self._batch = count, now


def _layouts(tree: Any) -> dict[str, str]:
    """Path -> shape, type and layout of every array; of donated ones, too."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{leaf.dtype} {leaf.shape} {getattr(leaf.sharding, 'spec', leaf.sharding)}"
        )
        for path, leaf in leaves
    }


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    return [
        f"{path}: {old[path]} before, {new[path]} now" for path in new if path in old and old[path] != new[path]
    ] + [f"{path}: new" for path in new if old and path not in old]


class Watchdog:
    """A thread that tells where everything stands when no step has finished for too long. Use as a context manager.

    Args:
      config: the limits.
      run_dir: gets `hang.txt`.
      stage: for the message.
    """

    def __init__(self, config: GuardConfig, run_dir: Path, stage: Stage) -> None:
        self._file, self._stage = own_file(run_dir / HANG), stage
        self._limit, self._later_limit = config.compile_seconds, config.hang_seconds
        self._last, self._step = time.monotonic(), 0
        self._told = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def beat(self, step: int) -> None:
        """Step number `step` has come further: it has been compiled, or has finished."""
        self._last, self._step = time.monotonic(), step
        self._limit, self._told = self._later_limit, False

    def _watch(self) -> None:
        # A step may change the limit at any time, so the time is looked at more often than either limit asks for.
        while not self._stop.wait(min(self._limit, self._later_limit) / 8):
            if time.monotonic() - self._last > self._limit and not self._told:
                self._told = True
                self._tell()

    def _tell(self) -> None:
        silent = time.monotonic() - self._last
        told = (
            f"{time.strftime('%Y-%m-%d %H:%M:%S')}: stage {self._stage.name!r}: no step has finished for {silent:.0f} "
            f"s, the last was {self._step}; the stacks of all threads (also in {self._file}):\n"
        )
        try:
            # Its own file: the stacks are written below Python, to a descriptor.
            with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
                file.seek(0)
                told += file.read()
        except OSError as error:
            told += f"(no stacks: {error})\n"
        # First: what hangs may be the network that the file is behind.
        print(told, file=sys.stderr, flush=True)
        try:
            append(self._file, told)
        except Exception as error:  # those of a network are no OSErrors
            print(f"{self._file} cannot be written: {error}", file=sys.stderr, flush=True)
