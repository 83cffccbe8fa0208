"""Files on a disk, or on Google's object storage: `gs://BUCKET/RUN` as the place of a run or of data.

`place` gives a `pathlib.Path` for a disk and an `etils.epath` path for a bucket, which has most of its methods. What a
bucket has not is done in another way by the functions below: objects are written whole and never appended to, folders
are what names have in common, and a path is absolute as it is.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from vita_jax.errors import UserError

BUCKETS = "gs://"


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether the path is in a bucket."""
    return os.fspath(path).startswith(BUCKETS)


def place(path: str | os.PathLike[str]) -> Path:
    """The path, on a disk or in a bucket.

    Raises:
      UserError: a store that is not supported, or what reads buckets is not installed.
    """
    text = os.fspath(path)
    if is_remote(text):
        if not _has_driver():
            raise UserError(f"{text}: buckets need a package that is not installed: pip install 'vita_jax[gcs]'")
        return epath.Path(text)
    scheme, found, _ = text.partition("://")
    if found and scheme.isalnum():
        raise UserError(f"{text}: {scheme}:// is not supported; use a disk, or a bucket of Google's ({BUCKETS}BUCKET)")
    return Path(path)


@functools.cache
def _has_driver() -> bool:
    return any(importlib.util.find_spec(name) for name in ("gcsfs", "tensorflow"))


def on_disk(path: str | os.PathLike[str], what: str) -> Path:
    """The path, for what is read or written on disks only.

    Args:
      what: is there, for the message.

    Raises:
      UserError: it is in a bucket.
    """
    if is_remote(path):
        raise UserError(f"{os.fspath(path)}: {what} has to be on a disk; copy it from or to the bucket")
    return place(path)


def absolute(path: Path) -> Path:
    """The path whatever folder a process is in."""
    return path if is_remote(path) else path.absolute()


def resolved(path: Path) -> Path:
    """The same for two paths to one file."""
    return path if is_remote(path) else path.resolve()


def size_of(file: Path) -> int:
    """Bytes of a file."""
    return file.stat().length if is_remote(file) else file.stat().st_size


def write_whole(file: Path, content: str | bytes) -> None:
    """Writes a file of which a reader never sees a half, and its folder if needed."""
    data = content.encode() if isinstance(content, str) else content
    file.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(file):
        file.write_bytes(data)
        return
    partial = file.with_name(file.name + ".partial")
    partial.write_bytes(data)
    partial.replace(file)


def append(file: Path, text: str) -> None:
    """Adds text to a file. In a bucket all of it is written again, so this is for what happens rarely."""
    if is_remote(file):
        write_whole(file, (file.read_text(encoding="utf-8") if file.exists() else "") + text)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as opened:
        opened.write(text)


def files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder and its folders, in the order of their names."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from files_below(path)
        else:
            yield path


def remove_folder(folder: Path) -> None:
    """Removes a folder with all that is in it."""
    folder.rmtree() if is_remote(folder) else shutil.rmtree(folder)


class Scratch:
    """A folder on a disk for what is only written there: `target` itself, or a temporary one that `send` uploads."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._temporary = tempfile.TemporaryDirectory() if is_remote(target) else None
        self._sent: dict[Path, tuple[int, int]] = {}
        self.folder = target if self._temporary is None else Path(self._temporary.name)

    def send(self) -> None:
        """Brings the bucket up to date with the files that have changed; on a disk there is nothing to do."""
        if self._temporary is None:
            return
        for file in files_below(self.folder):
            stat = file.stat()
            if self._sent.get(file) != (stat.st_mtime_ns, stat.st_size):
                write_whole(self._target.joinpath(*file.relative_to(self.folder).parts), file.read_bytes())
                self._sent[file] = (stat.st_mtime_ns, stat.st_size)

    def close(self) -> None:
        """Sends what is new, and removes the temporary folder, whether or not that went well."""
        if self._temporary is not None:
            try:
                self.send()
            finally:
                self._temporary.cleanup()
