"""Reading and writing the safetensors files of published checkpoints: one file, or shards with an index.

The layout of a folder is the usual one: `model.safetensors`, or `model-00001-of-00003.safetensors` and so on with
`model.safetensors.index.json`, whose `weight_map` gives the file of every tensor.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vita_jax.errors import UserError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 5 * 10**9
# Tensors of a shard that are held in memory; the header of a larger shard, with its length in front; and what a tensor
# takes of it at most, beside its name.
HELD_BYTES, HEADER_BYTES, LENGTH_BYTES, ENTRY_BYTES = 64 << 20, 1 << 20, 8, 160


# How the header of a safetensors file spells the types of the arrays they are read as.
DTYPE_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
DTYPE_CODES = {name: code for code, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Shape, dtype by name, and file of a tensor."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


class TensorSource(Protocol):
    """Files of tensors as a mapping from torch name to array, that also tells shapes without reading tensors."""

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads one tensor."""

    def __iter__(self) -> Iterator[str]:
        """Names."""

    def __len__(self) -> int:
        """Number of tensors."""

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of that name."""

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and file of one tensor."""


class TensorFiles(Mapping[str, np.ndarray]):
    """A checkpoint on disk as a mapping from torch name to array. Every look-up reads that one tensor.

    Args:
      path: a safetensors file, an index file, or a folder with either of them.

    Raises:
      UserError: nothing there, a file that is truncated or not safetensors, or an index that does not match its shards.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self._files: dict[Path, Any] = {}
        self._location: dict[str, Path] = {}
        index = path / INDEX_NAME if path.is_dir() else path
        if index.suffix == ".json" and index.is_file():
            self._read_index(index)
        elif path.is_file() or (path / SINGLE_NAME).is_file():
            self._open(path if path.is_file() else path / SINGLE_NAME)
        else:
            raise UserError(f"{path}: no {SINGLE_NAME}, no {INDEX_NAME} and not a safetensors file")

    def _open(self, file: Path) -> None:
        self._files[file] = _open_safetensors(file)
        self._location.update(dict.fromkeys(self._files[file].keys(), file))

    def _read_index(self, index: Path) -> None:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            listed = {str(name): index.parent / file for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not an index of safetensors shards ({error!r})") from error
        for file in sorted(set(listed.values())):
            if not file.is_file():
                raise UserError(f"{index}: names the shard {file.name}, which is not there; the download is incomplete")
            self._open(file)
        wrong = sorted(name for name, file in listed.items() if self._location.get(name) != file)
        unlisted = sorted(set(self._location) - set(listed))
        if wrong or unlisted:
            raise UserError(f"{index}: does not match its shards, first at tensor {(wrong + unlisted)[0]!r}")

    def __getitem__(self, name: str) -> np.ndarray:
        file = self._location[name]
        try:
            return self._files[file].get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{file}: tensor {name!r} cannot be read: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._location)

    def __len__(self) -> int:
        return len(self._location)

    def __contains__(self, name: object) -> bool:
        return name in self._location

    def info(self, name: str) -> TensorInfo:
        """What the header says about a tensor, which is not read."""
        file = self._location[name]
        header = self._files[file].get_slice(name)
        return TensorInfo(tuple(header.get_shape()), DTYPE_NAMES.get(header.get_dtype(), header.get_dtype()), file)


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a complete safetensors file ({error}); copy or download it again") from error


def write_tensors(
    folder: str | Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes tensors as they come, holding no more than one of them, and `HELD_BYTES` of small ones, in memory.

    Args:
      folder: created if needed; files of an earlier checkpoint in it are an error.
      tensors: (torch name, array) pairs.
      max_shard_bytes: a shard is closed before it would grow beyond this; a single larger tensor gets its own shard.
      metadata: strings for the header of every file; `format: pt` is added, as readers of these files expect.

    Returns:
      The files written; more than one come with an index.

    Raises:
      UserError: the folder already holds a checkpoint, the disk is full, a name comes twice, or there is no tensor at
        all.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    existing = sorted(path.name for path in folder.glob("*.safetensors*"))
    if existing:
        raise UserError(f"{folder} already holds {existing[0]}; choose an empty folder")
    header = {"format": "pt", **(metadata or {})}
    shards: list[_Shard] = []
    seen: set[str] = set()
    for name, array in tensors:
        if name in seen:
            raise UserError(f"tensor {name!r} was given twice")
        seen.add(name)
        if not shards or not shards[-1].takes(name, array, max_shard_bytes):
            if shards:
                shards[-1].close()
            shards.append(_Shard(folder / f".shard-{len(shards):05d}.part", header))
        shards[-1].add(name, array)
    if not shards:
        raise UserError(f"{folder}: no tensor to write")
    shards[-1].close()
    files = _final_names(folder, len(shards))
    for shard, file in zip(shards, files, strict=True):
        shard.path.rename(file)
    if len(files) > 1:
        weight_map = {name: file.name for file, shard in zip(files, shards, strict=True) for name in shard.names}
        index = {"metadata": {"total_size": sum(shard.size for shard in shards)}}
        index["weight_map"] = dict(sorted(weight_map.items()))
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


class _Shard:
    """One file: small tensors are held and written by the library at the end; a shard of more than `HELD_BYTES` is
    written tensor by tensor behind a header of `HEADER_BYTES`, which the format lets be filled up with spaces.

    `add` and `close` raise UserError where the disk does not take it.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self.path, self.size = path, 0
        self.names: list[str] = []
        self._metadata, self._file = dict(metadata), None
        self._held: dict[str, np.ndarray] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        self._written = 0
        # At most, once everything given so far is in it.
        self._header_bytes = LENGTH_BYTES + ENTRY_BYTES + len(json.dumps(self._metadata))

    def takes(self, name: str, array: np.ndarray, max_bytes: int) -> bool:
        """Whether there is room for one more, and it would lie where its dtype may."""
        room = self.size + array.nbytes <= max_bytes
        header = self._header_bytes + _entry_bytes(name) <= HEADER_BYTES
        # What is held is put in order before it is written.
        aligned = self._file is None or self.size % array.itemsize == 0
        return not self.names or (room and header and aligned)

    def add(self, name: str, array: np.ndarray) -> None:
        """Holds or writes a tensor."""
        array = np.asarray(array, order="C")  # what is written is the buffer as it lies in memory
        self.names.append(name)
        self.size += array.nbytes
        self._header_bytes += _entry_bytes(name)
        self._held[name] = array
        if self._file is not None or self.size > HELD_BYTES:
            with _writing(self.path):
                self._flush()

    def _flush(self) -> None:
        if self._file is None:
            if self._header_bytes > HEADER_BYTES:
                raise UserError(f"{self.path.parent}: names or metadata of the tensors need over {HEADER_BYTES} bytes")
            self._file = self.path.open("wb")
            self._file.write(bytes(HEADER_BYTES))
        # Wide types first, so that each lies at a multiple of its size.
        for name, array in sorted(self._held.items(), key=lambda item: -item[1].itemsize):
            self._file.write(memoryview(array.reshape(-1).view(np.uint8)))
            offsets = [self._written, self._written + array.nbytes]
            code = DTYPE_CODES[array.dtype.name]
            self._entries[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": offsets}
            self._written = offsets[1]
        self._held = {}

    def close(self) -> None:
        """Finishes the file."""
        with _writing(self.path):
            if self._file is None:
                save_file(self._held, self.path, metadata=self._metadata)
                self._held = {}
                return
            header = json.dumps({"__metadata__": self._metadata, **self._entries}).encode("utf-8")
            room = HEADER_BYTES - LENGTH_BYTES
            with self._file as file:
                file.seek(0)
                file.write(room.to_bytes(LENGTH_BYTES, "little") + header.ljust(room))


def _entry_bytes(name: str) -> int:
    """What a tensor takes of a header at most."""
    return ENTRY_BYTES + len(json.dumps(name))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path.parent}: a file of weights cannot be written: {error}") from error


def _final_names(folder: Path, count: int) -> list[Path]:
    if count == 1:
        return [folder / SINGLE_NAME]
    return [folder / f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
