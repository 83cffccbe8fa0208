"""Documents with pictures between their texts: the public JSON format read strictly, and the bytes they are stored as.

A captioned picture is a document of two pieces, a text without pictures one of a single piece. Public format, a JSON
list of objects:
  document: pieces in reading order: a text, or {"image": path} or {"video": path}
  set: optional folder key, looked up in a table of roots, as in `records`; id: optional, for messages
Stored form: msgpack of the same with the media files' bytes inside.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack

from vita_jax.data.interleaved import END_OF_CHUNK, IMAGE
from vita_jax.data.records import (
    PLACEHOLDERS,
    RECORD_SCHEMA,
    Checker,
    Media,
    MediaFile,
    identified,
    json_type,
    read_media,
)
from vita_jax.errors import UserError

MEDIA_KINDS = ("image", "video")
FIELDS = ("set", "id", "document")
# Their place in the text is given by the pieces; written in a text, they would stand for something that is not there.
TAGS = (IMAGE, PLACEHOLDERS["video"], END_OF_CHUNK)


@dataclasses.dataclass(frozen=True)
class DocumentRecord:
    """A checked document with its media.

    Attributes:
      id: for messages only.
      pieces: texts and media in reading order.
    """

    id: str
    pieces: tuple[str | Media, ...]

    @property
    def media(self) -> tuple[Media, ...]:
        """Pictures and videos in reading order."""
        return tuple(piece for piece in self.pieces if isinstance(piece, Media))

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts in reading order."""
        return tuple(piece for piece in self.pieces if isinstance(piece, str))


# ---- the public JSON ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CheckedDocument:
    """A document whose text is checked and whose files are located but not read yet; `where` names it in messages."""

    where: str
    id: str
    pieces: tuple[str | MediaFile, ...]

    @property
    def files(self) -> tuple[MediaFile, ...]:
        """Its media in reading order."""
        return tuple(piece for piece in self.pieces if isinstance(piece, MediaFile))

    def with_media(self) -> DocumentRecord:
        """Reads the files. Raises RecordError for a missing, unreadable or empty one."""
        pieces = (read_media(p, self.where) if isinstance(p, MediaFile) else p for p in self.pieces)
        return DocumentRecord(self.id, tuple(pieces))


def check_document(
    entry: Any,
    root: str | os.PathLike[str] | None,
    *,
    folders: Mapping[str, str] | None = None,
    where: str = "documents",
    index: int = 0,
    ignore_fields: Sequence[str] = (),
) -> CheckedDocument:
    """Checks one entry of a file of documents without touching its media; arguments as for `records.check_record`.

    Raises:
      RecordError: the first thing that is wrong, with its field.
    """
    check, identity = identified(entry, f"{where}: record {index}", index, "document")
    check.known_fields(entry, ignore_fields, FIELDS)
    key = None if entry.get("set") is None else check.text(entry["set"], "set")
    found = entry.get("document")
    if not isinstance(found, list) or not found:
        raise check.fail("document", "must be a non-empty list of pieces: texts, and {'image': path}")
    base = None if root is None else os.fspath(root)
    pieces = tuple(_piece(check, piece, f"document[{i}]", key, base, folders) for i, piece in enumerate(found))
    return CheckedDocument(check.where, identity, pieces)


def _piece(
    check: Checker, piece: Any, field: str, key: str | None, root: str | None, folders: Mapping[str, str] | None
) -> str | MediaFile:
    if isinstance(piece, str):
        text = check.text(piece, field)
        if not text.strip():
            raise check.fail(field, "is an empty text; leave the piece out")
        for tag in TAGS:
            if tag in text:
                raise check.fail(field, f"holds {tag}; media are pieces of their own, and tags are put in", "tags")
        return text
    if not isinstance(piece, dict) or len(piece) != 1 or next(iter(piece)) not in MEDIA_KINDS:
        what = sorted(piece) if isinstance(piece, dict) else f"a {json_type(piece)}"
        raise check.fail(field, f"must be a text, or an object with 'image' or 'video' and no other field, got {what}")
    ((kind, name),) = piece.items()
    if not check.text(name, f"{field}.{kind}"):
        raise check.fail(f"{field}.{kind}", "is empty; give a path")
    return check.locate(kind, name, key, root, folders)


# ---- the stored form ------------------------------------------------------------------------------------------------


def encode_document(document: DocumentRecord) -> bytes:
    """msgpack; equal documents give equal bytes."""
    return msgpack.packb(
        {
            "schema": RECORD_SCHEMA,
            "id": document.id,
            "pieces": [
                piece
                if isinstance(piece, str)
                else {"kind": piece.kind, "name": piece.name, "bytes": piece.data, "set": piece.set}
                for piece in document.pieces
            ],
        }
    )


def decode_document(data: bytes) -> DocumentRecord:
    """Inverse of `encode_document`.

    Raises:
      UserError: not a document, or one of another schema version.
    """
    try:
        fields = msgpack.unpackb(data)
        if fields["schema"] != RECORD_SCHEMA:
            raise UserError(
                f"document of schema {fields['schema']!r}, this version reads {RECORD_SCHEMA}; build the data again"
            )
        if "conversations" in fields:
            raise UserError("is a conversation; Flamingo's data sets hold documents (build records --layout documents)")
        pieces = (
            piece if isinstance(piece, str) else Media(piece["kind"], piece["name"], piece["bytes"], piece["set"])
            for piece in fields["pieces"]
        )
        return DocumentRecord(fields["id"], tuple(pieces))
    except (msgpack.UnpackException, ValueError, TypeError, KeyError) as error:
        raise UserError(f"damaged document ({type(error).__name__}: {error}); build the data again") from error
