"""Checkpoints: everything a stage needs to go on, in one folder per step, complete or not there at all.

`<run_dir>/stages/<stage>/checkpoints/<step>/` holds up to three Orbax items and a manifest:
  params          all parameters, trainable and frozen, as nested dicts
  optimizer       optimiser state (trainable parameters only); models made by a command have none
  meta            JSON: format version, stage, step, whether the stage is finished, rng, data-iterator state and the
                  resolved configuration
  manifest.json   size and CRC-32 of every file of these items; a folder without it is incomplete and is not looked at

Orbax writes a temporary folder and commits it by renaming, the manifest included; in a bucket it writes where the
checkpoint stays, and the manifest comes when all else of the items is there. It would read back flipped bits
without complaint and damaged files with anonymous errors; the manifest turns both into one clear message before
anything is loaded. A stage goes on from the newest checkpoint whose files are all as they were written; damaged newer
ones are put aside as `damaged-<step>`, with a message (`newest_usable`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import signal
import threading
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from vita_jax import config as config_lib
from vita_jax.errors import UserError
from vita_jax.models.int8 import LeafChange
from vita_jax.parallel.processes import WAIT_SECONDS, is_first, on_first
from vita_jax.storage import absolute, files_below, is_remote, place, remove_folder, size_of, write_whole
from vita_jax.training.adapters import adapter_layout
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.objectives import OBJECTIVES
from vita_jax.training.param_store import first_line, open_params
from vita_jax.training.portable import is_portable, portable_config, read_portable
from vita_jax.training.stages import Stage, flatten, unflatten

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CONFIG = "config.json"
ITEMS = ("params", "optimizer", "meta")
# Written by Orbax when it commits to a bucket, without content that matters.
COMMIT_MARK = "commit_success.txt"
# A damaged checkpoint that a stage went on without.
DAMAGED = "damaged-"
_CHUNK = 1 << 22
# What the system says when a file cannot be written; libraries pass it on as text only.
_REFUSALS = {os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)}


class DamagedCheckpoint(UserError):
    """Files of a checkpoint are not as they were written; `reason` says which."""

    def __init__(self, folder: Path, reason: str) -> None:
        others = [step for step in complete_steps(folder.parent) if str(step) != folder.name]
        advice = (
            f"delete that folder to go on from step {others[-1]}"
            if others
            else "delete that folder to start the stage again"
        )
        super().__init__(f"checkpoint {folder} is damaged: {reason}; {advice}")
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What one checkpoint holds.

    Attributes:
      params: nested dicts of arrays, trainable and frozen together.
      opt_state: optimiser state.
      meta: JSON part; see `snapshot_meta`.
    """

    params: dict[str, Any]
    opt_state: Any
    meta: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """Parameters for use, not for training on.

    Attributes:
      params: nested dicts; what a stage's objective added has been dropped.
      config: the configuration they were trained with.
      stage, step: where in the curriculum they were saved.
      path: the checkpoint folder.
      run_dir: the run it belongs to (`<run_dir>/tokenizer` has its tokenizer).
    """

    params: dict[str, Any]
    config: ExperimentConfig
    stage: str
    step: int
    path: Path
    run_dir: Path


def checkpoint_folder(run_dir: str | Path, stage: str) -> Path:
    """`<run_dir>/stages/<stage>/checkpoints`."""
    return place(run_dir) / "stages" / stage / "checkpoints"


def snapshot_meta(
    config: ExperimentConfig,
    stage: Stage,
    step: int,
    rng: list[int],
    data_state: Any,
    seconds: float,
    progress: Mapping[str, Any] | None = None,
    spent: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Args:
      config, stage: the run and its stage.
      step: finished steps.
      rng: key of the stage.
      data_state: of the batches.
      seconds: time the stage has trained so far, over all its starts.
      progress: what the loop counts beside, see `loop.train_stage`; older checkpoints have none.
      spent: on what the time went, see `goodput`; older checkpoints do not say.
    """
    return {
        "format_version": FORMAT_VERSION,
        "stage": stage.name,
        "step": step,
        "finished": step >= stage.steps,
        "rng": rng,
        "data_state": data_state,
        "seconds": seconds,
        "progress": dict(progress or {}),
        "spent": dict(spent or {}),
        "config": config_lib.to_dict(config),
    }


class StageCheckpoints:
    """Saves and restores the checkpoints of one stage, on top of Orbax's `CheckpointManager`. Of several processes all
    call each method.

    Writing happens in the background; `save` waits only for the previous one. Old checkpoints are removed once a newer
    one is complete, but those of the steps `milestones`.
    """

    def __init__(self, folder: Path, keep: int, milestones: Sequence[int] = ()) -> None:
        self.folder = absolute(folder)
        self.keep, self.milestones = keep, milestones
        self._in_flight: int | None = None
        # Orbax logs tracebacks of errors in its background thread, which it raises as well.
        logging.getLogger("absl").addFilter(_not_raised_anyway)
        on_first(self._remove_incomplete)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(timeout_secs=WAIT_SECONDS, post_finalization_callback=self._seal),
            ),
        )

    def __enter__(self) -> StageCheckpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            self.wait()
        # What went wrong first is what the caller has to hear of; and other processes may not know of it.
        with contextlib.suppress(Exception) if kind is not None else contextlib.nullcontext():
            self._manager.close()

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return max(complete_steps(self.folder), default=None)

    def save(self, step: int, params: Mapping[str, Any], opt_state: Any, meta: Mapping[str, Any]) -> None:
        """Starts writing the checkpoint of `step`. The arrays may be donated or changed as soon as this returns.

        `opt_state` None leaves it out: the checkpoint can be used, but the stage cannot be gone on with.

        Raises:
          UserError: this checkpoint, or the one before it, cannot be written: the disk is full, say.
        """
        self.wait()
        self._in_flight = step
        items = {"params": ocp.args.StandardSave(params), "meta": ocp.args.JsonSave(dict(meta))}
        if opt_state is not None:
            items["optimizer"] = ocp.args.StandardSave(opt_state)
        with self._named_errors():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Returns when the checkpoint being written is complete, and removes those beyond `keep`.

        Raises:
          UserError: it cannot be written.
        """
        with self._named_errors():
            self._manager.wait_until_finished()
            for step in on_first(lambda: complete_steps(self.folder)[: -self.keep]):
                if step not in self.milestones:
                    self._manager.delete(step)

    def restore(
        self, step: int, abstract_params: Any, abstract_opt_state: Any, meta: dict[str, Any] | None = None
    ) -> Snapshot:
        """Reads a checkpoint into the layout that the abstract arrays (with shardings) ask for.

        Args:
          step: of the checkpoint.
          abstract_params, abstract_opt_state: what it holds.
          meta: of a checkpoint that was verified already (`newest_usable`); None verifies it.

        Raises:
          UserError: the checkpoint is damaged or of another format.
        """
        meta = read_meta(self.folder / str(step)) if meta is None else meta
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract_params), optimizer=ocp.args.StandardRestore(abstract_opt_state)
            ),
        )
        return Snapshot(restored["params"], restored["optimizer"], meta)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Turns what libraries say of a full disk into one clear message; everything else passes."""
        try:
            yield
        except Exception as error:
            refusal = _refusal(error)
            if refusal is None:
                raise
            steps = complete_steps(self.folder)
            left = f"the checkpoint of step {steps[-1]} is complete" if steps else "there is no complete checkpoint yet"
            raise UserError(
                f"{self.folder}: the checkpoint of step {self._in_flight} cannot be written: {refusal}; {left}. "
                "See to the disk and start again to go on"
            ) from error

    def _seal(self) -> None:
        """Adds the manifest to the temporary folder that Orbax is about to rename (called in its background thread)."""
        if not is_first():
            return
        if is_remote(self.folder):  # written where it will stay
            write_manifest(self.folder / str(self._in_flight))
            return
        (temporary,) = self.folder.glob(f"{self._in_flight}.*")
        write_manifest(temporary)

    def _remove_incomplete(self) -> None:
        """What a killed process left half written is of no use, and a later save of the same step would collide with
        it. In a bucket Orbax restores nothing without its mark, which checkpoints do not have that were written on a
        disk and copied, or whose process was killed between manifest and mark.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.is_dir() and not _is_complete(path):
                remove_folder(path)
            elif path.is_dir() and is_remote(path) and not (path / COMMIT_MARK).is_file():
                write_whole(path / COMMIT_MARK, "")


def _refusal(error: BaseException | None) -> str | None:
    """What the system said, if an error, or what it came from, is its refusal to write."""
    while error is not None:
        for words in _REFUSALS:
            if words in str(error):
                return words
        error = error.__cause__ or error.__context__
    return None


def _not_raised_anyway(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


# ---------------------------------------------------------------------------------------------------------------------
# Completeness
# ---------------------------------------------------------------------------------------------------------------------


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a `checkpoints` folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and _is_complete(p))


def _is_complete(folder: Path) -> bool:
    """Whether everything of a checkpoint has been written: the manifest, with the sizes of all else, comes last."""
    return (folder / MANIFEST).is_file()


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def write_manifest(folder: Path) -> None:
    """Records the files of all items of a checkpoint that is about to be committed.

    In a bucket without their CRC-32: it would have to be read again, and the store compares checksums of its own.
    """
    files = {
        str(PurePosixPath(*path.relative_to(folder).parts)): _recorded(path)
        for item in ITEMS
        if (folder / item).is_dir()
        for path in files_below(folder / item)
        if path.name != COMMIT_MARK
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def _recorded(file: Path) -> dict[str, int]:
    size = {"size": size_of(file)}
    return size if is_remote(file) else {**size, "crc32": _crc32(file)}


def verify(folder: Path) -> None:
    """Compares every file of a checkpoint with its manifest.

    Raises:
      DamagedCheckpoint: a file is missing, truncated or changed; says which.
      UserError: the folder is no complete checkpoint.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise UserError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}")
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["size"], entry.get("crc32")) for name, entry in files.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpoint(folder, f"{MANIFEST} cannot be read") from None
    for name, (size, crc) in expected.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(folder, f"{name} is missing")
        if size_of(path) != size:
            raise DamagedCheckpoint(folder, f"{name} has {size_of(path)} bytes instead of {size}")
        if crc is not None and not is_remote(path) and _crc32(path) != crc:
            raise DamagedCheckpoint(folder, f"the content of {name} has changed since it was written")


def read_meta(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint, after `verify`.

    Raises:
      UserError: damaged, or written in another format version.
    """
    verify(folder)
    meta = json.loads((folder / "meta" / "metadata").read_text(encoding="utf-8"))
    if meta["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"checkpoint {folder} has format version {meta['format_version']}, "
            f"this program reads version {FORMAT_VERSION}"
        )
    return meta


def newest_usable(folder: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The JSON part of the newest checkpoint whose files are as they were written; None if there is no checkpoint.

    Newer ones that are damaged are put aside, for the stage will come to their steps again.

    Args:
      folder: a `checkpoints` folder that nobody writes to.
      say: gets a line for each that is put aside.

    Raises:
      UserError: all are damaged, or the newest is of another format. Nothing is put aside then.
    """
    damaged: list[tuple[Path, DamagedCheckpoint]] = []
    for step in reversed(complete_steps(folder)):
        try:
            meta = read_meta(folder / str(step))
        except DamagedCheckpoint as error:
            damaged.append((folder / str(step), error))
            continue
        for path, error in damaged:
            aside = path.with_name(DAMAGED + path.name)
            if aside.exists():
                remove_folder(aside)
            path.rename(aside)
            say(f"checkpoint {path} is damaged: {error.reason}; put aside as {aside.name}, step {step} is used instead")
        return meta
    if damaged:
        raise damaged[0][1]
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Loading parameters for use
# ---------------------------------------------------------------------------------------------------------------------


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder meant by `path`: a run, a stage's folder, a `checkpoints` folder, or a checkpoint itself.

    A run means the newest checkpoint of its last finished stage.

    Raises:
      UserError: there is no complete checkpoint at `path`.
    """
    path = place(path)
    if not path.is_dir():
        raise UserError(f"checkpoint {path} does not exist")
    if (path / MANIFEST).is_file() and path.name.isdigit():
        return path
    if (path / CONFIG).is_file():
        config = config_lib.load_json(ExperimentConfig, path / CONFIG)
        for stage in reversed(config.stages):
            folder = checkpoint_folder(path, stage.name)
            steps = complete_steps(folder)
            if steps and read_meta(folder / str(steps[-1]))["finished"]:
                return folder / str(steps[-1])
        unfinished = sorted(str(p.parent) for p in path.glob(f"stages/*/checkpoints/*/{MANIFEST}"))
        hint = f"; to use an unfinished stage give its folder, for example {unfinished[-1]}" if unfinished else ""
        raise UserError(f"run {path} has no finished stage yet: go on training it{hint}")
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = complete_steps(folder)
    if not steps:
        raise UserError(f"{path} is neither a run nor does it hold a complete checkpoint (a folder with {MANIFEST})")
    return folder / str(steps[-1])


def load_params(
    path: str | Path, shardings: Any = None, change: Callable[[ExperimentConfig], LeafChange] | None = None
) -> LoadedModel:
    """Parameters and configuration of a run or checkpoint, or of an exported folder that needs no run.

    Args:
      path: see `find_checkpoint`; or a folder as in `vita_jax.training.portable`, which is its own run directory.
      shardings: nested dict of shardings to restore into; adapters (LoRA) that it lacks go where their kernels do, and
        what else it lacks goes to the first device, as everything does with None.
      change: from the configuration, what becomes of every parameter; they are then read one after the other, and
        everything goes to the first device.

    Raises:
      UserError: nothing there, damaged, or of another format.
    """
    if is_portable(path):
        folder = absolute(place(path))
        changed = None if change is None else change(portable_config(folder))
        model = read_portable(folder, shardings, changed)
        return LoadedModel(model.params, model.config, model.stage, model.step, folder, folder)
    folder = absolute(find_checkpoint(path))
    meta = read_meta(folder)
    config = _config_of(folder, meta)
    extra = OBJECTIVES[config.stage(meta["stage"]).objective].extra_names
    if change is not None:
        params = _read_changed(folder / "params", extra, change(config))
        return LoadedModel(params, config, meta["stage"], meta["step"], folder, folder.parents[3])
    # The handler alone: a checkpointer would look for metadata that only whole checkpoints have.
    handler = ocp.StandardCheckpointHandler()
    saved = flatten(handler.metadata(folder / "params").tree)
    layout, default = adapter_layout(saved, flatten(shardings or {})), SingleDeviceSharding(jax.local_devices()[0])
    abstract = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.get(path, default))
        for path, leaf in saved.items()
    }
    params = handler.restore(folder / "params", args=ocp.args.StandardRestore(unflatten(abstract)))
    handler.close()
    params = {name: tree for name, tree in params.items() if name not in extra}
    return LoadedModel(params, config, meta["stage"], meta["step"], folder, folder.parents[3])


def _read_changed(folder: Path, extra: Container[str], change: LeafChange) -> dict[str, Any]:
    """Parameters without those of the components `extra`, each changed as it is read; see `load_params`."""
    stored = {name: tree for name, tree in open_params(folder).items() if name not in extra}
    try:
        changed = (new for path, leaf in flatten(stored).items() for new in change(path, leaf).items())
        return unflatten({path: jax.device_put(np.asarray(leaf), jax.local_devices()[0]) for path, leaf in changed})
    except (ValueError, OSError) as error:
        raise UserError(f"{folder}: a parameter cannot be read: {first_line(error)}") from error


def load_config(path: str | Path) -> tuple[ExperimentConfig, Path]:
    """What `load_params` would say of configuration and run directory, without the parameters. Raises as it does."""
    if is_portable(path):
        return portable_config(path), absolute(place(path))
    folder = absolute(find_checkpoint(path))
    return _config_of(folder, read_meta(folder)), folder.parents[3]


def _config_of(folder: Path, meta: Mapping[str, Any]) -> ExperimentConfig:
    try:
        return config_lib.from_dict(ExperimentConfig, meta["config"])
    except UserError as error:
        raise UserError(
            f"checkpoint {folder} was saved with a configuration this program does not know: {error}"
        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# Stopping safely
# ---------------------------------------------------------------------------------------------------------------------


class StopSignal:
    """Turns the first SIGTERM or SIGINT into a request that the loop reads between steps; a second one acts as usual.

    Use as a context manager. Outside the main thread signals cannot be caught and nothing is installed.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
