"""Manifests of recordings: a JSON object a line, {"id": ..., "audio": path, "text": ...}; paths start from its folder.

Corpora have up to 10^8 lines. `Manifest` remembers where lines begin, 8 bytes of memory each, and reads those it is
asked for; `read_manifest` reads a small one as a whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vita_jax.data.records import RecordError
from vita_jax.errors import UserError
from vita_jax.storage import on_disk

MANIFEST = "manifest.jsonl"
CODEC_FILE = "codec.json"  # beside a manifest with codes: whose they are
BLOCK_BYTES = 64 << 20  # that are searched for line ends at a time
BLANK_BYTES = 64  # longer lines are not blank
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class SpokenText:
    """One line of a manifest: `place` names it in messages; `codes` (t,) are the codec's tokens of it, or None
    (`data_pipelines.codes`).
    """

    place: str
    audio: Path
    text: str
    codes: np.ndarray | None = None


def manifest_file(path: str | Path) -> Path:
    """A manifest, given itself or by its folder."""
    path = on_disk(path, "a manifest with its recordings")
    return path / MANIFEST if path.is_dir() else path


class Manifest:
    """The lines of a manifest, or of the `manifest.jsonl` in a folder, read one by one.

    Raises:
      UserError: it cannot be read, or is empty.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = manifest_file(path)
        try:
            with self.path.open("rb") as file:
                self._ends, self._numbers = _lines(file)
        except OSError as error:
            raise UserError(f"speech manifest {self.path} cannot be read: {error}") from None
        if not len(self._numbers):
            raise UserError(f"speech manifest {self.path} is empty; there is nothing to train on")
        self._file: int | None = None

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> SpokenText:
        """One line.

        Raises:
          RecordError: it is not an object with `audio` and `text`, or its `codes` are no list of numbers from 0 on.
          IndexError: there are not so many.
        """
        number = int(self._numbers[index])
        place = f"{self.path}, line {number + 1}"
        try:
            entry = json.loads(self.line(index))
            audio, text = entry["audio"], entry["text"]
        except (ValueError, KeyError, TypeError):  # no UTF-8, no JSON, no object
            audio = text = None
        if not isinstance(audio, str) or not isinstance(text, str):
            raise RecordError(place, "", 'expected a JSON object with "audio" and "text", both text', "malformed line")
        return SpokenText(place, self.path.parent / audio, text, _codes(entry.get("codes"), place))

    def __iter__(self) -> Iterator[SpokenText]:
        return (self[index] for index in range(len(self)))

    def line(self, index: int) -> bytes:
        """A line as it is written."""
        number = int(self._numbers[index])
        start = int(self._ends[number - 1]) + 1 if number else 0
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        line = os.pread(self._file, int(self._ends[number]) - start, start)  # threads may read at the same time
        return line if number else line.removeprefix(BYTE_ORDER_MARK)

    def __reduce__(self) -> tuple[type[Manifest], tuple[Path]]:
        """Sent to another process by its name: opening it there costs less than sending the places of all lines."""
        return Manifest, (self.path,)

    def __del__(self) -> None:
        file, self._file = getattr(self, "_file", None), None
        if file is not None:
            os.close(file)


def read_manifest(path: str | Path) -> list[SpokenText]:
    """All lines of a manifest.

    Raises:
      UserError: as `Manifest`, or what is wrong with the first line that cannot be used.
    """
    try:
        return list(Manifest(path))
    except RecordError as error:
        raise UserError(str(error)) from None


def has_codes(manifest: Manifest) -> bool:
    """Whether its first line has the codec's tokens; a line that cannot be used has none."""
    try:
        return manifest[0].codes is not None
    except RecordError:
        return False


def _lines(file: Any) -> tuple[np.ndarray, np.ndarray]:
    """Of a file: where every line ends (n,) int64, and the numbers of those that are not blank (m,), from 0."""
    ends, start, short = [], 0, []
    while block := file.read(BLOCK_BYTES):
        ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + start)
        start += len(block)
    places = np.concatenate([*ends, [start]]).astype(np.int64)  # the last line need not end
    begins = np.concatenate([[0], places[:-1] + 1])
    used = np.ones(len(places), bool)
    short = np.flatnonzero(places - begins <= BLANK_BYTES)
    for number in short:
        file.seek(begins[number])
        used[number] = bool(file.read(places[number] - begins[number]).removeprefix(BYTE_ORDER_MARK).strip())
    return places, np.flatnonzero(used)


def _codes(values: Any, place: str) -> np.ndarray | None:
    if values is None:
        return None
    if not isinstance(values, list) or not values or any(type(value) is not int or value < 0 for value in values):
        raise RecordError(place, "codes", "must be a list of numbers from 0 on", "malformed line")
    return np.asarray(values, np.min_scalar_type(max(values)))
