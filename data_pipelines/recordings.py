"""Transcribed recordings, as corpora come, -> one checked manifest.jsonl that stages 2.1a, 3.1 and 3.2 train on.

The recordings stay where they are. OUTPUT gets manifest.jsonl (an object a line: id, audio, text, language, duration in
seconds) and rejects.jsonl (field, category, and the reason with its place). An older manifest is replaced when the new
one is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.parts import (
    LOCAL,
    Progress,
    Report,
    Runner,
    deal_out,
    file_state,
    forget,
    forget_work,
    map_in_order,
    read_part,
    replace_folder,
    run_parts,
    shown_counts,
    work_folder,
)
from data_pipelines.records import LONGEST_AUDIO
from data_pipelines.rejects import REJECTS_NAME, beside, check_budget, check_budget_bounds, check_output
from data_pipelines.speech.manifests import Utterance
from data_pipelines.tfds_source import TfdsSource
from vita_jax.data.audio import read_audio
from vita_jax.data.manifests import MANIFEST
from vita_jax.data.records import RecordError
from vita_jax.data.spoken_words import language_of
from vita_jax.errors import UserError
from vita_jax.ops.filter_bank import RELEASED

MEDIA = "media"
PART_LINES = 1000  # of a part
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
    corpus: Iterable[Utterance | RecordError] | TfdsSource,
    output: str | os.PathLike[str],
    *,
    max_bad_fraction: float = 0.01,
    runner: Runner = LOCAL,
    progress: Progress | None = None,
) -> Recordings:
    """Decodes every recording once and writes the manifest of those that can be used.

    Args:
      corpus: the lines of one, see `data_pipelines.speech.manifests.read_corpus`; or a data set with sound, whose
        answers are the transcripts and whose recordings are written below OUTPUT/media.
      output: folder to make; an earlier manifest in it is replaced, anything else is refused.
      max_bad_fraction: of the recordings; more rejects than that are an error.
      runner: who does the work.
      progress: called with a short line now and then.

    Raises:
      UserError: a refused output, a data set without sound, too many rejects, or nothing that can be used. The rejects
        are then in OUTPUT.rejects.jsonl and `output` is as before.
    """
    output = Path(output).absolute()
    check_budget_bounds(max_bad_fraction)
    check_output(output, (MANIFEST, REJECTS_NAME))  # a manifest alone may be the user's own
    output.parent.mkdir(parents=True, exist_ok=True)
    work, total = _dealt_out(corpus, output)
    if not total:
        forget_work(output)
        raise UserError("there are no recordings in the corpus: its lists are empty")
    new = work / "output"
    builder: ManifestBuilder | ElementBuilder = ManifestBuilder(str(output.resolve()))
    if isinstance(corpus, TfdsSource):
        (new / MEDIA).mkdir(parents=True, exist_ok=True)
        builder = ElementBuilder(corpus, str(new / MEDIA))
    new.mkdir(exist_ok=True)
    results = run_parts(work, builder, runner, shown_counts("recordings", total, progress))
    found = _gathered(results)
    for name in (REJECTS_NAME, MANIFEST):
        with (new / name).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=name == REJECTS_NAME) + "\n" for result in results
                            for line in result[name])  # fmt: skip
    bad = [line["reason"] for result in results for line in result[REJECTS_NAME]]
    try:
        first = bad[0] if bad else ""
        check_budget("the corpus", "recordings", len(bad), total, max_bad_fraction, beside(output), first)
    except UserError:
        shutil.copyfile(new / REJECTS_NAME, beside(output))
        forget(work, lambda result: bool(result[REJECTS_NAME]))  # what failed once may work when it is tried again
        raise
    replace_folder(new, output)
    forget_work(output)
    beside(output).unlink(missing_ok=True)
    return found


def _dealt_out(corpus: Iterable[Utterance | RecordError] | TfdsSource, output: Path) -> tuple[Path, int]:
    """The folder of the parts, and how many recordings there are."""
    if isinstance(corpus, TfdsSource):
        if corpus.audio is None:
            raise UserError(f"data set {corpus.name}: say which feature is the sound (--audio FEATURE)")
        corpus.check()
        digest = hashlib.sha256(json.dumps([corpus.sha256(), corpus.options()]).encode()).hexdigest()
        work = work_folder(output, digest)
        return work, deal_out(corpus.entries(), work, lambda place: place // PART_LINES)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.new-", dir=output.parent) as new:
        total = deal_out(map(_to_json, corpus), Path(new), lambda place: place // PART_LINES)
        work = work_folder(output, _digest(Path(new)))
        for file in Path(new).iterdir():
            file.replace(work / file.name)
    return work, total


def _to_json(line: Utterance | RecordError) -> dict[str, Any]:
    if isinstance(line, RecordError):
        return {"error": {"field": line.field, "category": line.category, "reason": str(line)}}
    return {**vars(line), "path": str(line.path)}


def _digest(folder: Path) -> str:
    """Of all lines, and of the size and time of change of their recordings."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        for _, entry in read_part(file):
            digest.update(json.dumps(entry).encode())
            if "error" not in entry:
                digest.update(file_state(Path(entry["path"])).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _gathered(results: Sequence[dict[str, Any]]) -> Recordings:
    """The results of all parts as one."""
    good = [line for result in results for line in result[MANIFEST]]
    categories = Counter(line["category"] for result in results for line in result[REJECTS_NAME])
    seconds = sum(line["duration"] for line in good)
    return Recordings(
        len(good), seconds, dict(Counter(line["language"] for line in good)), dict(sorted(categories.items()))
    )


@dataclass(frozen=True)
class ManifestBuilder:
    """The work of one part: its recordings are decoded.

    Attributes:
      output: folder of the manifest, where its paths start.
    """

    output: str

    def __call__(self, part: Path, report: Report) -> dict[str, list[dict[str, Any]]]:
        """Lines of the manifest, and of the rejects."""
        good, bad = [], []
        for result in map_in_order(lambda item: self._line(item[1]), read_part(part)):
            (bad if "category" in result else good).append(result)
            report.show(done=len(good) + len(bad), rejected=len(bad))
        return {MANIFEST: good, REJECTS_NAME: bad}

    def _line(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Of the manifest, or of the rejects."""
        if "error" in entry:
            return entry["error"]
        path = Path(entry["path"])
        line = Utterance(**{**entry, "path": path})
        try:
            if not path.is_file():
                return _reject(line, "audio", f"the recording {path} does not exist", "missing media")
            samples = read_audio(path, LONGEST_AUDIO, sample_rate=RELEASED.sample_rate)
        except UserError as error:
            return _reject(line, "audio", str(error), "damaged media")
        except OSError as error:
            return _reject(line, "audio", f"{path}: {error.strerror}", "missing media")
        seconds = len(samples) / RELEASED.sample_rate
        if line.duration is not None and abs(line.duration - seconds) > DURATION_TOLERANCE:
            reason = f"is {line.duration} s in the list, {seconds:.2f} s in {path}"
            return _reject(line, "duration", reason, "wrong duration")
        fields = {"id": line.id, "audio": os.path.relpath(path.resolve(), self.output)}
        return fields | {"text": line.text, "language": line.language, "duration": round(seconds, 3)}


def _reject(line: Utterance, field: str, reason: str, category: str) -> dict[str, str]:
    return {"field": field, "category": category, "reason": f"{line.place}: {field}: {reason}"}


@dataclass(frozen=True)
class ElementBuilder:
    """The work of one part of a data set: its sounds are decoded, and written below the folder `media`."""

    source: TfdsSource
    media: str

    def __call__(self, part: Path, report: Report) -> dict[str, list[dict[str, Any]]]:
        """Lines of the manifest, and of the rejects."""
        good, bad = [], []
        for place, entry in read_part(part):
            try:
                good.append(self._line(place, entry))
            except RecordError as error:
                bad.append({"field": error.field, "category": error.category, "reason": str(error)})
            report.show(done=len(good) + len(bad), rejected=len(bad))
        return {MANIFEST: good, REJECTS_NAME: bad}

    def _line(self, place: int, entry: int) -> dict[str, Any]:
        record = self.source.checked(entry, place).with_media()
        (sound,) = (media for media in record.media if media.kind == "audio")
        try:
            samples = read_audio(sound.data, LONGEST_AUDIO, sample_rate=RELEASED.sample_rate)
        except UserError as error:
            raise RecordError(f"{self.source.name}: record {place}", "audio", str(error), "damaged media") from error
        name, text = f"{place:08d}.wav", record.conversations[-1]["value"].strip()
        Path(self.media, name).write_bytes(sound.data)
        seconds = round(len(samples) / RELEASED.sample_rate, 3)
        fields = {"id": str(place), "audio": f"{MEDIA}/{name}", "text": text}
        return fields | {"language": language_of(text), "duration": seconds}
