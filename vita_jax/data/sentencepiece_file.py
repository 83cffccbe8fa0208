"""The pieces inside a sentencepiece model file: read, and appended to.

The library runs models but neither tells the kind of every piece nor changes one. Its files are protocol buffers
(`sentencepiece_model.proto`), of which this module knows a few fields:

    ModelProto      1 pieces (repeated SentencePiece), 2 trainer_spec, 3 normalizer_spec
    SentencePiece   1 piece (text), 2 score (float), 3 type
    TrainerSpec     3 model_type, 4 vocab_size
    NormalizerSpec  2 precompiled_charsmap, 3 add_dummy_prefix, 4 remove_extra_whitespaces, 5 escape_whitespaces

Everything else stays as it is, byte for byte: in this format what is appended to a file is added to its lists.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vita_jax.errors import UserError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BPE = 2  # of TrainerSpec.model_type; a file that does not say is a unigram model (1)


class PieceType(enum.IntEnum):
    """What a piece is; USER_DEFINED ones are found in text before anything else."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One entry; its id is its place. In a byte-pair model the pair with the highest score is joined first."""

    text: str
    score: float = 0.0
    type: PieceType = PieceType.NORMAL


def read_pieces(proto: bytes, name: str) -> list[Piece]:
    """All pieces in the order of their ids.

    Args:
      proto: content of a model file.
      name: of the file, for messages.

    Raises:
      UserError: the bytes are no sentencepiece model.
    """
    try:
        return [_read_piece(value) for field, value in _fields(proto) if field == 1]
    except (ValueError, struct.error, TypeError, AttributeError) as error:
        raise UserError(f"{name} is not a sentencepiece model ({error}); give a tokenizer.model") from None


def is_byte_pair(proto: bytes) -> bool:
    """Whether the model joins pairs (BPE); others choose the likeliest pieces as a whole. `proto` is a model's."""
    kinds = [kind for field, spec in _fields(proto) if field == 2 for number, kind in _fields(spec) if number == 3]
    return bool(kinds) and kinds[-1] == _BPE


def keeps_text(proto: bytes) -> bool:
    """Whether the model changes nothing of a text but its spaces, each to a mark, and puts one mark in front."""
    found: dict[int, int | bytes] = {2: b"", 3: 1, 4: 1, 5: 1}  # what holds where the file does not say
    for field, spec in _fields(proto):
        if field == 3:
            found.update(_fields(spec))
    return not found[2] and bool(found[3]) and not found[4] and bool(found[5])


def append_pieces(proto: bytes, pieces: Iterable[Piece], total: int) -> bytes:
    """The model with pieces behind all that it has.

    Args:
      proto: content of a model file.
      pieces: the new ones.
      total: how many pieces the result has, noted in its trainer's fields.
    """
    added = b"".join(_bytes_field(1, _write_piece(piece)) for piece in pieces)
    return proto + added + _bytes_field(2, _varint(4 << 3 | _VARINT) + _varint(total))


def _read_piece(message: bytes) -> Piece:
    text, score, kind = "", 0.0, PieceType.NORMAL
    for field, value in _fields(message):
        if field == 1:
            text = value.decode("utf-8")
        elif field == 2:
            (score,) = struct.unpack("<f", value)
        elif field == 3:
            kind = PieceType(value)
    return Piece(text, score, kind)


def _write_piece(piece: Piece) -> bytes:
    score = _varint(2 << 3 | _FIXED32) + struct.pack("<f", piece.score)
    return _bytes_field(1, piece.text.encode("utf-8")) + score + _varint(3 << 3 | _VARINT) + _varint(piece.type)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of every field; numbers as int, all else as bytes. Raises ValueError for bytes that end early."""
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = _read_varint(message, at)
        else:
            if wire == _BYTES:
                size, at = _read_varint(message, at)
            elif wire in (_FIXED32, _FIXED64):
                size = 4 if wire == _FIXED32 else 8
            else:
                raise ValueError(f"unknown field type {wire} at byte {at}")
            value, at = message[at : at + size], at + size
        if at > len(message):
            raise ValueError("it ends in the middle of a field")
        yield key >> 3, value


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        value, at, shift = value | (byte & 0x7F) << shift, at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("it ends in the middle of a number")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _bytes_field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content
