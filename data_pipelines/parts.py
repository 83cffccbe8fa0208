"""Work in parts, by Apache Beam: what turns raw data into training data here runs on this.

The entries of a source are dealt out to parts that need nothing of each other. Beam has them done: in this process, by
several processes of a machine (`--runner-option direct_running_mode=multi_processing`), or on a cluster (`--runner
FlinkRunner`, `SparkRunner`; sources and outputs must then be at the same paths on all machines). What
comes out depends on the parts alone, not on who did them. A part that is done leaves its result in the folder; a run
that was stopped goes on with the others.

    FOLDER/part-00000.entries   a JSON line for each entry: [place in the source, entry]
    FOLDER/part-00000.result    what its work returned
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from vita_jax.errors import UserError

ENTRIES, RESULT, FAILED, STATE = ".entries", ".result", ".failed", ".state"
BUFFER_BYTES = 64 << 20  # of lines that are held while entries are dealt out
# Beam's own DirectRunner would first look for a program on the network; this is the one it falls back to, in Python.
EMBEDDED = {"DirectRunner": "apache_beam.runners.portability.fn_api_runner.FnApiRunner"}
# Entries in memory at once, with their media.
WINDOW = 64
THREADS = max(2, os.cpu_count() or 1)
PROGRESS_SECONDS = 0.5

Progress = Callable[[str], None]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Runner:
    """Who does the parts.

    Attributes:
      name: of a Beam runner.
      options: "KEY=VALUE" of the runner, as Beam documents them: "project=mine", "direct_num_workers=4".
    """

    name: str = "DirectRunner"
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option in self.options:
            if not option.partition("=")[0].strip("-") or "=" not in option:
                raise UserError(f"runner option {option!r} must be KEY=VALUE, as in direct_num_workers=4")


LOCAL = Runner()


def deal_out(entries: Iterable[Any], folder: Path, part_of: Callable[[int], int]) -> int:
    """Writes the entries of every part; returns how many entries there are.

    Args:
      entries: JSON values.
      folder: of the parts; files of an attempt before are written anew.
      part_of: the part of the entry at this place.
    """
    for old in folder.glob(f"part-*{ENTRIES}"):
        old.unlink()
    buffers: dict[int, list[str]] = {}
    held, place = 0, -1
    for place, entry in enumerate(entries):
        # ASCII, so that half a character reaches its check and not the encoder of a file.
        line = json.dumps([place, entry], ensure_ascii=True) + "\n"
        buffers.setdefault(part_of(place), []).append(line)
        held += len(line)
        if held > BUFFER_BYTES:
            _append(buffers, folder)
            held = 0
    _append(buffers, folder)
    return place + 1


def work_folder(output: Path, digest: str) -> Path:
    """Where the parts of an output are until it is complete, made if needed; those for other inputs are removed.

    Args:
      output: what will be written.
      digest: of all inputs, in hexadecimal.
    """
    work = output.with_name(f".{output.name}.parts-{digest[:16]}")
    for old in output.parent.glob(f".{output.name}.parts-*"):
        if old != work:
            shutil.rmtree(old)
    work.mkdir(parents=True, exist_ok=True)
    return work


def forget_work(output: Path) -> None:
    """Removes the parts of an output that is complete."""
    for old in output.parent.glob(f".{output.name}.parts-*"):
        shutil.rmtree(old)


def replace_folder(new: Path, output: Path) -> None:
    """Puts `new` in the place of `output`; an older one disappears only once the new one is complete."""
    if not output.exists():
        new.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
    output.rename(old / "data")
    new.rename(output)
    shutil.rmtree(old)


def shown_counts(what: str, total: int, progress: Progress | None) -> Callable[[Counter[str]], None] | None:
    """What makes a line of the counts of `run_parts`: "done" and "rejected" of `total`."""
    if progress is None:
        return None
    return lambda counts: progress(f"{counts['done']} of {total} {what}, {counts['rejected']} rejected")


def file_state(path: Path) -> str:
    """Path, size and time of change as a line; a missing file counts as such."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return f"{path}\0missing\n"
    return f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n"


def _append(buffers: dict[int, list[str]], folder: Path) -> None:
    for part, lines in buffers.items():
        with _file(folder, part).open("a", encoding="ascii") as file:
            file.writelines(lines)
    buffers.clear()


def _file(folder: Path, part: int) -> Path:
    return folder / f"part-{part:05d}{ENTRIES}"


def read_part(file: Path) -> Iterator[tuple[int, Any]]:
    """(place, entry) of a part."""
    with file.open(encoding="ascii") as lines:
        for line in lines:
            place, entry = json.loads(line)
            yield place, entry


def map_in_order(function: Callable[[Any], Result], items: Iterable[Any]) -> Iterator[Result]:
    """The function of every item, in order, by several threads, a window at a time."""
    items = iter(items)
    with ThreadPoolExecutor(THREADS) as pool:
        while window := list(islice(items, WINDOW)):
            yield from pool.map(function, window)


# ---- the work of one part, wherever it runs -------------------------------------------------------------------------


class Report:
    """Says now and then how far a part is, in a small file beside it that whoever waits reads."""

    def __init__(self, file: Path) -> None:
        self._file, self._shown = file.with_suffix(STATE), 0.0
        self._counts: dict[str, int] = {}

    def show(self, **counts: int) -> None:
        """What was counted so far."""
        now, self._counts = time.monotonic(), counts
        if now - self._shown >= PROGRESS_SECONDS:
            self._shown = now
            self.close()

    def close(self) -> None:
        """Writes what was counted last."""
        _write_whole(self._file, self._counts)


def _write_whole(file: Path, value: Any) -> None:
    """A JSON file that is there completely or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(file)


@dataclass(frozen=True)
class _Work:
    """One part by name; what Beam sends to its workers."""

    function: Callable[[Path, Report], Any]

    def __call__(self, name: str) -> None:
        file = Path(name)
        if file.with_suffix(RESULT).is_file():
            return
        try:
            report = Report(file)
            result = self.function(file, report)
            report.close()
            _write_whole(file.with_suffix(RESULT), result)
        except (UserError, OSError) as error:
            with contextlib.suppress(OSError):
                _write_whole(file.with_suffix(FAILED), str(error))
            raise


# ---- all of them ----------------------------------------------------------------------------------------------------


def run_parts(
    folder: Path,
    function: Callable[[Path, Report], Any],
    runner: Runner,
    progress: Callable[[Counter[str]], None] | None = None,
) -> list[Any]:
    """The results of all parts in a folder, those of an earlier attempt included.

    Args:
      folder: after `deal_out`, or after a run that was stopped.
      function: called with a part's entries file, see `read_part`; must be picklable. Returns a JSON value; what it
        writes beside must bear being written twice.
      runner: who does the work.
      progress: gets the sum of what the parts last reported.

    Raises:
      UserError: a part failed by one, or by the disk; an unknown runner or a bad option of it.
    """
    files = sorted(folder.glob(f"part-*{ENTRIES}"))
    for file in files:
        file.with_suffix(FAILED).unlink(missing_ok=True)
    left = [str(file) for file in files if not file.with_suffix(RESULT).is_file()]
    if left:
        with _watching(folder, progress):
            try:
                _run_by_beam(left, _Work(function), runner)
            except Exception as error:
                failed = sorted(folder.glob(f"part-*{FAILED}"))
                if not failed:
                    raise
                raise UserError(json.loads(failed[0].read_text(encoding="utf-8"))) from error
    return [json.loads(file.with_suffix(RESULT).read_text(encoding="utf-8")) for file in files]


def forget(folder: Path, unwanted: Callable[[Any], bool]) -> None:
    """Removes the results that are not wanted, so that their parts are done again."""
    for file in folder.glob(f"part-*{RESULT}"):
        if unwanted(json.loads(file.read_text(encoding="utf-8"))):
            file.unlink()


def _run_by_beam(files: list[str], work: _Work, runner: Runner) -> None:
    with _quiet():
        import apache_beam as beam  # here, since it takes seconds

        pipeline = _pipeline(runner)
    with pipeline:
        # Reshuffled, so that a runner may spread the parts.
        _ = pipeline | "Parts" >> beam.Create(files) | beam.Reshuffle() | "Work" >> beam.Map(work)


def _pipeline(runner: Runner) -> Any:
    """An empty pipeline. Raises UserError for a runner or an option that Beam does not know."""
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            name = EMBEDDED.get(runner.name, runner.name)
            options = PipelineOptions([f"--{option.lstrip('-')}" for option in runner.options], runner=name)
            known = options.get_all_options()
            pipeline = beam.Pipeline(options=options)
    except ValueError as error:
        raise UserError(f"runner {runner.name!r} is refused by Beam: {error}") from error
    except SystemExit as error:  # argparse
        reason = said.getvalue().strip().rpartition("error: ")[2]
        raise UserError(f"a runner option is refused by Beam: {reason}") from error
    for option in runner.options:
        key = option.lstrip("-").partition("=")[0]
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see Beam's documentation of the runner"
            raise UserError(f"Beam knows no runner option {key!r}; {hint}")
    return pipeline


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what Beam says of parts of it that are not needed."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _watching(folder: Path, progress: Callable[[Counter[str]], None] | None) -> Iterator[None]:
    """Sums up now and then what the parts report."""
    if progress is None:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(PROGRESS_SECONDS):
            total = Counter[str]()
            for state in folder.glob(f"part-*{STATE}"):
                with contextlib.suppress(OSError):
                    total.update(json.loads(state.read_text(encoding="utf-8")))
            if total:
                progress(total)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
