"""Records of a source -> checked, self-contained ArrayRecord files for training.

Every picture and every sound is decoded and every video's sampled frames are read once here, so that training meets no
surprise later. OUTPUT gets records-*.array_record, manifest.json and rejects.jsonl (one line per rejected record: file,
record, id, field, category, reason). It appears complete or not at all, a second run with the same inputs does nothing,
and a run that was stopped goes on where it was: what is done lies in .OUTPUT.parts-* until OUTPUT is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from data_pipelines.parts import (
    LOCAL,
    Progress,
    Report,
    Runner,
    deal_out,
    forget,
    forget_work,
    map_in_order,
    read_part,
    replace_folder,
    run_parts,
    shown_counts,
    work_folder,
)
from data_pipelines.rejects import REJECTS_NAME, beside, check_budget, check_budget_bounds, check_output
from data_pipelines.sources import RecordsFile, file_sha256
from data_pipelines.tfds_source import TfdsSource
from vita_jax.data.audio import MAX_SECONDS, AudioConfig, read_audio
from vita_jax.data.documents import DocumentRecord, encode_document
from vita_jax.data.images import open_image
from vita_jax.data.records import (
    MANIFEST_NAME,
    RECORD_SCHEMA,
    Manifest,
    Media,
    Record,
    RecordError,
    Shard,
    encode_record,
    load_manifest,
)
from vita_jax.data.video import choose_frames, probe_video, read_frames
from vita_jax.errors import UserError

Source = RecordsFile | TfdsSource
Built = tuple[Record | DocumentRecord, bytes]  # with the bytes that are stored
# A run may accept less, never more.
LONGEST_AUDIO = AudioConfig(max_seconds=MAX_SECONDS)
MAX_SHARDS = 1000
CHECK_PART = 1000  # records of a part where nothing is written


# ---- checking -------------------------------------------------------------------------------------------------------


def check_media(media: Media) -> None:
    """Decodes a picture or a sound, or the frames of a video that training would take.

    Raises:
      UserError: it is damaged, or a sound is longer than any model hears.
    """
    if media.kind == "image":
        open_image(media.data, name=media.name)
        return
    if media.kind == "audio":
        read_audio(media.data, LONGEST_AUDIO, name=media.name)
        return
    info = probe_video(media.data, name=media.name)
    read_frames(media.data, choose_frames(info.num_frames, info.fps), info, name=media.name)


class _MediaChecker:
    """Remembers which contents were decoded already: the same picture in a thousand records is decoded once."""

    def __init__(self) -> None:
        self._verdicts: dict[tuple[str, bytes], str] = {}

    def check(self, record: Record | DocumentRecord, where: str) -> None:
        """Raises RecordError for the first file that does not decode."""
        for media in record.media:
            key = (media.kind, hashlib.sha256(media.data).digest())
            if key not in self._verdicts:
                try:
                    check_media(media)
                    self._verdicts[key] = ""
                except UserError as error:
                    self._verdicts[key] = str(error)
            if self._verdicts[key]:
                raise RecordError(where, media.kind, self._verdicts[key], "damaged media")


@dataclass(frozen=True)
class PartBuilder:
    """The work of one part: its records are checked, and written to one shard.

    Attributes:
      source: of the records.
      folder: gets the shard; None = the records are only checked.
      shards: how many there are in all, for their names.
    """

    source: Source
    folder: str | None
    shards: int = 1

    def __call__(self, part: Path, report: Report) -> dict[str, Any]:
        """{"counts", "rejects": lines of rejects.jsonl, "shard": a `Shard` or None}."""
        counts, rejects = _empty_counts(), []
        writer = None if self.folder is None else _ShardWriter(Path(self.folder), _number(part), self.shards)
        for result in map_in_order(self._result(_MediaChecker()), read_part(part)):
            if isinstance(result, dict):
                rejects.append(result)
            else:
                record, data = result
                _count(counts, record)
                if writer is not None:
                    writer.write(data)
            report.show(done=counts["records"] + len(rejects), rejected=len(rejects))
        return {"counts": counts, "rejects": rejects, "shard": None if writer is None else writer.close()}

    def _result(self, checker: _MediaChecker) -> Callable[[tuple[int, Any]], Built | dict[str, Any]]:
        """What makes a record with its stored bytes of an entry, or a line of rejects.jsonl."""

        def result(item: tuple[int, Any]) -> Built | dict[str, Any]:
            place, entry = item
            try:
                checked = self.source.checked(entry, place)
                record = checked.with_media()
                checker.check(record, checked.where)
                encode = encode_document if isinstance(record, DocumentRecord) else encode_record
                return record, encode(record)
            except RecordError as error:
                fields = {"file": self.source.name, "record": place, "id": self.source.identity(entry)}
                return fields | {"field": error.field, "category": error.category, "reason": error.reason}

        return result


def _number(part: Path) -> int:
    return int(part.stem.removeprefix("part-"))


def _empty_counts() -> Counter[str]:
    return Counter(records=0, rounds=0, images=0, videos=0, text_only=0)


def _count(counts: Counter[str], record: Record | DocumentRecord) -> None:
    counts["records"] += 1
    counts["rounds"] += 0 if isinstance(record, DocumentRecord) else record.num_rounds
    for media in record.media:
        counts[f"{media.kind}s"] += 1
    counts["text_only"] += not record.media


class _ShardWriter:
    """One ArrayRecord file, in its place once it is whole."""

    def __init__(self, folder: Path, number: int, shards: int) -> None:
        self._path = folder / f"records-{number:05d}-of-{shards:05d}.array_record"
        self._temporary = self._path.with_suffix(f".{os.getpid()}.new")
        # One record per group: random access then reads no more than the record.
        self._writer = ArrayRecordWriter(str(self._temporary), "group_size:1")
        self._records = 0

    def write(self, data: bytes) -> None:
        self._writer.write(data)
        self._records += 1

    def close(self) -> dict[str, Any] | None:
        """The fields of its `Shard`; None if there was nothing to write, then there is no file."""
        self._writer.close()
        if not self._records:
            self._temporary.unlink()
            return None
        self._temporary.replace(self._path)
        size, digest = self._path.stat().st_size, file_sha256(self._path)
        return {"name": self._path.name, "records": self._records, "bytes": size, "sha256": digest}


# ---- what came out --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Validation:
    """What a source holds.

    Attributes:
      total: records of the source.
      counts: of what can be used, as in a `Manifest`.
      rejects: what rejects.jsonl says of those that cannot be used, in their order.
      shards: what was written.
    """

    total: int
    counts: dict[str, int]
    rejects: tuple[dict[str, Any], ...]
    shards: tuple[Shard, ...] = ()

    @property
    def categories(self) -> dict[str, int]:
        """Rejects by category."""
        return dict(sorted(Counter(reject["category"] for reject in self.rejects).items()))


def _gathered(results: Iterable[dict[str, Any]]) -> Validation:
    """The results of all parts as one."""
    counts, rejects, shards = _empty_counts(), [], []
    for result in results:
        counts.update(result["counts"])
        rejects += result["rejects"]
        shards += [Shard(**result["shard"])] if result["shard"] else []
    rejects.sort(key=lambda reject: reject["record"])
    return Validation(counts["records"] + len(rejects), dict(counts), tuple(rejects), tuple(shards))


def validate_records(source: Source, *, progress: Progress | None = None) -> Validation:
    """Checks a source and decodes all its media, as `build_records` does, and writes nothing.

    Raises:
      UserError: the source cannot be read. What is wrong with records is in the result.
    """
    source.check()
    with tempfile.TemporaryDirectory() as folder:
        total = deal_out(source.entries(), Path(folder), lambda place: place // CHECK_PART)
        shown = shown_counts(f"records of {source.name}", total, progress)
        return _gathered(run_parts(Path(folder), PartBuilder(source, None), LOCAL, shown))


# ---- the whole folder -----------------------------------------------------------------------------------------------


def build_records(
    source: Source,
    output: str | os.PathLike[str],
    *,
    max_bad_fraction: float = 0.01,
    shards: int = 1,
    runner: Runner = LOCAL,
    progress: Progress | None = None,
    command: str | None = None,
) -> Manifest:
    """Checks the records of a source with their media and writes them as ArrayRecord.

    The same inputs give the same shards, byte for byte, whoever did them: record i goes to shard i modulo `shards`. If
    `output` already holds them, nothing is done.

    Args:
      source: of the records.
      output: folder to make; an earlier build in it is replaced, anything else is refused.
      max_bad_fraction: of the records; more rejects than that are an error.
      shards: number of files; they are made at the same time as far as the runner does.
      runner: who does the work.
      progress: called with a short line now and then.
      command: what the manifest gives as its origin.

    Returns:
      The manifest, which is also in `output`.

    Raises:
      UserError: unreadable input, a refused output, too many rejects, or no usable record at all. The rejects are
        then in OUTPUT.rejects.jsonl and `output` is as before.
    """
    output = Path(output).absolute()
    _check_arguments(output, max_bad_fraction, shards)
    source.check()
    wanted = Manifest(
        schema=RECORD_SCHEMA,
        source=os.fspath(source.path),
        source_sha256=source.sha256(),
        media_sha256=_media_sha256(source),
        options={**source.options(), "shards": shards},
        command=command or "build_records",
        counts={},
        rejects={},
        shards=(),
    )
    found = _up_to_date(output, wanted)
    if found is not None:
        bad = sum(found.rejects.values())
        total = bad + found.counts["records"]
        check_budget(wanted.source, "records", bad, total, max_bad_fraction, output / REJECTS_NAME)
        if progress is not None:
            progress(f"{output} is up to date ({found.counts['records']} records)")
        forget_work(output)
        return found
    digest = hashlib.sha256(json.dumps([RECORD_SCHEMA, *_inputs(wanted)]).encode()).hexdigest()
    work = work_folder(output, digest)
    new = work / "output"
    new.mkdir(exist_ok=True)
    # What a killed build left: shards that were not finished, and results whose shards have gone.
    for unfinished in new.glob("*.new"):
        unfinished.unlink()
    forget(work, lambda result: not _is_there(new, result["shard"]))
    total = deal_out(source.entries(), work, lambda place: place % shards)
    builder = PartBuilder(source, str(new), shards)
    built = _gathered(run_parts(work, builder, runner, shown_counts(f"records of {source.name}", total, progress)))
    try:
        manifest = _finish(new, wanted, built, output, max_bad_fraction)
    except UserError:
        forget(work, lambda result: bool(result["rejects"]))  # what failed once may work when it is tried again
        raise
    replace_folder(new, output)
    forget_work(output)
    beside(output).unlink(missing_ok=True)
    if progress is not None:
        progress(f"{source.name}: {total} records, {len(built.rejects)} rejected; wrote {output}")
    return manifest


def _check_arguments(output: Path, max_bad_fraction: float, shards: int) -> None:
    check_budget_bounds(max_bad_fraction)
    if not 1 <= shards <= MAX_SHARDS:
        raise UserError(f"shards is {shards}; it must be between 1 and {MAX_SHARDS}")
    check_output(output, (MANIFEST_NAME,))


def _media_sha256(source: Source) -> str:
    """Hash over path, size and modification time of all media files; a missing file counts as such."""
    digest = hashlib.sha256()
    for place, entry in enumerate(source.entries()):
        digest.update(source.state(entry, place).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _inputs(manifest: Manifest) -> tuple[Any, ...]:
    """What decides the content of a folder."""
    return manifest.source_sha256, manifest.media_sha256, manifest.options


def _up_to_date(output: Path, wanted: Manifest) -> Manifest | None:
    """The manifest of an earlier build with the same inputs whose shards are all there, else None."""
    if not (output / MANIFEST_NAME).is_file():
        return None
    try:
        found = load_manifest(output)
    except UserError:  # an older or damaged manifest: build again
        return None
    if _inputs(found) != _inputs(wanted):
        return None
    for shard in found.shards:
        path = output / shard.name
        if not path.is_file() or path.stat().st_size != shard.bytes:
            return None
    return found


def _is_there(folder: Path, shard: Mapping[str, Any] | None) -> bool:
    """Whether the file of a part is as its result says."""
    if shard is None:
        return True
    path = folder / shard["name"]
    return path.is_file() and path.stat().st_size == shard["bytes"]


def _finish(folder: Path, wanted: Manifest, built: Validation, output: Path, max_bad_fraction: float) -> Manifest:
    """Writes rejects and manifest, or raises with the rejects beside `output`."""
    lines = "".join(json.dumps(reject) + "\n" for reject in built.rejects)
    (folder / REJECTS_NAME).write_text(lines, encoding="utf-8")
    reasons, first = beside(output), _described(built.rejects[0]) if built.rejects else ""
    try:
        check_budget(wanted.source, "records", len(built.rejects), built.total, max_bad_fraction, reasons, first)
    except UserError:
        shutil.copyfile(folder / REJECTS_NAME, reasons)
        raise
    manifest = replace(wanted, counts=built.counts, rejects=built.categories, shards=built.shards)
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _described(reject: Mapping[str, Any]) -> str:
    """A reject with its place."""
    field = f"{reject['field']}: " if reject["field"] else ""
    return f"{reject['file']}: record {reject['record']}: {field}{reject['reason']}"
