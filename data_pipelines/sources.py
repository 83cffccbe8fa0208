"""Where records come from: files in a public format, or in a layout that chats or documents are published in."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.chat_layouts import CHAT_LAYOUTS, public_record
from data_pipelines.document_layouts import DOCUMENT_LAYOUTS, public_document
from data_pipelines.parts import file_state
from vita_jax.data.documents import CheckedDocument, check_document
from vita_jax.data.records import CheckedRecord, RecordError, check_record, read_json_records
from vita_jax.errors import UserError

LINES_SUFFIXES = (".jsonl", ".ndjson")
SOURCE_LAYOUTS = ("vita", *CHAT_LAYOUTS, *DOCUMENT_LAYOUTS)


def file_sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class RecordsFile:
    """A JSON list of records, or a record a line in a .jsonl file, which is never held in memory as a whole.

    Attributes:
      path: the file, UTF-8.
      root: folder that media paths are relative to; None if `folders` covers everything, or for text.
      folders: {set: root} for records that name a set.
      ignore_fields: fields outside of the format to skip; other unknown fields reject their record.
      layout: "vita" for the public format of conversations, one of `chat_layouts.CHAT_LAYOUTS`; or for documents one of
        `document_layouts.DOCUMENT_LAYOUTS`.
    """

    path: str | os.PathLike[str]
    root: str | os.PathLike[str] | None = None
    folders: Mapping[str, str] | None = None
    ignore_fields: Sequence[str] = ()
    layout: str = "vita"

    def __post_init__(self) -> None:
        if self.layout not in SOURCE_LAYOUTS:
            raise UserError(f"layout {self.layout!r} is unknown; use one of {', '.join(SOURCE_LAYOUTS)}")

    @property
    def name(self) -> str:
        """For messages."""
        return Path(self.path).name

    def check(self) -> None:
        """Raises UserError if the root is no folder."""
        if self.root is not None and not Path(self.root).is_dir():
            raise UserError(f"root {self.root} is not a folder; it is where the media paths of {self.path} start")

    def options(self) -> dict[str, Any]:
        """What decides the records, beside the bytes of the file."""
        return {
            "root": None if self.root is None else str(Path(self.root).resolve()),
            "folders": {key: str(Path(value).resolve()) for key, value in sorted((self.folders or {}).items())},
            "ignore_fields": sorted(self.ignore_fields),
            "layout": self.layout,
        }

    def sha256(self) -> str:
        """Of the file. Raises UserError if it cannot be read."""
        try:
            return file_sha256(Path(self.path))
        except OSError as error:
            raise UserError(f"records file {self.path} cannot be read: {error.strerror}") from error

    def entries(self) -> Iterator[dict[str, Any]]:
        """{"record": JSON value} in order, or {"error": reason} for a line that is no JSON.

        Raises:
          UserError: the file cannot be read, holds no JSON list, or nothing.
        """
        if Path(self.path).suffix not in LINES_SUFFIXES:
            yield from ({"record": entry} for entry in read_json_records(self.path))
            return
        empty = True
        try:
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        empty = False
                        yield _line_entry(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, number)
        except OSError as error:
            raise UserError(f"records file {self.path} cannot be read: {error.strerror}") from error
        if empty:
            raise UserError(f"records file {self.path} is empty; expected a JSON object a line")

    def checked(self, entry: dict[str, Any], place: int) -> CheckedRecord | CheckedDocument:
        """The record, or document, of an entry, its media not read yet. Raises RecordError."""
        rules = {"folders": self.folders, "ignore_fields": self.ignore_fields}
        check = check_document if self.layout in DOCUMENT_LAYOUTS else check_record
        return check(self.public(entry, place), self.root, where=self.name, index=place, **rules)

    def public(self, entry: dict[str, Any], place: int) -> Any:
        """What an entry says in the public format, not checked yet. Raises RecordError for what cannot be read."""
        where = f"{self.name}: record {place}"
        if "error" in entry:
            raise RecordError(where, "", entry["error"])
        record = entry["record"]
        if self.layout in DOCUMENT_LAYOUTS:
            root = None if self.root is None else os.fspath(self.root)
            return public_document(record, self.layout, where, root, self.folders)
        return record if self.layout == "vita" else public_record(record, self.layout, where)

    def state(self, entry: dict[str, Any], place: int) -> str:
        """Path, size and time of change of an entry's media, a line each; "" for a record that cannot be used."""
        try:
            files = self.checked(entry, place).files
        except RecordError:
            return ""
        return "".join(file_state(file.path) for file in files)

    def identity(self, entry: dict[str, Any]) -> str | int | None:
        """The id that a record gives itself."""
        record = entry.get("record")
        identity = record.get("id") if isinstance(record, dict) else None
        return identity if isinstance(identity, (str, int)) else None


def _line_entry(line: bytes, number: int) -> dict[str, Any]:
    try:
        return {"record": json.loads(line.rstrip(b"\r\n").decode("utf-8"))}
    except UnicodeDecodeError as error:
        return {"error": f"line {number} is not UTF-8 (byte {error.start}); save it as UTF-8"}
    except json.JSONDecodeError as error:
        return {"error": f"line {number} is not valid JSON: column {error.colno}: {error.msg}"}
    except RecursionError:
        return {"error": f"line {number} is nested too deeply to be a record"}
