"""Transcribed recordings, as corpora come, -> one checked manifest.jsonl that stages 2.1a, 3.1 and 3.2 train on.

The recordings stay where they are. OUTPUT gets manifest.jsonl (an object a line: id, audio, text, language, duration in
seconds) and rejects.jsonl (field, category, and the reason with its place). An older manifest is replaced when the new
one is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.records import (
    LONGEST_AUDIO,
    PROGRESS_SECONDS,
    REJECTS_NAME,
    Progress,
    check_budget_bounds,
    map_in_order,
    within_budget,
)
from data_pipelines.speech.manifests import Utterance
from vita_jax.data.audio import read_audio
from vita_jax.data.records import RecordError
from vita_jax.data.speech_pairs import MANIFEST
from vita_jax.errors import UserError
from vita_jax.ops.filter_bank import RELEASED

DURATION_TOLERANCE = 0.5  # seconds that a list may be wrong by


@dataclass(frozen=True)
class Recordings:
    """What was written.

    Attributes:
      count, seconds: of the recordings in the manifest.
      languages: recordings by language.
      rejects: lines that were left out, by category.
    """

    count: int
    seconds: float
    languages: dict[str, int]
    rejects: dict[str, int]


def build_manifest(
    lines: Iterable[Utterance | RecordError],
    output: str | os.PathLike[str],
    *,
    max_bad_fraction: float = 0.01,
    progress: Progress | None = None,
) -> Recordings:
    """Decodes every recording once and writes the manifest of those that can be used.

    Args:
      lines: of a corpus, see `data_pipelines.speech.manifests.read_corpus`.
      output: folder to make; an earlier manifest in it is replaced, anything else is refused.
      max_bad_fraction: of the lines; more rejects than that are an error.
      progress: called with a short line now and then.

    Raises:
      UserError: a refused output, too many rejects, or nothing that can be used. The rejects are then in
        OUTPUT.rejects.jsonl and `output` is as before.
    """
    output = Path(output).absolute()
    _check(output, max_bad_fraction)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.new-", dir=output.parent))
    try:
        found = _write(temporary, lines, output, progress)
        beside = output.with_name(f"{output.name}.{REJECTS_NAME}")
        bad, total = sum(found.rejects.values()), found.count + sum(found.rejects.values())
        if not total:
            raise UserError("there are no recordings in the corpus: its lists are empty")
        if not within_budget(bad, total, max_bad_fraction):
            shutil.copyfile(temporary / REJECTS_NAME, beside)
            first = json.loads(beside.read_text(encoding="utf-8").split("\n")[0])["reason"]
            raise UserError(
                f"{bad} of {total} recordings rejected, max_bad_fraction is {max_bad_fraction:g}; "
                f"all reasons are in {beside}; the first: {first}"
            )
        output.mkdir(exist_ok=True)
        for name in (REJECTS_NAME, MANIFEST):
            (temporary / name).replace(output / name)
        beside.unlink(missing_ok=True)
        return found
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check(output: Path, max_bad_fraction: float) -> None:
    check_budget_bounds(max_bad_fraction)
    if output.is_file():
        raise UserError(f"output {output} is a file; give a folder")
    # A manifest alone may be the user's own.
    built = all((output / name).is_file() for name in (MANIFEST, REJECTS_NAME))
    if output.is_dir() and any(output.iterdir()) and not built:
        raise UserError(f"output folder {output} holds something that was not built here; give a new or empty folder")


def _write(
    folder: Path, lines: Iterable[Utterance | RecordError], output: Path, progress: Progress | None
) -> Recordings:
    """Fills `folder` with the manifest, whose paths start at `output`, and the rejects."""
    languages, categories = Counter[str](), Counter[str]()
    seconds, done, shown = 0.0, 0, time.monotonic()
    with (folder / MANIFEST).open("w", encoding="utf-8") as good, (folder / REJECTS_NAME).open("w") as bad:
        for result in map_in_order(_entry(output), lines):
            done += 1
            if isinstance(result, RecordError):
                categories[result.category] += 1
                fields = {"field": result.field, "category": result.category, "reason": str(result)}
                bad.write(json.dumps(fields) + "\n")
            else:
                languages[result["language"]] += 1
                seconds += result["duration"]
                good.write(json.dumps(result, ensure_ascii=False) + "\n")
            if progress is not None and time.monotonic() - shown >= PROGRESS_SECONDS:
                shown = time.monotonic()
                progress(f"{done} recordings, {seconds / 3600:.1f} h, {sum(categories.values())} rejected")
    return Recordings(sum(languages.values()), seconds, dict(languages), dict(sorted(categories.items())))


def _entry(output: Path) -> Callable[[Utterance | RecordError], dict[str, Any] | RecordError]:
    """What makes a line of the manifest in `output`, or says why there is none."""
    start = output.resolve()

    def entry(line: Utterance | RecordError) -> dict[str, Any] | RecordError:
        if isinstance(line, RecordError):
            return line
        try:
            if not line.path.is_file():
                return RecordError(line.place, "audio", f"the recording {line.path} does not exist", "missing media")
            samples = read_audio(line.path, LONGEST_AUDIO, sample_rate=RELEASED.sample_rate)
        except UserError as error:
            return RecordError(line.place, "audio", str(error), "damaged media")
        except OSError as error:
            return RecordError(line.place, "audio", f"{line.path}: {error.strerror}", "missing media")
        seconds = len(samples) / RELEASED.sample_rate
        if line.duration is not None and abs(line.duration - seconds) > DURATION_TOLERANCE:
            reason = f"is {line.duration} s in the list, {seconds:.2f} s in {line.path}"
            return RecordError(line.place, "duration", reason, "wrong duration")
        path = os.path.relpath(line.path.resolve(), start)
        fields = {"id": line.id, "audio": path, "text": line.text, "language": line.language}
        return fields | {"duration": round(seconds, 3)}

    return entry
