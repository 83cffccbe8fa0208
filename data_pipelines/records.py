"""Any JSON in the public record format -> checked, self-contained ArrayRecord files for training.

The records file is described in `vita_jax/data/records.py`. Every picture and every sound is decoded
and every video's sampled frames are read once here, so that training meets no surprise later. OUTPUT gets
records-*.array_record, manifest.json and rejects.jsonl (one line per rejected record: file, record, id, field,
category, reason). It appears complete or not at all, and a second run with the same inputs does nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from array_record.python.array_record_module import ArrayRecordWriter

from vita_jax.data.audio import MAX_SECONDS, AudioConfig, read_audio
from vita_jax.data.images import open_image
from vita_jax.data.records import (
    MANIFEST_NAME,
    RECORD_SCHEMA,
    CheckedRecord,
    Manifest,
    Media,
    Record,
    RecordError,
    Shard,
    check_record,
    encode_record,
    load_manifest,
    read_json_records,
)
from vita_jax.data.video import choose_frames, probe_video, read_frames
from vita_jax.errors import UserError

REJECTS_NAME = "rejects.jsonl"
# Records in memory at once, with their media.
WINDOW = 64
THREADS = max(2, os.cpu_count() or 1)
PROGRESS_SECONDS = 0.5
# A run may accept less, never more.
LONGEST_AUDIO = AudioConfig(max_seconds=MAX_SECONDS)

Progress = Callable[[str], None]
Result = TypeVar("Result")


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

    def check(self, record: Record, where: str) -> None:
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


@dataclasses.dataclass(frozen=True)
class _Reject:
    index: int
    id: Any
    error: RecordError

    def to_json(self, source: str) -> str:
        error = self.error
        fields = {"file": source, "record": self.index, "id": self.id, "field": error.field}
        return json.dumps({**fields, "category": error.category, "reason": error.reason}, ensure_ascii=True)


def _check_texts(
    entries: Sequence[Any],
    source: str,
    root: str | None,
    folders: Mapping[str, str] | None,
    ignore_fields: Sequence[str],
) -> list[CheckedRecord | _Reject]:
    """Everything that can be checked without opening a media file."""
    out: list[CheckedRecord | _Reject] = []
    for index, entry in enumerate(entries):
        try:
            checked = check_record(entry, root, folders=folders, where=source, index=index, ignore_fields=ignore_fields)
            out.append(checked)
        except RecordError as error:
            out.append(_rejected(index, entry, error))
    return out


def _rejected(index: int, entry: Any, error: RecordError) -> _Reject:
    identity = entry.get("id") if isinstance(entry, dict) else None
    return _Reject(index, identity if isinstance(identity, (str, int)) else None, error)


def _finish(item: CheckedRecord | _Reject, checker: _MediaChecker) -> tuple[Record, bytes] | RecordError:
    """Reads and decodes the media of a record."""
    if isinstance(item, _Reject):
        return item.error
    try:
        record = item.with_media()
        checker.check(record, item.where)
        return record, encode_record(record)
    except RecordError as error:
        return error


def map_in_order(function: Callable[[Any], Result], items: Iterable[Any]) -> Iterator[Result]:
    """The function of every item, in order, by several threads, a window at a time."""
    items = iter(items)
    with ThreadPoolExecutor(THREADS) as pool:
        while window := list(islice(items, WINDOW)):
            yield from pool.map(function, window)


def _results(
    items: Sequence[CheckedRecord | _Reject], entries: Sequence[Any], name: str, progress: Progress | None
) -> Iterator[tuple[Record, bytes] | _Reject]:
    """Every record with its stored bytes, or why there are none; says now and then how far it is."""
    checker, shown, rejected = _MediaChecker(), time.monotonic(), 0
    for index, result in enumerate(map_in_order(lambda item: _finish(item, checker), items)):
        rejected += isinstance(result, RecordError)
        if progress is not None and time.monotonic() - shown >= PROGRESS_SECONDS:
            shown = time.monotonic()
            progress(f"{name}: {index + 1} of {len(items)} records, {rejected} rejected")
        yield _rejected(index, entries[index], result) if isinstance(result, RecordError) else result


# ---- fingerprints ---------------------------------------------------------------------------------------------------


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _media_sha256(items: Sequence[CheckedRecord | _Reject]) -> str:
    """Hash over path, size and modification time of all media files; a missing file counts as such."""
    paths = {file.path for item in items if isinstance(item, CheckedRecord) for file in item.files}
    digest = hashlib.sha256()
    for path in sorted(paths):
        try:
            stat = path.stat()
            line = f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
        except OSError:
            line = f"{path}\0missing\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _up_to_date(output: Path, wanted: Manifest) -> Manifest | None:
    """The manifest of an earlier build with the same inputs whose shards are all there, else None."""
    if not (output / MANIFEST_NAME).is_file():
        return None
    try:
        found = load_manifest(output)
    except UserError:  # an older or damaged manifest: build again
        return None
    inputs = ("source_sha256", "media_sha256", "options")
    if any(getattr(found, name) != getattr(wanted, name) for name in inputs):
        return None
    for shard in found.shards:
        path = output / shard.name
        if not path.is_file() or path.stat().st_size != shard.bytes:
            return None
    return found


# ---- writing --------------------------------------------------------------------------------------------------------


class _Writer:
    """Deals accepted records out to the shards in turn."""

    def __init__(self, folder: Path, shards: int) -> None:
        self.names = [f"records-{i:05d}-of-{shards:05d}.array_record" for i in range(shards)]
        self._folder = folder
        # One record per group: random access then reads no more than the record.
        self._writers = [ArrayRecordWriter(str(folder / name), "group_size:1") for name in self.names]
        self.written = 0

    def write(self, data: bytes) -> None:
        self._writers[self.written % len(self._writers)].write(data)
        self.written += 1

    def close(self) -> tuple[Shard, ...]:
        """Finishes the files. Shards that got no record are removed."""
        shards = []
        for i, (name, writer) in enumerate(zip(self.names, self._writers, strict=True)):
            writer.close()
            path = self._folder / name
            records = len(range(i, self.written, len(self.names)))
            if records:
                shards.append(Shard(name, records, path.stat().st_size, _file_sha256(path)))
            else:
                path.unlink()
        return tuple(shards)


def _count(counts: Counter[str], record: Record) -> None:
    counts["records"] += 1
    counts["rounds"] += record.num_rounds
    for media in record.media:
        counts[f"{media.kind}s"] += 1
    counts["text_only"] += not record.media


def _replace_folder(new: Path, output: Path) -> None:
    """Puts `new` in the place of `output`; an older build disappears only once the new one is complete."""
    if output.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
        output.rename(old / "data")
        new.rename(output)
        shutil.rmtree(old)
    else:
        new.rename(output)


@dataclasses.dataclass(frozen=True)
class Validation:
    """What a records file holds.

    Attributes:
      total: records in the file.
      counts: of what can be used, as in a `Manifest`.
      rejects: one JSON line for each record that cannot be used, as in rejects.jsonl.
      categories: rejects by category.
    """

    total: int
    counts: dict[str, int]
    rejects: tuple[str, ...]
    categories: dict[str, int]


def validate_json(
    json_path: str | os.PathLike[str],
    root: str | os.PathLike[str] | None,
    *,
    folders: Mapping[str, str] | None = None,
    ignore_fields: Sequence[str] = (),
    progress: Progress | None = None,
) -> Validation:
    """Checks a records file and decodes all its media, as `build_records` does, and writes nothing.

    Raises:
      UserError: the file cannot be read, or `root` is no folder. What is wrong with records is in the result.
    """
    source = Path(json_path)
    entries, items = _read_items(source, root, folders, ignore_fields)
    counts, rejects = _empty_counts(), []
    for result in _results(items, entries, source.name, progress):
        if isinstance(result, _Reject):
            rejects.append(result)
        else:
            _count(counts, result[0])
    categories = Counter(reject.error.category for reject in rejects)
    lines = tuple(reject.to_json(source.name) for reject in rejects)
    return Validation(len(items), dict(counts), lines, dict(sorted(categories.items())))


def _read_items(
    source: Path,
    root: str | os.PathLike[str] | None,
    folders: Mapping[str, str] | None,
    ignore_fields: Sequence[str],
) -> tuple[list[Any], list[CheckedRecord | _Reject]]:
    """The entries of a records file, and the same checked as far as their texts go."""
    if root is not None and not Path(root).is_dir():
        raise UserError(f"root {os.fspath(root)} is not a folder; it is where the media paths of {source} start")
    entries = read_json_records(source)
    place = None if root is None else os.fspath(root)
    return entries, _check_texts(entries, source.name, place, folders, ignore_fields)


def _empty_counts() -> Counter[str]:
    return Counter(records=0, rounds=0, images=0, videos=0, text_only=0)


def check_budget_bounds(max_bad_fraction: float) -> None:
    """Raises UserError for a budget of rejects that is no share."""
    if not 0 <= max_bad_fraction <= 1:
        raise UserError(f"max_bad_fraction is {max_bad_fraction}; it must be between 0 and 1")


def within_budget(bad: int, total: int, max_bad_fraction: float) -> bool:
    """Whether so many rejects are allowed; never are all."""
    return bad <= max_bad_fraction * total and bad < total


def _check_arguments(output: Path, max_bad_fraction: float, shards: int) -> None:
    check_budget_bounds(max_bad_fraction)
    if not 1 <= shards <= 1000:
        raise UserError(f"shards is {shards}; it must be between 1 and 1000")
    if output.exists():
        if not output.is_dir():
            raise UserError(f"output {output} is a file; give a folder")
        if any(output.iterdir()) and not (output / MANIFEST_NAME).is_file():
            raise UserError(
                f"output folder {output} holds something that was not built here; give a new or empty folder"
            )


def build_records(
    json_path: str | os.PathLike[str],
    root: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    *,
    folders: Mapping[str, str] | None = None,
    max_bad_fraction: float = 0.01,
    shards: int = 1,
    ignore_fields: Sequence[str] = (),
    progress: Progress | None = None,
    command: str | None = None,
) -> Manifest:
    """Checks a records file with its media and writes it as ArrayRecord.

    The same inputs give the same shards, byte for byte. If `output` already holds them, nothing is done.

    Args:
      json_path: a JSON list of records.
      root: folder that media paths are relative to; None if `folders` covers everything, or for text.
      output: folder to make; an earlier build in it is replaced, anything else is refused.
      folders: {set: root} for records that name a set.
      max_bad_fraction: of the records; more rejects than that are an error.
      shards: number of files.
      ignore_fields: fields outside of the format to skip; other unknown fields reject their record.
      progress: called with a short line now and then.
      command: what the manifest gives as its origin.

    Returns:
      The manifest, which is also in `output`.

    Raises:
      UserError: unreadable input, a refused output, too many rejects, or no usable record at all. The rejects are
        then in OUTPUT.rejects.jsonl and `output` is as before.
    """
    source, output = Path(json_path), Path(output).absolute()
    _check_arguments(output, max_bad_fraction, shards)
    entries, items = _read_items(source, root, folders, ignore_fields)
    options = {
        "root": None if root is None else str(Path(root).resolve()),
        "folders": {key: str(Path(value).resolve()) for key, value in sorted((folders or {}).items())},
        "shards": shards,
        "ignore_fields": sorted(ignore_fields),
    }
    wanted = Manifest(
        schema=RECORD_SCHEMA,
        source=str(source),
        source_sha256=_file_sha256(source),
        media_sha256=_media_sha256(items),
        options=options,
        command=command or "build_records",
        counts={},
        rejects={},
        shards=(),
    )
    found = _up_to_date(output, wanted)
    if found is not None:
        _check_budget(source, sum(found.rejects.values()), len(entries), max_bad_fraction, output / REJECTS_NAME, "")
        if progress is not None:
            progress(f"{output} is up to date ({found.counts['records']} records)")
        return found
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.new-", dir=output.parent))
    try:
        manifest = _write(temporary, wanted, items, entries, output, max_bad_fraction, progress)
        temporary.chmod(0o755)  # mkdtemp makes it private
        _replace_folder(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    output.with_name(f"{output.name}.{REJECTS_NAME}").unlink(missing_ok=True)
    return manifest


def _write(
    folder: Path,
    wanted: Manifest,
    items: Sequence[CheckedRecord | _Reject],
    entries: Sequence[Any],
    output: Path,
    max_bad_fraction: float,
    progress: Progress | None,
) -> Manifest:
    """Fills `folder` with shards, rejects and manifest, or raises with the rejects beside `output`."""
    source = Path(wanted.source)
    counts = _empty_counts()
    rejects: list[_Reject] = []
    writer = _Writer(folder, wanted.options["shards"])
    for result in _results(items, entries, source.name, progress):
        if isinstance(result, _Reject):
            rejects.append(result)
        else:
            record, data = result
            _count(counts, record)
            writer.write(data)
    shards = writer.close()
    lines = "".join(reject.to_json(source.name) + "\n" for reject in rejects)
    (folder / REJECTS_NAME).write_text(lines, encoding="utf-8")
    if rejects:
        beside = output.with_name(f"{output.name}.{REJECTS_NAME}")
        try:
            _check_budget(source, len(rejects), len(items), max_bad_fraction, beside, str(rejects[0].error))
        except UserError:
            shutil.copyfile(folder / REJECTS_NAME, beside)
            raise
    categories = Counter(reject.error.category for reject in rejects)
    manifest = dataclasses.replace(wanted, counts=dict(counts), rejects=dict(sorted(categories.items())), shards=shards)
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    if progress is not None:
        progress(f"{source.name}: {len(items)} records, {len(rejects)} rejected; wrote {output}")
    return manifest


def _check_budget(source: Path, bad: int, total: int, max_bad_fraction: float, rejects: Path, first: str) -> None:
    """Raises UserError if too many records, or all of them, were rejected."""
    if within_budget(bad, total, max_bad_fraction):
        return
    example = f"; the first: {first}" if first else ""
    raise UserError(
        f"{source}: {bad} of {total} records rejected ({bad / total:.1%}), max_bad_fraction is {max_bad_fraction:g}; "
        f"all reasons are in {rejects}{example}"
    )
