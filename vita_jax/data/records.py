"""The training record: the public JSON format read strictly, and the bytes it is stored as.

Public format, a JSON list of objects (`vita/util/data_utils_video_audio_neg_patch.py`, `chat_path` of a data set):
  conversations: [{"from": "human" | "gpt", "value": text}, ...], human first, taking turns, ending with gpt
  image, video, audio: a path or list of paths, one for every "<image>" / "<video>" / "<audio>" in the human turns, in
    order of appearance
  set: optional folder key (or one key per path), looked up in a table of roots; id: optional, for messages (a list of
    them where samples were joined to one)
  inserted_id: index of the answer to sound that is not meant for the model; end_tag: false for an answer that was
    interrupted; beside pictures only in records with audio
Stored form: msgpack of the same fields with the media files' bytes inside, so a record needs nothing else to be used.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack

from vita_jax.errors import UserError
from vita_jax.storage import place

# Raised by one when the stored fields change; older files are then refused with the advice to build again.
RECORD_SCHEMA = 1

PLACEHOLDERS = {"image": "<image>", "video": "<video>", "audio": "<audio>"}
ROLES = ("human", "gpt")
FIELDS = ("set", "id", "conversations", "image", "video", "audio", "inserted_id", "end_tag")


class RecordError(UserError):
    """One record cannot be used.

    Attributes:
      field: where in the record, e.g. "conversations[3].value".
      reason: what is wrong and what to do, without the place.
      category: a short word for counting ("format", "placeholders", "missing media", "damaged media", ...).
    """

    def __init__(self, where: str, field: str, reason: str, category: str = "format") -> None:
        super().__init__(f"{where}: {field}: {reason}" if field else f"{where}: {reason}")
        self.field, self.reason, self.category = field, reason, category


@dataclasses.dataclass(frozen=True)
class Media:
    """One picture, video or sound file.

    Attributes:
      kind: "image", "video" or "audio".
      name: the path as written in the record, for messages.
      data: the bytes of the file.
      set: folder key of the data set it belongs to.
    """

    kind: str
    name: str
    data: bytes = dataclasses.field(repr=False)
    set: str | None = None


@dataclasses.dataclass(frozen=True)
class Record:
    """A checked conversation with its media.

    Attributes:
      id: for messages, and the seed of what is drawn for the record.
      conversations: {"from", "value"} turns; human first, taking turns, ending with gpt.
      media: all images in order of their placeholders, then all videos and all sounds in order of theirs.
      set: folder keys, () if the record names none.
      inserted_id: index of the answer to something not meant for the model; None = no such answer.
      end_tag: False = the last answer was interrupted and has no end marker.
    """

    id: str
    conversations: tuple[dict[str, str], ...]
    media: tuple[Media, ...] = ()
    set: tuple[str, ...] = ()
    inserted_id: int | None = None
    end_tag: bool = True

    @property
    def num_rounds(self) -> int:
        """Questions with an answer."""
        return len(self.conversations) // 2


# ---- the public JSON ------------------------------------------------------------------------------------------------


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """Reads a UTF-8 JSON file (a leading byte-order mark is accepted).

    Args:
      what: what the file is, for messages ("records", "folder table").

    Raises:
      UserError: missing, not a file, empty, not UTF-8, or not JSON; names the file and where it goes wrong.
    """
    try:
        raw = place(path).read_bytes()
    except OSError as error:
        raise UserError(f"{what} file {os.fspath(path)} cannot be read: {error.strerror}") from error
    if not raw.strip():
        raise UserError(f"{what} file {os.fspath(path)} is empty; expected JSON")
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{what} file {os.fspath(path)} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{what} file {os.fspath(path)} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    except RecursionError as error:
        raise UserError(f"{what} file {os.fspath(path)} is nested too deeply to be a list of records") from error


def read_json_records(path: str | os.PathLike[str]) -> list[Any]:
    """The entries of a records file, unchecked. Raises UserError unless it is a non-empty JSON list."""
    entries = read_json(path, "records")
    if not isinstance(entries, list):
        raise UserError(f"records file {os.fspath(path)} holds a JSON {json_type(entries)}; expected a list of records")
    if not entries:
        raise UserError(f"records file {os.fspath(path)} is an empty list; there is nothing to train on")
    return entries


def read_folders(path: str | os.PathLike[str]) -> dict[str, str]:
    """A table {set: root folder}; relative roots are taken from the folder of the table. Raises UserError."""
    table = read_json(path, "folder table")
    if not isinstance(table, dict) or not all(isinstance(root, str) for root in table.values()):
        raise UserError(f"folder table {os.fspath(path)} must be a JSON object of set: folder, both text")
    return {key: str(Path(path).parent / root) for key, root in table.items()}


def json_type(value: Any) -> str:
    """What JSON calls the type of a value."""
    names = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


@dataclasses.dataclass(frozen=True)
class MediaFile:
    """A file that a record asks for: its kind, name as written, place on disk and folder key."""

    kind: str
    name: str
    path: Path
    set: str | None


@dataclasses.dataclass(frozen=True)
class Checker:
    """The rules for one record, or document; `where` names file, index and id in every message."""

    where: str

    def fail(self, field: str, reason: str, category: str = "format") -> RecordError:
        return RecordError(self.where, field, reason, category)

    def text(self, value: Any, field: str) -> str:
        if not isinstance(value, str):
            raise self.fail(field, f"is a {json_type(value)}; expected text")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.fail(
                field, f"holds half a character (surrogate) at position {error.start}; write it whole"
            ) from error
        return value

    def texts(self, value: Any, field: str) -> tuple[str, ...]:
        """A text or a list of texts, none empty."""
        values = value if isinstance(value, list) else [value]
        out = tuple(self.text(v, f"{field}[{i}]" if isinstance(value, list) else field) for i, v in enumerate(values))
        if not out or not all(out):
            raise self.fail(field, "is empty; leave the field out or give a value")
        return out

    def known_fields(self, entry: Mapping[str, Any], ignore: Sequence[str], known: Sequence[str] = FIELDS) -> None:
        for field in entry:
            if field in known or field in ignore:
                continue
            near = difflib.get_close_matches(field, known, n=1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else f"known: {', '.join(known)}; or ignore it (--ignore-fields {field})"
            )
            raise self.fail(field, f"unknown field; {hint}", "unknown field")

    def conversations(self, value: Any) -> tuple[dict[str, str], ...]:
        if not isinstance(value, list) or not value:
            raise self.fail("conversations", "must be a non-empty list of turns")
        turns = []
        for i, turn in enumerate(value):
            field = f"conversations[{i}]"
            if not isinstance(turn, dict) or set(turn) != {"from", "value"}:
                found = sorted(turn) if isinstance(turn, dict) else json_type(turn)
                raise self.fail(field, f"must have exactly the fields 'from' and 'value', got {found}")
            expected = ROLES[i % 2]
            if turn["from"] != expected:
                raise self.fail(
                    f"{field}.from",
                    f"is {turn['from']!r}; turns alternate human, gpt, ..., so {expected!r} is expected",
                )
            text = self.text(turn["value"], f"{field}.value")
            if not text.strip():
                raise self.fail(f"{field}.value", "the answer is empty" if i % 2 else "the question is empty")
            turns.append({"from": expected, "value": text})
        if len(turns) % 2:
            raise self.fail("conversations", f"the last of {len(turns)} turns is from 'human' and has no answer")
        return tuple(turns)

    def placeholders(self, turns: Sequence[dict[str, str]], files: Mapping[str, Sequence[str]]) -> None:
        """Every file has its placeholder in a human turn, and the other way round."""
        for i, turn in enumerate(turns):
            if i % 2:
                for placeholder in PLACEHOLDERS.values():
                    if placeholder in turn["value"]:
                        raise self.fail(
                            f"conversations[{i}].value",
                            f"holds {placeholder} in an answer; only questions may",
                            "placeholders",
                        )
        for kind, placeholder in PLACEHOLDERS.items():
            found = sum(turn["value"].count(placeholder) for turn in turns[::2])
            if found != len(files[kind]):
                raise self.fail(
                    kind,
                    f"{len(files[kind])} file(s) but {found} {placeholder} in the questions; write one per file",
                    "placeholders",
                )

    def audio_options(
        self, entry: Mapping[str, Any], num_turns: int, files: Mapping[str, Sequence[str]]
    ) -> tuple[int | None, bool]:
        """(inserted_id, end_tag); the original refuses both beside pictures without audio."""
        inserted_id, end_tag = entry.get("inserted_id"), entry.get("end_tag", True)
        if inserted_id is not None and (type(inserted_id) is not int or not 0 <= inserted_id < num_turns):
            raise self.fail("inserted_id", f"is {inserted_id!r}; expected the index of a turn, 0 to {num_turns - 1}")
        if type(end_tag) is not bool:
            raise self.fail("end_tag", f"is {end_tag!r}; expected true or false")
        if inserted_id is not None and files["audio"] and inserted_id % 2 == 0:
            raise self.fail("inserted_id", f"is {inserted_id}, a question; give the index of its answer")
        if (files["image"] or files["video"]) and not files["audio"]:
            for field in ("inserted_id", "end_tag"):
                if entry.get(field) is not None:
                    raise self.fail(field, "is only meaningful in a record with audio; leave it out")
        return inserted_id, end_tag

    def locate(
        self, kind: str, name: str, key: str | None, root: str | None, folders: Mapping[str, str] | None
    ) -> MediaFile:
        """Finds a file below its root. Nothing outside of the root is ever opened, links included."""
        if folders is not None and key is not None:
            if key not in folders:
                near = difflib.get_close_matches(key, folders, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(folders))}"
                raise self.fail("set", f"{key!r} is not in the folder table; {hint}")
            root = folders[key]
        if root is None:
            raise self.fail(kind, f"{name!r} has no root folder; give --root, or a 'set' of the folder table")
        if "\0" in name:
            raise self.fail(kind, f"{name!r} is not a file name")
        base = Path(root).resolve()
        path = (base / name).resolve()
        if not path.is_relative_to(base):
            raise self.fail(kind, f"{name!r} lies outside of the root folder {base}; refused", "outside root")
        return MediaFile(kind, name, path, key)


@dataclasses.dataclass(frozen=True)
class CheckedRecord:
    """A record whose text is checked and whose files are located but not read yet; `where` names it in messages."""

    where: str
    record: Record
    files: tuple[MediaFile, ...]

    def with_media(self) -> Record:
        """Reads the files. Raises RecordError for a missing, unreadable or empty one."""
        return dataclasses.replace(self.record, media=tuple(read_media(file, self.where) for file in self.files))


def check_record(
    entry: Any,
    root: str | os.PathLike[str] | None,
    *,
    folders: Mapping[str, str] | None = None,
    where: str = "records",
    index: int = 0,
    ignore_fields: Sequence[str] = (),
) -> CheckedRecord:
    """Checks one entry of a records file without touching its media files.

    Args:
      entry: the decoded JSON.
      root: folder that paths are relative to, unless `folders` knows the record's set; None is fine for text.
      folders: {set: root}.
      where: name of the file, for messages.
      index: position in the file, for messages and as id if the record has none.
      ignore_fields: fields outside of the format that are skipped; any other unknown one is an error.

    Raises:
      RecordError: the first thing that is wrong, with its field.
    """
    check, identity = identified(entry, f"{where}: record {index}", index, "conversations")
    check.known_fields(entry, ignore_fields)
    sets = () if entry.get("set") is None else check.texts(entry["set"], "set")
    turns = check.conversations(entry.get("conversations"))
    names = {kind: () if entry.get(kind) is None else check.texts(entry[kind], kind) for kind in PLACEHOLDERS}
    check.placeholders(turns, names)
    inserted_id, end_tag = check.audio_options(entry, len(turns), names)

    pairs = [(kind, name) for kind in PLACEHOLDERS for name in names[kind]]
    if len(set(sets)) > 1 and len(sets) != len(pairs):
        raise check.fail("set", f"{len(sets)} different keys for {len(pairs)} files; give one key, or one per file")
    keys = list(sets) if len(sets) == len(pairs) else [sets[0] if sets else None] * len(pairs)
    base = None if root is None else os.fspath(root)
    files = tuple(check.locate(kind, name, key, base, folders) for (kind, name), key in zip(pairs, keys, strict=True))
    record = Record(id=identity, conversations=turns, set=sets, inserted_id=inserted_id, end_tag=end_tag)
    return CheckedRecord(check.where, record, files)


def identified(entry: Any, where: str, index: int, main_field: str) -> tuple[Checker, str]:
    """The rules for an entry, whose messages name it, and its id; the index is that of a record without one.

    Raises:
      RecordError: the entry is no object, or its id is neither text, nor a number, nor a list of them.
    """
    if not isinstance(entry, dict):
        raise RecordError(where, "", f"is a {json_type(entry)}; expected an object with {main_field!r}")
    identity = entry.get("id", index)
    joined = identity if isinstance(identity, list) and identity else [identity]  # of samples joined to one record
    if any(type(one) not in (str, int) for one in joined):
        raise RecordError(where, "id", f"is a {json_type(identity)}; expected text, a number, or a list of them")
    identity = "+".join(map(str, joined)) if isinstance(identity, list) else identity
    check = Checker(f"{where} (id {identity!r})")
    check.text(str(identity), "id")
    return check, str(identity)


def read_media(file: MediaFile, where: str) -> Media:
    """Reads a located file. Raises RecordError if it is missing, no regular file, unreadable or empty."""
    if not file.path.is_file():
        raise RecordError(where, file.kind, f"no such file: {file.path}", "missing media")
    try:
        data = file.path.read_bytes()
    except OSError as error:
        raise RecordError(where, file.kind, f"{file.path} cannot be read: {error.strerror}", "missing media") from error
    if not data:
        raise RecordError(where, file.kind, f"{file.path} is empty (0 bytes)", "damaged media")
    return Media(file.kind, file.name, data, file.set)


def validate_record(
    entry: Any,
    root: str | os.PathLike[str] | None,
    *,
    folders: Mapping[str, str] | None = None,
    where: str = "records",
    index: int = 0,
    ignore_fields: Sequence[str] = (),
) -> Record:
    """`check_record`, then reads the media; same arguments. Whether a picture decodes is not checked here.

    Raises:
      RecordError: names file, record, field and reason.
    """
    checked = check_record(entry, root, folders=folders, where=where, index=index, ignore_fields=ignore_fields)
    return checked.with_media()


# ---- the stored form ------------------------------------------------------------------------------------------------


def encode_record(record: Record) -> bytes:
    """msgpack; equal records give equal bytes."""
    return msgpack.packb(
        {
            "schema": RECORD_SCHEMA,
            "id": record.id,
            "set": list(record.set),
            "conversations": [{"from": turn["from"], "value": turn["value"]} for turn in record.conversations],
            "media": [{"kind": m.kind, "name": m.name, "bytes": m.data, "set": m.set} for m in record.media],
            "inserted_id": record.inserted_id,
            "end_tag": record.end_tag,
        }
    )


def decode_record(data: bytes) -> Record:
    """Inverse of `encode_record`.

    Raises:
      UserError: not a record, or one of another schema version.
    """
    try:
        fields = msgpack.unpackb(data)
        schema = fields["schema"]
        if schema != RECORD_SCHEMA:
            raise UserError(f"record of schema {schema!r}, this version reads {RECORD_SCHEMA}; build the data again")
        if "pieces" in fields:
            raise UserError("is a document, which only the data sets of Flamingo hold; build conversations")
        return Record(
            id=fields["id"],
            conversations=tuple(fields["conversations"]),
            media=tuple(Media(m["kind"], m["name"], m["bytes"], m["set"]) for m in fields["media"]),
            set=tuple(fields["set"]),
            inserted_id=fields["inserted_id"],
            end_tag=fields["end_tag"],
        )
    except (msgpack.UnpackException, ValueError, TypeError, KeyError) as error:
        raise UserError(f"damaged record ({type(error).__name__}: {error}); build the data again") from error


# ---- the manifest of a folder of stored records ---------------------------------------------------------------------

MANIFEST_NAME = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file: name, number of records, size in bytes, sha256 of its bytes in hexadecimal."""

    name: str
    records: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of records holds and what it was made from.

    Attributes:
      schema: RECORD_SCHEMA of the writer.
      source, source_sha256: the JSON file and the hash of its bytes.
      media_sha256: hash over path, size and modification time of every media file the source names.
      options: everything else that decides the content.
      command: how it was made.
      counts: "records", "rounds", "images", "videos", "audios" (where there are any), "text_only" (records without
        media).
      rejects: rejected records by category; details are in rejects.jsonl.
      shards: the files.
    """

    schema: int
    source: str
    source_sha256: str
    media_sha256: str
    options: dict[str, Any]
    command: str
    counts: dict[str, int]
    rejects: dict[str, int]
    shards: tuple[Shard, ...]

    def to_json(self) -> str:
        """Readable JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


def load_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a folder of records. Raises UserError if there is none, or one of another schema version."""
    path = place(folder) / MANIFEST_NAME
    if not path.is_file():
        raise UserError(
            f"{os.fspath(folder)} holds no records ({MANIFEST_NAME} is missing); "
            "they are made by python -m data_pipelines.build records"
        )
    values = read_json(path, "manifest")
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema != RECORD_SCHEMA:
        raise UserError(f"{path} is of schema {schema!r}, this version reads {RECORD_SCHEMA}; build the data again")
    try:
        return Manifest(**{**values, "shards": tuple(Shard(**shard) for shard in values["shards"])})
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a manifest of this version ({error}); build the data again") from error
