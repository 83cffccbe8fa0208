"""Files with a JSON value a line: read with the place of every line for messages, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vita_jax.errors import UserError
from vita_jax.storage import place, write_whole

ADVICE = "expected UTF-8 with a JSON object a line"


def read_json_lines(path: str | os.PathLike[str], advice: str = ADVICE) -> Iterator[tuple[str, Any]]:
    """("FILE:LINE", value) of every line that is not blank.

    Args:
      advice: what to do about a file that is not there or empty, for messages.

    Raises:
      UserError: the file cannot be read or has no values, or a line is not JSON.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise UserError(f"{name} does not exist; {advice}")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut texts at U+2028, too
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name} cannot be read: {error}") from error
    if not any(map(str.strip, lines)):
        raise UserError(f"{name} is empty; {advice}")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{name}:{number}: not JSON ({error})") from None
        yield f"{name}:{number}", value


def write_json_lines(path: str | os.PathLike[str], values: Iterable[Mapping[str, Any]]) -> None:
    """Raises UserError if the file cannot be written."""
    path = place(path)
    try:
        write_whole(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}; choose another file") from error


def drop_cut_line(path: str | os.PathLike[str]) -> bool:
    """Takes the line that was being written when a program ended off a file of JSON lines.

    Returns:
      Whether there is anything left to read; False for a file that is not there.
    """
    path = Path(path)
    if not path.is_file():
        return False
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    return bool(whole.strip())
